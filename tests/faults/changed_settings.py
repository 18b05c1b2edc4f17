"""Going on with other settings: each is refused by name and nothing is touched, or it is allowed, and is in effect.

A run is killed after its fourth step of eight. Every case changes one thing, goes on without leave and then with it,
and measures in what the run does or writes that the new value is what counts from the next step on.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.operations import Watch
from faults.report import Report, chosen
from faults.scene import Ended, Scene, losses, make_model, make_rows, same, steps
from lora_alpaca.artifacts.checkpoint import STATE
from lora_alpaca.planning.plan import Plan
from lora_alpaca.storage.json_files import read_json
from lora_alpaca.storage.output_folder import MANIFEST, RECORD, read_record

AT, SAVED = 4, "checkpoint-6"  # where the run was killed; a checkpoint of after the change
RATE, STEPS, WARM_UP = 1e-2, 8, 2


@dataclass
class After:
    """What there is after a run that went on: all said, its folder, and the entries of its history by step."""

    ended: Ended
    folder: Path
    right: Path  # of the run that nothing was changed in

    def logged(self, step: int, name: str) -> float | None:
        """Return a figure of a step."""
        return next((entry[name] for entry in losses(self.folder) if entry["step"] == step and name in entry), None)

    def loss_differs(self, step: int = AT + 1) -> bool:
        """Whether the training loss of a step is another than it would have been."""
        mine, before = self.logged(step, "loss"), After(self.ended, self.right, self.right).logged(step, "loss")
        return mine is not None and mine != before

    def record(self, name: str) -> Any:
        """Return what the record of the finished run says."""
        return read_record(self.folder).get(name)

    def total(self) -> int:
        """Return the number of steps of the run."""
        return int((self.record("result") or {}).get("steps", -1))

    def adapter(self, name: str) -> Any:
        """Return a setting of the adapter."""
        return read_json(self.folder / "adapter_config.json").get(name)

    def plan(self, name: str) -> Any:
        """Return a choice of the run's plan, as a checkpoint after the change has it."""
        return read_json(self.folder / SAVED / STATE)["plan"][name]


@dataclass
class Change:
    """Something that is changed, the names by which it is listed, and how its effect is seen. No effect: for good."""

    names: str
    options: dict[str, Any]
    effect: Callable[[After], bool] | None
    prepare: Callable[["_Stage"], None] = lambda stage: None


def rate(options: dict[str, Any], step: int = AT) -> float:
    """Return the learning rate of a step, counted from 0, by the rule that the documentation gives."""
    value = {"learning_rate": RATE, "warmup_steps": WARM_UP, "lr_scheduler": "linear"} | options
    if step < value["warmup_steps"]:
        return float(value["learning_rate"] * (step + 1) / value["warmup_steps"])
    left = 1 - (step - value["warmup_steps"]) / (STEPS - value["warmup_steps"])
    return float(value["learning_rate"] * (1.0 if value["lr_scheduler"] == "constant" else left))


def has_rate(**options: Any) -> Callable[[After], bool]:
    """Return whether the step after the change is taken with the rate of the new options, and it is a new rate."""

    def true(after: After) -> bool:
        logged = after.logged(AT + 1, "learning_rate")
        return logged is not None and abs(logged - rate(options)) < 1e-12 and rate(options) != rate({})

    return true


