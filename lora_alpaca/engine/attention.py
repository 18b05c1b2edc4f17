"""Attention over a pack, registered with transformers: a token sees its own path and nothing else.

    model.set_attn_implementation(NAME)
    body(**pack.inputs(), use_cache=False)

The model passes the keyword `pack` to every attention layer. A call without it is ordinary attention, so evaluation
and generation work as before; but a call whose positions restart in the middle, without a pack, would mix up rows, and
is an error.

Shapes: N tokens, H query heads, G key and value heads, D head size.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lora_alpaca.engine.packing import PackedBatch

NAME = "packed"
PLAIN = "sdpa"  # what a call without a pack gets
RESTARTS = torch.empty(1, 1, 0, 0)  # the mask of a call whose positions restart; it masks nothing
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
    attend = _in_blocks if query.is_cuda else _by_segment
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
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outputs, 2)


def _path_mask(pack: PackedBatch, own: int, path: int, like: torch.Tensor) -> torch.Tensor:
    """Return the additive mask [own, path]: all of the path above, then causal. It serves every layer."""
    shape = (own, path, like.dtype)
    if shape not in pack.masks:
        mask = torch.full((own, path), float("-inf"), dtype=like.dtype, device=like.device)
        pack.masks[shape] = mask.triu_(path - own + 1)
    return pack.masks[shape]


# --------------------------------------------------------------------------------------------------------------- CUDA


def _in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: PackedBatch, dropout: float, scale: float | None
) -> torch.Tensor:
    """Return [1, H, N, D]: one FlexAttention call that skips the blocks in which nothing sees anything."""
    if dropout:
        raise NotImplementedError(f"its attention has a dropout of {dropout}, which FlexAttention does not know")
    attend, mask = _flex_attention(compiled=query.is_cuda), block_mask(pack, query.device)
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])


@cache
def _flex_attention(compiled: bool) -> Any:
    """Return FlexAttention, compiled once for packs of every length."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def block_mask(pack: PackedBatch, device: torch.device) -> Any:
    """Return FlexAttention's form of "a token sees its own path", made once a pack."""
    from torch.nn.attention.flex_attention import create_block_mask

    if "blocks" not in pack.masks:
        ends = pack.subtree_ends()  # [N]

        def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            return (key <= query) & (query < ends[key])

        tokens = len(ends)
        pack.masks["blocks"] = create_block_mask(sees, None, None, tokens, tokens, device=str(device))
    return pack.masks["blocks"]


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
