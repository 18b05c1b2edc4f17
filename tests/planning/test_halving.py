"""The search of a rate on paper: what is tried, what it costs, which rate wins, and what the run's own is then."""

import math

import pytest

from lora_alpaca.planning import halving
from lora_alpaca.planning.halving import GRID, Design, Rung, Trial

RATES = GRID["lora"]


@pytest.mark.parametrize("rows", [400, 3_000, 15_000, 1_000_000])
@pytest.mark.parametrize("tokens", [20.0, 100.0, 2000.0])
@pytest.mark.parametrize("batch", [4, 16, 128])
def test_a_search_takes_what_it_may_take(rows, tokens, batch):
    made = halving.design(RATES, rows, batch, tokens, 2000)
    assert 0.5 * rows < made.rows <= rows
    assert made.batch_size <= batch
    assert [rung.rates for rung in made.rungs] == [8, 4, 2]
    assert [rung.steps for rung in made.rungs] == [made.rungs[0].steps * factor for factor in (1, 2, 4)]
    assert halving.FEWEST_JUDGES <= made.judges <= halving.MOST_JUDGES


def test_a_search_tries_something_however_little_it_may_take():
    made = halving.design(RATES, 1, 16, 50.0, 3)
    assert (made.batch_size, made.judges, made.rungs[0]) == (1, 3, Rung(8, halving.FEWEST_STEPS))
    assert made.least == 8 * (2 + 3 * halving.PASS)
    assert made.rows == made.least + 4 * (4 + 3 * halving.PASS) + 2 * (8 + 3 * halving.PASS)


def trials_of(loss, has_time=lambda steps: True):
    made = Design(RATES, (Rung(8, 2), Rung(4, 4), Rung(2, 8)), 4, 8)
    tried = halving.halved(made, loss, has_time)
    return tried, halving.winner(made, tried)


@pytest.mark.parametrize("best", RATES)
def test_the_best_rate_of_a_smooth_curve_wins(best):
    tried, found = trials_of(lambda rate, steps: abs(math.log(rate / best)))
    assert found == Trial(best, 8, 0.0)
    assert [trial.steps for trial in tried] == [2] * 8 + [4] * 4 + [8] * 2


def test_a_rate_that_diverges_is_the_worst_and_ends_nothing():
    tried, found = trials_of(lambda rate, steps: math.inf if rate > 1e-3 else 1 - rate)
    assert found.rate == pytest.approx(1e-3)
    assert len(tried) == 14
    everything = trials_of(lambda rate, steps: math.inf)
    assert everything[1].rate == min(RATES), "where nothing works, the smallest"


def test_a_longer_horizon_decides_against_a_shorter_one():
    _, found = trials_of(lambda rate, steps: abs(math.log(rate / (1e-2 if steps < 8 else 4.6e-3))))
    assert found.rate == pytest.approx(4.6e-3, rel=0.02)


@pytest.mark.parametrize(("calls", "steps"), [(0, 2), (8, 2), (11, 2), (12, 4), (13, 4), (14, 8)])
def test_a_search_that_runs_out_of_time_takes_the_best_of_the_last_whole_rung(calls, steps):
    left = iter([True] * max(0, calls - 8) + [False])
    tried, found = trials_of(lambda rate, steps: abs(math.log(rate / 1e-3)), lambda steps: next(left, False))
    assert len(tried) == max(8, calls), "of rates that are not all tried, none is the best"
    assert found.steps == steps


def test_the_rate_falls_with_the_horizon_and_rises_with_the_batch():
    assert halving.scaled(1e-2, 100, 4, 100, 4) == 1e-2
    assert halving.scaled(1e-2, 100, 4, 800, 4) == pytest.approx(5e-3)
    assert halving.scaled(1e-2, 100, 4, 6400, 16) == pytest.approx(5e-3)
    assert halving.scaled(1e-2, 100, 4, 100, 128) == 1e-2, "never more than was tried"
    assert halving.scaled(1.23456e-3, 1, 1, 1, 1) == 1.2e-3, "two digits"
