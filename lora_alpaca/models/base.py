"""A base model: located, its files, and loaded."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as BOTH_WAYS
from transformers.utils.hub import (
    cached_file,
    extract_commit_hash,
    get_checkpoint_shard_files,
    has_file,
    is_offline_mode,
)

from lora_alpaca.config.shared import DEMO
from lora_alpaca.errors import LoraAlpacaError, ModelError, first_line
from lora_alpaca.models import quantization
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.weights import weights_damage
from lora_alpaca.storage.json_files import read_json, require_object
from lora_alpaca.storage.paths import user_path

MOST_PARTS = 10_000  # layers of a model, or experts of a layer
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"  # of weights, as transformers looks for them
PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"  # of old, which are not loaded
UNREAD = ("*.gguf", "consolidated*", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.ot")  # weights of other programs

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
    def vocabulary(self) -> int:
        """Return the number of tokens that the model has weights for."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def max_length(self) -> int | None:
        """Return the most positions that the model was made for, or None where its config names no limit."""
        text_config = self.config.get_text_config()
        return getattr(text_config, "max_position_embeddings", None) or getattr(text_config, "n_positions", None)


def demo_base() -> Path:
    """Return the folder of the tiny base model inside the package."""
    return Path(__file__).parent.parent / "demo" / "base"


def locate_base(
    name: str, revision: str | None = None, trust_remote_code: bool = False, flag: str = "--base_model"
) -> Base:
    """Return the base that a name stands for, its config read and its hub revision pinned to a commit.

    A name is `demo`, a folder, or a hub id. Raises ModelError, naming the flag that gives the name.
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
        raise ModelError(f"{flag} {name}: {hint if folder.exists() else 'no such folder'}")
    path = str(folder.resolve()) if local else name
    unasked = " (HF_HUB_OFFLINE is set)" * is_offline_mode()
    what = f"{flag} {name}" + ("" if local else f": no folder of this name here, and the hub gives none{unasked}")
    with as_model_error(what):
        # the file lies in a folder named by its commit: what a branch means may change, and this does not
        commit = None if local else extract_commit_hash(cached_file(path, "config.json", revision=revision), None)
        file = Path(cached_file(path, "config.json", revision=commit))
        require_object(file, ModelError, "copy or download it again", f"{flag} {name}")
        if trust_remote_code:
            require_own_code(file, path, what)
        config = transformers.AutoConfig.from_pretrained(path, revision=commit, trust_remote_code=trust_remote_code)
        _require_size(config, what)
    reads_both_ways = config.model_type in BOTH_WAYS and not getattr(config, "is_decoder", False)
    unknown = config.model_type not in CAUSAL and not trust_remote_code
    if config.is_encoder_decoder or reads_both_ways or unknown:
        raise ModelError(
            f"{flag} {name}: a {config.model_type} model does not write on from a text; "
            "name a causal language model, such as a Llama, Mistral, Qwen or GPT"
        )
    return Base(path if local and name != DEMO else name, path, commit, trust_remote_code, config)


def _require_size(config: Any, what: str) -> None:
    """Raise ModelError for a config with more layers or experts than there can be: each would be made, one by one."""
    text_config = config.get_text_config()
    for name in ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts"):
        number = getattr(text_config, name, None)
        if number is not None and not (isinstance(number, int) and 0 <= number <= MOST_PARTS):
            raise ModelError(f"{what}: config.json: {name} is {number!r:.60}; copy or download it again")


def require_own_code(file: Path, path: str, what: str) -> None:
    """Raise ModelError if a file of a base names code of another repository: the base alone is trusted."""
    named = read_json(file).get("auto_map")
    classes = list(named.values()) if isinstance(named, dict) else [named]
    for name in [name for entry in classes for name in (entry if isinstance(entry, list) else [entry])]:
        repository, _, code = str(name or "").partition("--")
        if code and repository != path:
            raise ModelError(
                f"{what}: its {file.name} names code of another repository, {repository}, and --trust_remote_code runs "
                "code of the base alone; copy that code into the base, or name that repository"
            )


def load_base(base: Base, spec: DeviceSpec) -> tuple[Any, list[str]]:
    """Return the frozen causal language model on its device, in eval mode, and notes on weights that were left out.

    Raises ModelError for missing weights.
    """
    weight_files(base)
    with as_model_error(f"--base_model {base.name}"), without_report():
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            base.path,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            use_safetensors=True,
            dtype=spec.dtype,
            **_precision(base, spec),
            device_map={"": spec.device},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    notes = require_all_weights(base, model, found)
    quantization.disable_repacking(model)
    if spec.bits != 16:  # what was not quantised is a view of the file, and keeps the whole of it in memory
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
    model.requires_grad_(False)
    return model.eval(), notes


def _precision(base: Base, spec: DeviceSpec) -> dict[str, Any]:
    """Return what says how the weights are held; a base that is stored quantised says that itself."""
    if quantization.stored(base.config):
        return {"config": quantization.computing_in(base.config, spec.dtype)}
    return {"quantization_config": quantization.bnb_config(spec.bits, spec.dtype)}


@contextmanager
def without_report() -> Iterator[None]:
    """Keep transformers from its report of several lines; one line of ours has what matters."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def require_all_weights(base: Base, model: Any, found: dict[str, Any]) -> list[str]:
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
    found = base_file(base, ONE_FILE) or base_file(base, INDEX)
    if found is None:
        raise ModelError(f"--base_model {base.name}: {_no_weights(base)}")
    shards = [str(found)]
    if found.name == INDEX:
        with as_model_error(f"--base_model {base.name}: {found}"):
            shards, _ = get_checkpoint_shard_files(base.path, str(found), revision=base.revision)
    for shard in shards:
        if reason := weights_damage(Path(shard)):
            raise ModelError(f"--base_model {base.name}: {shard} {reason}")
    return [Path(shard) for shard in shards]


