"""NEFTune: the noise of a row is its own, however rows are cut up; only training has it; a resumed run has the same."""

import math
from types import SimpleNamespace

import pytest
import short_run
import torch
from test_step import OPTIONS, make_stepper, padded, with_adapter
from transformers import AutoTokenizer

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import EngineChoices, fitted
from lora_alpaca.engine.batches import pad
from lora_alpaca.engine.packing import pack
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.prompts import load_template
from lora_alpaca.training.embedding_noise import EmbeddingNoise

ALPHA, WIDTH = 30.0, 8


@pytest.fixture
def examples(tiny_llama, rows):
    return Encoder.for_prompts(AutoTokenizer.from_pretrained(tiny_llama), load_template("alpaca_short")).encode(
        rows[:6]
    )


def gradient(folder, examples, engine_of, alpha=ALPHA, step=3, rank=0):
    """Return the gradient of one step as a vector, and the losses of a validation."""
    with World(FinetuneConfig(**OPTIONS)) as world:
        world.rank = rank
        world.seed(42, step)
        with engine_of(with_adapter(folder, world.spec)) as (engine, _):
            stepper, kept = make_stepper(engine, world, max_grad_norm=0.0, neftune_alpha=alpha), []
            stepper.optimizer.step = lambda: kept.extend(p.grad.flatten().clone() for p in stepper.parameters)
            world.rank = 0
            stepper.step(examples, 0.0)
            return torch.cat(kept), stepper.evaluate(examples).by_row


class _Context:
    """An engine on the model as it is, as a context."""

    def __init__(self, engine):
        self.engine = engine

    def __enter__(self):
        return self.engine, []

    def __exit__(self, *_):
        return None


def in_rows(size):
    return lambda model: _Context(padded(model, size))


def in_packs(budget):
    """Return the context of packs without shared beginnings, as a run with noise plans them."""

    def engine_of(model):
        choices = EngineChoices(engine="packed", token_budget=budget, micro_batch_size=4, share_prefix=False)
        return fitted(model, choices, DeviceSpec(torch.device("cpu"), torch.float32, 16), 0, [], torch.no_grad, True)

    return engine_of


def off(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_noise_is_the_same_in_packs_and_in_padded_rows_of_any_size(tiny_llama, examples):
    expected, losses = gradient(tiny_llama, examples, in_rows(6))
    for engine in (in_rows(1), in_rows(4), in_packs(80), in_packs(10_000)):
        found, other = gradient(tiny_llama, examples, engine)
        assert off(found, expected) < 1e-5
        assert other == pytest.approx(losses, rel=1e-5)
    assert off(gradient(tiny_llama, examples, in_rows(6), rank=1)[0], expected) == 0, "another rank, another noise"


def test_noise_is_of_training_alone_and_of_every_step_anew(tiny_llama, examples):
    noisy, losses = gradient(tiny_llama, examples, in_rows(6))
    plain, others = gradient(tiny_llama, examples, in_rows(6), alpha=None)
    assert losses == others, "validation has noise"
    assert off(noisy, plain) > 1e-3
    assert off(gradient(tiny_llama, examples, in_rows(6), step=4)[0], noisy) > 1e-3


def test_noise_is_scaled_by_the_length_of_the_row_not_of_what_it_is_in(examples):
    embedding = torch.nn.Embedding(100_000, WIDTH)
    noise = EmbeddingNoise(SimpleNamespace(get_input_embeddings=lambda: embedding), ALPHA)
    found = {}
    for batch in (pad(examples, 0), pack(examples, share=False, multiple=64)):
        plain = embedding(batch.input_ids)
        with noise.added(batch, examples, "42 0"):
            noisy = embedding(batch.input_ids)
        assert torch.equal(embedding(batch.input_ids), plain), "the noise stays"
        added = (noisy - plain).detach().flatten(0, 1)
        for row, (example, place) in enumerate(zip(examples, batch.places(), strict=True)):
            limit = ALPHA / math.sqrt(len(example.ids) * WIDTH)
            assert 0.9 * limit < added[place].abs().max() <= limit * 1.0001
            assert abs(float(added[place].mean())) < 0.2 * limit
            found.setdefault(row, []).append(added[place])
        if batch.input_ids.shape[0] > 1:
            mask = batch.attention_mask.flatten() == 0
            assert not added[mask].any(), "what fills rows up has noise"
    for whole, fed in found.values():
        assert torch.allclose(whole[: len(fed)], fed, atol=1e-6)


def test_rows_that_share_their_beginnings_have_no_places(examples):
    with pytest.raises(ValueError, match="share their beginnings"):
        pack(examples).places()


def test_a_run_with_noise_shares_no_beginnings_and_resumes_to_the_same_bits(tiny_llama, rows, tmp_path, capfd):
    options = {"neftune_alpha": 5.0, "lora_plus_ratio": 4.0, "save_steps": 2, "max_steps": 4, "report": False}
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = short_run.adapter(tmp_path / "whole", tiny_llama, rows[:16], **options)
    assert "beginnings not shared" in capfd.readouterr().out
    killed = short_run.adapter(tmp_path / "killed", tiny_llama, rows[:16], **options)
    short_run.interrupt(killed, 2)
    said = {"base_model": str(tiny_llama), "data_path": str(tmp_path / "killed/rows.json"), "output_dir": str(killed)}
    chosen = {"batch_size": 4, "val_set_size": 4, "learning_rate": 2e-2, "cutoff_len": 128, "load_8bit": False}
    chosen |= {"dtype": "fp32", "device": "cpu", "resume": True}
    finetune(FinetuneConfig(**said | chosen | options))
    assert "step 2" in capfd.readouterr().out
    assert short_run.same(whole, killed)
