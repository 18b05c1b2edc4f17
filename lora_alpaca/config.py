"""Every option, once: its name, type, unit, default, check and meaning.

The command line, `--help`, the record in the adapter folder and the documentation are all read from these classes.
This module imports neither torch nor any other heavy library, so a wrong flag is answered at once.
"""

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from lora_alpaca.common_options import ADAPTER_DIR, DEMO, EXPORT_DIR, DataOptions, ModelOptions
from lora_alpaca.environment import world_size
from lora_alpaca.errors import ConfigError
from lora_alpaca.options import AutoBool, Device, Dtype, Engine, Finite, Names, Options, lower, option, user_path


class FinetuneConfig(DataOptions, ModelOptions):
    """Train a LoRA adapter on instructions."""

    load_8bit: bool | None = option(
        None,
        "precision",
        "Hold the frozen base in 8 bits (LLM.int8); False leaves it unquantised.",
        auto="True, unless --load_4bit",
    )
    output_dir: str = option(ADAPTER_DIR, "model and data", "Folder for the adapter and its checkpoints.")
    val_set_size: Finite | None = option(
        None,
        "data",
        "Rows held out for validation; below 1 it is a share of the rows, 0 turns validation off.",
        unit="rows",
        auto="2000, at most a tenth of the rows",
        ge=0,
    )
    max_truncated: Finite | None = option(
        None, "data", "Largest share of rows that may be truncated; more is an error.", auto="no limit", ge=0, le=1
    )
    max_dropped: Finite | None = option(
        None, "data", "Largest share of rows that may be dropped, for whatever reason.", auto="no limit", ge=0, le=1
    )
    max_duplicates: Finite | None = option(
        None, "data", "Largest share of rows that may be exact doubles of others.", auto="no limit", ge=0, le=1
    )
    cache_dir: str = option(
        "",
        "data",
        "Folder for prepared rows, used again when nothing has changed; `none` keeps none.",
        auto="lora_alpaca in $XDG_CACHE_HOME or ~/.cache, for 5000 rows or more",
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
    learning_rate: Finite = option(3e-4, "training", "Peak learning rate of AdamW.", gt=0, le=1)
    lr_scheduler: Literal["linear", "cosine", "constant"] = option(
        "linear", "training", "What the rate does after the warm-up: linear, cosine or constant."
    )
    warmup_steps: int | None = option(
        None,
        "training",
        "Steps in which the rate rises to its peak.",
        unit="steps",
        auto="a tenth of all, at most 100",
        ge=0,
    )
    weight_decay: Finite = option(0.0, "training", "AdamW weight decay of the LoRA parameters.", ge=0)
    max_grad_norm: Finite = option(1.0, "training", "Gradients are scaled down to this norm; 0 turns it off.", ge=0)
    group_by_length: bool = option(
        False, "training", "Put rows of like length into one batch: less padding. Packs have none, and do not need it."
    )
    engine: Engine = option(
        "auto",
        "training",
        "How rows are computed: packed (without padding) or padded; auto packs where the model is found able to.",
    )
    token_budget: int | None = option(
        None, "training", "Most tokens in a pack.", unit="tokens", auto="2048 on a CPU, by memory on a GPU", ge=1
    )
    share_prefix: bool = option(
        True,
        "training",
        "Compute what rows of a pack begin with, such as the template's preamble, once; they share its dropout too.",
    )
    compile: AutoBool = option(
        "auto", "training", "Compile norms, gates and loss with torch.compile: auto (on long runs), True or False."
    )
    gradient_checkpointing: AutoBool = option(
        "auto", "training", "Recompute activations in the backward pass to save memory: auto, True or False."
    )
    seed: int = option(42, "training", "Seed of the split, the order, the initial weights and dropout.", ge=0, lt=2**32)

    lora_r: int = option(8, "LoRA", "Rank of the adapter.", ge=1)
    lora_alpha: Finite = option(16, "LoRA", "Scale of the adapter: the update is multiplied by alpha / r.", gt=0)
    lora_dropout: Finite = option(0.05, "LoRA", "Dropout before the adapter.", ge=0, lt=1)
    lora_target_modules: Names = option(
        ["q_proj", "v_proj"],
        "LoRA",
        "Modules that get an adapter: names, or all-linear. Unless given, what the architecture calls q and v.",
    )
    use_rslora: bool = option(False, "LoRA", "Scale by alpha / sqrt(r) instead (arXiv:2312.03732).")
    use_dora: bool = option(False, "LoRA", "Learn magnitude and direction apart (arXiv:2402.09353).")
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
        None, "progress and saving", "Write a checkpoint every so many steps.", unit="steps", auto="200", ge=1
    )
    logging_steps: int = option(10, "progress and saving", "Report the loss every so many steps.", unit="steps", ge=1)
    save_total_limit: int = option(
        3, "progress and saving", "Checkpoints kept; the oldest go first.", unit="folders", ge=1
    )
    early_stopping_patience: int | None = option(
        None,
        "progress and saving",
        "Stop after so many validations without a better loss.",
        unit="validations",
        auto="never",
        ge=1,
    )
    resume: bool = option(False, "progress and saving", "Go on from the newest checkpoint in --output_dir.")
    resume_from_checkpoint: str | None = option(
        None, "progress and saving", "Go on from this checkpoint folder.", auto="none"
    )
    overwrite: bool = option(False, "progress and saving", "Remove what an earlier run of ours left in --output_dir.")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = option(
        "none", "progress and saving", "Also send the figures to tensorboard, wandb or trackio."
    )
    wandb_project: str = option("", "progress and saving", "Weights & Biases project; naming one turns wandb on.")
    wandb_run_name: str = option("", "progress and saving", "Weights & Biases run name.")
    wandb_watch: Annotated[Literal["", "false", "gradients", "all"], BeforeValidator(lower)] = option(
        "", "progress and saving", "What wandb watches of the adapter: false, gradients or all."
    )
    wandb_log_model: Annotated[Literal["", "false", "true"], BeforeValidator(lower)] = option(
        "", "progress and saving", "Whether wandb keeps the finished adapter: false or true."
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if self.overwrite and (self.resume or self.resume_from_checkpoint):
            raise ConfigError("--resume and --overwrite exclude each other: go on with the run, or start anew")
        if self.resume and self.resume_from_checkpoint:
            raise ConfigError(
                "--resume takes the newest checkpoint, --resume_from_checkpoint a named one; give one of them"
            )
        if (size := self.val_set_size) is not None and size >= 1 and size != int(size):
            raise ConfigError(f"--val_set_size {size}: a whole number of rows, or a share below 1")
        for flag, name in (
            ("base_model", self.base_model),
            *(("data_path", name) for name in self.data_path.split(",")),
        ):
            if name not in ("", DEMO) and user_path(name).exists() and _holds(self.output_dir, name):
                raise ConfigError(f"--output_dir {self.output_dir} is, or holds, --{flag} {name}; name another folder")
        self.micro_batch(world_size())
        return self

    def micro_batch(self, world_size: int) -> int:
        """Return the rows per forward pass and device, so that `batch_size` comes out exactly on `world_size` devices.

        Left unsaid, it is the largest number up to the default that divides. Raises ConfigError where nothing does.
        """
        batch, micro = self.batch_size, self.micro_batch_size
        if batch % world_size == 0 and not self.said("micro_batch_size"):
            share = batch // world_size
            return max(size for size in range(1, min(micro, share) + 1) if share % size == 0)
        unit = world_size * (micro if self.said("micro_batch_size") else 1)
        if batch % unit == 0:
            return micro
        parts = f"--micro_batch_size {micro}" if self.said("micro_batch_size") else ""
        parts += (" x " if parts and world_size > 1 else "") + (f"{world_size} devices" if world_size > 1 else "")
        nearest = sorted({max(unit, batch // unit * unit), math.ceil(batch / unit) * unit})
        raise ConfigError(f"--batch_size {batch} is no multiple of {parts}; nearest: {' or '.join(map(str, nearest))}")


def _holds(folder: str, name: str) -> bool:
    return user_path(name).resolve().is_relative_to(user_path(folder).resolve())


class GenerateConfig(ModelOptions):
    """Answer instructions: once, in a terminal chat, or on a web page."""

    load_8bit: bool | None = option(None, "precision", "Hold the base in 8 bits (LLM.int8).", auto="False")
    base_model: str = option(
        "",
        "model and data",
        "Base model, merged model, or `demo`; the variable BASE_MODEL counts too.",
        auto="the base that the adapter records",
    )
    lora_weights: str = option(
        "",
        "model and data",
        "Adapter folder, or its hub id; `none` answers with the base alone.",
        auto=f"{ADAPTER_DIR}, if it was made for the base model",
    )
    prompt_template: str = option(
        "", "model and data", "Prompt template: a name, or a path.", auto="the one that the adapter records"
    )
    instruction: str | None = option(None, "what to answer", "Answer this instruction and leave.", auto="the web page")
    input: str = option("", "what to answer", "Input that goes with --instruction.")
    system: str = option("", "what to answer", "System message, for templates that have one.")
    chat: bool = option(False, "what to answer", "Read instructions from the terminal, one a line.")
    server_name: str = option("127.0.0.1", "web page", "Address to listen on; 0.0.0.0 opens it to the network.")
    server_port: int | None = option(
        None, "web page", "Port to listen on.", auto="7860, or the next free one", ge=1, le=65535
    )
    share_gradio: bool = option(False, "web page", "Ask Gradio for a public link to the page.")
    temperature: Finite = option(
        0.1, "sampling", "Sampling temperature; 0 always takes the likeliest token.", ge=0, le=10
    )
    top_p: Finite = option(0.75, "sampling", "Sample from the likeliest tokens that make up this share.", gt=0, le=1)
    top_k: int = option(
        40, "sampling", "Sample from so many of the likeliest tokens; 0 is no limit.", unit="tokens", ge=0
    )
    num_beams: int = option(1, "sampling", "Beams of the search; 1 is plain sampling.", unit="beams", ge=1, le=16)
    max_new_tokens: int = option(128, "sampling", "Longest answer.", unit="tokens", ge=1)
    seed: int | None = option(
        None, "sampling", "Seed of the sampling.", auto="another answer every time", ge=0, lt=2**32
    )

    @model_validator(mode="after")
    def _one_mode(self) -> Self:
        if self.chat and self.instruction is not None:
            raise ConfigError("--chat and --instruction exclude each other; choose one")
        if self.input and self.instruction is None:
            raise ConfigError("--input goes with --instruction, which is missing")
        return self


class ExportConfig(Options):
    """Merge an adapter into its base and save an ordinary transformers model."""

    base_model: str = option(
        "",
        "model and data",
        "Base model: a folder, a hub id, or `demo`; the variable BASE_MODEL counts too.",
        auto="the base that the adapter records",
    )
    revision: str | None = option(
        None, "model and data", "Branch, tag or commit of the base model.", auto="the commit that the adapter records"
    )
    trust_remote_code: bool = option(
        False, "model and data", "Run Python code that the base model's repository brings."
    )
    lora_weights: str = option(ADAPTER_DIR, "model and data", "Adapter folder.")
    output_dir: str = option(EXPORT_DIR, "model and data", "Folder for the merged model.")
    prompt_template: str = option(
        "", "model and data", "Prompt template: a name, or a path.", auto="the one that the adapter records"
    )
    dtype: Dtype = option(
        "auto", "precision", "Dtype of the saved weights; auto is the one that the base is stored in."
    )
    device: Device = option("auto", "precision", "Where to merge; auto is the CPU.")
    overwrite: bool = option(False, "saving", "Remove what an earlier export left in --output_dir.")


class ShowConfig(DataOptions):
    """Show rows as the tokens that training sees: which are learned, which are not, and what was lost."""

    base_model: str = option(
        "", "model and data", "Model whose tokenizer is used: a folder, a hub id, or `demo`.", auto="demo"
    )
    revision: str | None = option(None, "model and data", "Branch, tag or commit of a model from the hub.", auto="main")
    trust_remote_code: bool = option(False, "model and data", "Run Python code that the model's repository brings.")
    row: Names = option(["1"], "what to show", "Which rows: their numbers in the order of the data, from 1.")
    html: str | None = option(
        None,
        "what to show",
        "Write a web page of the rows to this file; without --row, of the first 100.",
        auto="the terminal",
    )


class ConvertConfig(Options):
    """Turn an old adapter_model.bin, read as tensors only, into safetensors: convert_adapter OLD NEW."""

    places: ClassVar[tuple[str, ...]] = ("old", "new")

    old: str = option(..., "model and data", "Folder of the old adapter, or its hub id.", auto="none, it must be said")
    new: str = option(
        ..., "model and data", "Folder for the new one; it must not be there.", auto="none, it must be said"
    )
