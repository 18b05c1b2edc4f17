"""Our layers replace those of a model for a while, each after a test that it computes the same.

Saving and generating afterwards use the library's own model, unchanged.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F

from lora_alpaca.engine import attention
from lora_alpaca.engine.int8_linear import int8_forward
from lora_alpaca.engine.model_access import ModelAccess, WholeModel, through
from lora_alpaca.engine.pointwise import Pointwise
from lora_alpaca.errors import first_line
from lora_alpaca.models import quantization

Forward = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def patched(
    model: torch.nn.Module, dtype: torch.dtype, pointwise: Pointwise, access: ModelAccess | None = None
) -> Iterator[list[str]]:
    """Within this context, our layers replace those of a model, where they compute the same. Yield what failed."""
    same: dict[Any, bool] = {}  # one test serves all modules of a kind
    notes = list[str]()
    access = access or WholeModel()
    with ExitStack() as undo:
        for module in list(model.modules()):
            if hasattr(module, "cast_input_dtype_enabled") and dtype != torch.float32:
                # autocast casts the adapter's weights; PEFT would cast the activations up to them, and back
                set_until(undo, module, "cast_input_dtype_enabled", False)
            tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # 16 bits round by some thousandths
            expected: Forward = module
            if (ours := int8_forward(module, dtype)) is not None:
                expected = _dequantised(module)  # bitsandbytes itself rounds activations to 8 bits
            elif (ours := _norm(module, pointwise)) is not None:
                expected = _in_fp64(module)
            elif (ours := _gated_mlp(module, pointwise)) is not None:
                tolerance = tolerance if dtype == torch.float32 else 3e-2  # its own products round too
            else:
                continue
            kind = (type(module), *((tuple(one.shape), one.dtype, one.requires_grad) for one in module.parameters()))
            if kind not in same:
                with access.gathered(module):
                    try:
                        same[kind] = _computes_the_same(module, ours, expected, dtype, tolerance)
                    except Exception as error:  # the compiler's, or of a module that only looks like the one we know
                        same[kind] = False
                        reason = first_line(error)
                        notes.append(f"{type(module).__name__} is not made faster, for that fails ({reason})")
            if same[kind]:
                set_until(undo, module, "forward", ours)
        yield notes


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Within this context, a model's attention takes packs. Raises NotImplementedError where it cannot."""
    found = model.config._attn_implementation
    if found != attention.PLAIN:
        raise NotImplementedError(f"its attention is {found}, not {attention.PLAIN}")
    if not model._can_set_attn_implementation():
        raise NotImplementedError("its attention cannot be replaced")
    model.set_attn_implementation(attention.NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(found)


@torch.no_grad()
def has_plain_head(model: Any, access: ModelAccess | None = None) -> bool:
    """Return whether a model's logits are its last hidden states times a matrix, and nothing else, also when it learns.

    A bias that learns may be zero now, and what PEFT puts around a head that learns is no matrix.
    """
    head = model.get_output_embeddings()
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return False
    if (bias is not None and bias.requires_grad) or (weight.requires_grad and not isinstance(head, torch.nn.Linear)):
        return False
    ids = torch.arange(4, device=weight.device)[None] % weight.shape[0]

    def is_a_product(ids: torch.Tensor) -> torch.Tensor:
        hidden = model.base_model(input_ids=ids, use_cache=False)[0]
        expected = model(input_ids=ids, use_cache=False).logits
        if hidden.shape[-1] != head.weight.shape[-1]:
            return torch.tensor(False)
        found = through(head, lambda hidden: F.linear(hidden, head.weight), hidden)
        return torch.tensor(torch.equal(found.float(), expected.float()))

    return bool((access or WholeModel()).call(is_a_product, ids))


def _norm(module: Any, pointwise: Pointwise) -> Forward | None:
    """Return a compiled forward for a root mean square norm."""
    rms_norm, epsilon = pointwise.rms_norm, getattr(module, "variance_epsilon", None)
    if rms_norm is None or epsilon is None or not type(module).__name__.endswith("RMSNorm"):
        return None
    return lambda x: rms_norm(x.flatten(0, -2), module.weight, epsilon).view(x.shape)


def _gated_mlp(module: Any, pointwise: Pointwise) -> Forward | None:
    """Return a forward for a gated MLP, its gate compiled."""
    gate = pointwise.silu_gate
    if gate is None or not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
        return None
    return lambda x: module.down_proj(gate(module.gate_proj(x), module.up_proj(x)))


def _dequantised(module: Any) -> Forward:
    """Return the forward of an 8-bit layer in fp64, with the weights that bitsandbytes says it has."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        bias = None if module.bias is None else module.bias.double()
        return F.linear(x.double(), quantization.dequantised(module).double(), bias)

    return forward


def _in_fp64(module: Any) -> Forward:
    """Return the forward of a small module in fp64, which its own weights have a gradient through."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        exact = {name: parameter.double() for name, parameter in module.named_parameters()}
        found: torch.Tensor = torch.func.functional_call(module, exact, (x.double(),))
        return found

    return forward


def _computes_the_same(module: Any, ours: Forward, expected: Forward, dtype: torch.dtype, tolerance: float) -> bool:
    """Return whether a forward of ours, and its gradient, are what is expected, on random input."""
    weight = next(module.parameters())
    width = getattr(module, "in_features", None) or getattr(module, "hidden_size", None) or weight.shape[-1]
    draw = torch.Generator().manual_seed(0)  # the global random state must not change
    x = torch.randn(1, 4, width, generator=draw).to(weight.device, dtype).requires_grad_()
    learning = [weight] if weight.requires_grad and weight.dim() == 1 else []  # of a norm; a product is the library's
    y = expected(x)
    by_y = torch.randn(y.shape, generator=draw).to(y.device, dtype)
    found, wanted = ((out, *torch.autograd.grad(out, [x, *learning], by_y.to(out.dtype))) for out in (ours(x), y))
    return all(_close(one, other, tolerance) for one, other in zip(found, wanted, strict=True))


def _close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Return whether the relative error of a tensor is below a tolerance."""
    found, expected = found.detach().float(), expected.detach().float()
    return bool((found - expected).norm() < tolerance * expected.norm())


def set_until(undo: ExitStack, module: Any, name: str, value: Any) -> None:
    """Set an attribute of a module until `undo` is unwound."""
    before = vars(module).get(name, undo)
    setattr(module, name, value)
    undo.callback(lambda: delattr(module, name) if before is undo else setattr(module, name, before))
