"""The gradient of one optimizer step does not depend on how its rows are cut up."""

import subprocess
import sys
import textwrap
from contextlib import nullcontext

import pytest
import torch
from conftest import TORCHRUN
from transformers import AutoTokenizer

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.examples import Example
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import Padded, Settings, fitted
from lora_alpaca.errors import TrainingError
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import choose_device
from lora_alpaca.prompts import load_template
from lora_alpaca.training.step import Stepper

OPTIONS = {"load_8bit": False, "dtype": "fp32", "device": "cpu", "lora_dropout": 0.0}


def with_adapter(folder, spec, **options):
    """Return the model of a folder with an adapter whose B is not zero, the same at every call."""
    config, base = FinetuneConfig(**OPTIONS | options), locate_base(str(folder))
    torch.manual_seed(0)
    model = lora.attach(load_base(base, spec)[0], config, base)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def padded(model, micro_batch_size):
    """Return the engine of padded rows, on the model as it is."""
    return Padded(model, torch.device("cpu"), None, micro_batch_size, pad_id=0)


def packed(model, token_budget):
    """Return the context of the engine of packs."""
    settings = Settings("packed", torch.device("cpu"), torch.float32, token_budget, True, 4, 0, checked=True)
    return fitted(model, settings, [], [], nullcontext)


def gradients(folder, rows, micro_batch_size, token_budget=None, **options):
    """Return the LoRA gradients of one step over all rows, with B not zero, as one vector, and the mean loss.

    Rows are padded, or packed where there is a token budget.
    """
    config = FinetuneConfig(**OPTIONS | options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = [row.example() for row in Encoder(tokenizer, load_template("alpaca_short"), 128).encode(rows)]
    with World(config) as ranks:
        assert ranks.agree("the same on every rank")
        assert ranks.agree(str(ranks.rank)) == (ranks.world_size == 1)
        model = with_adapter(folder, ranks.spec, **options)
        context = packed(model, token_budget) if token_budget else nullcontext((padded(model, micro_batch_size), []))
        with context as (engine, _):
            learner, kept = Stepper(engine, ranks, weight_decay=0.0, max_norm=0.0), []
            learner.optimizer.step = lambda: kept.extend(p.grad.flatten().clone() for p in learner.parameters)
            step = learner.step(examples, 0.0)
    return torch.cat(kept), step.loss


def reference(folder, rows):
    """Return the same from plain transformers and PEFT: one padded batch, mean loss over its labels."""
    config = FinetuneConfig(**OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = [row.example() for row in Encoder(tokenizer, load_template("alpaca_short"), 128).encode(rows)]
    model = with_adapter(folder, choose_device(config)[0])
    longest = max(len(example.input_ids) for example in examples)
    filled = [[*e.input_ids, *[0] * (longest - len(e.input_ids))] for e in examples]
    labels = [[*e.labels, *[-100] * (longest - len(e.labels))] for e in examples]
    mask = [[1] * len(e.input_ids) + [0] * (longest - len(e.input_ids)) for e in examples]
    loss = model(input_ids=torch.tensor(filled), attention_mask=torch.tensor(mask), labels=torch.tensor(labels)).loss
    loss.backward()
    return torch.cat([p.grad.flatten() for p in lora.trainable_parameters(model)]), loss.item()


def test_any_micro_batch_gives_the_gradient_of_the_whole_batch(tiny_llama, rows):
    expected, loss = reference(tiny_llama, rows[:12])
    for micro_batch_size in (1, 3, 5, 12):
        found, found_loss = gradients(tiny_llama, rows[:12], micro_batch_size)
        assert (found - expected).norm() / expected.norm() < 1e-5
        assert found_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("token_budget", [1, 150, 10_000])
def test_any_packs_give_the_gradient_of_the_whole_batch(tiny_llama, rows, token_budget):
    expected, loss = reference(tiny_llama, rows[:12])
    found, found_loss = gradients(tiny_llama, rows[:12], 4, token_budget)
    assert (found - expected).norm() / expected.norm() < 1e-5
    assert found_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("token_budget", [None, 100])
def test_two_ranks_give_the_gradient_of_one(tiny_llama, rows, tmp_path, token_budget):
    program = tmp_path / "two_ranks.py"
    program.write_text(
        textwrap.dedent(f"""
        import sys; sys.path[:0] = {sys.path!r}
        import torch
        from lora_alpaca.prompts import Conversation, Message
        from test_step import gradients
        rows = {rows[:7]!r}
        import os
        found = gradients({str(tiny_llama)!r}, rows, 2, {token_budget})
        torch.save(found, {str(tmp_path)!r} + "/rank" + os.environ["RANK"])
        assert not torch.distributed.is_initialized(), "the process group was left open"
        """)
    )
    launcher = [*TORCHRUN, str(program)]
    subprocess.run(launcher, check=True, capture_output=True, cwd=tmp_path)
    expected, loss = gradients(tiny_llama, rows[:7], 7)
    for name in ("rank0", "rank1"):
        found, found_loss = torch.load(tmp_path / name)
        assert (found - expected).norm() / expected.norm() < 1e-5
        assert found_loss == pytest.approx(loss, rel=1e-5)


def test_a_loss_that_is_not_finite_moves_nothing(tiny_llama, rows):
    config = FinetuneConfig(**OPTIONS)
    with World(config) as ranks:
        model = with_adapter(tiny_llama, ranks.spec)
        learner = Stepper(padded(model, 2), ranks, weight_decay=0.0, max_norm=1.0)
        before = lora.state(model)
        model.get_output_embeddings().weight.data[0] = float("nan")
        assert not learner.step([Example([1, 5, 6], [-100, 5, 6])], 1e-3).finite
        after = lora.state(model)
        with pytest.raises(TrainingError, match="the validation loss is nan"):
            learner.evaluate([Example([1, 5, 6], [-100, 5, 6])])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_validation_loss_does_not_depend_on_the_micro_batch(tiny_llama, rows):
    config = FinetuneConfig(**OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    examples = [row.example() for row in Encoder(tokenizer, load_template("alpaca_short"), 128).encode(rows[:9])]
    with World(config) as ranks:
        model = with_adapter(tiny_llama, ranks.spec)
        losses = [Stepper(padded(model, size), ranks, 0.0, 1.0).evaluate(examples) for size in (1, 4, 9)]
        with packed(model, 100) as (engine, _):
            losses.append(Stepper(engine, ranks, 0.0, 1.0).evaluate(examples))
    assert losses == pytest.approx([losses[0]] * 4, rel=1e-6)


def test_optimizer_state_comes_back(tiny_llama, rows):
    config = FinetuneConfig(**OPTIONS)
    with World(config) as ranks:
        model = with_adapter(tiny_llama, ranks.spec)
        learner = Stepper(padded(model, 2), ranks, weight_decay=0.0, max_norm=1.0)
        learner.step([Example([1, 5, 6], [-100, 5, 6])], 1e-3)
        state = learner.optimizer_state()
        again = Stepper(padded(model, 2), ranks, weight_decay=0.0, max_norm=1.0)
        again.load_optimizer_state(state)
    assert state
    assert all(torch.equal(state[name], again.optimizer_state()[name]) for name in state)
