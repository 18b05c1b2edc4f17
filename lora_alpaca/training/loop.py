"""The loop of a run: step after step, and in between what is due: validation, checkpoints, and the end.

What is due follows from the state alone, so a resumed run does what the run before it was about to do.
"""

import time
from contextlib import nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import checkpoint as checkpoints
from lora_alpaca.data.sampler import Sampler
from lora_alpaca.errors import RankError, TrainingError
from lora_alpaca.models import memory
from lora_alpaca.planning.budget import PASSES
from lora_alpaca.planning.plan import Plan
from lora_alpaca.signals import Interrupted, StepAbandoned
from lora_alpaca.training.budget.countdown import Countdown
from lora_alpaca.training.budget.pacing import Pacing
from lora_alpaca.training.checkpointing import Checkpoints
from lora_alpaca.training.job import Job
from lora_alpaca.training.progress import Limits, Progress
from lora_alpaca.training.report.run_report import RunReport
from lora_alpaca.training.state import TrainState
from lora_alpaca.training.step import Evaluation, ShortageError, Step, Stepper
from lora_alpaca.training.trackers import Tracker

MOST_FAILED_SAVES = 3  # in a row
MOST_OVERFLOWS = 50  # of fp16, in a row; a few are how the loss scale is found
MOST_SKIPPED = 10  # steps of a run under --on_nonfinite skip