def changes() -> list[Change]:
    """Return all of them."""
    of_loss = After.loss_differs
    alone: list[tuple[str, Any, Callable[[After], bool] | None]] = [
        ("learning_rate", 1e-3, has_rate(learning_rate=1e-3)),
        ("lr_scheduler", "constant", has_rate(lr_scheduler="constant")),
        ("warmup_steps", 8, has_rate(warmup_steps=8)),
        ("num_epochs", 3, lambda after: after.total() == 12),
        ("max_steps", 6, lambda after: after.total() == 6),
        ("batch_size", 2, lambda after: after.total() == 16),
        ("val_set_size", 6, lambda after: after.total() == 6),
        ("micro_batch_size", 2, lambda after: after.plan("micro_batch_size") == 2),
        ("eval_steps", 1, lambda after: after.logged(AT + 1, "validation_loss") is not None),
        ("early_stopping_patience", 1, lambda after: after.total() == _stops(after)),
        ("lora_alpha", 32, lambda after: after.adapter("lora_alpha") == 32 and of_loss(after)),
        ("use_rslora", True, lambda after: after.adapter("use_rslora") is True and of_loss(after)),
        ("lora_dropout", 0.0, lambda after: of_loss(after) and after.adapter("lora_dropout") == 0.0),
        ("weight_decay", 0.5, lambda after: not of_loss(after) and of_loss(after, AT + 2)),
        ("max_grad_norm", 1e-9, lambda after: not of_loss(after) and of_loss(after, AT + 2)),
        ("seed", 7, of_loss),
        ("group_by_length", True, of_loss),
        ("train_on_inputs", True, of_loss),
        ("cutoff_len", 29, lambda after: of_loss(after) and after.record("ledger")["truncated"]["count"] > 0),
        ("add_eos_token", False, lambda after: of_loss(after) and "end token is not learned" in after.ended.said),
        ("engine", "padded", lambda after: after.plan("engine") == "padded" and "engine: padded" in after.ended.said),
        ("token_budget", 64, lambda after: after.plan("token_budget") == 64),
        ("share_prefix", False, lambda after: "beginnings not shared" in after.ended.said),
        ("gradient_checkpointing", "True", lambda after: after.plan("gradient_checkpointing") is True),
        ("lora_r", 4, None),
        ("lora_target_modules", "q_proj,k_proj", None),
        ("use_dora", True, None),
    ]
    found = [Change(name, {name: value}, effect) for name, value, effect in alone]
    return [
        *found,
        Change("prompt_template_name,prompt_template", {"prompt_template_name": "alpaca"},
               lambda after: of_loss(after) and "template alpaca\n" in after.ended.said),
        Change("dtype,precision", {"dtype": "bf16"},
               lambda after: of_loss(after) and "bf16" in after.record("precision")),
        Change("load_8bit,load_4bit,precision", {"load_8bit": None, "load_4bit": True},
               lambda after: of_loss(after) and "4-bit" in after.record("precision")),
        Change("data_sha256", {}, of_loss, lambda stage: make_rows(stage.scene.data, shift=1)),
        Change("base_sha256", {}, of_loss, lambda stage: stage.other_model(seed=1)),
        Change("tokenizer_sha256", {}, lambda after: after.total() == STEPS, lambda stage: stage.other_tokenizer()),
        Change("base_model,base_sha256", {"base_model": "OTHER"}, of_loss),
        Change("data_path,data_sha256", {"data_path": "OTHER"}, of_loss),
        Change("ranks", {}, lambda after: after.record("ranks") == 1, lambda stage: stage.of_two_ranks()),
    ]  # fmt: skip


def _stops(after: After) -> int:
    """Return after which step a run with a patience of one validation must end."""
    best = float("inf")
    for entry in losses(after.folder):
        if loss := entry.get("validation_loss"):
            if loss >= best and entry["step"] > AT:
                return int(entry["step"])
            best = min(best, loss)
    return STEPS


def programme(share: float, folder: Path) -> Report:
    """Change everything that can be changed, or a share of it."""
    report = Report()
    stage = _Stage(folder)
    for change in chosen(changes(), share):
        stage.begin(change)
        report.count("changed_settings")
        names = set(change.names.split(","))

        before = stage.contents()
        ended = stage.go_on(change)
        listed = {name for name in names if f"{name} was " in ended.error()}
        report.expect(ended.code == 1 and listed == names, f"{change.names}: listed {listed}: {ended.last()}")
        report.expect(stage.contents() == before, f"{change.names}: something was touched by the refusal")
        report.count("changed_settings refused", ended.code == 1)
        if len(names) > 1:
            some = stage.go_on(change, allow_change=min(names))
            report.expect(some.code == 1, f"{change.names}: one of them was allowed, and that was enough")

        allowed = stage.go_on(change, allow_change=change.names)
        if change.effect is None:
            report.count("changed_settings refused for good", allowed.code == 1)
            good = allowed.code == 1 and f"{change.names} was " in allowed.error() and stage.contents() == before
            report.expect(good, f"{change.names}: allowed, it is not refused: {allowed.last()}")
            continue
        report.count("changed_settings applied", allowed.code == 0)
        report.expect(allowed.code == 0, f"{change.names}: allowed, it fails: {allowed.last()}")
        told = all(f"changed, as allowed: {name} was " in allowed.said for name in names)
        report.expect(told, f"{change.names}: not said what is changed")
        in_effect = allowed.code == 0 and change.effect(After(allowed, stage.out, stage.right))
        report.expect(in_effect, f"{change.names}: allowed, and without effect: {losses(stage.out)[-3:]}")

        # The changed run is a run as any other: killed again, it goes on with what is now its own, and is the same.
        shutil.rmtree(stage.folder / "whole", ignore_errors=True)
        stage.out.rename(stage.folder / "whole")
        stage.begin(change)
        died = stage.go_on(change, stage.killed(".final"), allow_change=change.names)
        report.expect(died.code == 9, f"{change.names}: not killed: {died.last()}")
        if (stage.out / SAVED).is_dir():
            report.count("changed_settings killed again")
            again = stage.go_on(change)
            right = again.code == 0 and same(stage.out, stage.folder / "whole")
            report.expect(right, f"{change.names}: killed after the change, it comes to something else: {again.last()}")
        stage.end(change)

    moved = Change("nothing", {"base_model": "COPY", "data_path": "COPY"}, None)
    stage.begin(moved)
    ended = stage.go_on(moved)
    report.count("files_moved")
    report.expect(ended.code == 0, f"the same base and data in another place are refused: {ended.last()}")
    report.expect(same(stage.out, stage.right), "the same base and data in another place come to something else")
    return report


