"""Attention over a pack, registered with transformers: a token sees its own path and nothing else.

    model.set_attn_implementation(NAME)
    body(**pack.inputs(), use_cache=False)

The model passes the keyword `pack` to every attention layer. A call without it is ordinary attention, so evaluation
and generation work as before; but a call whose positions restart in the middle, without a pack, would mix up rows, and
is an error.

Shapes: N tokens, H query heads, G key and value heads, D head size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_alpaca.engine.block_attention import in_blocks
from lora_alpaca.engine.packing import PackedBatch

NAME = "packed"
PLAIN = "sdpa"  # what a call without a pack gets
RESTARTS = torch.empty(1, 1, 0, 0)  # the mask of a call whose positions restart; it masks nothing
SHORT = 128  # tokens up to which gradients of attention in 16 bits are computed in fp32, on a CPU
KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # what F.scaled_dot_product_attention calls
GRADIENT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
NOT_PACKED = ("softcap", "s_aux", "position_bias")  # options of attention that packed attention does not have


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # [1, H, N, D]
    key: torch.Tensor,  # [1, G, N, D]
    value: torch.Tensor,  # [1, G, N, D]
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    pack: PackedBatch | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Return the attention output [1, N, H, D], and None for the attention weights."""
    if pack is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise RuntimeError("positions start again, but the call brings no pack: its rows would see each other")
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    for name in NOT_PACKED:
        if options.get(name) is not None:
            raise NotImplementedError(f"its attention has {name}")
    if (window := options.get("sliding_window")) is not None and window < pack.longest:
        raise NotImplementedError(f"its attention window of {window} tokens is shorter than a row of {pack.longest}")
    attend = in_blocks if query.is_cuda else _by_segment
    return attend(query, key, value, pack, dropout, scaling).transpose(1, 2), None


def _by_segment(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: PackedBatch, dropout: float, scale: float | None
) -> torch.Tensor:
    """Return [1, H, N, D]: one call a segment, to the keys of its path. What a token cannot see costs nothing.

    `split`, not slices: its gradient is one concatenation, where every slice would make zeros for the whole pack.
    """
    lengths = [segment.stop - segment.start for segment in pack.segments]
    queries, keys, values = query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2)
    outputs = []
    for number, segment in enumerate(pack.segments):
        q, k, v, mask = queries[number], keys[number], values[number], None
        if segment.above:
            k = torch.cat([*(keys[other] for other in segment.above), k], 2)  # [1, G, path, D]
            v = torch.cat([*(values[other] for other in segment.above), v], 2)
            mask = _path_mask(pack, q.shape[2], k.shape[2], query)
        outputs.append(_attend(q, k, v, mask, dropout, scale))
    return torch.cat(outputs, 2)


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    dropout: float,
    scale: float | None,
) -> torch.Tensor:
    """Return the attention of one segment, causal where there is no mask."""
    halves, size = query.dtype in (torch.bfloat16, torch.float16), query.shape[3]
    if halves and query.device.type == "cpu" and key.shape[2] <= SHORT and not dropout and value.shape[3] == size:
        groups = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(groups, 1) if groups > 1 else one for one in (key, value))
        return Fp32Gradient.apply(query, key, value, mask, scale)
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(
        query, key, value, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=grouped
    )


class Fp32Gradient(torch.autograd.Function):
    """Attention by torch's kernel for CPUs in 16 bits, whose gradients are computed in fp32.

    In 16 bits the kernel has no products of its own for the backward pass: it asks a library for five small ones a
    head, and each costs more to set up than to compute. Up to 128 tokens, fp32 takes a third to three quarters of the
    time (decision 26).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float | None,
    ) -> torch.Tensor:
        """Return the attention of queries to as many heads of keys and values."""
        ctx.options = {"dropout_p": 0.0, "is_causal": mask is None, "scale": scale}
        output, logsumexp = KERNEL(query, key, value, attn_mask=mask, **ctx.options)
        ctx.save_for_backward(query, key, value, output, logsumexp)
        ctx.mask = mask
        return output

    @staticmethod
    def backward(ctx: Any, by_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients by query, key and value."""
        *halves, logsumexp = ctx.saved_tensors
        wide = [one.float() for one in (by_output, *halves)]
        mask = None if ctx.mask is None else ctx.mask.float()
        found = GRADIENT(*wide, logsumexp, attn_mask=mask, **ctx.options)
        return (*(one.to(by_output.dtype) for one in found), None, None)


def _path_mask(pack: PackedBatch, own: int, path: int, like: torch.Tensor) -> torch.Tensor:
    """Return the additive mask [own, path]: all of the path above, then causal. It serves every layer."""
    shape = (own, path, like.dtype)
    if shape not in pack.masks:
        mask = torch.full((own, path), float("-inf"), dtype=like.dtype, device=like.device)
        pack.masks[shape] = mask.triu_(path - own + 1)
    return pack.masks[shape]


# ------------------------------------------------------------------------------------------------------- registration


def packed_mask(
    *args: Any, attention_mask: torch.Tensor | None = None, allow_is_causal_skip: bool = True, **options: Any
) -> torch.Tensor | None:
    """Return the usual mask of a padded call; for a call whose positions restart, `RESTARTS`."""
    if attention_mask is None and not allow_is_causal_skip:
        return RESTARTS
    return sdpa_mask(*args, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip, **options)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, packed_mask)
