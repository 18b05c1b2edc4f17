"""The proof of an export: base + adapter computed once, and every format that was written held to it."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from lora_alpaca.export.job import Job
from lora_alpaca.export.merge.merged_model import MergedModel
from lora_alpaca.export.proof import samples
from lora_alpaca.export.proof.adapted_model import with_adapters
from lora_alpaca.export.proof.receipt import Reference
from lora_alpaca.export.proof.samples import MOST_TOKENS, Sample
from lora_alpaca.export.proof.streamed_model import Precision, Read, StreamedModel, state_of, without_adapter
from lora_alpaca.export.tensors import ModelFacts, Tensors, Writer
from lora_alpaca.export.verify import greedy, served_receipt
from lora_alpaca.export.verify.probes import PROBES
from lora_alpaca.export.verify.served_receipt import Continuation
from lora_alpaca.models import memory
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import pick_device
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.tensor_names import TensorNames

TRAINED_TOKENS = 64  # of those whose embeddings were trained by themselves, compared in a sample of their own
FULL = 200_000_000  # parameters up to which all tokens are compared, and every probe is answered at full length
FEWEST_TOKENS, SHORTEST_ANSWER = 160, 8  # of the largest models


class Proof:
    """Base + adapter, and the base alone, on samples; every format that was written is held to them.

    `served` is the content of the served receipt, None for a model that is too large to be held.
    """

    def __init__(self, job: Job, model: MergedModel, facts: ModelFacts):
        self._job, self._model, self._facts = job, model, facts
        self._device = pick_device("cpu" if job.config.device == "auto" else job.config.device)
        adapt = partial(with_adapters, adapters=job.adapters)
        self._tuned = StreamedModel(job.source.base, model.base_tied, adapt, model.vocabulary)
        self._read = _reader(job.source.base, model.base_tensors, model.base_tied)
        self._parameters = sum(math.prod(info.shape) for info in model.base_tensors.infos.values())
        self._share = min(1.0, FULL / self._parameters)  # of the work that is done for a small model
        most = max(FEWEST_TOKENS, int(MOST_TOKENS * self._share))
        self.served = self._answers(most)
        rows, self._rows_left_out = samples.from_validation(
            job.adapters[0][0], job.tokenizer, job.template, facts.base.vocabulary, most // 2
        )
        most = most - most // 2 if rows else most
        probes = (
            samples.from_probes(self.served, most)
            if self.served
            else samples.from_prompts(job.tokenizer, job.template, list(PROBES.values()), most)
        )
        self._samples: list[Sample] = probes + rows
        if known := [token for token in model.tokens if token < job.source.base.vocabulary]:
            self._samples.append(Sample(known[:TRAINED_TOKENS], []))  # which no prompt of ours may have

    def receipt(self, writers: Mapping[str, Writer]) -> dict[str, Any]:
        """Return the part of a receipt that says how what was written answers.

        Raises AdapterError if the adapter changes nothing, ExportError if the merge is not base + adapter.
        """
        job, model, reference = self._job, self._model, self._reference
        chosen = reference if job.config.merge_into == "full_precision" else self._as_trained
        effect = chosen.effect()
        found: dict[str, Any] = {
            "adapter_effect": effect,
            "merge_error": chosen.require_equal(self._merged(model.exact)),
            "formats": {},
        }
        for name, writer in writers.items():
            what = f"hf, {str(job.dtype).removeprefix('torch.')}" if name == "hf" else name
            if name == "gguf":
                what = f"gguf, {job.config.gguf_type}"
            logits = self._merged(writer.read_back())
            found["formats"][name] = {"what": what, **chosen.figures(logits)}
            quantised = name == "gguf" and job.config.gguf_type not in ("f32", "f16", "bf16")
            chosen.require_near(found["formats"][name], quantised)
            if name == next(iter(writers)) and job.held is not None and model.values is not None:
                trained = self._as_trained.figures(logits)
                found["to_training"] = {"bits": job.held.bits, "format": name, **trained}
        rows = sum(sample.is_row for sample in self._samples)
        found["samples"] = {
            "tokens": sum(len(sample.ids) for sample in self._samples),
            "probes": len(self._samples) - rows,
            "rows": rows,
            "rows_left_out": self._rows_left_out,
        }
        return found

    @cached_property
    def _reference(self) -> Reference:
        """Return base + adapter in fp64, in fp32 where its code knows no fp64, and the base alone."""
        try:
            tuned = self._logits(self._tuned, self._read, torch.float64)
        except (RuntimeError, TypeError, NotImplementedError):
            tuned = self._logits(self._tuned, self._read, torch.float32)
        return Reference(self._samples, tuned, self._logits(self._tuned, self._read, adapted=False))

    @cached_property
    def _as_trained(self) -> Reference:
        """Return the reference for base + adapter with the values of the base that training held."""
        assert self._model.values is not None
        read = _reader(self._job.source.base, self._model.values, self._model.base_tied)
        return replace(self._reference, tuned=self._logits(self._tuned, read, torch.float64))

    def _merged(self, tensors: Tensors) -> torch.Tensor:
        """Return the logits of a merged model."""
        base, model = self._job.source.base, self._model
        streamed = StreamedModel(base, model.tied, vocabulary=model.vocabulary)
        return self._logits(streamed, _reader(base, tensors, model.tied, model.vocabulary))

    def _logits(
        self, model: StreamedModel, read: Read, dtype: torch.dtype = torch.float32, adapted: bool = True
    ) -> torch.Tensor:
        found = model.logits(samples.padded(self._samples), read, Precision(self._device, dtype), adapted)
        return torch.cat([row[: len(sample.ids)] for row, sample in zip(found, self._samples, strict=True)])

    def _answers(self, most: int) -> dict[str, Any] | None:
        """Return what base + adapter and the base answer, None for a model that is too large to be held."""
        free = 0.7 * memory.free_and_total(self._device)[0]
        stored = self._job.source.base.config.get_text_config().dtype or torch.float32
        dtype = next((one for one in (torch.float32, stored) if self._parameters * one.itemsize < free), None)
        if dtype is None:
            return None
        facts = self._facts
        with self._tuned.loaded(self._read, Precision(self._device, dtype)) as model:

            def plain(prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Continuation]:
                with without_adapter(model):
                    return greedy.continuations(model, prompts, new_tokens)

            def score(prompts: Sequence[Sequence[int]], found: Sequence[Continuation]) -> list[list[float]]:
                with without_adapter(model):
                    return greedy.logprobs(model, prompts, found)

            return served_receipt.build(
                partial(greedy.continuations, model),
                plain,
                facts.tokenizer,
                facts.template,
                facts.stop_ids,
                score,
                partial(greedy.rounding, model),
                new_tokens=max(SHORTEST_ANSWER, int(served_receipt.NEW_TOKENS * self._share)),
                most_tokens=None if self._share == 1 else most,
                max_length=facts.base.max_length,
            )


def _reader(base: Base, tensors: Tensors, tied: bool, vocabulary: int | None = None) -> Read:
    """Return what gives the tensors of a model by their names in memory.

    Where transformers makes other tensors of those in the files of the base, all of them are held.
    """
    bare = meta_model(base)
    names = TensorNames(bare, {name: info.shape for name, info in tensors.infos.items()}) if bare else None
    if names is None or names.converted:
        return state_of(base, {name: tensors.read(name) for name in tensors.infos}, tied, vocabulary).__getitem__
    return lambda name: tensors.read(names.stored[name])
