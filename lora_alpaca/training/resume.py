"""Fresh or resumed: the one module that asks. `start` answers with an object whose methods the story of a run calls.

A run resumes from a checkpoint of the same run. What decides its result must be as it was, unless it may change.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import checkpoint as checkpoints
from lora_alpaca.artifacts import privacy, run_record
from lora_alpaca.artifacts.checkpoint import Checkpoint
from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.artifacts.source import FINETUNED
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.distributed.world import World
from lora_alpaca.errors import CheckpointError, ConfigError, FolderError
from lora_alpaca.planning import plan as planning
from lora_alpaca.planning.plan import Plan
from lora_alpaca.prompts import AnyTemplate, template_from_json
from lora_alpaca.storage.json_files import Shape, shape_of
from lora_alpaca.storage.output_folder import MANIFEST, RECORD, OutputFolder
from lora_alpaca.storage.paths import sha256, user_path
from lora_alpaca.training.checkpointing import Checkpoints
from lora_alpaca.training.job import Job
from lora_alpaca.training.state import TrainState

Changes = dict[str, tuple[Any, Any]]  # name -> (before, now)


@dataclass
class Start:
    """A run that begins: nothing of an earlier one is used. `finished` is the result where nothing is left to do."""

    config: FinetuneConfig
    output_dir: Path
    notes: list[str] = field(default_factory=list)
    finished: RunResult | None = None
    tracker_id: str = ""
    is_proven: bool = False  # whether packs were found to change nothing, by the run that is resumed

    def template(self, asked: AnyTemplate | None) -> AnyTemplate | None:
        """Return the template to use, None for the one that fits the data.

        A chat template is the one that the run before recorded, with the date that it was recorded with.
        """
        if not self._before or (asked is not None and asked.name != "chat"):
            return asked
        recorded = template_from_json(self._before["template"], "", "the record of the run")
        return recorded if recorded.name == "chat" else asked

    def with_rate(self, config: FinetuneConfig) -> FinetuneConfig:
        """Return the config with the learning rate of the run before, if it is to be found: it was found then."""
        known = self._before.get("options", {}).get("learning_rate")
        return (
            config.model_copy(update={"learning_rate": known}) if known and config.learning_rate == "auto" else config
        )

    @property
    def threads(self) -> int | None:
        """The threads that the run before computed with, None where it does not say, or there is none."""
        hardware = self._before.get("hardware")
        found = hardware.get("threads") if isinstance(hardware, dict) else None
        return found if type(found) is int and found > 0 else None

    def check_same(self, record: dict[str, Any]) -> list[str]:
        """Return notes on what changed since the run began; the record becomes that of this run."""
        return []

    def plan(self, job: Job, world: World) -> Plan:
        """Return the plan of the run."""
        return planning.resolve(job.config, job.train.lengths, job.size, world)

    def restore(self, saver: Checkpoints, record: dict[str, Any]) -> TrainState:
        """Return the state to train from, having put weights and moments back."""
        return TrainState()

    @contextmanager
    def folder(self, record: dict[str, Any]) -> Iterator[list[str]]:
        """Make the output folder this run's own until the context ends, and yield notes on what was set aside."""
        folder = OutputFolder(self.output_dir)
        with folder.take(self.config.overwrite) as notes:
            with folder.disk_errors_named():
                checkpoints.remove_leftovers(self.output_dir)
                notes += checkpoints.set_aside_after(self.output_dir, self._checkpoint_folder())
                folder.write_record(privacy.published(record))
            yield notes

    def _checkpoint_folder(self) -> Path | None:
        return None

    @property
    def _before(self) -> dict[str, Any]:
        """Return the record of the run that this one is to be like; empty where there is none."""
        return {}


@dataclass
class Finished(Start):
    """A run that is at its end. It stays as it is; whoever asks for another run in its folder is told so."""

    recorded: dict[str, Any] = field(kw_only=True)

    def check_same(self, record: dict[str, Any]) -> list[str]:
        """Return a note that the run is finished. Raises ConfigError naming whatever is asked for otherwise.

        Where it ran, on which device and how many of them, changes nothing any more, and is only told.
        """
        changed = run_record.differences(self.recorded, privacy.published(record))
        sentences = _sentences(changed)
        if changed.keys() <= {"precision", "ranks"}:
            return ["; ".join([f"{self.output_dir}: this run is already finished", *sentences.values()])]
        raise ConfigError(
            f"--resume: {self.output_dir} holds a finished run, and this is another one "
            f"({'; '.join(sentences.values())}). A finished run is not trained on, whatever --allow_change names: its "
            "schedule is at its end, and the state of its optimizer there is not kept. "
            f"{self._way_on(changed)}, or start anew with --overwrite"
        )

    def _way_on(self, changed: Changes) -> str:
        """Return what to say instead; the adapter can be trained further on its own base and in its own shape only."""
        if changed.keys() & (FinetuneConfig.deciding("shape") | {"lora_alpha", "use_rslora", "base_sha256"}):
            return "Begin the other run with --output_dir ANOTHER, without --resume"
        if self.recorded.get("kind") == FINETUNED:
            return f"Train its model further with --base_model {self.output_dir} --output_dir ANOTHER, without --resume"
        return f"Train its adapter further with --init_adapter {self.output_dir} --output_dir ANOTHER, without --resume"

    @property
    def _before(self) -> dict[str, Any]:
        return self.recorded


