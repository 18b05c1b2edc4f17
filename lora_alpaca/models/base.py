"""A base model: located, its files, and loaded."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as BOTH_WAYS
from transformers.utils.hub import cached_file, extract_commit_hash, get_checkpoint_shard_files

from lora_alpaca.config.shared import DEMO
from lora_alpaca.errors import LoraAlpacaError, ModelError
from lora_alpaca.models import quantization
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.weights import weights_damage
from lora_alpaca.storage.paths import user_path

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"  # of weights, as transformers looks for them

if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()


@dataclass(frozen=True)
class Base:
    """A base model: the name to record, the path or hub id to load from, and the commit if it is from the hub."""

    name: str
    path: str
    revision: str | None
    trust_remote_code: bool
    config: Any  # its transformers config

    @property
    def max_length(self) -> int | None:
        """Return the most positions that the model was made for, or None where its config names no limit."""
        text_config = self.config.get_text_config()
        return getattr(text_config, "max_position_embeddings", None) or getattr(text_config, "n_positions", None)


def demo_base() -> Path:
    """Return the folder of the tiny base model inside the package."""
    return Path(__file__).parent.parent / "demo" / "base"


def locate_base(name: str, revision: str | None = None, trust_remote_code: bool = False) -> Base:
    """Return the base that a name stands for, its config read and its hub revision pinned to a commit.

    A name is `demo`, a folder, or a hub id. Raises ModelError.
    """
    name = name or DEMO
    folder = demo_base() if name == DEMO else user_path(name)
    local = folder.exists() or folder.is_absolute() or name.startswith((".", "~"))
    if local and not (folder / "config.json").is_file():
        hint = (
            "an adapter, not a base model"
            if (folder / "adapter_config.json").is_file()
            else "no model folder (config.json is missing)"
        )
        raise ModelError(f"--base_model {name}: {hint if folder.exists() else 'no such folder'}")
    path = str(folder.resolve()) if local else name
    what = f"--base_model {name}" + ("" if local else ": no folder of this name here, and the hub gives none")
    with as_model_error(what):
        # the file lies in a folder named by its commit: what a branch means may change, and this does not
        commit = None if local else extract_commit_hash(cached_file(path, "config.json", revision=revision), None)
        config = transformers.AutoConfig.from_pretrained(path, revision=commit, trust_remote_code=trust_remote_code)
    reads_both_ways = config.model_type in BOTH_WAYS and not getattr(config, "is_decoder", False)
    unknown = config.model_type not in CAUSAL and not trust_remote_code
    if config.is_encoder_decoder or reads_both_ways or unknown:
        raise ModelError(
            f"--base_model {name}: a {config.model_type} model does not write on from a text; "
            "name a causal language model, such as a Llama, Mistral, Qwen or GPT"
        )
    return Base(path if local and name != DEMO else name, path, commit, trust_remote_code, config)


def load_base(base: Base, spec: DeviceSpec) -> tuple[Any, list[str]]:
    """Return the frozen causal language model on its device, in eval mode, and notes on weights that were left out.

    Raises ModelError for missing weights.
    """
    weight_files(base)
    with as_model_error(f"--base_model {base.name}"), _without_report():
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            base.path,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            use_safetensors=True,
            dtype=spec.dtype,
            quantization_config=quantization.bnb_config(spec.bits, spec.dtype),
            device_map={"": spec.device},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    notes = _require_all_weights(base, model, found)
    quantization.disable_repacking(model)
    if spec.bits != 16:  # what was not quantised is a view of the file, and keeps the whole of it in memory
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
    model.requires_grad_(False)
    return model.eval(), notes


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from its report of several lines; one line of ours has what matters."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def _require_all_weights(base: Base, model: Any, found: dict[str, Any]) -> list[str]:
    """Return a note if weights of the files were left out. Raises ModelError if the files lack weights of the model."""
    weights = {name for name, _ in model.named_parameters()}
    left = sorted(weights & {*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])})
    if left:
        raise ModelError(
            f"--base_model {base.name}: its files do not hold what config.json describes; {left[0]} is missing or of "
            f"another shape ({len(left)} in all); copy or download it again"
        )
    if extra := sorted(found["unexpected_keys"]):
        what = f"{len(extra)} weights of its files have no place in the model, such as {extra[0]}"
        return [f"warning: --base_model {base.name}: {what}"]
    return []


def config_file(base: Base) -> Path:
    """Return the path of a base's config.json; the folder has the other files of its commit that are downloaded."""
    with as_model_error(f"--base_model {base.name}"):
        return Path(cached_file(base.path, "config.json", revision=base.revision))


def weight_files(base: Base) -> list[Path]:
    """Return the safetensors files of a base, downloaded if they are not here yet, each with a sound header.

    Raises ModelError naming the file that is missing or damaged, and where there is nothing but a pickle.
    """
    found = _file(base, ONE_FILE) or _file(base, INDEX)
    if found is None:
        raise ModelError(f"--base_model {base.name}: {_no_weights(config_file(base).parent)}")
    shards = [str(found)]
    if found.name == INDEX:
        with as_model_error(f"--base_model {base.name}: {found}"):
            shards, _ = get_checkpoint_shard_files(base.path, str(found), revision=base.revision)
    for shard in shards:
        if reason := weights_damage(Path(shard)):
            raise ModelError(f"--base_model {base.name}: {shard} {reason}")
    return [Path(shard) for shard in shards]


def _file(base: Base, name: str) -> Path | None:
    """Return the path of a file of a base, downloaded if it is not here yet; None if there is none."""
    with as_model_error(f"--base_model {base.name}"):
        path = cached_file(base.path, name, revision=base.revision, _raise_exceptions_for_missing_entries=False)
    return Path(path) if path else None


def _no_weights(folder: Path) -> str:
    if not any(folder.glob("pytorch_model*.bin")):
        return f"{folder} holds no weights ({ONE_FILE} is missing); copy or download the model again"
    return (
        f"{folder} holds pytorch_model.bin, a pickle, which is not loaded, and no {ONE_FILE}; "
        "save the model as safetensors first, with save_pretrained of transformers"
    )


class as_model_error:
    """A context in which the many errors of loading a model become one ModelError of one line."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        expected = isinstance(error, (OSError, ValueError, TypeError, ImportError, KeyError))
        of_a_library = type(error).__module__.startswith(("huggingface_hub", "safetensors"))
        plain = type(error) is Exception  # of tokenizers
        if not (expected or of_a_library or plain) or isinstance(error, LoraAlpacaError):
            return
        root = error
        while root is not None and root.__cause__ is not None:
            root = root.__cause__
        reason, cause = _first_line(error), _first_line(root)
        raise ModelError(f"{self.what}: {reason}" + (f", because {cause}" if cause not in reason else "")) from error


def _first_line(error: BaseException | None) -> str:
    """Return the first line of a message, and the next ones as long as they end in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    last = next((number for number, line in enumerate(lines) if not line.endswith(":")), 0)
    return " ".join(lines[: last + 1]).removesuffix(".")
