"""The main job as a story: where, data, plan, model, folder, training, saving; cheap failures first."""

from contextlib import ExitStack

from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import fitted
from lora_alpaca.planning import preflight
from lora_alpaca.signals import Interrupted, Stop
from lora_alpaca.training import checkpointing, resume, setup
from lora_alpaca.training.loop import Loop
from lora_alpaca.training.progress import Progress, minutes
from lora_alpaca.training.reading import RunRows
from lora_alpaca.training.report.run_report import RunReport
from lora_alpaca.training.step import Stepper
from lora_alpaca.training.trackers import Tracker


def train(config: FinetuneConfig, rows: RunRows | None = None) -> RunResult:
    """Train an adapter as `finetune` describes; `rows` are those that the config names, if they have been read."""
    stop = Stop()
    with stop.watching(), World(config, stop) as world, ExitStack() as resources:
        progress = Progress(quiet=not world.is_main)
        log = progress.log
        log(*world.notes)

        # 1. Where: the output folder, and the run that is continued there
        start = resume.start(config, world)
        log(*start.notes)

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

        # 4. Model: the first heavy step; its engine and optimizer
        strategy = setup.strategy(job.config, plan, world)
        trainable, notes = setup.load(job, plan, strategy)
        log(*notes)
        model = trainable.model
        pad_id, proven = job.tokenizer.pad_token_id, start.is_proven
        fitting = fitted(model, plan, job.spec, pad_id, job.train, world.autocast, proven, strategy)
        engine, notes = resources.enter_context(fitting)
        log(*notes)
        plan.engine = engine.name
        stepper = Stepper(engine, trainable, strategy, world, job.config, log)
        saver = checkpointing.of_run(job.config, stepper, start.output_dir, record["run"])
        state = start.restore(saver, record)

        # 5. Folder: from here on it is this run's own
        world.barrier()  # until all ranks have looked at it
        if world.is_main:
            log(*resources.enter_context(start.folder(record)))
        if saver.together:
            checkpointing.require_shared(start.output_dir, world)
        tracker = Tracker(job.config, world.is_main, log)
        tracker.start(model, start.tracker_id)
        report = RunReport(job, inputs.rows, plan, stepper, start.output_dir, notes, log)

        # 6. Train: steps, validation, checkpoints
        with stop.deferred():
            Loop(job, plan, stepper, saver, start.output_dir, record, state, progress, tracker, report).run()

            # 7. Save: the best weights, with tokenizer, prompt contract and record
            result = saver.finish(job, record, state)
            world.barrier()
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
