"""The options of merging an adapter, and of converting an old one."""

from typing import ClassVar

from lora_alpaca.config.options import Device, Dtype, Options, option
from lora_alpaca.config.shared import ADAPTER_DIR, EXPORT_DIR, BaseModelOptions


class ExportConfig(BaseModelOptions):
    """Merge an adapter into its base and save an ordinary transformers model."""

    wording: ClassVar[dict[str, dict[str, str]]] = {
        "base_model": {
            "help": "Base model: a folder, a hub id, or `demo`; the variable BASE_MODEL counts too.",
            "auto": "the base that the adapter records",
        },
        "revision": {
            "help": "Branch, tag or commit of the base model.",
            "auto": "the commit that the adapter records",
        },
    }

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


class ConvertConfig(Options):
    """Turn an old adapter_model.bin, read as tensors only, into safetensors: convert_adapter OLD NEW."""

    positional: ClassVar[tuple[str, ...]] = ("old", "new")

    old: str = option(..., "model and data", "Folder of the old adapter, or its hub id.", auto="none, it is required")
    new: str = option(
        ..., "model and data", "Folder for the new one; it must not be there.", auto="none, it is required"
    )