@dataclass
class Resumed(Start):
    """A run that continues from a checkpoint."""

    checkpoint_folder: Path = field(kw_only=True)
    checkpoint: Checkpoint = field(kw_only=True)
    best_damage: str = ""  # what is wrong with the other checkpoint that has the best weights
    is_proven: bool = True
    _changed: set[str] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        """Take what the checkpoint knows of the tracker."""
        self.tracker_id = self.checkpoint.facts["tracker"]

    def check_same(self, record: dict[str, Any]) -> list[str]:
        """Return notes on the differences that --allow_change allows.

        Raises CheckpointError naming every difference that is not allowed, or that no run can make.
        """
        record["run"] = self._before["run"]
        if "rate_search" in self._before:
            record["rate_search"] = self._before["rate_search"]
        changed = run_record.differences(self._before, record)
        sentences = _sentences(changed)
        for name in sorted(FinetuneConfig.deciding("shape") & changed.keys()):
            raise CheckpointError(f"--resume: {sentences[name]}; a run cannot change that, start a new one")
        refused = [name for name in changed if name not in (self.config.allow_change or [])]
        if refused:
            raise CheckpointError(
                f"--resume: this is another run ({'; '.join(sentences[name] for name in refused)}); say what was said "
                f"then, allow the change with --allow_change {','.join(changed)}, or start anew with --overwrite"
            )
        self._changed = set(changed)
        moved = list(run_record.moved(*map(run_record.surroundings, (self._before, record))).values())
        record["moved"] = [*self._before.get("moved", []), *moved]
        record["changes"] = [*self._before.get("changes", []), *sentences.values()]
        allowed = [f"changed, as allowed: {sentence}" for sentence in sentences.values()]
        elsewhere = [f"not as when the run began: {'; '.join(moved)}: from here on, sums may be rounded otherwise"]
        return [*allowed, *elsewhere * bool(moved), *self._notes_on_best()]

    def plan(self, job: Job, world: World) -> Plan:
        """Return the plan as it was, but for what follows from the changes that were allowed."""
        config_then = FinetuneConfig.model_construct(set(self._before["said"]), **self._before["options"])
        then = planning.resolve_steps(config_then, self._before["ledger"]["train"], self._before["ranks"])
        now = planning.resolve_steps(job.config, len(job.train), world.world_size)
        plan = planning.updated(Plan(**self.checkpoint.facts["plan"]), then, now)
        plan.share_prefix = job.config.shares_prefix
        if self._changed & FinetuneConfig.deciding("engine"):
            plan.reads_hidden = None
            plan = planning.resolve_engine(plan, job.config, job.train.lengths, job.size, world)
        elif "ranks" in self._changed:  # the weights are spread over other ones
            plan.shard = planning.choose_shard(job.config, job.size, planning.free_memory(world), world)
        return plan

    def restore(self, saver: Checkpoints, record: dict[str, Any]) -> TrainState:
        """Return the state of the checkpoint, having put weights, moments and loss scale back."""
        saver.restore(self.checkpoint_folder, self.checkpoint)
        state = TrainState(**self.checkpoint.facts["progress"], best=self.checkpoint.best)
        if self.best_damage or self._before["validation_sha256"] != record["validation_sha256"]:
            state.forget_best()
        elif (folder := self._best_folder()) and self._leaves(folder):
            state.best = checkpoints.weights_of(folder)  # the checkpoints of this run will hold it
        saver.keep(state)
        return state

    def _best_folder(self) -> Path | None:
        """Return the other checkpoint that holds the best adapter, None where this one holds it, or there is none."""
        progress = self.checkpoint.facts["progress"]
        if self.checkpoint.best or progress["best_step"] in (0, progress["step"]):
            return None
        return self.checkpoint_folder.with_name(f"checkpoint-{progress['best_step']}")

    def _leaves(self, folder: Path) -> bool:
        """Return whether a checkpoint will not be in the output folder: it is in another, or this one is set aside."""
        elsewhere = folder.resolve().parent != self.output_dir.resolve()
        return elsewhere or OutputFolder(self.output_dir).status == "finished"

    def check_best(self) -> str:
        """Return what is wrong with the other checkpoint that has the best weights, nothing where there is none."""
        if (folder := self._best_folder()) is None:
            return ""
        if checkpoints.is_in_parts(self.checkpoint_folder) and self._leaves(folder):
            return "it is not among the checkpoints of this folder, and too large to be kept in memory"
        return checkpoints.verify(folder)

    def _notes_on_best(self) -> list[str]:
        if not self.best_damage:
            return []
        where = f"{self._best_folder()} has the best weights so far"
        return [f"warning: {where}, and {self.best_damage}; the best ones are sought anew from here"]

    def _checkpoint_folder(self) -> Path | None:
        return self.checkpoint_folder

    @property
    def _before(self) -> dict[str, Any]:
        """Return the record of the run when the checkpoint was written."""
        return self.checkpoint.facts["record"]


