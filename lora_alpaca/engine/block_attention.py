"""Attention over a pack on CUDA: FlexAttention, which skips the blocks of tokens in which nothing sees anything.

What a token sees, `subtree_ends` of the pack says. Which blocks have something to see is found on the host, from as
many numbers as the pack has tokens: the library's own way makes all pairs of tokens, 10 bytes each, on the device.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import numpy as np
import torch

from lora_alpaca.engine.packing import PackedBatch

BLOCK = 128  # tokens on a side of what is skipped whole
Options = dict[str, int]
FULL: Options = {}  # the library's own choice
_SIDES = ("fwd_BLOCK_M", "fwd_BLOCK_N", "bwd_BLOCK_M1", "bwd_BLOCK_N1", "bwd_BLOCK_M2", "bwd_BLOCK_N2")
KERNELS = (FULL, *(dict.fromkeys(_SIDES, side) | {"num_stages": 1} for side in (64, 32, 16)))
SHARED_MEMORY = ("out of resource", "outofresources", "no valid triton configs")  # a multiprocessor's, not the card's
_chosen: dict[tuple[int, torch.dtype], Options] = {}  # by the size of a head and dtype: facts of the card


def in_blocks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: PackedBatch, dropout: float, scale: float | None
) -> torch.Tensor:
    """Return [1, H, N, D] of queries [1, H, N, D], keys and values [1, G, N, D]: one FlexAttention call."""
    if dropout:
        raise NotImplementedError(f"its attention has a dropout of {dropout}, which FlexAttention does not know")
    options = _chosen.get((query.shape[-1], query.dtype), FULL)
    return _attend(query, key, value, block_mask(pack, query.device), scale, options)


def _attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, scale: float | None, options: Options
) -> torch.Tensor:
    attend, grouped = _flex_attention(query.is_cuda), query.shape[1] != key.shape[1]
    found: torch.Tensor = attend(
        query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=dict(options) or None
    )
    return found


@cache
def _flex_attention(compiled: bool) -> Any:
    """Return FlexAttention, compiled once for packs of every length."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


# --------------------------------------------------------------------------------------------------------------- mask


def block_mask(pack: PackedBatch, device: torch.device) -> Any:
    """Return FlexAttention's form of "a token sees its own path", made once a pack."""
    if "blocks" not in pack.masks:
        pack.masks["blocks"] = _mask(pack.subtree_ends().cpu(), device)
    return pack.masks["blocks"]


def _mask(ends: torch.Tensor, device: torch.device) -> Any:
    """Return the mask of tokens k that are seen by the tokens from k up to, not including, `ends[k]`, [N]."""
    from torch.nn.attention.flex_attention import BlockMask

    tables = [torch.from_numpy(table)[None, None] for table in _tables(ends.numpy())]
    count, index, full_count, full_index = (_moved(table, device) for table in tables)
    ends = _moved(ends, device)

    def sees(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query < ends[key])

    return BlockMask.from_kv_blocks(
        count, index, full_count, full_index, BLOCK, mask_mod=sees, seq_lengths=(len(ends), len(ends))
    )


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _tables(ends: np.ndarray) -> Iterable[np.ndarray]:
    """Return for each block of queries how many blocks of keys it sees in part, which, and the same of those in whole.

    Of a block before that of the queries, the longest-lived key tells whether the first query sees any, and the
    shortest-lived one whether the last query sees all.
    """
    starts = np.arange(0, len(ends), BLOCK)
    stops = starts + BLOCK  # that of the last block is behind the end: it has no whole blocks
    longest, shortest = np.maximum.reduceat(ends, starts), np.minimum.reduceat(ends, starts)
    blocks = np.arange(len(starts))
    before = blocks[None, :] < blocks[:, None]  # [queries, keys]
    sees_any = (before & (longest[None, :] > starts[:, None])) | (blocks[None, :] == blocks[:, None])
    sees_all = before & (shortest[None, :] >= stops[:, None])
    for seen in (sees_any & ~sees_all, sees_all):
        yield seen.sum(1).astype(np.int32)
        yield np.argsort(~seen, 1, kind="stable").astype(np.int32)  # those that are seen, in order, before the others


# ------------------------------------------------------------------------------------------------------------ kernels


def choose_kernels(
    config: Any, dtypes: Iterable[torch.dtype], device: torch.device, attempt: Callable[..., None] | None = None
) -> list[str]:
    """Choose blocks that the shared memory of a card holds, for the heads of a config; return notes on smaller ones.

    `attempt` computes with some options, forward and backward. What it raises for another reason than shared memory is
    left to the comparison of packs.
    """
    notes = []
    heads, size = _heads(config.get_text_config())
    for dtype in dtypes:
        if (size, dtype) in _chosen:
            continue
        options = _first_that_fits(partial(attempt or _attempt, heads, size, dtype, device))
        _chosen[size, dtype] = options
        if options:
            side, name = options["fwd_BLOCK_M"], str(dtype).removeprefix("torch.")
            notes.append(
                f"heads of {size} in {name} attend in blocks of {side} tokens: larger ones do not fit into the shared "
                "memory of this card"
            )
    return notes


def _heads(config: Any) -> tuple[tuple[int, int], int]:
    """Return the numbers of query heads and of key heads, and the size of a head."""
    queries = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    return (queries, getattr(config, "num_key_value_heads", None) or queries), size


def _first_that_fits(attempt: Callable[[Options], None]) -> Options:
    """Return the first options that do not lack shared memory; the library's own where all do."""
    for options in KERNELS:
        try:
            attempt(options)
        except Exception as error:
            if _lacks_shared_memory(error):
                continue
        return options
    return FULL


def _attempt(heads: tuple[int, int], size: int, dtype: torch.dtype, device: torch.device, options: Options) -> None:
    """Compute attention of a short row and its gradients."""
    tokens, (queries, keys) = 2 * BLOCK, heads
    shapes = [(1, number, tokens, size) for number in (queries, keys, keys)]
    query, key, value = (torch.zeros(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
    mask = _mask(torch.full((tokens,), tokens), device)
    with torch.enable_grad():
        _attend(query, key, value, mask, None, options).sum().backward()


def _lacks_shared_memory(error: BaseException | None) -> bool:
    """Return whether an error, or one that it came from, says that a kernel's blocks are too large."""
    while error is not None:
        if any(sign in f"{type(error).__name__} {error}".lower() for sign in SHARED_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False
