"""The report of a run while it runs: measures, keeps the facts and draws. Whatever fails in it costs the run a line.

It takes below 3 % of a run's time: 1 % for two passes over some training rows, 1 % for answers, 1 % for drawing. The
losses of the validation rows are those of validation itself.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np

from lora_alpaca._version import __version__
from lora_alpaca.artifacts import adapter_folder
from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.data import row_losses
from lora_alpaca.engine.allocator import returning_large_buffers
from lora_alpaca.errors import DataError, RankError
from lora_alpaca.planning import plan as planning
from lora_alpaca.planning.devices import RESERVED
from lora_alpaca.planning.plan import Plan
from lora_alpaca.signals import StepAbandoned
from lora_alpaca.storage.json_files import read_json
from lora_alpaca.training.job import Job
from lora_alpaca.training.reading import RunRows
from lora_alpaca.training.report import answers, files
from lora_alpaca.training.report import rows as measured
from lora_alpaca.training.report.drawing import drawn
from lora_alpaca.training.report.rows import RowTable
from lora_alpaca.training.state import TrainState
from lora_alpaca.training.step import Evaluation, Stepper

DRAWING = 0.01  # of the run's time, until its end
STEP = 3.0  # passes without a gradient that a step takes as long as
BINS = 30
FEW = 16  # training rows


class RunReport:
    """The report of one run on one rank: all ranks measure, the main one writes."""

    def __init__(
        self,
        job: Job,
        rows: RunRows,
        plan: Plan,
        stepper: Stepper,
        output_dir: Path,
        notes: Sequence[str],
        log: Callable[..., None],
    ):
        self._job, self._rows, self._plan, self._stepper, self._log = job, rows, plan, stepper, log
        self._world, self._output_dir, self._is_on = stepper.world, output_dir, job.config.report
        self._begun, self._drawing, self.seconds = time.perf_counter(), 0.0, 0.0
        self._failed, self._is_due, self._run_seconds = False, True, 0.0
        self._train_rows = self._choose_rows()
        self._table = RowTable(rows)
        self._asked: list[answers.Asked] = []
        self._facts: dict[str, Any] = {}
        with self._costs_no_run():
            if self._world.is_main:
                files.clear(output_dir, job.record["run"])
                self._facts = self._known(notes) if self._is_on else {}

    def _known(self, notes: Sequence[str]) -> dict[str, Any]:
        """Return the facts that stand before the first step, with those that an earlier process of the run measured."""
        job, lengths = self._job, self._job.train.lengths
        counts, edges = np.histogram(lengths, BINS, (0, int(lengths.max()) + 1))
        facts: dict[str, Any] = {
            "kind": files.KIND,
            "version": __version__,
            "run": job.record["run"],
            "record": {**job.record, "status": "running"},
            "plan": str(self._plan),
            "total_steps": self._plan.total_steps,
            "notes": list(notes),
            "estimate": {"memory": self._estimated_memory()},
            "trainable": sum(parameter.numel() for parameter in self._stepper.parameters),
            "lengths": {"counts": counts.tolist(), "edges": edges.tolist()},
            "measured_rows": {"training": len(self._train_rows), "of": len(job.train)},
        }
        before = read_json(self._output_dir / files.FACTS)
        if before.get("run") == facts["run"]:
            facts["answers"] = before.get("answers")
            try:
                lines, known = row_losses.read(self._output_dir / files.ROWS)
            except DataError:
                return facts
            if known["run"] == facts["run"]:
                self._table.recall(lines, known["step"])
        return facts

    def _choose_rows(self) -> list[int]:
        """Return which training rows are measured, by the steps that are planned now.

        A run within a time that has validated nothing does not know how long rows take, and measures few.
        """
        job, plan = self._job, self._plan
        asked, trained = job.config.report_rows, plan.total_steps * job.config.batch_size
        if asked is None and plan.within and not len(job.validation):
            asked = FEW
        return measured.chosen(job.train, trained, asked, job.config.seed)

    def _estimated_memory(self) -> int:
        """Return the bytes that the formulas give, with those of libraries where what is measured has them too."""
        job, device = self._job, self._world.device.type
        spread = planning.layout(self._plan.shard, job.config, self._world)
        parts = planning.estimate_run(self._plan, job.config, job.train.lengths, job.size, spread).memory
        return parts.device.total + (0 if device == "cuda" else RESERVED[device])

    # ------------------------------------------------------------------------------------------- called by the run

    @property
    def rows(self) -> int:
        """Return how many training rows are measured."""
        return len(self._train_rows)

    def validated(self, state: TrainState, found: Evaluation) -> None:
        """Take the losses of the validation rows; every rank calls it."""
        if not self._is_on:
            return
        with self._costs_no_run():
            validation = self._job.validation
            self._estimate(found.seconds, int(validation.lengths.sum()))
            if state.step == 0 or state.best_step == state.step:
                when = "after" if state.step else "before"
                self._table.note(when, "validation", validation, range(len(validation)), found.by_row)
                self._table.after_step = state.step
            self._is_due = True

    def update(self, state: TrainState, saved: int) -> None:
        """Measure what is to be known before the first step, which no drawing delays, and draw later where there is
        news; every rank calls it.
        """
        if not self._is_on:
            return
        if state.step == 0:
            self._train_rows = self._choose_rows()
            self._measure("before")
            return
        elapsed = time.perf_counter() - self._begun
        if (self._is_due or (saved == state.step > 0)) and self._drawing <= DRAWING * elapsed:
            self._draw(state, "running")

    def finish(self, state: TrainState, result: RunResult) -> None:
        """Measure what came of it, and draw the whole report; every rank calls it, when the result is saved."""
        if not self._is_on:
            return
        self._run_seconds = state.seconds
        with suppress(StepAbandoned):  # the signal is heeded by the run
            with self._costs_no_run(together=True):
                self._facts["after_step"] = self._restore_best(state)
            self._measure("after")
        self._facts["record"] = {**self._job.record, "status": "finished", "seconds": result.seconds}
        self._draw(state, "finished")

    # --------------------------------------------------------------------------------------------------- measuring

    def _restore_best(self, state: TrainState) -> int:
        """Put the adapter that was kept into the model, and return the step of what is in it."""
        if self._job.config.tune == "full" or state.best_step in (0, state.step):
            return state.step
        tensors = self._world.broadcast(lambda: adapter_folder.read_weights(self._output_dir, may_do_nothing=True))
        self._stepper.trainable.load_state(tensors, str(self._output_dir))
        return state.best_step

    def _measure(self, when: str) -> None:
        """Measure training rows, and answer held-out ones."""
        with self._costs_no_run(together=True):
            if self._train_rows:
                examples = [self._job.train[row] for row in self._train_rows]
                found = self._stepper.evaluate(examples)
                self._table.note(when, "training", self._job.train, self._train_rows, found.by_row)
                self._estimate(found.seconds, sum(len(one.ids) for one in examples))
        with self._costs_no_run(together=True):
            self._answer(when)

    def _estimate(self, seconds: float, tokens: int) -> None:
        """Estimate the time of the run by that of a pass over so many tokens, until it is known."""
        if not self._run_seconds and tokens:
            trained = self._plan.total_steps * self._job.config.batch_size * float(self._job.train.lengths.mean())
            self._run_seconds = STEP * trained * seconds / tokens
            self._facts.setdefault("estimate", {}).setdefault("seconds", self._run_seconds)

    def _answer(self, when: str) -> None:
        """Answer held-out rows, if they are asked for, or the time of the run allows."""
        number = self._job.config.report_answers
        seconds = math.inf if number else answers.SHARE * self._run_seconds
        together = self._stepper.engine.access.in_lockstep
        if together:
            seconds = self._world.broadcast(lambda: seconds)
        if number == 0 or not len(self._job.validation) or seconds < answers.LEAST:
            if self._world.is_main:
                self._facts.setdefault("answers", None)
            return
        if not (together or self._world.is_main):
            return
        if not self._asked:
            self._asked = answers.choose(self._job, self._rows, number or answers.ROWS)
        if self._asked:
            keeps_buffers = self._world.device.type == "cpu" and not together
            with returning_large_buffers() if keeps_buffers else nullcontext():
                given = answers.answer(self._stepper, self._job, self._asked, seconds)
            if self._world.is_main:
                self._keep(when, given, seconds)

    def _keep(self, when: str, given: list[dict[str, Any]], seconds: float) -> None:
        bound = {"longest": answers.longest(self._asked), "seconds": None if math.isinf(seconds) else seconds}
        rows = answers.facts(self._asked)
        kept = self._facts.get("answers") or {}
        if kept.get("rows") not in (None, rows):  # the rows of an earlier process were others
            kept = {}
        self._facts["answers"] = {**kept, **bound, "rows": rows, when: given}

    # ----------------------------------------------------------------------------------------------------- drawing

    def _draw(self, state: TrainState, status: str) -> None:
        """Write the report anew."""
        if not self._world.is_main:
            return
        self._is_due, begun = False, time.perf_counter()
        with self._costs_no_run():
            self._table.read_texts()
            self._facts |= {
                "status": status,
                "step": state.step,
                "seconds": state.seconds,
                "history": state.history,
                "validation": {
                    "first": state.first_loss,
                    "best": state.best_loss if state.best_step else None,
                    "best_step": state.best_step,
                },
                "plan": str(self._plan),
                "total_steps": self._plan.total_steps,
                "measured_rows": {"training": len(self._train_rows), "of": len(self._job.train)},
                "engine": self._plan.engine,
                "rows": self._table.extremes(),
                "report_seconds": self.seconds,
            }
            files.write(self._output_dir, drawn(self._facts, str(self._output_dir)) | self._table_file())
        self._drawing += time.perf_counter() - begun

    def _table_file(self) -> dict[str, bytes]:
        record = self._job.record
        known = {"run": record["run"], "step": self._table.after_step, "options": record["options"]}
        return {files.ROWS: row_losses.as_parquet(self._table.lines(), known)}

    @contextmanager
    def _costs_no_run(self, together: bool = False) -> Iterator[None]:
        """Tell in one line what fails within this context, once; a signal and a rank that failed are the run's own,
        and, where all ranks compute together, what fails on one of them.
        """
        begun = time.perf_counter()
        try:
            yield
        except (RankError, StepAbandoned):
            raise
        except Exception as error:
            if together and self._stepper.engine.access.in_lockstep:  # the other ranks wait for this one
                raise
            if not self._failed:
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                self._log(f"warning: the report of the run is incomplete ({reason}); the run goes on")
            self._failed = True
        finally:
            self.seconds += time.perf_counter() - begun
