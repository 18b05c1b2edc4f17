"""Meta's format of a Llama: how its tensors are called and laid out, and its `params.json`.

Meta turns neighbouring values of a query or key together, transformers turns each value with the one half a head away;
the rows of both projections stand in another order therefore. All other tensors are the same.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lora_alpaca.storage.json_files import ABSENT, Count, Shape

FILES = "consolidated.*.pth"
PARAMS = "params.json"
LAYER = {  # what follows model.layers.N. in transformers, and layers.N. in Meta's files
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.wq",
    "self_attn.k_proj": "attention.wk",
    "self_attn.v_proj": "attention.wv",
    "self_attn.o_proj": "attention.wo",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OTHERS = {EMBEDDINGS: "tok_embeddings.weight", "model.norm.weight": "norm.weight", HEAD: "output.weight"}
COMPUTED = re.compile(r".*(rotary_emb\.inv_freq|rope\.freqs)")  # from the config, whoever reads the file
LLAMA_3 = 128_000  # tokens, from which on a vocabulary is that of Llama 3
SCALED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
FFN = ((256, None), (1024, 1.3), (4096, 1.3), (256, 1.5), (256, 1.0), (4096, 1.2))  # pairs that Meta's own models have


class Written(Shape):
    """What is read of `params.json`."""

    dim: Count
    n_layers: Count
    n_heads: Count
    n_kv_heads: Count | None = ABSENT
    norm_eps: float
    rope_theta: float | None = ABSENT
    use_scaled_rope: bool | None = ABSENT


@dataclass(frozen=True)
class Sizes:
    """The sizes of a Llama."""

    dim: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int

    @property
    def head_dim(self) -> int:
        """Return the size of a head."""
        return self.dim // self.heads

    def shapes(self, tied: bool) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all tensors by transformers' names, in the order of the layers."""
        wide, narrow = (self.dim, self.dim), (self.kv_heads * self.head_dim, self.dim)
        up, down, norm = (self.hidden, self.dim), (self.dim, self.hidden), (self.dim,)
        layer: dict[str, tuple[int, ...]]
        layer = dict(zip(LAYER, (norm, wide, narrow, narrow, wide, norm, up, down, up), strict=True))
        found: dict[str, tuple[int, ...]] = {EMBEDDINGS: (self.vocabulary, self.dim)}
        for number in range(self.layers):
            found |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
        return found | {"model.norm.weight": norm} | ({} if tied else {HEAD: (self.vocabulary, self.dim)})


def meta_name(name: str) -> str:
    """Return Meta's name of a tensor that transformers calls `name`, empty if it has none."""
    if match := re.fullmatch(r"model\.(layers\.\d+)\.(.+)\.weight", name):
        return f"{match[1]}.{LAYER[match[2]]}.weight" if match[2] in LAYER else ""
    return OTHERS.get(name, "")


def rotated(name: str, sizes: Sizes) -> int:
    """Return the number of heads of a projection whose result is rotated, 0 for every other tensor."""
    return {"q_proj": sizes.heads, "k_proj": sizes.kv_heads}.get(name.split(".")[-2], 0)


def to_meta(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a projection of queries or keys with its rows in Meta's order."""
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


def from_meta(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a projection of queries or keys with its rows in the order of transformers."""
    return tensor.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(tensor.shape)


# --------------------------------------------------------------------------------------------------------- params.json


def params_of(sizes: Sizes, norm_eps: float, rope_theta: float, scaled: bool) -> dict[str, Any]:
    """Return the content of `params.json`: of what a Llama 1 lacks, only what differs from a Llama 1."""
    multiple, multiplier = ffn_rule(sizes.dim, sizes.hidden)
    params: dict[str, Any] = {"dim": sizes.dim, "n_layers": sizes.layers, "n_heads": sizes.heads}
    params |= {"n_kv_heads": sizes.kv_heads} if sizes.kv_heads != sizes.heads else {}
    params |= {"vocab_size": sizes.vocabulary, "multiple_of": multiple}
    params |= {"ffn_dim_multiplier": multiplier} if multiplier is not None else {}
    params |= {"norm_eps": norm_eps}
    params |= {"rope_theta": rope_theta} if rope_theta != 10_000 or sizes.vocabulary >= LLAMA_3 else {}
    return params | ({"use_scaled_rope": True} if scaled else {})


def hidden_size(dim: int, multiple: int, multiplier: float | None) -> int:
    """Return the size between the two projections of a layer, as Meta's code works it out."""
    size = int(2 * (4 * dim) / 3)
    size = size if multiplier is None else int(multiplier * size)
    return multiple * math.ceil(size / multiple)


def ffn_rule(dim: int, hidden: int) -> tuple[int, float | None]:
    """Return `multiple_of` and `ffn_dim_multiplier` of which Meta's code works out a hidden size.

    A pair that Meta has used, if one gives that size; else a multiplier with as few decimals as will do.
    """
    for multiple, multiplier in FFN:
        if hidden_size(dim, multiple, multiplier) == hidden:
            return multiple, multiplier
    multiple = math.gcd(hidden, 256)
    exact = (hidden + 1 - multiple / 2) / int(8 * dim / 3)  # the middle of those that round up to it
    multipliers = (round(exact, decimals) for decimals in range(1, 17))
    return multiple, next(found for found in multipliers if hidden_size(dim, multiple, found) == hidden)


def rope_of(settings: Mapping[str, Any]) -> tuple[float, float | None, str]:
    """Return the base of rope, the factor of a scaling of Llama 3.1's kind, and what else there is, if anything.

    `settings` are those of a config, in the spelling of any version of transformers.
    """
    old = settings.get("rope_scaling") or {}
    found = {"rope_theta": settings.get("rope_theta", 10_000.0), **old, **(settings.get("rope_parameters") or {})}
    kind = found.get("rope_type", found.get("type", "default"))
    if kind == "default":
        return float(found["rope_theta"]), None, ""
    known = kind == "llama3" and all(found.get(key) == value for key, value in SCALED.items())
    return float(found["rope_theta"]), float(found.get("factor", 1.0)), "" if known else f"rope scaling of type {kind}"


def scaling_factor(tied: bool) -> float:
    """Return the factor of a scaled rope, which `params.json` does not hold: the tied models are those of Llama 3.2."""
    return 32.0 if tied else 8.0
