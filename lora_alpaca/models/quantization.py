"""8-bit and 4-bit bases with bitsandbytes: the settings, the corrections the library needs, and what it cannot do.

A base may also be stored quantised already. By bitsandbytes it is held as it is stored; other kinds are refused.
"""

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from lora_alpaca.errors import ModelError
from lora_alpaca.models.quantised_linear import EightBitLinear, FourBitLinear

BITS = {8: "8-bit (LLM.int8)", 4: "4-bit (NF4)", 16: "unquantised"}


def bnb_config(bits: int, compute_dtype: torch.dtype) -> Any:
    """Return the quantization config for `from_pretrained`, or None for an unquantised base.

    8-bit is LLM.int8 (arXiv:2208.07339); 4-bit is NF4 with double quantisation (arXiv:2305.14314).
    """
    if bits == 16:
        return None
    require_bitsandbytes(bits)
    from transformers import BitsAndBytesConfig

    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


@dataclass(frozen=True)
class Stored:
    """How a base is stored that is quantised already: its bits, and their kind, such as `4-bit (NF4)`."""

    bits: int
    kind: str


def stored(config: Any) -> Stored | None:
    """Return how a base is stored by its config, None for one that is not quantised; others' kinds have 0 bits."""
    found = _settings(config)
    if not found:
        return None
    method = str(found.get("quant_method") or "bitsandbytes").removeprefix("QuantizationMethod.")
    if method != "bitsandbytes" or not (found.get("load_in_4bit") or found.get("load_in_8bit")):
        return Stored(0, method)
    if found.get("load_in_8bit"):
        return Stored(8, BITS[8])
    return Stored(4, f"4-bit ({str(found.get('bnb_4bit_quant_type', 'fp4')).upper()})")


@dataclass(frozen=True)
class Held:
    """In how many bits a run held its base, and the dtype that the weights were rounded to before."""

    bits: int
    dtype: torch.dtype


def held(precision: str) -> Held | None:
    """Return how a run held its base by the sentence that it records, None for an unquantised one, or none recorded."""
    bits = next((bits for bits, kind in BITS.items() if bits != 16 and precision.startswith(kind)), None)
    names = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    dtype = next((dtype for name, dtype in names.items() if f"{name} compute" in precision), torch.float32)
    return Held(bits, dtype) if bits else None


@torch.no_grad()
def as_held(weight: torch.Tensor, how: Held) -> torch.Tensor:
    """Return a weight [out, in] with the values that it has once it is held in 8 or 4 bits, fp32."""
    require_bitsandbytes(how.bits)
    from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

    rounded = weight.to(how.dtype).contiguous()
    rows, columns = weight.shape
    if how.bits == 8:
        layer = Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False, device="meta")
        layer.weight = Int8Params(rounded.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
        found = eight_bit_weight(layer)
        assert found is not None
        return found[0].float() * found[1][:, None]
    four = Linear4bit(columns, rows, bias=False, compute_dtype=how.dtype, quant_type="nf4", device="meta")
    four.weight = Params4bit(rounded, requires_grad=False, compress_statistics=True, quant_type="nf4").to("cpu")
    values = four_bit_weight(four)
    assert values is not None
    return values.float()


def computing_in(config: Any, dtype: torch.dtype) -> Any:
    """Return a copy of the config of a base that is stored quantised, which computes in a dtype."""
    changed = copy.deepcopy(config)
    name = str(dtype).removeprefix("torch.")
    changed.quantization_config = _settings(config) | {"bnb_4bit_compute_dtype": name}
    return changed


def _settings(config: Any) -> dict[str, Any]:
    """Return what a config says of the quantisation that its weights are stored in, nothing if they are not."""
    found = getattr(config, "quantization_config", None) or {}
    return dict(found if isinstance(found, dict) else found.to_dict())


def require_bitsandbytes(bits: int, remedy: str = "pass --load_8bit False") -> None:
    """Raise ModelError, in one line, where bitsandbytes is missing or does not import."""
    try:
        import bitsandbytes  # noqa: F401  told here, not from inside the loader
    except Exception as error:  # a broken installation raises whatever its libraries raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{BITS[bits]} needs bitsandbytes, which does not import ({reason}); pip install bitsandbytes, or {remedy}"
        ) from None


def disable_repacking(model: torch.nn.Module) -> None:
    """Turn off what bitsandbytes 0.50 gets wrong in a loaded model.

    On CPUs with AVX512-BF16, the first 4-bit forward in eval mode repacks the weights; dequantising or saving them
    afterwards yields other weights (a relative error of 1.25 in a merge). Without the repacking it is exact.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain attribute, not a submodule


def _is_bitsandbytes(module: torch.nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] == "bitsandbytes"


def is_quantised(module: torch.nn.Module) -> bool:
    """Return whether a module is a linear layer of bitsandbytes."""
    return _is_bitsandbytes(module) and isinstance(module, torch.nn.Linear)


def eight_bit_weight(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return int8 weight [out, in] and fp32 scale of its rows [out] of an 8-bit layer; None for any other module."""
    if isinstance(module, EightBitLinear):
        return module.weight, module.scale
    if not _is_bitsandbytes(module):
        return None
    from bitsandbytes.nn import Linear8bitLt

    if not isinstance(module, Linear8bitLt):
        return None
    if module.weight.CB is not None:  # the layer takes its weight over from the parameter at its first use
        module.init_8bit_state()
    return module.state.CB, module.state.SCB.float() / 127


def dequantised(module: Any) -> torch.Tensor:
    """Return the weight [out, in] of an 8-bit layer as bitsandbytes dequantises it, fp32."""
    if isinstance(module, EightBitLinear):
        return module.dequantised()
    from bitsandbytes.functional import int8_vectorwise_dequant

    return int8_vectorwise_dequant(module.state.CB, module.state.SCB)


def is_four_bit(module: torch.nn.Module) -> bool:
    """Return whether a module is a 4-bit layer."""
    if isinstance(module, FourBitLinear):
        return True
    if not _is_bitsandbytes(module):
        return False
    from bitsandbytes.nn import Linear4bit

    return isinstance(module, Linear4bit)


def four_bit_weight(module: torch.nn.Module) -> torch.Tensor | None:
    """Return the weight [out, in] of a 4-bit layer, dequantised; None for any other module."""
    if not is_four_bit(module):
        return None
    if isinstance(module, FourBitLinear):
        return module.dequantised()
    from bitsandbytes.functional import dequantize_4bit

    weight: Any = module.weight
    return dequantize_4bit(weight.data, weight.quant_state)


class FourBits(NamedTuple):
    """A 4-bit weight as it is stored: two values a byte, fp32 scales of blocks, and the 16 values that there are."""

    packed: torch.Tensor
    scales: torch.Tensor
    code: torch.Tensor
    block: int


def four_bit_parts(module: Any) -> FourBits | None:
    """Return the parts of the weight of a 4-bit layer; None for any other module, and for a repacked weight."""
    if not _is_bitsandbytes(module):
        return None
    from bitsandbytes.functional import dequantize_blockwise
    from bitsandbytes.nn import Linear4bit

    if not isinstance(module, Linear4bit) or (state := module.weight.quant_state) is None:
        return None
    if getattr(state, "packing_format_for_cpu", False):
        return None
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset if state.nested else state.absmax
    return FourBits(module.weight.data, scales.float(), state.code.float(), state.blocksize)
