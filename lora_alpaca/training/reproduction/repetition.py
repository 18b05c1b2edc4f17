"""How a run that is made again starts: from the plan that is recorded, having checked what it is made of."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from lora_alpaca.artifacts import run_record
from lora_alpaca.config import ReproduceConfig
from lora_alpaca.distributed.world import World
from lora_alpaca.errors import AdapterError, ConfigError, LoraAlpacaError
from lora_alpaca.planning.plan import Plan
from lora_alpaca.prompts import AnyTemplate, load_template, template_from_json
from lora_alpaca.storage.json_files import shape_of
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.training.job import Job
from lora_alpaca.training.resume import Start

MADE_OF = {  # fact of the record -> the flag that names it
    "base_sha256": "base_model",
    "tokenizer_sha256": "base_model",
    "data_sha256": "data_path",
    "val_data_sha256": "val_data_path",
    "init_adapter_sha256": "init_adapter",
}
FACTS = ("precision", "ranks")  # that the place decides
OF_THE_PLACE = {"ranks", "precision", "device", "gpu"}  # what a plan is made for
OF_STEPS = ("total_steps", "warmup_steps", "eval_steps", "rates", "validated_at")  # of a plan, wherever it is made


@dataclass
class Repetition(Start):
    """A run that is made again. `elsewhere` is what is not as it was when the run was recorded: sentences by name."""

    recorded: dict[str, Any] = field(kw_only=True)
    of: ReproduceConfig = field(kw_only=True)
    elsewhere: dict[str, str] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Check the output folder. Raises FolderError."""
        folder = OutputFolder(self.output_dir)
        folder.check_unlocked()
        folder.check(self.of.overwrite, "start anew with --overwrite, or name another --output_dir")

    def template(self, asked: AnyTemplate | None) -> AnyTemplate | None:
        """Return the recorded template, whatever has become of its file."""
        return template_from_json(
            self.recorded["template"], self.recorded["template"].get("name", ""), f"{self.of.adapter}: the template"
        )

    @property
    def threads(self) -> int | None:
        """The threads that the recorded run computed with, None where there are no cores for so many."""
        found = super().threads
        return found if found and found <= max(torch.get_num_threads(), os.cpu_count() or 1) else None

    def check_same(self, record: dict[str, Any]) -> list[str]:
        """Return notes on what is not as it was. Raises ConfigError, naming all of it, where that is no longer the
        same run: another base, tokenizer, or other rows.
        """
        record["reproduces"] = self.recorded["run"]
        others = [
            f"--{flag} {getattr(self.config, flag)}: {name} was {_short(self.recorded[name])} "
            f"and is {_short(record.get(name))}"
            for name, flag in MADE_OF.items()
            if name in self.recorded and self.recorded[name] != record.get(name)
        ]
        if others:
            raise ConfigError(f"{self.of.adapter} was made of something else ({'; '.join(others)}); name what it was")
        self.elsewhere = self._differences(record)
        if self.recorded.get("validation_sha256") != record["validation_sha256"]:
            if not self.elsewhere:
                raise AdapterError(
                    f"{self.of.adapter}: of the same rows, in the same versions, others are held out or cut now: "
                    "options in its record were changed after the run; copy the folder again"
                )
            self.elsewhere["validation_sha256"] = "the rows that are validated on give other tokens"
        made_of = "made of what it was: base, tokenizer, rows"
        notes = [made_of + (", initial adapter" if self.config.init_adapter else "") + self._on_template()]
        if not self.elsewhere:
            return [*notes, "hardware and versions are those recorded: the result has to be the same, bit for bit"]
        return [
            *notes,
            f"not as recorded: {'; '.join(self.elsewhere.values())}: the same sums may be rounded otherwise here, so "
            f"losses are compared, to within {self.of.tolerance:g}",
        ]

    def plan(self, job: Job, world: World) -> Plan:
        """Return the recorded plan; one for this place, where the recorded one was made for other devices."""
        if (found := self.recorded.get("plan")) is None:
            return super().plan(job, world)
        shape_of(Plan).require(found, f"{self.of.adapter}: plan", AdapterError, "copy the folder again")
        then = replace(Plan(**found), within="")
        if self.elsewhere.keys() & OF_THE_PLACE:
            steps = {name: getattr(then, name) for name in OF_STEPS}
            return replace(super().plan(job, world), **steps)
        return replace(then, engine=job.config.engine)  # which is compared with plain rows here too

    @property
    def _before(self) -> dict[str, Any]:
        return self.recorded

    def _differences(self, record: Mapping[str, Any]) -> dict[str, str]:
        """Return sentences on hardware, versions and processes that are not as recorded, by name."""
        found = run_record.moved(*map(_facts, (self.recorded, record)))
        if "ranks" in found:
            found["ranks"] += (
                f" (each draws its own dropout; torchrun --nproc_per_node={self.recorded['ranks']} -m lora_alpaca "
                "reproduce makes it of as many)"
            )
        if moved := self.recorded.get("moved"):
            found["moved"] = f"it was resumed elsewhere ({'; '.join(map(str, moved))})"
        if self.config.on_oom == "shrink":
            found["on_oom"] = "with --on_oom shrink, its packs may have become smaller on the way"
        if record["hardware"]["device"] != "cpu":
            found["order"] = "a GPU adds in any order"
        return found

    def _on_template(self) -> str:
        """Return a note where the named template says something else by now; what the record says is used."""
        name = self.recorded["options"].get("prompt_template_name") or self.recorded["template"].get("name", "")
        try:
            now = load_template(name).to_json() if name and name != "chat" else None
        except LoraAlpacaError:
            return ", template as recorded"
        same = now is None or _told(now) == _told(self.recorded["template"])
        return ", template" if same else f", template as recorded; {name} says something else by now"


def _told(template: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in template.items() if key not in ("name", "description")}


def _short(value: Any) -> str:
    return "none" if value is None else str(value)[:12]


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides how numbers are rounded: versions, hardware, and how many processes."""
    return run_record.surroundings(record) | {name: record.get(name) for name in FACTS}