def base_file(base: Base, name: str, optional: bool = False) -> Path | None:
    """Return the path of a file of a base, downloaded if it is not here yet; None if there is none.

    One that is `optional` is none, too, where it cannot be downloaded now.
    """
    with as_model_error(f"--base_model {base.name}"):
        path = cached_file(
            base.path,
            name,
            revision=base.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=not optional,
        )
    return Path(path) if path else None


def _no_weights(base: Base) -> str:
    """Return what a base holds instead of safetensors, and what to do."""
    folder = config_file(base).parent
    if any(_has_file(base, name) for name in (PICKLE, PICKLE_INDEX)) or any(folder.glob("pytorch_model*.bin")):
        return (
            f"{folder} holds {PICKLE}, a pickle, which is not loaded, and no {ONE_FILE}; convert it, tensors only: "
            f"lora-alpaca convert_base {base.name} NEW"
        )
    if others := sorted(path.name for ending in UNREAD for path in folder.glob(ending)):
        return f"{folder} holds {others[0]}, which is not read, and no {ONE_FILE}; name the same model in safetensors"
    return f"{folder} holds no weights ({ONE_FILE} is missing); copy or download the model again"


def _has_file(base: Base, name: str) -> bool:
    """Return whether a base has a file, without downloading it; not where the hub cannot be asked."""
    try:
        return bool(has_file(base.path, name, revision=base.revision))
    except (OSError, ValueError):
        return False


class as_model_error:
    """A context in which the many errors of loading a model become one ModelError of one line.

    What a damaged or hostile file makes of a library can be any error; one that our own code raises is a mistake of
    ours, and stays what it is, as does a full memory.
    """

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        meant = (LoraAlpacaError, MemoryError, torch.OutOfMemoryError)
        if not isinstance(error, Exception) or isinstance(error, meant):
            return
        expected = isinstance(error, (OSError, ValueError, TypeError, ImportError, KeyError))
        if not expected and Path(traceback.extract_tb(trace)[-1].filename).is_relative_to(Path(__file__).parent.parent):
            return
        root: BaseException | None = error
        while root is not None and root.__cause__ is not None:
            root = root.__cause__
        reason, cause = first_line(error), first_line(root)
        raise ModelError(f"{self.what}: {reason}" + (f", because {cause}" if cause not in reason else "")) from error
