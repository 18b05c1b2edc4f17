"""Layers below all that learns, computed once a row: their hidden states are read from a file in every later pass.

With --layers top:N nothing below the last N layers changes, so what comes out of the layer below them is a function of
the row alone. It is computed for all rows before the first step, in packs that follow from the rows, and kept in the
dtype that it has; a run that resumes reads, or computes again, the very same numbers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lora_alpaca.data.examples import Example
from lora_alpaca.engine.packing import PackedBatch, pack, packs
from lora_alpaca.models.layers import decoder_layers, library_model

CHUNK = 4096  # rows whose packs are made together
DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "hidden_dropout", "resid_pdrop", "dropout")


class LayersUnfit(Exception):
    """The reason why the first layers of a model cannot be computed apart from the others."""


@dataclass(frozen=True)
class SplitModel:
    """A model of transformers whose first `count` layers, and the embeddings before them, do not learn."""

    model: Any
    count: int
    parent: Any
    attribute: str
    layers: torch.nn.ModuleList

    @classmethod
    def of(cls, model: Any) -> "SplitModel":
        """Return a model split below the first layer that learns. Raises LayersUnfit where that cannot be done."""
        base = library_model(model)
        try:
            name, layers = decoder_layers(base)
        except NotImplementedError as error:
            raise LayersUnfit(str(error)) from None
        learns = [any(one.requires_grad for one in layer.parameters()) for layer in layers]
        if learns[0] or True not in learns:
            raise LayersUnfit("something is trained in its first layer; --layers top:N leaves the others as they are")
        if any(one.requires_grad for one in base.get_input_embeddings().parameters()):
            raise LayersUnfit("its embeddings are trained")
        count, config = learns.index(True), base.config.get_text_config()
        if found := [key for key in DROPOUTS if getattr(config, key, 0)]:
            raise LayersUnfit(f"it has a dropout of its own: {found[0]} {getattr(config, found[0])}")
        above, _, attribute = name.rpartition(".")
        return cls(base, count, base.get_submodule(above), attribute, layers)

    @contextmanager
    def _having(self, part: slice) -> Iterator[None]:
        """Within this context, the model has only some of its layers."""
        setattr(self.parent, self.attribute, self.layers[part])
        try:
            yield
        finally:
            setattr(self.parent, self.attribute, self.layers)

    @torch.no_grad()
    def below(self, batch: PackedBatch) -> torch.Tensor:
        """Return what the first layers make of a pack, [N, W]."""
        caught: list[torch.Tensor] = []

        def catch(module: torch.nn.Module, args: Any, output: Any) -> None:
            caught.append(output[0] if isinstance(output, tuple) else output)

        hook = self.layers[self.count - 1].register_forward_hook(catch)
        try:
            with self._having(slice(0, self.count)):
                self.model.base_model(**batch.inputs(), use_cache=False)
        finally:
            hook.remove()
        return caught.pop()[0]

    def above(self, hidden: torch.Tensor, **inputs: Any) -> Any:
        """Return what the body returns for a pack, whose first layers have made `hidden`, [N, W]."""
        with self._having(slice(self.count, None)):
            return self.model.base_model(inputs_embeds=hidden[None], **inputs)


@dataclass(frozen=True)
class LowerLayers:
    """The body of a model, whose first layers are read from `states`, [tokens of all rows, W], on the CPU."""

    split: SplitModel
    states: torch.Tensor

    def __call__(self, *, input_ids: torch.Tensor, pack: PackedBatch, **inputs: Any) -> Any:
        """Return what the body returns for a pack; all layers compute where its rows do not know their places."""
        if pack.token_places is None:
            return self.split.model.base_model(input_ids=input_ids, pack=pack, **inputs)
        hidden = self.states[torch.from_numpy(pack.token_places)]
        return self.split.above(hidden.to(input_ids.device), pack=pack, **inputs)


def shape_of_states(split: SplitModel, example: Example, device: torch.device) -> tuple[int, torch.dtype]:
    """Return width and dtype of the hidden states between the layers, by those of a row."""
    hidden = split.below(pack([example], device=device))
    return hidden.shape[1], hidden.dtype


def fill(
    split: SplitModel,
    states: torch.Tensor,
    examples: Sequence[Example],
    token_budget: int,
    device: torch.device,
    count: Callable[[int], None],
) -> None:
    """Write the hidden states of all rows, each at its place, into `states`. `count` takes how many rows more are done.

    The packs follow from rows and budget alone, so the same numbers come out whenever they are computed.
    """
    for start in range(0, len(examples), CHUNK):
        rows = [examples[row] for row in range(start, min(start + CHUNK, len(examples)))]
        for members in packs(rows, token_budget):
            batch = pack([rows[row] for row in members], device=device)
            hidden = split.below(batch).cpu()
            for member, tokens in zip(members, batch.of_rows, strict=True):
                place = rows[member].place
                if place is None:
                    raise RuntimeError("a row does not say where its hidden states belong")
                states[place : place + len(tokens)] = hidden[torch.from_numpy(tokens)]
            count(len(members))
