"""Hidden states of the layers that do not learn, for all rows of a run, in a file that later epochs and runs read.

They are as private as the rows: the folder is the cache of prepared rows, which only the user can read. What is found
there has the name of everything that it depends on.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lora_alpaca.artifacts import run_record
from lora_alpaca.data import cache
from lora_alpaca.data.examples import Example
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import Engine, Packed
from lora_alpaca.engine.equivalence import EXACT, ROUNDED, difference, loss_and_gradient, sample
from lora_alpaca.engine.lower_layers import LayersUnfit, LowerLayers, SplitModel, fill, shape_of_states
from lora_alpaca.errors import ConfigError
from lora_alpaca.models.memory import gigabytes
from lora_alpaca.planning.plan import Plan
from lora_alpaca.storage import atomic
from lora_alpaca.storage.handles import RealFolder
from lora_alpaca.training.job import Job
from lora_alpaca.training.progress import Progress

BUDGET = 2048  # tokens of a pack, whatever the plan says: the numbers must not depend on it
PREFIX, STATES, WHOLE = "hidden-", "states", "whole.json"  # a folder of the cache, and the files in it


@dataclass(frozen=True)
class _Wanted:
    """Where the hidden states of a run belong, and how large they are."""

    folder: Path
    key: str
    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def mapped(self, path: Path, is_new: bool = False) -> torch.Tensor:
        """Return the states in a file, mapped from it; what is written into those of a new file is in the file."""
        states = torch.from_file(str(path), shared=is_new, size=self.shape[0] * self.shape[1], dtype=self.dtype)
        return states.view(self.shape)

    def found(self) -> torch.Tensor | None:
        """Return the states that an earlier run kept; None where they are not there whole."""
        path = self.folder / self.key / STATES
        try:
            if (path.parent.is_symlink() or path.is_symlink()) or not (path.parent / WHOLE).is_file():
                return None
            if path.stat().st_size != self.bytes:
                return None
            return self.mapped(path)
        except OSError:
            return None


def reading_hidden_states(
    engine: Engine, job: Job, plan: Plan, world: World, progress: Progress
) -> tuple[Engine, list[str]]:
    """Return an engine that reads what the first layers make of rows, and a note; the engine itself, with the reason,
    where that cannot be had.

    Computes them for all rows if no earlier run has; every rank calls it. A run that goes on, or is made again, does
    what its plan says that it did, for the two round otherwise. Raises ConfigError where it cannot.
    """
    if not job.config.cache_hidden:
        return engine, []
    if plan.reads_hidden is False:
        return engine, ["--cache_hidden: every layer is computed in every step, as when the run began"]
    begun = time.perf_counter()
    try:
        if not isinstance(engine, Packed) or engine.piece_loss is None:
            raise LayersUnfit("its rows are not computed in packs")
        split = SplitModel.of(engine.model)
        job.train.first_place, job.validation.first_place = 0, len(job.train.ids)
        with world.autocast(), _inference(engine):
            wanted = _wanted(split, engine, job)
            _require_same(split, engine, job, world)
            with world.main_process_first():
                states = wanted.found()
                said = f"found in {wanted.folder}"
                if states is None:
                    states = _filled(split, engine, job, wanted, progress)
                    said = f"computed in {time.perf_counter() - begun:.1f} s"
        body, plan.reads_hidden = LowerLayers(split, states), True
        of = f"of {split.count} of {len(split.layers)} layers for {len(job.train) + len(job.validation)} rows"
        return replace(engine, body=body), [f"hidden states {of}, {gigabytes(wanted.bytes)}, {said}"]
    except (LayersUnfit, OSError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        if plan.reads_hidden:
            raise ConfigError(
                f"--cache_hidden: {reason}; hidden states were read when the run began, and without them it has other "
                "roundings: make that possible again"
            ) from None
        job.train.first_place = job.validation.first_place = None
        plan.reads_hidden = False
        return engine, [f"--cache_hidden: {reason}; every layer is computed in every step"]


@contextmanager
def _inference(engine: Engine) -> Iterator[None]:
    """Within this context, the model is in evaluation mode."""
    was_training = engine.model.training
    engine.model.eval()
    try:
        yield
    finally:
        engine.model.train(was_training)


def _wanted(split: SplitModel, engine: Engine, job: Job) -> _Wanted:
    """Return where the states belong. Raises LayersUnfit where they may not be kept."""
    folder, notes = cache.cache_folder(job.config.cache_dir)
    if folder is None:
        raise LayersUnfit(notes[0].removeprefix("warning: ") if notes else f"--cache_dir is {job.config.cache_dir}")
    folder.mkdir(parents=True, exist_ok=True)
    width, dtype = shape_of_states(split, job.train[0], engine.device)
    record = job.record
    facts = {
        "base": record["base_sha256"],
        "precision": record["precision"],
        "rows": [job.train.digest(), job.validation.digest()],
        "layers": split.count,
        "versions": run_record.versions(),
        "hardware": {name: value for name, value in record["hardware"].items() if name != "cores"},
        "dtype": str(dtype),
    }
    key = PREFIX + hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    wanted = _Wanted(folder, key, (len(job.train.ids) + len(job.validation.ids), width), dtype)
    if wanted.bytes > job.config.cache_gb * 1e9:
        raise LayersUnfit(f"they take {gigabytes(wanted.bytes)}, and --cache_gb is {job.config.cache_gb:g}")
    if wanted.found() is None and (free := shutil.disk_usage(folder).free) < wanted.bytes:
        raise LayersUnfit(f"they take {gigabytes(wanted.bytes)}, and {folder} has {gigabytes(free)} left")
    return wanted


def _require_same(split: SplitModel, engine: Engine, job: Job, world: World) -> None:
    """Raise LayersUnfit unless some rows have the loss and gradient that they have when all layers are computed."""
    rows = sample(job.train)
    placed = [Example(row.ids, row.spans, place=sum(len(one.ids) for one in rows[:n])) for n, row in enumerate(rows)]
    width, dtype = shape_of_states(split, rows[0], engine.device)
    states = torch.zeros(sum(len(row.ids) for row in rows), width, dtype=dtype)
    limit = EXACT if dtype == torch.float32 else ROUNDED
    measure = partial(loss_and_gradient, examples=placed, precision=world.autocast)
    try:
        fill(split, states, placed, BUDGET, engine.device, lambda _: None)
        found = measure(replace(engine, body=LowerLayers(split, states)))
    except Exception as error:  # models fail in many ways with arguments that they do not know
        raise LayersUnfit((str(error).splitlines() or [type(error).__name__])[0]) from None
    if not (off := difference(found, measure(engine))) <= limit:
        raise LayersUnfit(f"the gradient is {off:.1e} off that of all layers together")


def _filled(split: SplitModel, engine: Engine, job: Job, wanted: _Wanted, progress: Progress) -> torch.Tensor:
    """Compute the states of all rows, keep them in the cache, and return them, mapped from their file."""
    parts: Sequence[Sequence[Example]] = (job.train, job.validation)
    atomic.remove_hidden(wanted.folder, locked=False)
    with atomic.staging_folder(wanted.folder / wanted.key) as stage:
        with progress.counting(sum(map(len, parts)), "rows") as count:
            states = wanted.mapped(stage / STATES, is_new=True)
            for part in parts:
                fill(split, states, part, BUDGET, engine.device, count)
        atomic.write(stage / WHOLE, atomic.as_json({"shape": wanted.shape, "dtype": str(wanted.dtype)}))
        atomic.fsync_tree(stage)
        with RealFolder.opened(wanted.folder) as folder:
            folder.remove(wanted.key)  # written by another process, or damaged
        atomic.rename(stage, wanted.folder / wanted.key)
    _forget_oldest(wanted, job.config.cache_gb * 1e9)
    if (found := wanted.found()) is None:
        raise OSError(5, "what was written to the cache is not there")
    return found


def _forget_oldest(wanted: _Wanted, most: float) -> None:
    """Remove the states of earlier runs, the oldest first, until all together take no more than so many bytes."""
    with RealFolder.opened(wanted.folder) as folder:
        others = [name for name in folder.names() if name.startswith(PREFIX) and name != wanted.key]
        kept = {}
        for name in others:
            with suppress(OSError):
                if folder.has_folder(name) and (wanted.folder / name / WHOLE).is_file():
                    found = (wanted.folder / name / STATES).stat()
                    kept[name] = (found.st_mtime, found.st_size)
        total = wanted.bytes + sum(size for _, size in kept.values())
        for name, (_, size) in sorted(kept.items(), key=lambda item: item[1]):
            if total > most:
                folder.remove(name)
                total -= size