class Loop:
    """A run from its state to the end of its plan. `record` is that of the run."""

    def __init__(
        self,
        job: Job,
        plan: Plan,
        stepper: Stepper,
        saver: Checkpoints,
        output_dir: Path,
        record: dict[str, Any],
        state: TrainState,
        progress: Progress,
        tracker: Tracker,
        report: RunReport,
        countdown: Countdown,
    ):
        self.config, self.train, self.validation = job.config, job.train, job.validation
        self.plan, self.stepper, self.saver, self.output_dir, self.record = plan, stepper, saver, output_dir, record
        self.state, self.progress, self.tracker, self.report = state, progress, tracker, report
        self.world, self.stop, self.countdown = stepper.world, stepper.world.stop, countdown
        config = self.config
        self.sampler = Sampler(self.train.lengths, config.batch_size, config.seed, config.group_by_length)
        self.pacing = Pacing(job, plan, self.sampler, countdown, state, progress.log)
        self.unlogged: tuple[float, float, float] | None = None  # rate, gradient norm and speed of the last step
        self.begun = time.perf_counter() - state.seconds
        self.window_begun, self.window_tokens = time.perf_counter(), 0
        self.saved = state.step  # the step of the newest checkpoint
        self.failed_saves = 0

    def run(self) -> None:
        """Train to the end, or to where the validation loss no longer falls.

        Raises Interrupted after a signal, RankError where another process failed, and TrainingError for what training
        cannot continue from. The state of the last finished step is saved before, but where all ranks save together
        and one of them no longer takes part.
        """
        state, plan, alone = self.state, self.plan, not self.saver.together
        limits = Limits(self.countdown.meter.left, self.countdown.meter.spent)
        self.progress.start(plan.total_steps, state.step, self.config.batch_size, limits)
        self._rotate()  # the run before may have ended between a save and this
        if not alone:
            self.stop.lengthen_grace()  # a step that one rank gives up is lost for all
        try:
            while True:
                self.pacing.look()
                if self.unlogged and self.pacing.is_at_end():
                    self._log(*self.unlogged)
                if self._validation_is_due():
                    self.report.validated(state, self._validate())
                    continue  # the time is another one now
                if self.pacing.is_at_end() or self._should_stop_early():
                    return
                if self._checkpoint_is_due():
                    self._save()
                    self._check_saves()
                if asked := self._signal():
                    raise Interrupted(asked, self._saved_before_leaving())
                self._report()
                self._step()
        except StepAbandoned:
            raise Interrupted(self.stop.asked, self._saved_before_leaving(alone)) from None
        except RankError as error:
            raise RankError(error.rank, error.cause, self._saved_before_leaving(alone)) from None
        except ShortageError as error:
            raise TrainingError(f"{error}; {self._saved_before_leaving(alone)}") from None
        except TrainingError as error:
            raise TrainingError(f"{error}; {self._saved_before_leaving()}") from None
        except RuntimeError as error:
            if failed := self.world.failed_rank(error):  # in a collective call of FSDP2's own
                raise RankError(*failed, self._saved_before_leaving(alone)) from None
            raise
        finally:
            self.progress.stop()

    def _signal(self) -> int:
        """Return the signal that asked the run to stop, 0 for none; of any rank, where all ranks save together."""
        return int(self.world.largest(self.stop.asked)) if self.saver.together else self.stop.asked

    def _report(self) -> None:
        """Let the report measure and draw; what it measures before the first step, it measures after the last one."""
        timing = self.countdown.timing("report") if self.state.step == 0 else nullcontext()
        with self.progress.stage("report", self.report.rows), timing:
            self.report.update(self.state, self.saved)

    # ------------------------------------------------------------------------------------------------------ steps

    def _step(self) -> None:
        config, state = self.config, self.state
        rows = self.sampler.rows(state.step)
        rate = self.pacing.rate()
        self.world.seed(config.seed, state.step)
        with self.progress.next_step(), self.countdown.counting():
            step = self.stepper.step([self.train[row] for row in rows], rate)
        self._record_batch_size()
        if not step.finite:
            self._skip(step, rows)
        self.pacing.note_step(rate)
        state.step += 1
        if step.finite:
            state.window_loss += step.loss * step.labels
            state.window_labels += step.labels
        state.seconds = time.perf_counter() - self.begun
        self.window_tokens += step.tokens
        speed = self.window_tokens / max(1e-9, time.perf_counter() - self.window_begun)
        self.progress.step(state.step, self.plan.total_steps, state.mean_loss(), speed)
        self._count_overflows(step)
        self.unlogged = rate, step.grad_norm, speed
        if state.step == 1 and not len(self.validation):
            self._expect(1 / speed, "the first step")
        if state.step % config.logging_steps == 0:
            self._log(*self.unlogged)

    def _expect(self, per_token: float, basis: str) -> None:
        """Say what the run will take; one with a budget says what fits into that."""
        if not self.countdown.is_limited:
            self.progress.log(self.countdown.expectation(self.plan.total_steps, per_token, basis))

    def _log(self, rate: float, grad_norm: float, speed: float) -> None:
        state, loss, self.unlogged = self.state, self.state.mean_loss(), None
        figures = {"loss": loss, "learning_rate": rate, "grad_norm": grad_norm, "tokens_per_second": speed}
        figures["memory"] = memory.in_use(self.world.device)
        self.progress.interval(loss, rate, speed)
        state.history.append({"step": state.step, **figures})
        self.tracker.track(figures, state.step)
        state.window_loss, state.window_labels = 0.0, 0
        self.window_begun, self.window_tokens = time.perf_counter(), 0

    def _skip(self, step: Step, rows: list[int]) -> None:
        """Report what is not finite, and where; TrainingError unless such steps are to be skipped, and few."""
        number = self.state.step + 1
        indices = self.stepper.not_finite([self.train[row] for row in rows])
        named = [rows[index] + 1 for index in indices] or [row + 1 for row in rows]
        shown = ", ".join(map(str, named[:8])) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        what = (
            f"step {number}: the loss is {step.loss} and the gradient norm {step.grad_norm} (training rows {shown}, "
            f"{'each alone' if indices else 'together'}); nothing was changed by it"
        )
        self.state.skipped += 1
        if self.config.on_nonfinite == "stop":
            raise TrainingError(
                f"{what}. Lower --learning_rate, try --dtype fp32 or --load_8bit False, or say --on_nonfinite skip"
            )
        if self.state.skipped > MOST_SKIPPED:
            raise TrainingError(f"{what}. That is the {self.state.skipped}th such step, and --on_nonfinite skip ends")
        self.progress.log(f"{what} (--on_nonfinite skip)")

    def _count_overflows(self, step: Step) -> None:
        self.state.overflows = self.state.overflows + 1 if step.overflow else 0
        if step.overflow:
            self.progress.log(f"step {self.state.step}: the gradients overflow fp16; the loss scale is lowered")
        if self.state.overflows >= MOST_OVERFLOWS:
            raise TrainingError(
                f"step {self.state.step}: the gradients overflowed fp16 {MOST_OVERFLOWS} times in a row; "
                "try --dtype bf16 or fp32, or a lower --learning_rate"
            )

    def _record_batch_size(self) -> None:
        """Copy the size of packs or micro-batches that memory allowed into the plan, which checkpoints hold."""
        engine = self.stepper.engine
        if engine.name == "packed":
            self.plan.token_budget = engine.batch_size
        else:
            self.plan.micro_batch_size = engine.batch_size

    # ------------------------------------------------------------------------------------------------- validation

    def _validation_is_due(self) -> bool:
        is_due = self.pacing.allows_validation() or self.pacing.is_at_end()
        return len(self.validation) > 0 and self.state.validated != self.state.step and is_due

    def _validate(self) -> Evaluation:
        """Measure the validation loss, and return all that was measured; the adapter with the best one is kept."""
        state = self.state
        with self.progress.stage("validation", len(self.validation)), self.countdown.timing("validation"):
            found = self.stepper.evaluate(self.validation)
        state.timings["pass"] = state.timings["validation"] / int(self.validation.lengths.sum())  # of a token
        loss = found.loss
        self._record_batch_size()
        state.validated = state.step
        self.pacing.note_validation()
        if state.step == 0:
            state.first_loss = loss
            self.progress.log(f"validation loss {loss:.4f} before the first step")
            self._expect(PASSES * state.timings["pass"], "this validation")
            return found
        state.history.append({"step": state.step, "validation_loss": loss})
        self.tracker.track({"validation_loss": loss}, state.step)
        state.without_gain += 1
        if loss < state.best_loss:
            state.best_loss, state.best_step, state.without_gain, state.best = loss, state.step, 0, {}
        self.progress.log(
            f"validation loss {loss:.4f} at step {state.step}" + ("" if state.without_gain else ", the best")
        )
        if self._should_stop_early():
            self.progress.log(f"stopped early: {state.without_gain} validations without a better loss")
        return found

    def _should_stop_early(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.state.without_gain >= patience

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _checkpoint_is_due(self) -> bool:
        """Return whether to save: at every --save_steps, and where the validation loss is the best so far."""
        step = self.state.step
        is_regular = step % self.plan.save_steps == 0 and self.pacing.outlook.allows_checkpoint
        return step > self.saved and (is_regular or step == self.state.best_step)

    def _save(self) -> None:
        """Write a checkpoint and remove those beyond the limit; a disk that fails is reported, and retried later."""
        state, best = self.state, self.state.best_step
        try:
            with self.progress.stage(f"saving checkpoint-{state.step}"), self.countdown.timing("checkpoint"):
                self.saver.save(self._facts(), state)
        except OSError as error:
            self.failed_saves += 1
            self._failure = f"step {state.step}: no checkpoint could be written ({error.strerror or error})"
            lost = "" if state.best_step == best else f"; step {best} was the best, and its weights are not kept"
            self.progress.log(f"warning: {self._failure}; {self._newest()}{lost}")
            return
        self.failed_saves, self.saved = 0, state.step
        self._rotate()

    def _rotate(self) -> None:
        """Remove checkpoints beyond the limit, but not the best one; a failure is reported, and retried later."""
        if not self.world.is_main:
            return
        best = None if self.state.best else self.state.best_step
        try:
            checkpoints.rotate(self.output_dir, self.record["run"], self.config.save_total_limit, best)
        except OSError as error:
            self.progress.log(f"warning: an older checkpoint could not be removed ({error.strerror or error})")

    def _check_saves(self) -> None:
        """Raise TrainingError where one save after the other fails."""
        if self.failed_saves >= MOST_FAILED_SAVES:
            raise TrainingError(
                f"{self._failure}, {self.failed_saves} times in a row; {self._newest()}: free space in "
                f"{self.output_dir} and go on from there with --resume"
            )

    def _facts(self) -> dict[str, Any]:
        """Return what a run resumes from besides its tensors."""
        return {
            "step": self.state.step,
            "plan": asdict(self.plan),
            "progress": self.state.facts(),
            "record": self.record,
            "scaler": self.stepper.scaler_state(),
            "tracker": self.tracker.id,
        }

    def _newest(self) -> str:
        return f"the newest checkpoint is that of step {self.saved}" if self.saved else "there is no checkpoint yet"

    def _saved_before_leaving(self, can_save: bool = True) -> str:
        """Save the state of the last finished step, if it is not saved, and return a sentence on what is."""
        if can_save and self.state.step > self.saved and self.failed_saves < MOST_FAILED_SAVES:
            with suppress(TrainingError):  # tensors that are no longer finite are not saved
                self._save()
        if not self.saved:
            return "there is no checkpoint yet; --resume starts anew"
        return f"step {self.saved} of {self.plan.total_steps} is saved; --resume goes on from there"
