"""Tokenizer, base model and adapter: locate, load, attach, save. The one table of devices and precisions."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors import SafetensorError
from safetensors.torch import load_file

from lora_alpaca import quantization
from lora_alpaca.config import DEMO, FinetuneConfig, ModelOptions
from lora_alpaca.errors import AdapterError, ConfigError, ModelError

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # the names that PEFT reads
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
State = dict[str, torch.Tensor]

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


def place(options: ModelOptions, device: torch.device | None = None, default_bits: int = 16) -> tuple[Placement, list[str]]:
    """Return where and how to compute, and a sentence for everything that could not be had as asked.

    `device` is what a launcher has already chosen. Raises ConfigError for a device that is not there.
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
    folder = demo_base() if name == DEMO else Path(name).expanduser()
    local = folder.exists() or folder.is_absolute() or name.startswith((".", "~"))
    if local and not (folder / "config.json").is_file():
        hint = "an adapter, not a base model" if (folder / SETTINGS).is_file() else "no model folder (config.json is missing)"
        raise ModelError(f"--base_model {name}: {hint if folder.exists() else 'no such folder'}")
    path = str(folder.resolve()) if local else name
    with _one_line(f"--base_model {name}"):
        config = transformers.AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=trust_remote_code)
    commit = None if local else getattr(config, "_commit_hash", None) or revision
    return Base(path if local and name != DEMO else name, path, commit, trust_remote_code, config)


def load_tokenizer(base: Base, folder: Path | None = None) -> Any:
    """Return the tokenizer of a base, or the one saved in `folder`, with a padding token that is set once, here.

    Padding never reaches a label or an attention mask, so any token can serve; the unknown token is tried first.
    """
    where = str(folder or base.path)
    with _one_line(f"the tokenizer of {where}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            where, revision=None if folder else base.revision, trust_remote_code=base.trust_remote_code
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if len(tokenizer) > (vocab := base.config.get_text_config().vocab_size):
        raise ModelError(f"{where}: the tokenizer has {len(tokenizer)} tokens, the model only {vocab}")
    return tokenizer


def load_base(base: Base, placement: Placement) -> Any:
    """Return the frozen causal language model on its device, in eval mode."""
    with _one_line(f"--base_model {base.name}"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base.path,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            dtype=placement.dtype,
            quantization_config=quantization.settings(placement.bits, placement.dtype),
            device_map={"": placement.device},
        )
    quantization.correct(model)
    model.requires_grad_(False)
    return model.eval()


class _one_line:
    """A context in which the many errors of loading become one ModelError of one line."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, (OSError, ValueError, SafetensorError, ImportError, KeyError)) and not isinstance(error, ModelError):
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise ModelError(f"{self.what}: {first.strip()}") from error


# ---------------------------------------------------------------------------------------------------------- adapter


def attach_adapter(model: Any, config: FinetuneConfig, base: Base) -> PeftModel:
    """Return the model with a fresh, trainable LoRA adapter (B is zero), its parameters in fp32.

    Raises ModelError listing what the model has, where a target module is not among it.
    """
    targets = _target_modules(model, config)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # PEFT says int and takes any number
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        fan_in_fan_out=_is_conv1d(model, targets),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base.path,
        revision=base.revision,
    )
    return _with_adapter(model, lora)


def _with_adapter(model: Any, lora: LoraConfig) -> PeftModel:
    peft_model = get_peft_model(model, lora)
    peft_model.active_peft_config.revision = lora.revision
    assert isinstance(peft_model, PeftModel)
    return peft_model


def _linear_names(model: Any) -> list[str]:
    """Return the last name parts of all linear layers but the head: what an adapter can be put on."""
    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return sorted({name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, kinds) and part is not head})


def _target_modules(model: Any, config: FinetuneConfig) -> list[str] | str:
    there = _linear_names(model)
    asked = config.lora_target_modules
    if asked == ["all-linear"]:
        return "all-linear"
    if not config.said("lora_target_modules") and not set(asked) <= set(there):
        known = PEFT_TARGETS.get(model.config.model_type)
        asked = [known] if isinstance(known, str) else list(known or asked)
        if isinstance(known, str):  # a regular expression over full names
            return known
    missing = [name for name in asked if name.rpartition(".")[2] not in there]
    if missing:
        raise ModelError(f"--lora_target_modules {','.join(missing)}: the model has no such module; it has {', '.join(there)}")
    return asked


def _is_conv1d(model: Any, targets: Sequence[str] | str) -> bool:
    """Return whether the targets store their weight transposed, as GPT-2's do."""
    conv = transformers.pytorch_utils.Conv1D
    return any(isinstance(part, conv) and name.rpartition(".")[2] in targets for name, part in model.named_modules())


def adapter_state(model: PeftModel) -> State:
    """Return the adapter's tensors on the CPU, under the names that PEFT saves them by."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def adapter_settings(model: PeftModel) -> dict[str, Any]:
    """Return what PEFT reads from adapter_config.json, in an order that does not change from run to run."""
    settings = model.active_peft_config.to_dict() | {"inference_mode": True}
    return {key: sorted(value) if isinstance(value, set) else value for key, value in sorted(settings.items())}


def load_adapter(model: Any, folder: Path, trainable: bool = False) -> PeftModel:
    """Return the model with the adapter of a folder on it. Raises AdapterError where not everything fits."""
    if not (folder / SETTINGS).is_file():
        raise AdapterError(f"{folder}: no adapter there ({SETTINGS} is missing)")
    try:
        lora = LoraConfig.from_pretrained(str(folder))
        lora.inference_mode = not trainable
        peft_model = _with_adapter(model, lora)
    except (ValueError, TypeError, KeyError) as error:
        raise AdapterError(f"{folder}: the adapter does not fit this base model ({str(error).splitlines()[0]})") from None
    set_adapter_state(peft_model, read_adapter(folder), str(folder))
    return peft_model


def read_adapter(folder: Path) -> State:
    """Return the tensors of an adapter folder. Raises AdapterError for one that is missing, cut short or not finite."""
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        raise AdapterError(f"{folder}: {WEIGHTS} is missing" + ("; adapter_model.bin is a pickle, which is not loaded" * pickled))
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: cannot be read ({error})") from None
    if not state:
        raise AdapterError(f"{path}: holds no tensors; it is an empty adapter")
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name} holds NaN or infinity")
    return state


def set_adapter_state(model: PeftModel, state: State, where: str) -> None:
    """Put tensors into the adapter of a model; AdapterError unless names and shapes are exactly the adapter's own."""
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name in sorted(own.keys() ^ state.keys()):
        raise AdapterError(f"{where}: {name} is {'missing' if name in own else 'not part of this base model'}; wrong base model?")
    for name, tensor in state.items():
        if tensor.shape != own[name].shape:
            raise AdapterError(f"{where}: {name} is {list(tensor.shape)}, the base model needs {list(own[name].shape)}")
    set_peft_model_state_dict(model, state)


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Return the parameters that training moves, in the model's order."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file, or an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def download_adapter(hub_id: str, revision: str | None = None) -> Path:
    """Return the local copy of an adapter on the hub, downloaded if it is not there yet. Raises AdapterError."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=["*.json", "*.safetensors", "tokenizer*"]))
    except Exception as error:  # the hub's many errors have no common base
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise AdapterError(f"--lora_weights {hub_id}: no such folder, and the hub gives none ({reason})") from None
