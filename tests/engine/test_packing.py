"""A row in a pack sees what it sees alone: itself."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_alpaca.data.examples import IGNORED, Example
from lora_alpaca.engine.packing import LEAST_SAVED, pack, packs

PREAMBLE = list(range(100, 130))


def example(ids, prompt):
    return Example(ids, [IGNORED] * prompt + ids[prompt:])


def alpaca_like(count, seed=0):
    """Return rows that share one of two preambles, with answers of many lengths."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        own = [draw.randrange(50) for _ in range(draw.randint(2, 90))]
        rows.append(example(PREAMBLE[number % 2 :] + own, len(PREAMBLE)))
    return rows


@st.composite
def examples(draw):
    """Draw rows of few different tokens, so that many begin alike; any label may be missing, but not all."""
    beginnings = draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=40), min_size=1, max_size=3))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        ids = draw(st.sampled_from(beginnings)) + draw(st.lists(st.integers(1, 3), min_size=1, max_size=8))
        learned = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        labels = [token if learn else IGNORED for token, learn in zip(ids, learned, strict=True)]
        rows.append(Example(ids, [*labels[:-1], ids[-1]]))
    return rows


def predictions(rows):
    """Return how often each label is predicted from each beginning of a row."""
    return Counter(
        (tuple(row.input_ids[:place]), label)
        for row in rows
        for place, label in enumerate(row.labels)
        if place and label != IGNORED
    )


@given(examples(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_prediction_sees_its_own_row_and_nothing_else(rows, share):
    packed = pack(rows, share)
    ids, positions, ends = packed.input_ids[0].tolist(), packed.positions[0].tolist(), packed.subtree_ends().tolist()
    found = Counter()
    for place, label, weight in zip(packed.places, packed.labels, packed.weights, strict=True):
        seen = [key for key in range(int(place) + 1) if place < ends[key]]
        assert [positions[key] for key in seen] == list(range(len(seen)))
        found[tuple(ids[key] for key in seen), int(label)] += int(weight)
    assert found == predictions(rows)


@given(examples())
@settings(max_examples=100, deadline=None)
def test_paths_and_subtrees_say_the_same(rows):
    """Attention by segment follows `above`, attention in blocks `subtree_ends`."""
    packed = pack(rows)
    ends = packed.subtree_ends().tolist()
    for number, segment in enumerate(packed.segments):
        path = [*segment.above, number]
        for other, begin in enumerate(packed.segments):
            sees = other <= number and segment.start < ends[begin.start]
            assert sees == (other in path)


def test_what_rows_share_is_held_once():
    rows = [example([*PREAMBLE, n, n + 1, n + 2], len(PREAMBLE)) for n in range(5)]
    assert pack(rows).input_ids.numel() == len(PREAMBLE) + 5 * 2  # the last token of a row predicts nothing
    assert pack(rows, share=False).input_ids.numel() == 5 * (len(PREAMBLE) + 2)


def test_a_beginning_that_saves_little_is_not_shared():
    rows = [example([*PREAMBLE[: LEAST_SAVED - 1], n, n], LEAST_SAVED - 1) for n in (1, 2)]
    assert len(pack(rows).segments) == 2


def test_beginnings_branch_more_than_once():
    longer = [*PREAMBLE, *range(200, 240)]
    rows = [example([*longer, 1, 2], 70), example([*longer, 3, 4], 70), example([*PREAMBLE, 5, 6], 30)]
    packed = pack(rows)
    assert packed.input_ids.numel() == 30 + 40 + 3 * 1
    assert sorted(len(segment.above) for segment in packed.segments) == [0, 1, 1, 2, 2]


def test_the_same_row_twice_weighs_twice():
    row = example([*PREAMBLE, 7, 8], 30)
    packed = pack([row, row])
    assert packed.input_ids.numel() == 31
    assert packed.weights.tolist() == [2, 2]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [1, 150, 400, 100_000])
def test_packs_hold_every_row_once_within_the_budget(budget, share):
    rows = alpaca_like(60)
    found = packs(rows, budget, share)
    assert sorted(row for part in found for row in part) == list(range(60))
    for part in found:
        assert len(part) == 1 or pack([rows[row] for row in part], share).input_ids.numel() <= budget


@given(examples(), st.integers(1, 120))
@settings(max_examples=200, deadline=None)
def test_a_pack_is_never_larger_than_it_was_thought(rows, budget):
    for part in packs(rows, budget):
        assert len(part) == 1 or pack([rows[row] for row in part]).input_ids.numel() <= budget


def test_packs_are_few_and_alike():
    rows = alpaca_like(60)
    sizes = [pack([rows[row] for row in part]).input_ids.numel() for part in packs(rows, 1000)]
    assert len(sizes) <= -(-sum(sizes) // 1000) + 1
    assert max(sizes) - min(sizes) < 200


def test_packs_come_from_the_rows_alone():
    rows = alpaca_like(60)
    order = random.Random(1).sample(range(60), 60)
    shuffled = [rows[row] for row in order]
    expected = [[rows[row] for row in part] for part in packs(rows, 400)]
    assert [[shuffled[row] for row in part] for part in packs(shuffled, 400)] == expected


def test_a_row_without_a_prediction_is_in_no_pack():
    rows = [example([1, 2, 3], 1), Example([1, 2], [IGNORED, IGNORED]), Example([5], [5])]
    assert packs(rows, 100) == [[0]]
    assert packs(rows[1:], 100) == []
