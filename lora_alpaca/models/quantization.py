"""8-bit and 4-bit bases with bitsandbytes: the settings, the corrections the library needs, and what it cannot do."""

from typing import Any

import torch

from lora_alpaca.errors import ModelError

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


def require_bitsandbytes(bits: int) -> None:
    """Raise ModelError, in one line, where bitsandbytes is missing or does not import."""
    try:
        import bitsandbytes  # noqa: F401  told here, not from inside the loader
    except Exception as error:  # a broken installation raises whatever its libraries raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"{BITS[bits]} needs bitsandbytes, which does not import ({reason}); "
            "pip install bitsandbytes, or pass --load_8bit False"
        ) from None


def disable_repacking(model: torch.nn.Module) -> None:
    """Turn off what bitsandbytes 0.50 gets wrong in a loaded model.

    On CPUs with AVX512-BF16, the first 4-bit forward in eval mode repacks the weights; dequantising or saving them
    afterwards yields other weights (a relative error of 1.25 in a merge). Without the repacking it is exact.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]  # a plain attribute, not a submodule


def eight_bit_weight(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return int8 weight [out, in] and fp32 scale of its rows [out] of an 8-bit layer; None for any other module."""
    if type(module).__module__.partition(".")[0] != "bitsandbytes":
        return None
    from bitsandbytes.nn import Linear8bitLt

    if not isinstance(module, Linear8bitLt):
        return None
    if module.weight.CB is not None:  # the layer takes its weight over from the parameter at its first use
        module.init_8bit_state()
    return module.state.CB, module.state.SCB.float() / 127
