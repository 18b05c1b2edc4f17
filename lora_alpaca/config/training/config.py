"""The options of training, put together, and what they must fulfil together."""

import math
from typing import Any, ClassVar, Self

from pydantic import model_validator

from lora_alpaca.config.environment import world_size
from lora_alpaca.config.shared import DEMO, DataOptions, ModelOptions
from lora_alpaca.config.training.adapter import AdapterOptions
from lora_alpaca.config.training.devices import DeviceOptions
from lora_alpaca.config.training.learning import LearningOptions
from lora_alpaca.config.training.rows import RowOptions
from lora_alpaca.config.training.running import RunningOptions
from lora_alpaca.errors import ConfigError
from lora_alpaca.storage.paths import user_path

# what a run is identified by besides its options: names in its record, for --allow_change
RECORDED_FACTS = (
    "base_revision", "base_sha256", "tokenizer_sha256", "precision", "ranks", "data_sha256", "val_data_sha256",
    "prompt_template",
)  # fmt: skip


class FinetuneConfig(
    RunningOptions, AdapterOptions, DeviceOptions, LearningOptions, RowOptions, DataOptions, ModelOptions
):
    """Train a LoRA adapter, or the weights of a model, on instructions."""

    wording: ClassVar[dict[str, dict[str, str]]] = {
        "load_8bit": {
            "help": "Hold the frozen base in 8 bits (LLM.int8); False leaves it unquantised.",
            "auto": "True, unless --load_4bit",
        },
    }

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.overwrite and (self.resume or self.resume_from_checkpoint):
            raise ConfigError("--resume and --overwrite exclude each other: go on with the run, or start anew")
        if self.resume and self.resume_from_checkpoint:
            raise ConfigError(
                "--resume takes the newest checkpoint, --resume_from_checkpoint a named one; give one of them"
            )
        if (self.resume_from_checkpoint or "").lower() in ("true", "1"):
            raise ConfigError(
                f"--resume_from_checkpoint {self.resume_from_checkpoint}: it names a folder; the newest checkpoint in "
                "--output_dir is taken by --resume"
            )
        for name in self.allow_change or []:
            if name not in {*type(self).model_fields, *RECORDED_FACTS}:
                raise ConfigError(f"--allow_change {name}: no such name; the refusal to resume lists them")
        if self.allow_change and not (self.resume or self.resume_from_checkpoint):
            raise ConfigError("--allow_change is for a run that is resumed; say --resume too")
        if (size := self.val_set_size) is not None and size >= 1 and size != int(size):
            raise ConfigError(f"--val_set_size {size}: a whole number of rows, or a share below 1")
        for flag, name in (
            ("base_model", self.base_model),
            *(("data_path", name) for name in self.data_path.split(",")),
            *(("val_data_path", name) for name in self.val_data_path.split(",")),
        ):
            if name not in ("", DEMO) and user_path(name).exists() and _holds(self.output_dir, name):
                raise ConfigError(f"--output_dir {self.output_dir} is, or holds, --{flag} {name}; name another folder")
        if self.max_cost is not None and self.price_per_hour is None:
            raise ConfigError(f"--max_cost {self.max_cost:g}: say what an hour costs with --price_per_hour")
        if self.export_dir and user_path(self.export_dir).resolve() == user_path(self.output_dir).resolve():
            raise ConfigError(f"--export_dir {self.export_dir} is --output_dir; name another folder")
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ConfigError("--warmup_ratio and --warmup_steps exclude each other; leave one out")
        if self.layer_parts != "all" and (self.tune != "full" or self.layers == "all"):
            raise ConfigError(f"--layer_parts {self.layer_parts} is for --tune full --layers top:N")
        if self.cache_hidden and self.layers == "all":
            raise ConfigError("--cache_hidden is for layers below those that learn; say --layers top:N too")
        if self.cache_hidden and self.neftune_alpha:
            raise ConfigError("--neftune_alpha changes what --cache_hidden would keep; leave one out")
        if self.cache_hidden and self.shard in ("grads", "full"):
            raise ConfigError(f"--cache_hidden reads whole layers, which --shard {self.shard} spreads; leave one out")
        if self.init_adapter and self.layers != "all":
            raise ConfigError(f"--layers {self.layers}: --init_adapter has its own layers; leave the flag out")
        if self.tune == "full":
            self._fit_full_finetuning()
        elif self.lora_target_parameters:
            self._fit_target_parameters()
        if self.shard == "none" and (self.offload != "none" or self.shard_size):
            raise ConfigError("--offload and --shard_size are for sharded weights: --shard full, or grads")
        if self.shard_size and world_size() % self.shard_size:
            raise ConfigError(f"--shard_size {self.shard_size}: the {world_size()} devices are no multiple of it")
        if self.shard in ("grads", "full") and self.use_dora:
            raise ConfigError(f"--use_dora reads whole weights, which --shard {self.shard} spreads; leave one out")
        if self.shard in ("grads", "full") and self.on_oom == "shrink":
            raise ConfigError(
                f"--on_oom shrink: with --shard {self.shard} a rank that is short of memory is missed by all others in "
                "the middle of a layer; lower --token_budget beforehand"
            )
        if self.is_set("batch_size") or not self.is_set("recipe"):  # or else its recipe has one that fits
            self.micro_batch(world_size())
        return self

    def _fit_target_parameters(self) -> None:
        """Raise ConfigError for what PEFT cannot have of an adapter on parameters."""
        cannot = {
            "--lora_dropout above 0": self.is_set("lora_dropout") and self.lora_dropout > 0,
            "--use_dora": self.use_dora,
            "--layers": self.layers != "all",
            "--init_adapter": bool(self.init_adapter),
            "--shard full or grads": self.shard in ("grads", "full"),
        }
        if named := [flag for flag, is_asked in cannot.items() if is_asked]:
            raise ConfigError(f"--lora_target_parameters excludes {', '.join(named)}; leave one of them out")

    def _fit_full_finetuning(self) -> None:
        """Raise ConfigError, naming them all, for options that have no meaning where there is no adapter."""
        fields = type(self).model_fields
        if lora := [name for name in fields if _group(fields[name]) == "LoRA" and self.is_set(name)]:
            named = ", ".join(f"--{name}" for name in lora)
            raise ConfigError(f"--tune full trains the weights themselves, and {named} of an adapter; leave one out")
        if self.is_set("recipe"):
            raise ConfigError(f"--recipe {self.recipe} is of a LoRA adapter; leave it out: --tune full has its own")
        for name in ("load_8bit", "load_4bit"):
            if getattr(self, name):
                raise ConfigError(f"--{name} {getattr(self, name)}: what is quantised cannot learn; leave it out")

    @property
    def peak_rate(self) -> float:
        """Return the peak learning rate, which must be known: with auto, a search has found one."""
        assert isinstance(self.learning_rate, float), "the learning rate is not decided yet"
        return self.learning_rate

    @property
    def shares_prefix(self) -> bool:
        """Whether rows of a pack may share their beginnings: with noise on their embeddings, none begin alike."""
        return self.share_prefix and not self.neftune_alpha

    @property
    def fills_time(self) -> bool:
        """Return whether a run trains until its time is used, however many epochs that are."""
        return self.max_minutes is not None and self.max_steps is None and not self.is_set("num_epochs")

    def micro_batch(self, world_size: int) -> int:
        """Return the rows per forward pass and device, so that `batch_size` comes out exactly on `world_size` devices.

        Unless the user set it, it is the largest divisor up to the default. Raises ConfigError where no number fits.
        """
        batch, micro = self.batch_size, self.micro_batch_size
        if batch % world_size == 0 and not self.is_set("micro_batch_size"):
            share = batch // world_size
            return max(size for size in range(1, min(micro, share) + 1) if share % size == 0)
        unit = world_size * (micro if self.is_set("micro_batch_size") else 1)
        if batch % unit == 0:
            return micro
        parts = f"--micro_batch_size {micro}" if self.is_set("micro_batch_size") else ""
        parts += (" x " if parts and world_size > 1 else "") + (f"{world_size} devices" if world_size > 1 else "")
        nearest = sorted({max(unit, batch // unit * unit), math.ceil(batch / unit) * unit})
        raise ConfigError(f"--batch_size {batch} is no multiple of {parts}; nearest: {' or '.join(map(str, nearest))}")


def _group(field: Any) -> str:
    return str(field.json_schema_extra["group"])


def _holds(folder: str, name: str) -> bool:
    return user_path(name).resolve().is_relative_to(user_path(folder).resolve())
