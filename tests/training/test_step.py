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
from lora_alpaca.distributed.strategy import Replicated
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import EngineChoices, Padded, WholeModel, fitted
from lora_alpaca.errors import ConfigError, TrainingError
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import DeviceSpec, choose_device
from lora_alpaca.models.lora import LoraAdapter
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
    choices = EngineChoices(engine="packed", token_budget=token_budget, micro_batch_size=4)
    spec = DeviceSpec(torch.device("cpu"), torch.float32, 16)
    return fitted(model, choices, spec, 0, [], nullcontext, is_proven=True)


def make_stepper(engine, world, **options):
    """Return the stepper of an engine."""
    config = FinetuneConfig(**OPTIONS | {"max_grad_norm": 1.0} | options)
    return Stepper(engine, LoraAdapter(engine.model), Replicated(world), world, config, print)


def gradients(folder, rows, micro_batch_size, token_budget=None, **options):
    """Return the LoRA gradients of one step over all rows, with B not zero, as one vector, and the mean loss.

    Rows are padded, or packed where there is a token budget.
    """
    config = FinetuneConfig(**OPTIONS | options)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = Encoder.for_prompts(tokenizer, load_template("alpaca_short")).encode(rows)
    with World(config) as world:
        world.require_same({"seed": "42"}, "")
        with nullcontext() if world.world_size == 1 else pytest.raises(ConfigError, match="rank is 1 on rank 1"):
            world.require_same({"rank": str(world.rank)}, "")
        assert world.least(world.rank + 5) == 5
        assert world.broadcast(lambda: world.rank) == 0
        model = with_adapter(folder, world.spec, **options)
        context = packed(model, token_budget) if token_budget else nullcontext((padded(model, micro_batch_size), []))
        with context as (engine, _):
            stepper, kept = make_stepper(engine, world, max_grad_norm=0.0, **options), []
            stepper.optimizer.step = lambda: kept.extend(p.grad.flatten().clone() for p in stepper.parameters)
            step = stepper.step(examples, 0.0)
    return torch.cat(kept), step.loss


def reference(folder, rows):
    """Return the same from plain transformers and PEFT in fp64: one padded batch, mean loss over its labels."""
    config = FinetuneConfig(**OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    examples = Encoder.for_prompts(tokenizer, load_template("alpaca_short")).encode(rows)
    model = with_adapter(folder, choose_device(config)[0]).double()
    longest = max(len(example.ids) for example in examples)
    filled = [[*e.ids.tolist(), *[0] * (longest - len(e.ids))] for e in examples]
    labels = [[*e.labels, *[-100] * (longest - len(e.labels))] for e in examples]
    mask = [[1] * len(e.ids) + [0] * (longest - len(e.ids)) for e in examples]
    logits = model(input_ids=torch.tensor(filled), attention_mask=torch.tensor(mask)).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), torch.tensor(labels)[:, 1:].flatten())
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
    with World(config) as world:
        model = with_adapter(tiny_llama, world.spec)
        stepper = make_stepper(padded(model, 2), world)
        before = lora.state(model)
        model.get_output_embeddings().weight.data[0] = float("nan")
        assert not stepper.step([Example([1, 5, 6], [(1, 3)])], 1e-3).finite
        after = lora.state(model)
        with pytest.raises(TrainingError, match="the validation loss is nan"):
            stepper.evaluate([Example([1, 5, 6], [(1, 3)])])
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_validation_loss_does_not_depend_on_the_micro_batch(tiny_llama, rows):
    config = FinetuneConfig(**OPTIONS)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    examples = Encoder.for_prompts(tokenizer, load_template("alpaca_short")).encode(rows[:9])
    with World(config) as world:
        model = with_adapter(tiny_llama, world.spec)
        found = [make_stepper(padded(model, size), world).evaluate(examples) for size in (1, 4, 9)]
        with packed(model, 100) as (engine, _):
            found.append(make_stepper(engine, world).evaluate(examples))
    assert [one.loss for one in found] == pytest.approx([found[0].loss] * 4, rel=1e-6)


def test_the_losses_of_rows_are_in_their_order_and_sum_to_the_validation_loss(tiny_llama, rows):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    examples = Encoder.for_prompts(tokenizer, load_template("alpaca_short")).encode(rows[:9])
    with World(FinetuneConfig(**OPTIONS)) as world:
        model = with_adapter(tiny_llama, world.spec)
        alone = [make_stepper(padded(model, 1), world).evaluate([example]) for example in examples]
        with packed(model, 100) as (engine, _):
            found = make_stepper(engine, world).evaluate(examples)
    labels = [example.num_labels() for example in examples]
    assert len({len(example.ids) for example in examples}) > 4  # they are not computed in this order
    assert found.by_row == pytest.approx([one.by_row[0] for one in alone], rel=1e-5)
    assert found.by_row == pytest.approx([one.loss * count for one, count in zip(alone, labels, strict=True)], rel=1e-5)
    assert sum(found.by_row) / sum(labels) == pytest.approx(found.loss, rel=1e-6)


def test_optimizer_state_comes_back(tiny_llama, rows):
    config = FinetuneConfig(**OPTIONS)
    with World(config) as world:
        model = with_adapter(tiny_llama, world.spec)
        stepper = make_stepper(padded(model, 2), world)
        stepper.step([Example([1, 5, 6], [(1, 3)])], 1e-3)
        state, weights = stepper.optimizer_state(), stepper.weights()
        stepper.step([Example([1, 5, 6], [(1, 3)])], 1e-3)
        again = make_stepper(padded(model, 2), world)
        again.restore(weights, state, None)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in lora.state(model).items())
    assert state
    assert all(torch.equal(state[name], again.optimizer_state()[name]) for name in state)


def test_a_row_that_is_computed_only_to_keep_in_step_has_no_loss():
    class Lockstep(WholeModel):
        in_lockstep = True

    engine = Padded(None, torch.device("cpu"), None, 1, pad_id=0, access=Lockstep())
    examples = [Example([1, 5, 6], [(1, 3)]), Example([1, 5, 6, 7], [(1, 4)]), Example([1, 5], [(1, 2)])]
    own, idle = engine.batches(examples, rank=1, world_size=2)
    assert own.sum_by_row(torch.ones(len(own.labels))).tolist() == [3]
    assert idle.sum_by_row(torch.ones(len(idle.labels))).tolist() == [0]