def _sentences(changed: Changes) -> dict[str, str]:
    return {name: f"{name} was {was!r:.60} and is {now!r:.60}" for name, (was, now) in changed.items()}


def start(config: FinetuneConfig, world: World) -> Start:
    """Return how a run starts: fresh, resumed from a checkpoint, or not at all, since it is finished.

    Raises FolderError for an output folder that cannot be used, and CheckpointError or ConfigError for a checkpoint
    that cannot be resumed from.
    """
    output_dir = user_path(config.output_dir)
    folder = OutputFolder(output_dir)
    shared = "a run resumes from a file system that all its nodes share"
    if config.resume:
        world.require_same({f"--output_dir {config.output_dir}": folder.status}, shared)
    if config.resume and folder.status == "finished":
        if world.is_main:
            folder.check_unlocked()
        if not folder.record.get("run"):
            raise FolderError(
                f"--resume: {output_dir} holds a model that was exported, and no run; name another folder"
            )
        run_record.require_comparable(folder.record, output_dir / RECORD, FolderError, "name another folder")
        recorded = privacy.published(folder.record)
        return Finished(config, output_dir, finished=run_record.finished_run(output_dir), recorded=recorded)
    chosen, notes = world.broadcast(lambda: _find(config, output_dir))
    if chosen is None:
        return Start(config, output_dir, notes)
    manifest = chosen / MANIFEST
    found = f"manifest of sha256 {sha256(manifest)[:12]}" if manifest.is_file() else "no manifest"
    world.require_same({str(chosen): found}, shared)
    checkpoint = checkpoints.load(chosen)
    _require_complete(checkpoint, chosen / checkpoints.STATE)
    resumed = Resumed(config, output_dir, notes, checkpoint_folder=chosen, checkpoint=checkpoint)
    resumed.best_damage = world.broadcast(resumed.check_best)  # by one rank: all files are hashed
    return resumed


class _Facts(Shape):
    scaler: dict[str, Any] | None
    tracker: str


def _require_complete(checkpoint: Checkpoint, where: Path) -> None:
    """Raise CheckpointError, naming the key, unless a checkpoint's facts are what a run resumes from."""
    remedy, facts = "take another checkpoint, or start anew with --overwrite", checkpoint.facts
    _Facts.require(facts, where, CheckpointError, remedy)
    shape_of(Plan).require(facts["plan"], f"{where}, plan", CheckpointError, remedy)
    shape_of(TrainState, "best").require(facts["progress"], f"{where}, progress", CheckpointError, remedy)
    run_record.require_comparable(facts["record"], f"{where}, record", CheckpointError, remedy)


def _find(config: FinetuneConfig, output_dir: Path) -> tuple[Path | None, list[str]]:
    """Return the checkpoint folder to resume from, None for a fresh start, and notes; the output folder is checked."""
    folder = OutputFolder(output_dir)
    folder.check_unlocked()
    if config.resume_from_checkpoint:
        chosen = checkpoints.resolve(config.resume_from_checkpoint)
        folder.check(overwrite=folder.status == "unfinished", remedy="")
        return chosen, []
    notes = []
    if config.resume:
        newest, damaged = checkpoints.newest(output_dir)
        notes = [f"passed over {path}: {reason}" for path, reason in damaged.items()]
        if newest:
            folder.check(overwrite=True, remedy="")
            return newest, [*notes, f"resuming from {newest}"]
        notes.append("--resume: no checkpoint yet; starting fresh")
    remedy = "go on with --resume, or start anew with --overwrite"
    folder.check(config.overwrite or config.resume, remedy)
    return None, notes
