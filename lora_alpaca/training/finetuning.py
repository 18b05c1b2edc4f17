"""The main job as a story: where, data, plan, model, folder, training, saving; cheap failures first."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

import torch

from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.distributed.world import World
from lora_alpaca.planning import preflight
from lora_alpaca.planning.budget import Budget, Meter, minutes
from lora_alpaca.planning.ending import ending_seconds
from lora_alpaca.signals import Interrupted, Stop
from lora_alpaca.training import checkpointing, resume, setup, threads
from lora_alpaca.training.budget.countdown import Countdown, require_time
from lora_alpaca.training.hidden_states import reading_hidden_states
from lora_alpaca.training.loop import Loop
from lora_alpaca.training.progress import Progress
from lora_alpaca.training.reading import RunRows
from lora_alpaca.training.report.run_report import RunReport
from lora_alpaca.training.resume import Start
from lora_alpaca.training.search import rate_search
from lora_alpaca.training.trackers import Tracker

Beginning = Callable[[FinetuneConfig, World], Start]


def train(
    config: FinetuneConfig,
    rows: RunRows | None = None,
    begin: Beginning = resume.start,
    meter: Meter | None = None,
) -> RunResult:
    """Train an adapter as `finetune` describes; `rows` are those that the config names, if they have been read.

    `begin` tells how the run starts: fresh or resumed, as the config says, unless it is a repetition. `meter` counts
    its time, which begins now unless the meter says otherwise.
    """
    meter = meter or Meter(Budget.of(config), time.perf_counter())
    stop = Stop()
    with stop.watching(), World(config, stop) as world, ExitStack() as resources:
        progress = resources.enter_context(Progress(quiet=not world.is_main))
        log = progress.log
        log(*world.notes)

        # 1. Where: the output folder, and the run that is continued there
        start = begin(config, world)
        log(*start.notes, *resources.enter_context(threads.used(config.threads, start.threads)))

        # 2. Data: rows, base, tokenizer, template, examples; all that fails cheaply fails here
        inputs = setup.identify(config, rows, world, start, progress)
        if start.finished:
            log(*start.check_same(setup.record(inputs, world)))
            return start.finished
        job = setup.prepare(inputs, world, progress)

        # 3. Plan: every automatic choice, from counted tokens and a model without weights
        record = job.record
        log(*start.check_same(record))
        plan = start.plan(job, world)
        log(
            f"base: {job.base.name}, {job.spec}",
            f"plan: {plan}",
            preflight.describe_memory(plan, job.config, job.train.lengths, job.size, world),
        )
        preflight.check_disk(start.output_dir, plan, job.config, job.size)
        if not (config.resume or config.resume_from_checkpoint):
            require_time(meter, world)

        # 4. Model: the first heavy step; its engine and optimizer
        stepper, notes = setup.fit(job, plan, world, resources, progress, start.is_proven)
        first = job.train[: job.config.batch_size]
        notes += threads.choose(stepper.engine, first, world, config.threads or start.threads)
        record["hardware"]["threads"] = torch.get_num_threads()
        stepper.engine, more = reading_hidden_states(stepper.engine, job, plan, world, progress)
        notes += more
        log(*notes)
        record["plan"] = asdict(plan)
        saver = checkpointing.of_run(job.config, stepper, start.output_dir, record["run"])
        state = start.restore(saver, record)
        if job.config.learning_rate == "auto":
            job = rate_search.decided(job, plan, stepper, progress, meter)
        tokens_a_step = job.config.batch_size * float(job.train.lengths.mean())
        countdown = Countdown(meter, world, state, tokens_a_step, ending_seconds(job.config, job.size))

        # 5. Folder: from here on it is this run's own
        world.barrier()  # until all ranks have looked at it
        if world.is_main:
            log(*resources.enter_context(start.folder(record)))
        if saver.together:
            checkpointing.require_shared(start.output_dir, world)
        tracker = Tracker(job.config, world.is_main, log)
        tracker.start(stepper.model, start.tracker_id)
        report = RunReport(job, inputs.rows, plan, stepper, start.output_dir, notes, log)

        # 6. Train: steps, validation, checkpoints
        with stop.deferred():
            Loop(job, plan, stepper, saver, start.output_dir, record, state, progress, tracker, report, countdown).run()

            # 7. Save: the best weights, with tokenizer, prompt contract and record
            record["plan"] = asdict(plan)  # with what its time has decided
            with progress.stage("saving"):
                result = saver.finish(job, record, state)
                world.barrier()
            with progress.stage("report", report.rows):
                report.finish(state, result)
        tracker.finish(start.output_dir)
        what = "adapter" if job.config.tune == "lora" else "model"
        log(f"{what} saved in {start.output_dir}: {result.steps} steps in {minutes(result.seconds)}{_gain(result)}")
        if stop:
            raise Interrupted(stop.asked, f"the run was at its end, and its {what} is in {start.output_dir}")
        return result


def _gain(result: RunResult) -> str:
    if result.validation_loss is None or result.first_validation_loss is None:
        return ""
    return f"; validation loss {result.first_validation_loss:.4f} -> {result.validation_loss:.4f}"
