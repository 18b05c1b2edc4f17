"""A step of a Llama-like model by the compiled functions: one call for all layers, where the library makes thousands.

The scheduler's steps with few tokens come here; all else goes the library's way.
"""

import ctypes
import weakref
from typing import Any

import torch
from torch import nn

from lora_alpaca.inference.layers import kernels
from lora_alpaca.inference.layers.weights import KINDS, VECTOR, OtherWeights, Weights, require

CHANGING = ("dynamic", "longrope")  # rotary embeddings that depend on the length of the text


class Decoder:
    """A model as the compiled functions take it, with the adapter that is at work when it is made.

    The weights are the model's own. Raises OtherWeights for a model with other layers.
    """

    def __init__(self, functions: ctypes.CDLL, model: Any, adapter: str):
        self._functions, self._adapter = functions, adapter
        self._weights = Weights()
        self.windows: set[int | None] = set()  # how many tokens layers see, None for all
        try:
            self._read(model)
        except (AttributeError, TypeError) as error:
            raise OtherWeights(str(error)) from None
        self._memory = torch.empty(0)
        self._turns = torch.empty(0, 0)
        self._cache: Any = lambda: None

    def _read(self, model: Any) -> None:
        inner, weights = model.model, self._weights
        first = inner.layers[0]
        require(type(first.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation"), "its activation is not SiLU")
        require(type(inner.embed_tokens) is nn.Embedding, "its embeddings are of another kind")
        self.rotary, self.changes = inner.rotary_emb, getattr(inner.rotary_emb, "rope_type", "") in CHANGING
        self.size = first.self_attn.head_dim
        self._layers = (kernels.Layer * len(inner.layers))(*(self._layer(layer) for layer in inner.layers))
        self._model = kernels.Model(
            layers=len(self._layers),
            width=self._layers[0].q.weight.columns,
            heads=self._layers[0].q.weight.rows // self.size,
            groups=self._layers[0].k.weight.rows // self.size,
            head_size=self.size,
            inner=self._layers[0].gate.weight.rows,
            epsilon=inner.norm.variance_epsilon,
            scaling=first.self_attn.scaling,
            layer=self._layers,
            embeddings=weights.matrix(inner.embed_tokens),
            head=weights.linear(model.lm_head, self._adapter),
            norm=weights.floats(inner.norm.weight),
        )
        self.vocabulary = self._model.head.weight.rows
        self._require_shapes(inner)
        self._keys, self._values = ((ctypes.c_void_p * len(self._layers))() for _ in range(2))

    def _layer(self, layer: Any) -> kernels.Layer:
        attention, mlp, weights = layer.self_attn, layer.mlp, self._weights
        window = getattr(attention, "sliding_window", getattr(attention.config, "sliding_window", None))
        self.windows.add(window)
        places = (*(getattr(attention, f"{name}_proj") for name in "qkvo"), mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        return kernels.Layer(
            *(weights.linear(place, self._adapter) for place in places),
            weights.floats(layer.input_layernorm.weight),
            weights.floats(layer.post_attention_layernorm.weight),
            *(None if norm is None else weights.floats(norm.weight) for norm in norms),
            window or 0,
        )

    def _require_shapes(self, inner: Any) -> None:
        """Raise OtherWeights unless all shapes are what the functions will take them for."""
        m = self._model
        mixed, shared = m.heads * m.head_size, m.groups * m.head_size
        shapes = {
            "q": (mixed, m.width), "k": (shared, m.width), "v": (shared, m.width), "o": (m.width, mixed),
            "gate": (m.inner, m.width), "up": (m.inner, m.width), "down": (m.width, m.inner),
        }  # fmt: skip
        for layer in self._layers:
            for name, shape in shapes.items():
                linear = getattr(layer, name)
                require((linear.weight.rows, linear.weight.columns) == shape, f"{name} has a shape of its own")
                require(not linear.a.rows or linear.a.columns == shape[1], f"{name} has an adapter of another width")
                require(not linear.a.rows or linear.b.rows == shape[0], f"{name} has an adapter of another width")
            for together in ((layer.q, layer.k, layer.v), (layer.gate, layer.up)):
                require(len({linear.weight.kind for linear in together}) == 1, "some of its weights are quantised")
        norms = [(inner.norm, m.width)]
        for part in inner.layers:
            norms += [(part.input_layernorm, m.width), (part.post_attention_layernorm, m.width)]
            own = [getattr(part.self_attn, name, None) for name in ("q_norm", "k_norm")]
            norms += [(norm, m.head_size) for norm in own if norm is not None]
        require(all(tuple(norm.weight.shape) == (size,) for norm, size in norms), "its norms have shapes of their own")
        require(m.head_size % VECTOR == 0 and m.groups > 0 and m.heads % m.groups == 0, "its heads are of another size")
        require(m.embeddings.columns == m.width == m.head.weight.columns, "its embeddings are of another width")
        require(m.embeddings.kind in KINDS.values(), "its embeddings are quantised")

    # --------------------------------------------------------------------------------------------------- a step

    def logits(self, step: Any, keep: torch.Tensor) -> torch.Tensor:
        """Return the logits [kept, vocabulary] of some tokens of a step, fp32, and put keys and values in its cache."""
        self._point_to(step.cache)
        turns = self._turn(step)
        found = torch.empty(len(keep), self.vocabulary)
        keys = step.cache.layers[0][0]
        asked = kernels.Step(
            tokens=len(step.ids),
            kept=len(keep),
            threads=torch.get_num_threads(),
            length=keys.shape[2],
            is_bf16=keys.dtype == torch.bfloat16,
            ids=step.ids.data_ptr(),
            rows=step.rows.data_ptr(),
            positions=step.positions.data_ptr(),
            turns=turns.data_ptr(),
            keep=keep.data_ptr(),
            cosines=self._cosines.data_ptr(),
            sines=self._sines.data_ptr(),
            keys=ctypes.cast(self._keys, ctypes.c_void_p),
            values=ctypes.cast(self._values, ctypes.c_void_p),
            logits=found.data_ptr(),
        )
        needed = self._functions.memory_needed(ctypes.byref(self._model), ctypes.byref(asked))
        if needed > self._memory.numel():
            self._memory = torch.empty(needed)
        asked.memory = self._memory.data_ptr()
        self._functions.decode(ctypes.byref(self._model), ctypes.byref(asked))
        return found

    def _point_to(self, cache: Any) -> None:
        """Take over where the keys and values of every layer are, if they have moved."""
        first = cache.layers[0][0]
        if self._cache() is not first:
            for number in range(len(self._layers)):
                keys, values = cache.layers[number]
                self._keys[number], self._values[number] = keys.data_ptr(), values.data_ptr()
            self._cache = weakref.ref(first)

    def _turn(self, step: Any) -> torch.Tensor:
        """Return the rows of the tables of cosines and sines for the tokens, after making these where need be."""
        positions: torch.Tensor = step.positions
        if self.changes:
            self._cosines, self._sines = self._tables(positions)
            return torch.arange(len(positions))
        length = step.cache.layers[0][0].shape[2]
        if len(self._turns) < length:
            self._turns = torch.arange(length)
            self._cosines, self._sines = self._tables(self._turns)
        return positions

    def _tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        cosines, sines = self.rotary(torch.empty(1, 1, dtype=torch.float32), positions[None])
        return cosines[0].contiguous(), sines[0].contiguous()
