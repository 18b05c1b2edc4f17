"""The loop of a run: step after step, and in between what is due: validation, checkpoints, and the end.

What is due follows from where the run stands, so that a run that goes on does what the one before was about to do.
"""

import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import checkpoint
from lora_alpaca.artifacts.checkpoint import Checkpoint
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import Examples
from lora_alpaca.data.sampler import Sampler
from lora_alpaca.errors import RankError, TrainingError
from lora_alpaca.models import lora
from lora_alpaca.planning.plan import Plan
from lora_alpaca.signals import Interrupted, StepAbandoned
from lora_alpaca.training.state import TrainState
from lora_alpaca.training.step import Step, Stepper

MOST_FAILED_SAVES = 3  # in a row
MOST_OVERFLOWS = 50  # of fp16, in a row; a few are how it finds its loss scale
MOST_SKIPPED = 10  # steps of a run under --on_nonfinite skip


@dataclass
class Loop:
    """A run from `progress.step` to the end of its plan. `record` is that of the run."""

    config: FinetuneConfig
    plan: Plan
    learner: Stepper
    train: Examples
    validation: Examples
    output_dir: Path
    record: dict[str, Any]
    progress: TrainState
    failed_saves: int = 0

    def __post_init__(self) -> None:
        """Set the clocks."""
        self.ranks, self.reporter, self.stop = self.learner.ranks, self.learner.ranks.reporter, self.learner.ranks.stop
        self.sampler = Sampler(
            self.train.lengths, self.config.batch_size, self.config.seed, self.config.group_by_length
        )
        self.begun = time.perf_counter() - self.progress.seconds
        self.window_begun, self.window_tokens = time.perf_counter(), 0
        self.saved = self.progress.step  # the step of the newest checkpoint

    def run(self) -> None:
        """Go to the end, or to where the validation loss no longer falls.

        Raises Interrupted after a signal, RankError where another process has failed, and TrainingError for what
        training cannot go on from. The state of the last finished step is saved before.
        """
        progress, plan = self.progress, self.plan
        self.reporter.start(plan.total_steps, progress.step)
        self._rotate()  # the run before may have ended between a save and this
        try:
            while True:
                if self._validation_is_due():
                    self._validate()
                if progress.step >= plan.total_steps or self._no_longer_falls():
                    break
                if progress.step % plan.save_steps == 0 and progress.step > self.saved:
                    self._save()
                    self._check_saves()
                if self.stop:
                    raise StepAbandoned
                self._step()
        except StepAbandoned:
            raise Interrupted(self.stop.asked, self._saved_before_leaving()) from None
        except RankError as error:
            raise RankError(error.rank, error.cause, self._saved_before_leaving()) from None
        except TrainingError as error:
            raise TrainingError(f"{error}; {self._saved_before_leaving()}") from None
        finally:
            self.reporter.stop()

    # ------------------------------------------------------------------------------------------------------ steps

    def _step(self) -> None:
        config, progress = self.config, self.progress
        rows = self.sampler.rows(progress.step)
        rate = self.plan.learning_rate(progress.step, config)
        self.ranks.seed(config.seed, progress.step)
        step = self.learner.step([self.train[row] for row in rows], rate)
        self._keep_size()
        if not step.finite:
            self._skip(step, rows)
        progress.step += 1
        if step.finite:
            progress.window_loss += step.loss * step.labels
            progress.window_labels += step.labels
        progress.seconds = time.perf_counter() - self.begun
        self.window_tokens += step.tokens
        speed = self.window_tokens / max(1e-9, time.perf_counter() - self.window_begun)
        self.reporter.progress(progress.step, progress.mean_loss(), speed)
        self._count_overflows(step)
        if progress.step % config.logging_steps == 0 or progress.step == self.plan.total_steps:
            self._log(rate, step.grad_norm, speed)

    def _log(self, rate: float, grad_norm: float, speed: float) -> None:
        progress, loss = self.progress, self.progress.mean_loss()
        figures = {"loss": loss, "learning_rate": rate, "grad_norm": grad_norm, "tokens_per_second": speed}
        self.reporter.interval(progress.step, loss, rate, speed)
        progress.history.append({"step": progress.step, **figures})
        self.ranks.track(figures, progress.step)
        progress.window_loss, progress.window_labels = 0.0, 0
        self.window_begun, self.window_tokens = time.perf_counter(), 0

    def _skip(self, step: Step, rows: list[int]) -> None:
        """Say what is not finite, and where; TrainingError unless such steps are to be skipped, and few."""
        number = self.progress.step + 1
        places = self.learner.not_finite([self.train[row] for row in rows])
        named = [rows[place] + 1 for place in places] or [row + 1 for row in rows]
        shown = ", ".join(map(str, named[:8])) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
        what = (
            f"step {number}: the loss is {step.loss} and the gradient norm {step.grad_norm} (training rows {shown}, "
            f"{'each alone' if places else 'together'}); nothing was changed by it"
        )
        self.progress.skipped += 1
        if self.config.on_nonfinite == "stop":
            raise TrainingError(
                f"{what}. Lower --learning_rate, try --dtype fp32 or --load_8bit False, or say --on_nonfinite skip"
            )
        if self.progress.skipped > MOST_SKIPPED:
            raise TrainingError(
                f"{what}. That is the {self.progress.skipped}th such step, and --on_nonfinite skip ends"
            )
        self.reporter.say(f"{what} (--on_nonfinite skip)")

    def _count_overflows(self, step: Step) -> None:
        self.progress.overflows = self.progress.overflows + 1 if step.overflow else 0
        if step.overflow:
            self.reporter.say(f"step {self.progress.step}: the gradients overflow fp16; the loss scale is lowered")
        if self.progress.overflows >= MOST_OVERFLOWS:
            raise TrainingError(
                f"step {self.progress.step}: the gradients overflowed fp16 {MOST_OVERFLOWS} times in a row; "
                "try --dtype bf16 or fp32, or a lower --learning_rate"
            )

    def _keep_size(self) -> None:
        """Let the plan, which checkpoints hold, have the size of packs or micro-batches that memory allowed."""
        engine = self.learner.engine
        if engine.name == "packed":
            self.plan.token_budget = engine.batch_size
        else:
            self.plan.micro_batch_size = engine.batch_size

    # ------------------------------------------------------------------------------------------------- validation

    def _validation_is_due(self) -> bool:
        step, plan = self.progress.step, self.plan
        regular = step % plan.eval_steps == 0 or step == plan.total_steps
        return len(self.validation) > 0 and regular and self.progress.validated != step

    def _validate(self) -> None:
        """Measure the validation loss; the adapter of the best one is kept."""
        progress = self.progress
        loss = self.learner.evaluate(self.validation)
        self._keep_size()
        progress.validated = progress.step
        if progress.step == 0:
            progress.first_loss = loss
            self.reporter.say(f"validation loss {loss:.4f} before the first step")
            return
        progress.history.append({"step": progress.step, "validation_loss": loss})
        self.ranks.track({"validation_loss": loss}, progress.step)
        progress.without_gain += 1
        if loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.without_gain = loss, progress.step, 0
            progress.best = lora.state(self.learner.model)
        self.reporter.say(
            f"validation loss {loss:.4f} at step {progress.step}" + ("" if progress.without_gain else ", the best")
        )
        if self._no_longer_falls():
            self.reporter.say(f"stopped early: {progress.without_gain} validations without a better loss")

    def _no_longer_falls(self) -> bool:
        patience = self.config.early_stopping_patience
        return patience is not None and self.progress.without_gain >= patience

    # ------------------------------------------------------------------------------------------------ checkpoints

    def _save(self) -> None:
        """Write a checkpoint and remove those beyond the limit; a disk that fails is said, and tried again later."""
        if not self.ranks.first:
            self.saved = self.progress.step
            return
        try:
            settings = lora.peft_config(self.learner.model)
            checkpoint.save(self.output_dir, self.record["run"], self._checkpoint(), settings)
        except OSError as error:
            self.failed_saves += 1
            self._failure = f"step {self.progress.step}: no checkpoint could be written ({error.strerror or error})"
            self.reporter.say(f"warning: {self._failure}; {self._newest()}")
            return
        self.failed_saves, self.saved = 0, self.progress.step
        self._rotate()

    def _rotate(self) -> None:
        """Remove checkpoints beyond the limit; one that cannot be removed is said, and tried again later."""
        if not self.ranks.first:
            return
        try:
            checkpoint.rotate(self.output_dir, self.record["run"], self.config.save_total_limit)
        except OSError as error:
            self.reporter.say(f"warning: an older checkpoint could not be removed ({error.strerror or error})")

    def _check_saves(self) -> None:
        """Raise TrainingError where one save after the other fails."""
        if self.failed_saves >= MOST_FAILED_SAVES:
            raise TrainingError(
                f"{self._failure}, {self.failed_saves} times in a row; {self._newest()}: free space in "
                f"{self.output_dir} and go on from there with --resume"
            )

    def _checkpoint(self) -> Checkpoint:
        facts = {
            "step": self.progress.step,
            "plan": asdict(self.plan),
            "progress": self.progress.facts(),
            "record": self.record,
            "scaler": self.ranks.scaler.state_dict() if self.ranks.scaler is not None else None,
            "tracker": self.ranks.tracker_id(),
        }
        state = lora.state(self.learner.model)
        return Checkpoint(facts, state, self.learner.optimizer_state(), self.progress.best)

    def _newest(self) -> str:
        return f"the newest checkpoint is that of step {self.saved}" if self.saved else "there is no checkpoint yet"

    def _saved_before_leaving(self) -> str:
        """Save the state of the last finished step, if it is not, and return what there is to say."""
        if self.progress.step > self.saved and self.failed_saves < MOST_FAILED_SAVES:
            with suppress(TrainingError):  # what is no longer finite is not kept
                self._save()
        if not self.saved:
            return "there is no checkpoint yet; --resume starts anew"
        return f"step {self.saved} of {self.plan.total_steps} is saved; --resume goes on from there"
