"""The options of a run on how it learns."""

from typing import Literal

from lora_alpaca.config.options import AutoBool, Engine, Finite, Layers, LearningRate, Options, option


class LearningOptions(Options):
    """What is trained, with which batches, rate and optimizer, and how rows are computed."""

    recipe: Literal["alpaca-lora", "fast"] = option(
        "alpaca-lora",
        "training",
        "Defaults of a LoRA run, which every flag given by hand replaces: alpaca-lora, those listed here; or fast, "
        "small batches at a high rate on all linear layers (docs/recipes.md).",
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
    max_minutes: Finite | None = option(
        None,
        "training",
        "Time from the start of the run to its end, in which the rate falls; without --num_epochs and --max_steps, "
        "rows are trained on until then.",
        unit="minutes",
        auto="no limit",
        gt=0,
    )
    max_cost: Finite | None = option(
        None,
        "training",
        "The most that the run may cost, by --price_per_hour; in any currency.",
        auto="no limit",
        gt=0,
    )
    learning_rate: LearningRate = option(
        3e-4,
        "training",
        "Peak learning rate; 2e-5 for --tune full, unless given; auto finds one by short runs on the rows "
        "(docs/recipes.md).",
    )
    find_lr_minutes: Finite | None = option(
        None,
        "training",
        "The most that the search of --learning_rate auto may take.",
        unit="minutes",
        auto="a tenth of the rows that the run computes, or of --max_minutes",
        gt=0,
        decides="nothing",
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
    neftune_alpha: Finite | None = option(
        None,
        "training",
        "NEFTune: noise on the embeddings in training, alpha / sqrt(tokens x width) at most (arXiv:2310.05914); rows "
        "then share no beginnings.",
        auto="no noise",
        gt=0,
    )
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
    cache_hidden: bool = option(
        False,
        "training",
        "With --layers top:N, compute the layers below once a row, and read what they make of it in every later pass.",
        decides="engine",
    )
    cache_gb: Finite = option(
        20, "training", "Most that --cache_hidden keeps in --cache_dir.", unit="GB", gt=0, decides="nothing"
    )
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = option(
        "adamw",
        "training",
        "adamw; adamw_8bit, its moments in 8 bits; or adafactor, which keeps means of rows and columns.",
        decides="shape",
    )