class _Stage:
    """A run that was killed, and the changes of files."""

    def __init__(self, folder: Path):
        self.folder, self.out = folder, folder / "out"
        options = {"max_steps": None, "num_epochs": 2, "save_steps": 2, "warmup_steps": WARM_UP, "save_total_limit": 9}
        options["cutoff_len"] = 256
        self.scene = Scene(folder, options)
        self.right, self.killed_run, self.copies = folder / "right", folder / "killed", folder / "copies"
        self.others = folder / "others"
        for place in (self.copies, self.others):
            place.mkdir()
        shutil.copytree(self.scene.model, self.copies / "model")
        shutil.copy(self.scene.data, self.copies / "rows.json")
        make_model(self.others / "model", seed=1)
        make_rows(self.others / "rows.json", shift=1)
        ended = self.scene.finetune(self.right)
        assert ended.code == 0, ended.said
        died = self.scene.finetune(self.killed_run, self.killed(SAVED))
        assert died.code == 9, died.said
        assert steps(self.killed_run) == [2, AT], steps(self.killed_run)
        for step, was in ((place, After(ended, self.right, self.right)) for place in (0, AT)):
            plan = Plan(
                total_steps=STEPS, warmup_steps=WARM_UP, eval_steps=1, save_steps=1, micro_batch_size=1
            )  # the rule above is that of a run in which nothing is changed
            assert was.logged(step + 1, "learning_rate") == plan.learning_rate(step, _Rate()) == rate({}, step)

    def killed(self, name: str) -> Callable[[], None]:
        """Return what kills the process when it begins to save a checkpoint."""

        def before(kind: str, path: Path, more: Any) -> None:
            if name in str(path):
                os._exit(9)

        return lambda: Watch(self.folder, before).begin()

    def begin(self, change: Change) -> None:
        """Put the killed run in place, and change what is to be changed of files."""
        shutil.rmtree(self.out, ignore_errors=True)
        shutil.copytree(self.killed_run, self.out)
        change.prepare(self)

    def end(self, change: Change) -> None:
        """Put the files back."""
        shutil.rmtree(self.scene.model)
        shutil.copytree(self.copies / "model", self.scene.model)
        shutil.copy(self.copies / "rows.json", self.scene.data)

    def go_on(self, change: Change, before: Callable[[], None] | None = None, **more: Any) -> Ended:
        """Return how it ends to go on with the changed options."""
        names = {"base_model": "model", "data_path": "rows.json"}
        places = {"COPY": self.copies, "OTHER": self.others}
        options = {
            name: places[value] / names[name] if value in places else value for name, value in change.options.items()
        }
        return self.scene.finetune(self.out, before, **options, **more, resume=True)

    def contents(self) -> dict[str, Any]:
        """Return every file of the output folder with its time and hash."""
        return {
            str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in self.out.rglob("*") if path.is_file()
        }  # fmt: skip

    def other_model(self, seed: int) -> None:
        """Let other weights lie where the base lies."""
        shutil.rmtree(self.scene.model)
        make_model(self.scene.model, seed)

    def other_tokenizer(self) -> None:
        """Let two pieces of the vocabulary change places."""
        path = self.scene.model / "tokenizer.json"
        facts = json.loads(path.read_text())
        vocabulary = facts["model"]["vocab"]
        one, other = list(vocabulary)[-2:]
        vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
        path.write_text(json.dumps(facts))

    def of_two_ranks(self) -> None:
        """Let the checkpoints be those of a run on two ranks: they differ in what they say of it."""
        for path in (*self.out.glob("checkpoint-*"),):
            facts, manifest = read_json(path / STATE), read_json(path / MANIFEST)
            facts["record"]["ranks"] = 2
            data = json.dumps(facts).encode()
            (path / STATE).write_bytes(data)
            manifest["files"][STATE] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (path / MANIFEST).write_text(json.dumps(manifest))
        record = read_json(self.out / RECORD)
        (self.out / RECORD).write_text(json.dumps(record | {"ranks": 2}))


@dataclasses.dataclass
class _Rate:
    """What a plan reads of a config for its learning rates."""

    peak_rate: float = RATE
    lr_scheduler: str = "linear"
