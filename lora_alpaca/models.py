"""Tokenizer and base model: locate and load. The one table of devices and precisions."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as BOTH_WAYS
from transformers.utils.hub import cached_file, extract_commit_hash, get_checkpoint_shard_files

from lora_alpaca import quantization
from lora_alpaca.config.shared import DEMO, ModelOptions
from lora_alpaca.errors import ConfigError, ModelError, one_line
from lora_alpaca.storage.paths import user_path

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"  # of weights, as transformers looks for them
VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

if not sys.stderr.isatty():
    transformers.utils.logging.disable_progress_bar()


# ------------------------------------------------------------------------------------------ where and how to compute


@dataclass(frozen=True)
class Placement:
    """Where a model runs and in what precision: device, compute dtype, and 8, 4 or 16 bits for the frozen base."""

    device: torch.device
    dtype: torch.dtype
    bits: int

    def __str__(self) -> str:
        name = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        return f"{quantization.BITS[self.bits]} base, {name} compute on {self.device.type}"


def place(
    options: ModelOptions, device: torch.device | None = None, default_bits: int = 16
) -> tuple[Placement, list[str]]:
    """Return where and how to compute, and a sentence for everything that could not be had as asked.

    `device` is what a launcher has already chosen. Raises ConfigError for a device that is not there, ModelError where
    bitsandbytes is needed and is not.
    """
    device = device or pick_device(options.device)
    said: list[str] = []
    dtype = options.dtype
    if dtype == "auto":
        dtype = "bf16" if has_bf16(device) else "fp16" if device.type == "cuda" else "fp32"
    elif dtype == "bf16" and not has_bf16(device):
        dtype = "fp16" if device.type == "cuda" else "fp32"
        said.append(f"bf16 is not native on {device}: {dtype} is used")
    elif dtype == "fp16" and device.type == "cpu":
        dtype = "fp32"
        said.append("fp16 is too slow and too narrow to train on a CPU: fp32 is used")
    bits = 4 if options.load_4bit else 8 if options.load_8bit else default_bits if options.load_8bit is None else 16
    if bits != 16 and device.type == "mps":
        bits = 16
        said.append("bitsandbytes cannot quantise on mps: the base is left unquantised")
    if bits != 16:
        quantization.check_library(bits)
    if bits != 16 and device.type == "cpu":
        said.append(f"no GPU is used: a base in {bits} bits works on a CPU, and is slow")
    return Placement(device, DTYPES[dtype], bits), said


def pick_device(name: str) -> torch.device:
    """Return the asked device, or for `auto` the first there is of cuda, mps, cpu."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, available in there.items() if available)
    if not there[name]:
        found = ", ".join(device for device, available in there.items() if available)
        raise ConfigError(f"--device {name}: torch sees no such device here; it sees {found}")
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Return whether the device multiplies bf16 natively, rather than emulating it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return False


# ------------------------------------------------------------------------------------------------------- base model


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
    return Path(__file__).parent / "demo" / "base"


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
    with one_line(what):
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


def load_tokenizer(base: Base, folder: Path | None = None) -> Any:
    """Return the tokenizer of a base, or the one saved in `folder`, with a padding token that is set once, here.

    Padding never reaches a label or an attention mask, so any token can serve; the unknown token is tried first.
    """
    where = str(folder or base.path)
    if Path(where).is_dir():
        _check_vocabulary(base, Path(where))
    with one_line(f"the tokenizer of {where}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            where, revision=None if folder else base.revision, trust_remote_code=base.trust_remote_code
        )
    _check_vocabulary(base, folder or config_file(base).parent)  # what the hub's cache may hold only half of
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if len(tokenizer) > (vocab := base.config.get_text_config().vocab_size):
        raise ModelError(f"{where}: the tokenizer has {len(tokenizer)} tokens, the model only {vocab}")
    return tokenizer


def _check_vocabulary(base: Base, folder: Path) -> None:
    """Raise ModelError where a folder has no vocabulary: transformers would make do with control tokens."""
    if not base.trust_remote_code and not any(path for name in VOCABULARIES for path in folder.glob(name)):
        raise ModelError(
            f"the tokenizer of {folder}: tokenizer.json is missing, and so are tokenizer.model and vocab.json; "
            "copy or download the model again"
        )


def load_base(base: Base, placement: Placement) -> Any:
    """Return the frozen causal language model on its device, in eval mode. Raises ModelError for missing weights."""
    weight_files(base)
    with one_line(f"--base_model {base.name}"), _without_report():
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            base.path,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            use_safetensors=True,
            dtype=placement.dtype,
            quantization_config=quantization.settings(placement.bits, placement.dtype),
            device_map={"": placement.device},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_found(base, model, found)
    quantization.correct(model)
    if placement.bits != 16:  # what was not quantised is a view of the file, and keeps the whole of it in memory
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.clone()
    model.requires_grad_(False)
    return model.eval()


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from its report of several lines; what matters in it is said in one."""
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(before)


def _check_found(base: Base, model: Any, found: dict[str, Any]) -> None:
    """Raise ModelError where weights were left as they were born; say where some of the files' were left out."""
    weights = {name for name, _ in model.named_parameters()}
    left = sorted(weights & {*found["missing_keys"], *(entry[0] for entry in found["mismatched_keys"])})
    if left:
        raise ModelError(
            f"--base_model {base.name}: its files do not hold what config.json describes; {left[0]} is missing or of "
            f"another shape ({len(left)} in all); copy or download it again"
        )
    if extra := sorted(found["unexpected_keys"]):
        print(
            f"warning: --base_model {base.name}: {len(extra)} weights of its files have no place in the model, such as "
            f"{extra[0]}",
            file=sys.stderr,
        )


# --------------------------------------------------------------------------------------------------- files of a base


def config_file(base: Base) -> Path:
    """Return the path of a base's config.json; the other files of its commit lie beside it, as far as they are here."""
    with one_line(f"--base_model {base.name}"):
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
        with one_line(f"--base_model {base.name}: {found}"):
            shards, _ = get_checkpoint_shard_files(base.path, str(found), revision=base.revision)
    for shard in shards:
        if reason := damage(Path(shard)):
            raise ModelError(f"--base_model {base.name}: {shard} {reason}")
    return [Path(shard) for shard in shards]


def _file(base: Base, name: str) -> Path | None:
    """Return the path of a file of a base, downloaded if it is not here yet; None if there is none."""
    with one_line(f"--base_model {base.name}"):
        path = cached_file(base.path, name, revision=base.revision, _raise_exceptions_for_missing_entries=False)
    return Path(path) if path else None


def _no_weights(folder: Path) -> str:
    if not any(folder.glob("pytorch_model*.bin")):
        return f"{folder} holds no weights ({ONE_FILE} is missing); copy or download the model again"
    return (
        f"{folder} holds pytorch_model.bin, a pickle, which is not loaded, and no {ONE_FILE}; "
        "save the model as safetensors first, with save_pretrained of transformers"
    )


def damage(path: Path) -> str:
    """Return what is wrong with a safetensors file, as a predicate, or nothing: its header is read, and its size."""
    pointer = b"version https://git-lfs"
    try:
        with open(path, "rb") as file:
            start = file.read(len(pointer))
        if not start:
            return "is empty (0 bytes); copy or download it again"
        if start == pointer:
            return "is a git-LFS pointer, not the file itself; fetch it with git lfs pull"
        with safe_open(path, "pt"):
            return ""
    except FileNotFoundError:
        return "is missing"
    except (SafetensorError, OSError) as error:
        return f"cannot be read ({str(error).splitlines()[0]}); copy or download it again"
