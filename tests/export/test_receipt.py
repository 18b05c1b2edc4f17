"""The figures of a receipt, worked out by hand, and what makes one an error."""

import math

import pytest
import torch

from lora_alpaca.errors import AdapterError, ExportError
from lora_alpaca.export.proof.receipt import ROWS, Reference
from lora_alpaca.export.proof.samples import Sample

TUNED = torch.tensor([[0.0, 1.0, 2.0], [2.0, 0.0, 1.0], [0.0, 4.0, 0.0], [1.0, 0.0, 0.0]])
PROBE, ROW = Sample([2, 0], [1]), Sample([1, 2], [1], is_row=True)


def reference(plain=None, tuned=TUNED):
    return Reference([PROBE, ROW], tuned, tuned + 1 if plain is None else plain)


def test_equal_logits_lose_nothing():
    found = reference().figures(TUNED.clone())
    assert found["largest_logit_difference"] == found["mean_logit_difference"] == found["kl"] == 0
    assert found["same_top_token"] == found["greedy_agreement"] == 1
    assert found["share_of_the_adapter"] == 0
    assert found["loss"] == found["loss_of_base_and_adapter"] == pytest.approx(-(0 - math.log(math.exp(4) + 2)))


def test_every_figure_by_hand():
    other = TUNED.clone()
    other[0] = torch.tensor([3.0, 1.0, 2.0])  # the prediction of the probe's answer
    found = reference(plain=TUNED - 2).figures(other)
    assert found["largest_logit_difference"] == pytest.approx(3 / 4)
    assert found["mean_logit_difference"] == pytest.approx(3 / 12 / 4)
    p, q = torch.softmax(TUNED[0].double(), 0), torch.softmax(other[0].double(), 0)
    assert found["kl"] == pytest.approx((p * (p / q).log()).sum().item() / 4)
    assert found["same_top_token"] == 3 / 4 and found["greedy_agreement"] == 0
    assert found["share_of_the_adapter"] == pytest.approx(3 / math.sqrt(12 * 4))


def test_many_tokens_are_compared_in_parts():
    torch.manual_seed(0)
    tuned = torch.randn(2 * ROWS + 3, 11)
    sample = Sample(list(range(len(tuned))), [])
    found = Reference([sample], tuned, tuned + 1).figures(tuned + 0.1 * torch.randn_like(tuned))
    whole = Reference([sample], tuned, tuned + 1)
    assert 0 < found["kl"] < 0.1 and 0.5 < found["same_top_token"] <= 1
    assert "loss" not in found and "greedy_agreement" not in found
    assert whole.effect() > 0


def test_a_merge_that_is_another_model_is_an_error():
    assert reference().require_equal(TUNED + 1e-4) == pytest.approx(2.5e-5, rel=0.01)
    with pytest.raises(ExportError, match=r"differ from base \+ adapter by 2.5e-01"):
        reference().require_equal(TUNED + 1)
    with pytest.raises(ExportError):
        reference().require_equal(TUNED * float("nan"))


def test_an_adapter_that_changes_nothing_is_an_error():
    with pytest.raises(AdapterError, match="changes no logit"):
        reference(plain=TUNED.clone()).effect()
