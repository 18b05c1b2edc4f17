"""The options of merging an adapter, and of converting an old one."""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, model_validator

from lora_alpaca.config.options import Device, Dtype, Names, Options, option
from lora_alpaca.config.shared import ADAPTER_DIR, EXPORT_DIR, BaseModelOptions
from lora_alpaca.errors import ConfigError

FORMATS = ("hf", "gguf", "gguf_lora", "adapter", "state_dict")
GgufType = Literal["f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_1", "q5_0", "q4_k_m", "q4_1", "q4_0"]
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def _size(value: Any) -> Any:
    """Return a number of bytes, said with a unit or as a number."""
    text = str(value).strip().upper()
    unit = next((unit for unit in UNITS if text.endswith(unit)), "")
    try:
        return int(float(text.removesuffix(unit)) * UNITS.get(unit, 1))
    except (ValueError, OverflowError):
        raise ValueError("is not a size, such as 500MB or 5GB") from None


def _weights(value: Any) -> Any:
    return [part.strip() for part in value.strip("[]()").split(",")] if isinstance(value, str) else value


Size = Annotated[int, BeforeValidator(_size)]
Weights = Annotated[list[float], BeforeValidator(_weights)]


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

    lora_weights: str = option(ADAPTER_DIR, "model and data", "Adapter folder, or several with commas between.")
    adapter_weights: Weights | None = option(
        None,
        "model and data",
        "What the change of each adapter is multiplied by, with commas between.",
        auto="1 for each",
    )
    output_dir: str = option(
        EXPORT_DIR, "model and data", "Folder for the merged model; of several formats, each is a folder in it."
    )
    format: Names = option(
        ["hf"], "model and data", f"What to write: {', '.join(FORMATS)}; several with commas between."
    )
    gguf_type: GgufType = option("f16", "model and data", "Type of the large tensors of a GGUF file.")
    prompt_template: str = option(
        "", "model and data", "Prompt template: a name, or a path.", auto="the one that the adapter records"
    )
    dtype: Dtype = option(
        "auto", "precision", "Dtype of the saved weights; auto is the one that the base is stored in."
    )
    merge_into: Literal["full_precision", "quantised_values"] = option(
        "full_precision",
        "precision",
        "What an adapter that was trained on a base in 8 or 4 bits is merged into: the base as it is stored, or the "
        "values that training computed with.",
    )
    device: Device = option("auto", "precision", "Where the receipt is computed; auto is the CPU.")
    max_shard_size: Size = option(
        5_000_000_000, "saving", "The most that a file of weights takes, such as 500MB or 5GB.", unit="bytes"
    )
    receipt: bool = option(True, "saving", "Prove that what is written answers as base + adapter does.")
    push_to_hub: str = option(
        "", "saving", "Repository on the hub, NAME/REPOSITORY, to upload the folder to.", auto="no upload"
    )
    private: bool = option(True, "saving", "Whether a repository that --push_to_hub makes is private.")
    overwrite: bool = option(False, "saving", "Remove what an earlier export left in --output_dir.")

    @model_validator(mode="after")
    def _known_formats(self) -> Self:
        for name in self.format:
            if name not in FORMATS:
                raise ConfigError(f"--format {name}: not one of {', '.join(FORMATS)}")
        if not self.format or len(set(self.format)) < len(self.format):
            raise ConfigError("--format: name each format once")
        return self


class ConvertConfig(Options):
    """Turn an old adapter_model.bin, read as tensors only, into safetensors: convert_adapter OLD NEW."""

    positional: ClassVar[tuple[str, ...]] = ("old", "new")

    old: str = option(..., "model and data", "Folder of the old adapter, or its hub id.", auto="none, it is required")
    new: str = option(
        ..., "model and data", "Folder for the new one; it must not be there.", auto="none, it is required"
    )


class ConvertBaseConfig(Options):
    """Turn a base's pytorch_model.bin, read as tensors only, into safetensors: convert_base OLD NEW."""

    positional: ClassVar[tuple[str, ...]] = ("old", "new")

    old: str = option(..., "model and data", "Folder of the base, or its hub id.", auto="none, it is required")
    new: str = option(
        ..., "model and data", "Folder for the new one; it must not be there.", auto="none, it is required"
    )
    revision: str | None = option(None, "model and data", "Branch, tag or commit of a base from the hub.", auto="main")


class WeightDiffConfig(Options):
    """Publish a model as its difference: weight_diff make BASE TUNED DIFF; weight_diff recover BASE DIFF TUNED."""

    positional: ClassVar[tuple[str, ...]] = ("action", "base", "source", "target")

    action: Literal["make", "recover"] = option(
        ..., "model and data", "make a difference, or recover a model from one.", auto="none, it is required"
    )
    base: str = option(
        ..., "model and data", "The base that was finetuned: a folder, or a hub id.", auto="none, it is required"
    )
    source: str = option(
        ...,
        "model and data",
        "To make: the finetuned model, a folder or a hub id. To recover: the difference.",
        auto="none, it is required",
    )
    target: str = option(
        ..., "model and data", "Folder for what is made; it must not be there.", auto="none, it is required"
    )
    max_shard_size: Size = option(
        5_000_000_000, "saving", "The most that a file of weights takes, such as 500MB or 5GB.", unit="bytes"
    )


class ImportMetaConfig(Options):
    """Turn Meta's original Llama checkpoint, read as tensors only, into a transformers folder: import_meta OLD NEW."""

    positional: ClassVar[tuple[str, ...]] = ("old", "new")

    old: str = option(
        ..., "model and data", "Folder of consolidated.*.pth and params.json.", auto="none, it is required"
    )
    new: str = option(
        ..., "model and data", "Folder for the new one; it must not be there.", auto="none, it is required"
    )
    context_length: int | None = option(
        None,
        "model and data",
        "Positions that the model was trained for.",
        auto="what Meta trained such models for",
        unit="tokens",
        ge=1,
    )
    max_shard_size: Size = option(
        5_000_000_000, "saving", "The most that a file of weights takes, such as 500MB or 5GB.", unit="bytes"
    )
