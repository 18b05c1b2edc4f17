"""The options of training."""

import math
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from lora_alpaca.config.environment import world_size
from lora_alpaca.config.options import AutoBool, Engine, Finite, Layers, Names, Targets, lower, option
from lora_alpaca.config.shared import ADAPTER_DIR, DEMO, DataOptions, ModelOptions
from lora_alpaca.errors import ConfigError
from lora_alpaca.storage.paths import user_path

# what a run is identified by besides its options: names in its record, for --allow_change
RECORDED_FACTS = (
    "base_revision", "base_sha256", "tokenizer_sha256", "precision", "ranks", "data_sha256", "val_data_sha256",
    "prompt_template",
)  # fmt: skip


class FinetuneConfig(DataOptions, ModelOptions):
    """Train a LoRA adapter, or the weights of a model, on instructions."""

    wording: ClassVar[dict[str, dict[str, str]]] = {
        "load_8bit": {
            "help": "Hold the frozen base in 8 bits (LLM.int8); False leaves it unquantised.",
            "auto": "True, unless --load_4bit",
        },
    }

    output_dir: str = option(
        ADAPTER_DIR, "model and data", "Folder for the adapter and its checkpoints.", decides="nothing"
    )
    val_data_path: str = option(
        "",
        "data",
        "Rows to validate on, named as --data_path names rows; those of --data_path are then all trained on.",
        auto="rows of --data_path, as --val_set_size says",
        same_if="val_data_sha256",
    )
    val_set_size: Finite | None = option(
        None,
        "data",
        "Rows held out for validation; below 1 it is a share of the rows, 0 turns validation off.",
        unit="rows",
        auto="2000, at most a tenth of the rows",
        ge=0,
    )
    max_truncated: Finite | None = option(
        None,
        "data",
        "Largest share of rows that may be truncated; more is an error.",
        auto="no limit",
        ge=0,
        le=1,
        decides="nothing",
    )
    max_dropped: Finite | None = option(
        None,
        "data",
        "Largest share of rows that may be dropped, for whatever reason.",
        auto="no limit",
        ge=0,
        le=1,
        decides="nothing",
    )
    max_duplicates: Finite | None = option(
        None,
        "data",
        "Largest share of rows that may be exact doubles of others.",
        auto="no limit",
        ge=0,
        le=1,
        decides="nothing",
    )
    cache_dir: str = option(
        "",
        "data",
        "Folder for prepared rows, used again when nothing has changed; `none` keeps none.",
        auto="lora_alpaca in $XDG_CACHE_HOME or ~/.cache, for 5000 rows or more",
        decides="nothing",
    )

    batch_size: int = option(128, "training", "Rows per optimizer step, over all devices.", unit="rows", ge=1)
    micro_batch_size: int = option(
        4, "training", "Rows per forward pass and device; unless given, fitted to --batch_size.", unit="rows", ge=1
    )
    num_epochs: Finite = option(
        3, "training", "Passes over the data; may be a fraction.", unit="epochs", gt=0, le=10_000
    )
    max_steps: int | None = option(
        None, "training", "Optimizer steps, instead of --num_epochs.", unit="steps", auto="from --num_epochs", ge=1
    )
    learning_rate: Finite = option(
        3e-4, "training", "Peak learning rate; 2e-5 for --tune full, unless given.", gt=0, le=1
    )
    lr_scheduler: Literal["linear", "cosine", "constant"] = option(
        "linear",
        "training",
        "What the rate does after the warm-up: linear, cosine or constant; cosine for --tune full, unless given.",
    )
    warmup_steps: int | None = option(
        None,
        "training",
        "Steps in which the rate rises to its peak.",
        unit="steps",
        auto="a tenth of all, at most 100; for --tune full --warmup_ratio 0.03",
        ge=0,
    )
    warmup_ratio: Finite | None = option(
        None,
        "training",
        "Share of the steps in which the rate rises, instead of --warmup_steps.",
        auto="none",
        ge=0,
        le=1,
    )
    weight_decay: Finite = option(
        0.0, "training", "Weight decay of what is trained; of a base's weights, norms and biases do not decay.", ge=0
    )
    max_grad_norm: Finite = option(1.0, "training", "Gradients are scaled down to this norm; 0 turns it off.", ge=0)
    group_by_length: bool = option(
        False, "training", "Put rows of like length into one batch: less padding. Packs have none, and do not need it."
    )
    engine: Engine = option(
        "auto",
        "training",
        "How rows are computed: packed (without padding) or padded; auto packs where the model is found able to.",
        decides="engine",
    )
    token_budget: int | None = option(
        None,
        "training",
        "Most tokens in a pack.",
        unit="tokens",
        auto="2048 on a CPU, by memory on a GPU",
        ge=1,
        decides="engine",
    )
    share_prefix: bool = option(
        True,
        "training",
        "Compute what rows of a pack begin with, such as the template's preamble, once; they share its dropout too.",
    )
    compile: AutoBool = option(
        "auto",
        "training",
        "Compile norms, gates and loss with torch.compile: auto (on long runs), True or False.",
        decides="engine",
    )
    gradient_checkpointing: AutoBool = option(
        "auto",
        "training",
        "Recompute activations in the backward pass to save memory: auto, True or False.",
        decides="engine",
    )
    seed: int = option(42, "training", "Seed of the split, the order, the initial weights and dropout.", ge=0, lt=2**32)

    tune: Literal["lora", "full"] = option(
        "lora",
        "training",
        "What is trained: a LoRA adapter on the frozen base, or the weights of the base.",
        decides="shape",
    )
    layers: Layers = option(
        "all",
        "training",
        "Which layers are trained, or get the adapter: all, or top:N for the last N.",
        decides="shape",
    )
    layer_parts: Literal["all", "mlp"] = option(
        "all",
        "training",
        "With --tune full --layers top:N, what of these layers: all, or their MLPs.",
        decides="shape",
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = option(
        "adamw",
        "training",
        "adamw; adamw_8bit, its moments in 8 bits; or adafactor, which keeps means of rows and columns.",
        decides="shape",
    )

    shard: Literal["auto", "none", "grads", "full"] = option(
        "auto",
        "devices",
        "Spread the weights over the devices (FSDP2): full gathers a layer when it computes, grads keeps it gathered "
        "until its backward; auto is full where the base does not fit on one device.",
        decides="engine",
    )
    shard_size: int | None = option(
        None,
        "devices",
        "Devices that share one copy of the weights; further ones hold copies of their own.",
        unit="devices",
        auto="all devices",
        ge=1,
        decides="engine",
    )
    offload: Literal["none", "cpu"] = option(
        "none", "devices", "With --shard, keep the shards in the host's memory: cpu.", decides="engine"
    )

    processes: int | None = option(
        None,
        "devices",
        "Processes that this command starts on this machine, one for each device.",
        unit="processes",
        auto="one for each card with --shard full or grads, else one",
        ge=1,
        decides="nothing",
    )

    lora_r: int = option(8, "LoRA", "Rank of the adapter.", ge=1, decides="shape")
    lora_alpha: Finite = option(16, "LoRA", "Scale of the adapter: the update is multiplied by alpha / r.", gt=0)
    lora_dropout: Finite = option(0.05, "LoRA", "Dropout before the adapter.", ge=0, lt=1)
    lora_target_modules: Targets = option(
        ["q_proj", "v_proj"],
        "LoRA",
        "Modules that get an adapter: names, a regular expression over full names, or all-linear. Unless given, what "
        "the architecture calls q and v.",
        decides="shape",
    )
    use_rslora: bool = option(False, "LoRA", "Scale by alpha / sqrt(r) instead (arXiv:2312.03732).")
    use_dora: bool = option(False, "LoRA", "Learn magnitude and direction apart (arXiv:2402.09353).", decides="shape")
    init_adapter: str | None = option(
        None, "LoRA", "Start from the weights of this adapter folder, with a fresh optimizer.", auto="a new adapter"
    )

    eval_steps: int | None = option(
        None,
        "progress and saving",
        "Validate every so many steps.",
        unit="steps",
        auto="200, at most a fourth of the run",
        ge=1,
    )
    save_steps: int | None = option(
        None,
        "progress and saving",
        "Write a checkpoint every so many steps.",
        unit="steps",
        auto="200",
        ge=1,
        decides="nothing",
    )
    logging_steps: int = option(
        10, "progress and saving", "Report the loss every so many steps.", unit="steps", ge=1, decides="nothing"
    )
    save_total_limit: int = option(
        3,
        "progress and saving",
        "Checkpoints kept, and the best one; the oldest go first.",
        unit="folders",
        ge=1,
        decides="nothing",
    )
    early_stopping_patience: int | None = option(
        None,
        "progress and saving",
        "Stop after so many validations without a better loss.",
        unit="validations",
        auto="never",
        ge=1,
    )
    resume: bool = option(
        False, "progress and saving", "Go on from the newest checkpoint in --output_dir.", decides="nothing"
    )
    resume_from_checkpoint: str | None = option(
        None, "progress and saving", "Go on from this checkpoint folder.", auto="none", decides="nothing"
    )
    allow_change: Names | None = option(
        None,
        "progress and saving",
        "What may differ from the run that is resumed, by name.",
        auto="nothing",
        decides="nothing",
    )
    overwrite: bool = option(
        False, "progress and saving", "Remove what an earlier run of ours left in --output_dir.", decides="nothing"
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "progress and saving",
        "At a loss or gradient of NaN or infinity: stop, or skip the step (ten at most).",
        decides="nothing",
    )
    on_oom: Literal["stop", "shrink"] = option(
        "stop",
        "progress and saving",
        "Out of memory: stop, or go on with packs or micro-batches of half the size.",
        decides="nothing",
    )
    rank_timeout: int = option(
        1800,
        "progress and saving",
        "How long processes wait for one of them that hangs.",
        unit="seconds",
        ge=1,
        decides="nothing",
    )
    report: bool = option(
        True,
        "progress and saving",
        "Keep report.html and report.md in --output_dir: what was run, its curves, and what it changed on which rows.",
        decides="nothing",
    )
    report_rows: int | None = option(
        None,
        "progress and saving",
        "Training rows whose loss the report has, before and after.",
        unit="rows",
        auto="a hundredth of those trained on, at most 2000",
        ge=0,
        decides="nothing",
    )
    report_answers: int | None = option(
        None,
        "progress and saving",
        "Validation rows that are answered for the report, before and after; 0 turns it off.",
        unit="rows",
        auto="8, within a hundredth of the run's time",
        ge=0,
        le=256,
        decides="nothing",
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option(
        "none", "progress and saving", "Also send the figures to tensorboard, wandb or trackio.", decides="nothing"
    )
    wandb_project: str = option(
        "", "progress and saving", "Weights & Biases project; naming one turns wandb on.", decides="nothing"
    )
    wandb_run_name: str = option("", "progress and saving", "Weights & Biases run name.", decides="nothing")
    wandb_watch: Annotated[Literal["", "false", "gradients", "all"], BeforeValidator(lower)] = option(
        "", "progress and saving", "What wandb watches of the adapter: false, gradients or all.", decides="nothing"
    )
    wandb_log_model: Annotated[Literal["", "false", "true"], BeforeValidator(lower)] = option(
        "", "progress and saving", "Whether wandb keeps the finished adapter: false or true.", decides="nothing"
    )

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
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ConfigError("--warmup_ratio and --warmup_steps exclude each other; leave one out")
        if self.layer_parts != "all" and (self.tune != "full" or self.layers == "all"):
            raise ConfigError(f"--layer_parts {self.layer_parts} is for --tune full --layers top:N")
        if self.init_adapter and self.layers != "all":
            raise ConfigError(f"--layers {self.layers}: --init_adapter has its own layers; leave the flag out")
        if self.tune == "full":
            self._fit_full_finetuning()
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
        self.micro_batch(world_size())
        return self

    def _fit_full_finetuning(self) -> None:
        """Raise ConfigError, naming them all, for options that have no meaning where there is no adapter."""
        fields = type(self).model_fields
        if lora := [name for name in fields if _group(fields[name]) == "LoRA" and self.is_set(name)]:
            named = ", ".join(f"--{name}" for name in lora)
            raise ConfigError(f"--tune full trains the weights themselves, and {named} of an adapter; leave one out")
        for name in ("load_8bit", "load_4bit"):
            if getattr(self, name):
                raise ConfigError(f"--{name} {getattr(self, name)}: what is quantised cannot learn; leave it out")

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
