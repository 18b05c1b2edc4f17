"""The command `find_lr`: a run as far as its first step, and the search of its learning rate."""

from contextlib import ExitStack

from lora_alpaca.config.finding import FindConfig
from lora_alpaca.distributed.world import World
from lora_alpaca.errors import FolderError
from lora_alpaca.planning.budget import Budget
from lora_alpaca.signals import Stop
from lora_alpaca.storage import atomic
from lora_alpaca.storage.paths import user_path
from lora_alpaca.training import setup, threads
from lora_alpaca.training.progress import Progress
from lora_alpaca.training.report import plots, rates
from lora_alpaca.training.resume import Start
from lora_alpaca.training.search import rate_search
from lora_alpaca.training.search.rate_search import Found


def find_lr(find: FindConfig) -> Found:
    """Search the learning rate of a run, print what was tried and the flag to say, and return it.

    Raises the children of LoraAlpacaError that `finetune` raises before its first step, and FolderError where there is
    a file already, or no library that draws.
    """
    config, svg = find.of_run(), user_path(find.svg) if find.svg else None
    if svg is not None and (svg.exists() or not svg.parent.is_dir()):
        raise FolderError(f"--svg {svg}: {'is there already' if svg.exists() else 'its folder is not there'}")
    if svg is not None and not plots.available():
        raise FolderError(f"--svg {svg}: there is nothing to draw it with; {plots.MISSING}")
    stop = Stop()
    with stop.watching(), World(config, stop) as world, ExitStack() as resources:
        progress = Progress(quiet=not world.is_main)
        progress.log(*world.notes, *resources.enter_context(threads.used(config.threads, None)))
        start = Start(config, user_path(config.output_dir))
        job = setup.prepare(setup.identify(config, None, world, start, progress), world, progress)
        plan = start.plan(job, world)
        stepper, notes = setup.fit(job, plan, world, resources, progress)
        notes += threads.choose(stepper.engine, job.train[: job.config.batch_size], world, config.threads)
        progress.log(*notes)
        found = rate_search.search(job, plan, stepper, progress, Budget.of(config).in_seconds)
        progress.log(f"say --learning_rate {found.rate:g}")
        drawn = rates.curve({"rate_search": found.facts()})
        if svg is not None and drawn is not None and world.is_main:
            atomic.write(svg, plots.alone(drawn).encode())
        return found
