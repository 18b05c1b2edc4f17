"""How llama.cpp knows the architectures that go into a GGUF file: their metadata, and the place of each tensor.

Each is proven against llama.cpp's own converter (tests/clients/test_gguf_oracle.py). What llama.cpp computes otherwise
than the model was trained, which its converter does not say, is refused by name.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import gguf
import torch

from lora_alpaca.errors import ModelError
from lora_alpaca.models.base import Base
from lora_alpaca.models.weights import TensorInfo

_LEFT_OUT = re.compile(r"(\.attention\.(masked_)?bias|\.attn\.(masked_)?bias|\.rotary_emb\.inv_freq)$")  # no weights
_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_FP32 = ("ffn_gate_inp", "position_embd")  # tensors besides norms and vectors that llama.cpp reads in fp32 alone


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp calls an architecture, and what its tensors need."""

    name: str
    interleaved: bool = False  # the rows of each head of q and k: its rotary embedding turns neighbours
    norm_shift: float = 0.0  # what the model adds to a norm's weight, and llama.cpp does not
    transposed: tuple[str, ...] = ()  # ends of names of weights that are [in, out]
    no_head: bool = False  # the head is the embeddings, whatever the files hold
    activations: tuple[str, ...] = ("silu",)


ARCHITECTURES = {
    "llama": Architecture("LLAMA", interleaved=True),
    "mistral": Architecture("LLAMA", interleaved=True),
    "mixtral": Architecture("LLAMA", interleaved=True),
    "qwen2": Architecture("QWEN2"),
    "qwen3": Architecture("QWEN3"),
    "qwen3_moe": Architecture("QWEN3MOE"),
    "gemma": Architecture("GEMMA", norm_shift=1, no_head=True, activations=("gelu_pytorch_tanh", "gelu")),
    "gemma2": Architecture("GEMMA2", norm_shift=1, no_head=True, activations=("gelu_pytorch_tanh",)),
    "gemma3_text": Architecture("GEMMA3", norm_shift=1, no_head=True, activations=("gelu_pytorch_tanh",)),
    "phi3": Architecture("PHI3"),
    "gpt2": Architecture(
        "GPT2", transposed=("c_attn.weight", "c_proj.weight", "c_fc.weight"), activations=("gelu_new",)
    ),
}


class Place(NamedTuple):
    """Where a tensor of the base stands in a GGUF file: in which tensor, or as which expert of it, and how."""

    name: str
    shape: tuple[int, ...]  # as numpy has it
    expert: int | None = None
    heads: int = 0  # whose rows are interleaved; 0: the rows stay
    shift: float = 0.0
    transposed: bool = False

    @property
    def fp32(self) -> bool:
        """Return whether llama.cpp reads the tensor in fp32 alone: norms, vectors, routers and positions."""
        return (
            len(self.shape) == 1
            or self.name.endswith("_norm.weight")
            or not self.name.endswith(".weight")
            or any(part in self.name for part in _FP32)
        )


def architecture_of(base: Base, advice: str) -> Architecture:
    """Return the architecture of a base. Raises ModelError where llama.cpp has none, or computes another."""
    config = base.config.get_text_config()
    found = ARCHITECTURES.get(config.model_type)
    if found is None or base.config.model_type != config.model_type:
        raise ModelError(
            f"--format gguf takes {', '.join(ARCHITECTURES)}, and this is {base.config.model_type}; {advice}"
        )
    for reason in _differs(config, found):
        raise ModelError(f"--format gguf: llama.cpp computes this {config.model_type} otherwise: {reason}; use hf")
    return found


