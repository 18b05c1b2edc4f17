"""The judge: plain transformers and PEFT, each row alone, in fp64 on the CPU. It uses nothing of our own computing."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel

from lora_alpaca.data.examples import Example
from lora_alpaca.models import memory
from lora_alpaca.models.base import Base, without_report

CPU = torch.device("cpu")


def load(base: Base, adapter: Path | None = None) -> Any:
    """Return a base, with the adapter of a folder if one is named, in fp64; in fp32 where memory is short."""
    with without_report():
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base.path,
            revision=base.revision,
            trust_remote_code=base.trust_remote_code,
            use_safetensors=True,
            dtype=torch.float32,
        )
    if adapter is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads what transformers has renamed
            model = PeftModel.from_pretrained(model, str(adapter), is_trainable=True)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    fits = 2 * 8 * numbers < memory.free_and_total(CPU)[0]
    return model.to(torch.float64 if fits else torch.float32).eval()


def loss_and_gradient(model: Any, examples: Sequence[Example]) -> tuple[float, torch.Tensor]:
    """Return the mean loss per label of some examples, and its gradient by the whole adapter as one vector, fp64."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total, labels = 0.0, 0
    for example in examples:
        ids, places = torch.tensor(example.ids.tolist()), _learned(example)
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits[places - 1], ids[places], reduction="sum")
        loss.backward()
        total, labels = total + loss.item(), labels + len(places)
    gradient = torch.cat([parameter.grad.flatten().double() for parameter in parameters])
    return total / labels, gradient / labels


@torch.no_grad()
def logits(model: Any, examples: Sequence[Example]) -> torch.Tensor:
    """Return the logits of some examples, each computed alone, [all tokens, V]."""
    rows = [torch.tensor(example.ids.tolist())[None] for example in examples]
    return torch.cat([model(input_ids=ids, use_cache=False).logits[0] for ids in rows])


def _learned(example: Example) -> torch.Tensor:
    """Return the positions of the learned tokens; the first token of a row is predicted by nothing."""
    return torch.tensor([place for first, last in example.spans for place in range(max(first, 1), last)])
