"""Going on with a run: which checkpoint, whether it is still the same run, and everything put back as it was."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import checkpoint, run_record
from lora_alpaca.artifacts.checkpoint import Checkpoint
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import Examples
from lora_alpaca.errors import CheckpointError
from lora_alpaca.models import lora
from lora_alpaca.planning.plan import Plan, resolve
from lora_alpaca.prompts import AnyTemplate, template_from_json
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.training.progress import Progress
from lora_alpaca.training.step import Stepper

SHAPE = {"lora_r", "lora_target_modules", "use_dora"}  # what the tensors of a checkpoint were made for


def find(config: FinetuneConfig, output_dir: Path, reporter: Progress) -> Path | None:
    """Return the checkpoint folder to go on from, or None for a fresh start, for which the output folder is checked."""
    output = OutputFolder(output_dir)
    output.check_unlocked()
    if config.resume_from_checkpoint:
        folder = checkpoint.resolve(config.resume_from_checkpoint)
        output.check(overwrite=True, remedy="")
        return folder
    if config.resume:
        newest, passed = checkpoint.newest(output_dir)
        reporter.say(*(f"passed over {folder}: {reason}" for folder, reason in passed.items()))
        if newest:
            reporter.say(f"resuming from {newest}")
            return newest
    output.check(config.overwrite or config.resume, "go on with --resume, or start anew with --overwrite")
    if config.resume:
        reporter.say("--resume: no checkpoint yet; starting fresh")
    return None


def template_as_before(checkpoint: Checkpoint | None, template: AnyTemplate | None) -> AnyTemplate | None:
    """Return the template to use; that of a run that goes on with a chat template is the one of then, with its date."""
    if checkpoint is None or (template is not None and template.name != "chat"):
        return template
    recorded = template_from_json(checkpoint.facts["record"]["template"], "", "checkpoint")
    return recorded if recorded.name == "chat" else template


def check_same(checkpoint: Checkpoint, now: dict[str, Any], allowed: list[str]) -> dict[str, str]:
    """Return name -> sentence of what differs from the run that a checkpoint is of, and was allowed to.

    The record `now` becomes one of that run. Raises CheckpointError naming every difference that was not, or cannot be.
    """
    stored = checkpoint.facts["record"]
    now["run"] = stored["run"]
    changed = run_record.differences(stored, now)
    said = {name: f"{name} was {before!r:.60} and is {after!r:.60}" for name, (before, after) in changed.items()}
    for name in SHAPE & changed.keys():
        raise CheckpointError(f"--resume: {said[name]}; a run cannot change that, start a new one")
    refused = [name for name in changed if name not in allowed]
    if refused:
        raise CheckpointError(
            f"--resume: this is another run ({'; '.join(said[name] for name in refused)}); say what was said then, "
            f"allow the change with --allow_change {','.join(changed)}, or start anew with --overwrite"
        )
    return {name: f"changed, as allowed: {sentence}" for name, sentence in said.items()}


def plan_as_before(checkpoint: Checkpoint, config: FinetuneConfig, train: Examples, world_size: int) -> Plan:
    """Return the plan of a run that goes on: as it was, but for what follows from the changes that were allowed."""
    record = checkpoint.facts["record"]
    before = Plan(**checkpoint.facts["plan"])
    config_then = FinetuneConfig.model_construct(set(record["said"]), **record["options"])
    then = asdict(resolve(config_then, record["ledger"]["train"], record["ranks"]))
    now = asdict(resolve(config, len(train), world_size))
    return replace(before, **{name: value for name, value in now.items() if value != then[name]})


def restore(checkpoint: Checkpoint, learner: Stepper) -> None:
    """Put adapter, optimizer and loss scale back."""
    lora.set_state(learner.model, checkpoint.adapter, "checkpoint")
    learner.load_optimizer_state(checkpoint.optimizer)
    if learner.ranks.scaler is not None and checkpoint.facts["scaler"]:
        learner.ranks.scaler.load_state_dict(checkpoint.facts["scaler"])
