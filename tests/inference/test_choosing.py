"""Which token comes next: by the distribution of transformers, and an error where there is no number."""

import pytest
import torch
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lora_alpaca.inference.sampling import Request, Sampling
from lora_alpaca.inference.scheduler.choosing import Chooser, choose, sample

LIMITS = [
    {},
    {"top_k": 5},
    {"top_k": 400},
    {"top_p": 0.6},
    {"top_p": 0.999},
    {"min_p": 0.2},
    {"min_p": 1e-5},
    {"top_k": 50, "top_p": 0.8, "min_p": 0.05},
    {"top_k": 10**9, "top_p": 0.5},
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("limits", LIMITS, ids=str)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_the_distribution_is_that_of_transformers(temperature, limits, ties):
    """Drawn with evenly spaced numbers, so that each token comes as often as its probability says."""
    scores = torch.randn(1, 700, generator=torch.Generator().manual_seed(3)) * 3
    scores = (scores * 4).round() / 4 if ties else scores  # as logits in 16 bits are
    sampling = Sampling(temperature, **{"top_p": 1.0, "top_k": 0} | limits)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(min(sampling.top_k, 700))] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    warped = scores.double()
    for warper in warpers:
        warped = warper(None, warped)
    expected = warped.softmax(-1)[0]
    number = 4000
    drawn = sample(scores.expand(number, -1), [sampling] * number, (torch.arange(number).double() + 0.5) / number)
    found = torch.tensor(drawn).bincount(minlength=700) / number
    if ties:  # which of several equal tokens top p cuts off is nobody's promise
        assert float((found.sort().values - expected.sort().values).abs().max()) < 2 / number
    else:
        assert float((found - expected).abs().max()) < 2 / number
        assert set(drawn) <= set(expected.nonzero()[:, 0].tolist())


def test_temperatures_near_zero_are_greedy():
    scores = torch.randn(4, 700)
    for temperature in (1e-3, 1e-30, 1e-320):
        for limits in ({"top_k": 0, "top_p": 1.0}, {"top_k": 40, "top_p": 0.5}):
            drawn = sample(scores, [Sampling(temperature, **limits)] * 4, torch.rand(4).double())
            assert drawn == scores.argmax(-1).tolist()


def test_rows_without_a_number_are_errors():
    scores = torch.randn(3, 50)
    scores[1, 7] = float("nan")
    choosers = [Chooser(Request([1], Sampling(temperature=t, seed=0))) for t in (0, 0.5, 0.5)]
    first, second, third = choose(scores, choosers)
    assert first.id == int(scores[0].argmax()) and isinstance(second, FloatingPointError) and third.id < 50