class Places:
    """Where the tensors of a base stand in a GGUF file."""

    def __init__(self, base: Base, architecture: Architecture):
        self._config, self._architecture = base.config.get_text_config(), architecture
        self._names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.name], self._config.num_hidden_layers)
        self._heads = {"q_proj": self._config.num_attention_heads, "k_proj": _kv_heads(self._config)}

    def all(self, infos: Mapping[str, TensorInfo]) -> dict[str, Place]:
        """Return the places of all tensors by their names in the base's files, but for those that are left out."""
        head = "lm_head.weight" if self._architecture.no_head else None
        return {
            name: self.of(name, info.shape)
            for name, info in infos.items()
            if name != head and not _LEFT_OUT.search(name)
        }

    def of(self, name: str, shape: tuple[int, ...]) -> Place:
        """Return the place of a tensor. Raises ModelError for one that llama.cpp has no name for."""
        config, architecture, expert = self._config, self._architecture, _EXPERT.search(name)
        known = self._names.get_name(_whole(name) if expert else name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ModelError(f"--format gguf: llama.cpp has no name for {name} of a {config.model_type}; use hf")
        transposed = bool(architecture.transposed) and name.endswith(architecture.transposed)
        experts = (_experts(config),) if expert else ()
        return Place(
            known,
            (*experts, *(shape[::-1] if transposed else shape)),
            int(expert[1]) if expert else None,
            self._heads.get(name.split(".")[-2], 0) if architecture.interleaved else 0,
            architecture.norm_shift if name.endswith("norm.weight") else 0.0,
            transposed,
        )


def interleaved(rows: int, heads: int) -> torch.Tensor:
    """Return the order of rows in which a head's first and second half alternate, as llama.cpp turns neighbours."""
    return torch.arange(rows).view(heads, 2, rows // heads // 2).transpose(1, 2).reshape(-1)


def extra_tensors(config: Any) -> dict[str, torch.Tensor]:
    """Return the fp32 tensors of a GGUF file that are no weights: how rotary frequencies are scaled."""
    rope = _rope(config)
    if rope.get("rope_type") == "llama3":
        return {"rope_freqs.weight": _llama3_factors(config, rope)}
    if rope.get("rope_type") == "longrope":
        long, short = (torch.tensor(rope[f"{kind}_factor"], dtype=torch.float32) for kind in ("long", "short"))
        return {"rope_factors_long.weight": long, "rope_factors_short.weight": short}
    return {}


def add_metadata(writer: gguf.GGUFWriter, config: Any, vocabulary: int) -> None:
    """Add what llama.cpp must know of a model's shape."""
    kind = config.model_type
    head = _head_size(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or _gpt2_inner(config))
    writer.add_head_count(config.num_attention_heads)
    if kind == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_head_count_kv(_kv_heads(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rope(writer, config)
    if getattr(config, "head_dim", None) and kind != "phi3":
        writer.add_key_length(head)
        writer.add_value_length(head)
    if kind in ("llama", "mistral", "mixtral"):
        writer.add_vocab_size(vocabulary)
        writer.add_rope_dimension_count(head)
    if _experts(config):
        writer.add_expert_count(_experts(config))
        writer.add_expert_used_count(config.num_experts_per_tok)
    if kind == "qwen3_moe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if kind in ("gemma2", "gemma3_text"):
        writer.add_sliding_window(config.sliding_window)
    if kind == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_dimension_count(int(_rope(config).get("partial_rotary_factor", 1.0) * head))


def notes(config: Any) -> Iterable[str]:
    """Yield sentences on what llama.cpp leaves out, where that changes long texts alone."""
    if config.model_type not in ("mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"):
        return
    window = getattr(config, "use_sliding_window", True) and config.sliding_window
    if window and window < config.max_position_embeddings:
        yield f"llama.cpp attends to all tokens, this model to the last {window}: it answers longer texts otherwise"


def _differs(config: Any, architecture: Architecture) -> Iterable[str]:
    """Yield what llama.cpp would compute otherwise than transformers, as a predicate."""
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    activation = activation or getattr(config, "activation_function", None)
    if activation not in architecture.activations:
        yield f"its activation is {activation}, not {architecture.activations[0]}"
    rope = _rope(config).get("rope_type", "default")
    known = ("default", "linear", "yarn", "llama3") if config.model_type != "phi3" else ("default", "longrope")
    if rope not in known:
        yield f"its rotary embedding is scaled by {rope}"
    if config.model_type == "gpt2" and (config.scale_attn_by_inverse_layer_idx or not config.scale_attn_weights):
        yield "its attention is scaled by layer"
    if config.model_type in ("gemma2", "gemma3_text") and config.query_pre_attn_scalar != _head_size(config):
        yield f"its attention is scaled by {config.query_pre_attn_scalar}, not by the size of a head"
    if config.model_type == "qwen3_moe" and (not config.norm_topk_prob or config.mlp_only_layers):
        yield "its experts are not weighted to 1, or not in every layer"
    if config.model_type == "qwen3_moe" and config.decoder_sparse_step != 1:
        yield "its experts are not in every layer"
    if config.model_type in ("gemma2", "gemma3_text"):
        every = {"gemma2": 2, "gemma3_text": 6}[config.model_type]
        expected = [
            "full_attention" if (n + 1) % every == 0 else "sliding_attention" for n in range(len(config.layer_types))
        ]
        if list(config.layer_types) != expected:
            yield f"not every {every}th of its layers attends to all tokens"


def _add_rope(writer: gguf.GGUFWriter, config: Any) -> None:
    rope = _rope(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    local = (getattr(config, "rope_parameters", None) or {}).get("sliding_attention")
    if local:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    longest = config.max_position_embeddings
    original = getattr(config, "original_max_position_embeddings", None) or longest
    original = int(rope.get("original_max_position_embeddings") or original)
    kind = rope.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(original)
        for key, add in (
            ("extrapolation_factor", writer.add_rope_scaling_yarn_ext_factor),
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
        ):
            if rope.get(key) is not None:
                add(rope[key])
    if config.model_type == "phi3":
        writer.add_rope_scaling_orig_ctx_len(original)
        if kind == "longrope":
            scale = longest / original
            writer.add_rope_scaling_attn_factors(
                math.sqrt(1 + math.log(scale) / math.log(original)) if scale > 1 else 1
            )


def _llama3_factors(config: Any, rope: dict[str, Any]) -> torch.Tensor:
    """Return by what each frequency of Llama 3 is divided: low ones by the factor, high ones by 1."""
    size = _head_size(config)
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    factors = []
    for frequency in frequencies:
        length = 2 * math.pi / frequency
        if length < original / high:
            factors.append(1.0)
        elif length > original / low:
            factors.append(factor)
        else:
            smooth = (original / length - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(factors, dtype=torch.float32)


def _rope(config: Any) -> dict[str, Any]:
    """Return how the rotary embedding of a model, or of its layers that attend to all tokens, is made."""
    found = getattr(config, "rope_parameters", None) or {}
    return dict(found.get("full_attention", found))


def _whole(name: str) -> str:
    """Return the name of the tensor of all experts that one expert's is a part of."""
    name = _EXPERT.sub(".experts.", name)
    mixtral = ".block_sparse_moe."
    return name.replace("model.layers", "layers").replace(mixtral, ".feed_forward.") if mixtral in name else name


def _experts(config: Any) -> int:
    return getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None) or 0


def _kv_heads(config: Any) -> int:
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _gpt2_inner(config: Any) -> int:
    return config.n_inner or 4 * config.n_embd
