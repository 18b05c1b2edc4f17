"""Scores of single answers, and their means with standard errors."""

import math
import random
import statistics

import pytest
from rouge_score.rouge_scorer import RougeScorer

from lora_alpaca.evaluation import scores
from lora_alpaca.evaluation.losses import Loss
from lora_alpaca.evaluation.scores import Answered


def test_rouge_of_english_is_that_of_the_library_as_it_comes() -> None:
    chance, rouge = random.Random(0), scores.rouge_l()
    words = ["the", "Alpaca", "lives", "in", "3", "High", "mountains,", "it", "hums;", "don't", "stop-it."]
    for _ in range(200):
        one, other = (" ".join(chance.choices(words, k=chance.randint(0, 12))) for _ in range(2))
        assert rouge(one, other) == RougeScorer(["rougeL"]).score(one, other)["rougeL"].fmeasure


def test_rouge_knows_other_scripts() -> None:
    """With the library's own tokenizer all of these are 0: it throws away what is not a to z."""
    rouge = scores.rouge_l()
    assert rouge("Альпака живёт в горах", "альпака спит в горах") == pytest.approx(0.75)  # noqa: RUF001
    assert rouge("羊驼住在山里", "羊驼睡在山里") == pytest.approx(5 / 6)
    assert rouge("Où est l'été ?", "où est l'été") == 1
    assert scores.words("Où est l'été, 羊驼 42?") == ["où", "est", "l", "été", "羊", "驼", "42"]


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 0),
        ("one two three", 0),
        ("one two three four five six", 0),
        ("one two three four one two three four", 0.2),  # of five runs, the last
        ("so it is so it is so it is so it is", 1 - 3 / 9),
        ("hum " * 20, 1 - 1 / 17),
    ],
)
def test_repetition(text: str, share: float) -> None:
    assert scores.repetition(text) == pytest.approx(share)


def test_an_exact_match_is_one_but_for_white_space_around_it() -> None:
    def exact(answer: str, expected: str | None) -> float | None:
        return scores.scored(answer, expected, Loss(1, 1), True, 1, lambda one, other: 0.0).exact_match

    assert exact(" cold\n", "cold") == 1
    assert exact("Cold", "cold") == 0
    assert exact("a  b", "a b") == 0
    assert exact("cold", None) is None


def test_the_standard_error_of_a_mean_is_the_usual_one() -> None:
    chance = random.Random(1)
    values = [chance.gauss(3, 2) for _ in range(50)]
    mean, error = scores.ratio([(value, 1.0) for value in values])
    assert mean == pytest.approx(statistics.mean(values))
    assert error == pytest.approx(statistics.stdev(values) / math.sqrt(50))
    assert scores.ratio([(3.0, 1.0)]) == (3.0, None)


def test_the_standard_error_of_a_loss_is_that_of_a_bootstrap_over_rows() -> None:
    chance = random.Random(2)
    rows = []
    for _ in range(300):
        tokens, level = chance.randint(1, 60), chance.gauss(1.5, 0.4)
        rows.append((sum(chance.gauss(level, 1) for _ in range(tokens)), float(tokens)))
    mean, error = scores.ratio(rows)
    assert mean == pytest.approx(sum(nats for nats, _ in rows) / sum(tokens for _, tokens in rows))
    drawn = [scores.ratio(chance.choices(rows, k=300))[0] for _ in range(1000)]
    assert error == pytest.approx(statistics.stdev(drawn), rel=0.1)


def test_a_difference_is_taken_row_by_row() -> None:
    """Rows that are hard for both make each mean uncertain, and not the difference."""
    chance = random.Random(3)
    hard = [chance.gauss(0, 1) for _ in range(100)]
    one = [Answered("", Loss(level + 1, 1), rouge_l=level) for level in hard]
    other = [Answered("", Loss(level, 1), rouge_l=level + 0.5) for level in hard]
    found = scores.differences(one, other)
    assert (found["loss"]["mean"], found["rouge_l"]["mean"]) == (pytest.approx(1), pytest.approx(-0.5))
    assert found["loss"]["standard_error"] == pytest.approx(0, abs=1e-9)
    assert scores.summary(one)["loss"]["standard_error"] == pytest.approx(0.1, rel=0.3)
    assert "exact_match" not in found
