"""What the tests of the engine share: tiny random models, rows for them, and gradients by plain transformers."""

import copy
import random
from contextlib import nullcontext

import torch
import torch.nn.functional as F
import transformers
from conftest import ARCHITECTURES, LLAMA_SIZES

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import IGNORED, Example
from lora_alpaca.engine import EngineChoices, fitted
from lora_alpaca.engine.equivalence import difference, loss_and_gradient
from lora_alpaca.models import full
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.lora import attach, trainable_parameters

CPU, VOCABULARY = torch.device("cpu"), 300
OTHERS = {
    "Mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "Gemma2": {**LLAMA_SIZES, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0},
    "Granite": {**LLAMA_SIZES, "logits_scaling": 3.0},
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def make(architecture, lora=None, vocabulary=VOCABULARY, **changes):
    """Return a random model, norms and biases too, with an adapter whose B is not zero; the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _random(architecture, vocabulary, changes)
        config = model.config
        targets = ["x_proj", "in_proj"] if architecture == "Mamba" else ["all-linear"]
        options = {"lora_target_modules": targets, "lora_r": 4, "lora_dropout": 0.0} | (lora or {})
        base = Base(architecture, architecture, None, False, config)
        model = attach(model, FinetuneConfig(**options), base)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_whole(architecture, options=None, vocabulary=VOCABULARY, dtype=torch.float32, **changes):
    """Return the same random model without an adapter, its own weights learning; the frozen ones are in `dtype`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = _random(architecture, vocabulary, changes)
    return full.mark_learning(model, FinetuneConfig(tune="full", **options or {}), dtype)


def _random(architecture, vocabulary, changes):
    sizes = (ARCHITECTURES | OTHERS)[architecture] | IDS | changes
    config = getattr(transformers, f"{architecture}Config")(vocab_size=vocabulary, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() == 1 else 0.02)
    return model


def rows(count=11, train_on_inputs=False, seed=0):
    """Return rows that share one of two preambles, of many lengths."""
    draw = random.Random(seed)
    preambles = [[draw.randrange(VOCABULARY) for _ in range(25)] for _ in range(2)]
    examples = []
    for number in range(count):
        prompt = preambles[number % 2] + [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 12))]
        answer = [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, 25))]
        first = 0 if train_on_inputs else len(prompt)
        examples.append(Example(prompt + answer, [(first, len(prompt + answer))]))
    return examples


def reference(model, examples):
    """Return summed loss and adapter gradient by plain transformers and PEFT in fp64, each row alone."""
    model = copy.deepcopy(model.eval()).double()
    parameters = trainable_parameters(model)
    loss, gradient = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        logits = model(input_ids=torch.tensor(example.ids.tolist())[None], use_cache=False).logits[0, :-1]
        part = F.cross_entropy(logits, torch.tensor(example.labels[1:]), ignore_index=IGNORED, reduction="sum")
        found = torch.autograd.grad(part, parameters, allow_unused=True, materialize_grads=True)
        gradient = gradient + torch.cat([grad.flatten() for grad in found])
        loss += part.detach()
    return loss, gradient


@torch.no_grad()
def large_and_sure(vocabulary=49_152, label=7, labels=10):
    """Return a model that gives nearly all of the probability to the right piece of many, and its rows.

    The other pieces' logits have a spread of 2, as a trained model's have; the label's row of the head is solved for.
    """
    model, draw = make("Llama", vocabulary=vocabulary), random.Random(0)
    prompts = [[draw.randrange(vocabulary) for _ in range(12)] for _ in range(4)]
    examples = [Example(prompt + [label] * labels, [(len(prompt), len(prompt) + labels)]) for prompt in prompts]
    base = model.get_base_model()
    hidden = torch.cat([base.model(torch.tensor(row.ids.tolist())[None])[0][0, 11:-1] for row in examples])
    head = base.lm_head.weight
    head.mul_(2 / (hidden @ head.t()).std())
    wanted = torch.linspace(14, 24, len(hidden)).double()[:, None]
    head[label] = torch.linalg.lstsq(hidden.double(), wanted, driver="gelsd").solution[:, 0].float()
    return model, examples


def settings(device=CPU, dtype=torch.float32, checked=False, **changes):
    """Return choices for an engine, where it computes, and whether its packs are proven."""
    choices = EngineChoices(**{"token_budget": 200, "micro_batch_size": 3} | changes)
    return choices, DeviceSpec(device, dtype, bits=16), checked


def fit(model, chosen, examples, precision=nullcontext):
    """Return the context of a fitted engine."""
    choices, spec, checked = chosen
    return fitted(model, choices, spec, 0, examples, precision, checked)


def error(model, examples, chosen, world_size=1):
    """Return the engine's name, and how far its loss and gradients, summed over ranks, are off the reference."""
    expected = reference(model, examples)
    with fit(model, chosen, examples) as (engine, _):
        parts = [
            loss_and_gradient(_Rank(engine, rank, world_size), examples, nullcontext) for rank in range(world_size)
        ]
    return engine.name, difference([sum(part) for part in zip(*parts, strict=True)], expected)


class _Rank:
    """An engine as one rank of several sees it."""

    def __init__(self, engine, rank, world_size):
        self.model, self.device, self.loss = engine.model, engine.device, engine.loss
        self.batches = lambda examples: engine.batches(examples, rank, world_size)
