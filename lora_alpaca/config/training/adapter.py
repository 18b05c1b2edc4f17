"""The options of a run on its LoRA adapter."""

from lora_alpaca.config.options import Finite, Names, Options, Targets, option


class AdapterOptions(Options):
    """The shape of a LoRA adapter and where it starts from."""

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
    lora_target_parameters: Names | None = option(
        None,
        "LoRA",
        "Parameters that get an adapter besides the modules, by the ends of their names: experts of a mixture that are "
        "one 3-D tensor, such as experts.gate_up_proj,experts.down_proj. Dropout is then 0.",
        auto="none",
        decides="shape",
    )
    lora_plus_ratio: Finite | None = option(
        None,
        "LoRA",
        "LoRA+: the rate of B is that of A, --learning_rate, times this (arXiv:2402.12354).",
        auto="1, the same rate for both",
        gt=0,
        le=1000,
    )
    use_rslora: bool = option(False, "LoRA", "Scale by alpha / sqrt(r) instead (arXiv:2312.03732).")
    use_dora: bool = option(False, "LoRA", "Learn magnitude and direction apart (arXiv:2402.09353).", decides="shape")
    init_adapter: str | None = option(
        None, "LoRA", "Start from the weights of this adapter folder, with a fresh optimizer.", auto="a new adapter"
    )
