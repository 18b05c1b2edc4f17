"""The kinds of adapters that are merged, and why others are not."""

from pathlib import Path
from typing import Any

from lora_alpaca.errors import AdapterError
from lora_alpaca.models.lora import CONFIG

MERGED = {  # kinds of which tests/export/every_kind.py proves that they are merged exactly
    "ADALORA", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA", "GRALORA", "HIRA", "HRA", "IA3",
    "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT", "PEANUT", "PVERA", "RANDLORA", "ROAD", "TINYLORA",
    "TRAINABLE_TOKENS", "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
BIASES = {"BEFT", "IA3", "ROAD"}  # kinds whose rule is for the bias of a layer, too
ADDING = {"ADALORA", "LOHA", "LOKR", "VERA"}  # kinds that add the same to every tensor
CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # beginnings that take from the base what they add
NOT_AGAIN = ("pissa_niter", "corda", "loftq", "lora_ga")  # of these, the ones that PEFT does not find again
NO_TENSOR = {  # settings of what is no change of a tensor, or not of one that there is
    "alora_invocation_tokens": "changes what follows some tokens, and no tensor",
    "arrow_config": "chooses among adapters",
    "kasa_config": "changes the base by what it is when the adapter begins",
    "layer_replication": "makes a model with more layers than the base",
    "monteclora_config": "keeps what it draws by chance beside the adapter",
}


def require_mergeable(config: Any, folder: Path) -> str:
    """Return the kind of an adapter. Raises AdapterError for one that is not merged, and says why."""
    kind, where = str(config.peft_type.value), folder / CONFIG
    require_same_base(config, folder, CHANGED_BASE)
    if kind not in MERGED:
        raise AdapterError(
            f"{where}: peft_type is {kind}, which is not merged; docs/export.md lists the kinds that are"
        )
    for setting, does in NO_TENSOR.items():
        if getattr(config, setting, None):
            raise AdapterError(f"{where}: {setting} {does}; it is not merged")
    if getattr(config, "save_projection", True) is False:
        raise AdapterError(f"{where}: save_projection is false: what {kind} multiplies with is not there to be merged")
    return kind


def require_same_base(config: Any, folder: Path, beginnings: tuple[str, ...] = NOT_AGAIN) -> None:
    """Raise AdapterError for an adapter on a base that was changed when it began, and that is not there."""
    beginning = str(getattr(config, "init_lora_weights", ""))
    if beginning.startswith(beginnings):
        raise AdapterError(
            f"{folder / CONFIG}: init_lora_weights is {beginning:.40}: this adapter needs a base that was changed when "
            "it began; save it with path_initial_model_for_weight_conversion of PEFT, which makes plain LoRA of it"
        )
