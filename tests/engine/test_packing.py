"""A row in a pack sees what it sees alone: itself."""

import random
from collections import Counter, defaultdict
from itertools import groupby, takewhile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_alpaca.data.examples import IGNORED, Example
from lora_alpaca.engine.packing import LEAST_SAVED, dealt, pack, packs, shares

PREAMBLE = list(range(100, 130))


def example(ids, prompt):
    return Example(ids, [(prompt, len(ids))])


def alpaca_like(count, seed=0):
    """Return rows that share one of two preambles, with answers of many lengths."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        own = [draw.randrange(50) for _ in range(draw.randint(2, 90))]
        rows.append(example(PREAMBLE[number % 2 :] + own, len(PREAMBLE)))
    return rows


def spans_of(learned):
    """Return the spans of a mask."""
    edges = [n for n, (one, other) in enumerate(zip([False, *learned], [*learned, False], strict=True)) if one != other]
    return list(zip(edges[::2], edges[1::2], strict=True))


@st.composite
def examples(draw):
    """Draw rows of few different tokens, so that many begin alike; any label may be missing, but not all."""
    beginnings = draw(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=40), min_size=1, max_size=3))
    rows = []
    for _ in range(draw(st.integers(1, 6))):
        ids = draw(st.sampled_from(beginnings)) + draw(st.lists(st.integers(1, 3), min_size=1, max_size=8))
        learned = draw(st.lists(st.booleans(), min_size=len(ids), max_size=len(ids)))
        rows.append(Example(ids, spans_of([*learned[:-1], True])))
    return rows


def predictions(rows):
    """Return how often each label is predicted from each beginning of a row."""
    return Counter(
        (tuple(row.ids[:place].tolist()), label)
        for row in rows
        for place, label in enumerate(row.labels)
        if place and label != IGNORED
    )


@given(examples(), st.booleans(), st.sampled_from([1, 7, 32]))
@settings(max_examples=200, deadline=None)
def test_a_prediction_sees_its_own_row_and_nothing_else(rows, share, multiple):
    packed = pack(rows, share, multiple=multiple)
    assert len(packed.input_ids[0]) % multiple == 0
    assert packed.positions.max() < packed.longest <= max(len(row.ids) for row in rows)  # a model may take no more
    ids, positions, ends = packed.input_ids[0].tolist(), packed.positions[0].tolist(), packed.subtree_ends().tolist()
    found = Counter()
    for place, label, weight in zip(packed.indices, packed.labels, packed.weights, strict=True):
        seen = [key for key in range(int(place) + 1) if place < ends[key]]
        assert [positions[key] for key in seen] == list(range(len(seen)))
        found[tuple(ids[key] for key in seen), int(label)] += int(weight)
    assert found == predictions(rows)


@given(examples(), st.sampled_from([1, 32]))
@settings(max_examples=100, deadline=None)
def test_paths_and_subtrees_say_the_same(rows, multiple):
    """Attention by segment follows `above`, attention in blocks `subtree_ends`."""
    packed = pack(rows, multiple=multiple)
    ends = packed.subtree_ends().tolist()
    for number, segment in enumerate(packed.segments):
        path = [*segment.above, number]
        for other, begin in enumerate(packed.segments):
            sees = other <= number and segment.start < ends[begin.start]
            assert sees == (other in path)


def shared_by(rows):
    """Return how many ids all rows have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False)))


def plain_pack(rows, share):
    """Return a pack computed token by token: ids, positions, segments, and (index, label) -> rows that predict it."""
    fed = [row.ids[: max(n for n, label in enumerate(row.labels) if label != IGNORED)].tolist() for row in rows]
    ids, positions, segments, paths = [], [], [], [[] for _ in rows]

    def put(members, start, stop, above):
        if start == stop:
            return above
        begin = len(ids)
        ids.extend(fed[members[0]][start:stop])
        positions.extend(range(start, stop))
        segments.append((begin, len(ids), above))
        for member in members:
            paths[member].extend(range(begin, len(ids)))
        return (*above, len(segments) - 1)

    def grow(members, start, above):
        stop = shared_by([fed[member] for member in members])
        if (stop - start) * (len(members) - 1) >= LEAST_SAVED:
            above = put(members, start, stop, above)
            start = stop
        for following, branch in groupby(members, key=lambda member: fed[member][stop : stop + 1]):
            alike = list(branch)
            if following and len(alike) > 1:
                grow(alike, start, above)
            else:
                for member in alike:
                    put([member], start, len(fed[member]), above)

    if share:
        grow(sorted(range(len(fed)), key=fed.__getitem__), 0, ())
    else:
        for row in range(len(fed)):
            put([row], 0, len(fed[row]), ())
    predicting = defaultdict(list)
    for number, (row, path) in enumerate(zip(rows, paths, strict=True)):
        for index, label in zip(path, row.labels[1:], strict=False):
            if label != IGNORED:
                predicting[index, label].append(number)
    return ids, positions, segments, dict(sorted(predicting.items()))


def plain_packs(rows, budget, share):
    """Return the numbers of the rows in each pack, found by trying every capacity."""
    fed = {
        number: row.ids[: max(n for n, label in enumerate(row.labels) if label != IGNORED)].tolist()
        for number, row in enumerate(rows)
        if any(label != IGNORED for label in row.labels[1:])
    }
    order = sorted(fed, key=fed.__getitem__) if share else list(fed)

    def filled(capacity):
        parts, size = [], capacity
        for before, number in zip([None, *order], order, strict=False):
            more = len(fed[number])
            if share and before is not None:
                more -= max(0, shared_by([fed[before], fed[number]]) - LEAST_SAVED + 1)
            if size + more > capacity:
                parts.append([])
                size, more = 0, len(fed[number])
            parts[-1].append(number)
            size += more
        return parts

    fewest = len(filled(budget))
    return next(filled(capacity) for capacity in range(budget + 1) if len(filled(capacity)) <= fewest)


@given(examples(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_a_pack_is_the_one_computed_token_by_token(rows, share):
    packed = pack(rows, share)
    ids, positions, segments, predicting = plain_pack(rows, share)
    assert packed.input_ids.tolist() == [ids]
    assert packed.positions.tolist() == [positions]
    assert [(segment.start, segment.stop, segment.above) for segment in packed.segments] == segments
    assert list(zip(packed.indices.tolist(), packed.labels.tolist(), strict=True)) == list(predicting)
    assert packed.weights.tolist() == [len(members) for members in predicting.values()]
    found = defaultdict(list)
    for row, prediction in zip(packed.row_index.tolist(), packed.prediction_index.tolist(), strict=True):
        found[prediction].append(row)
    assert [found[number] for number in range(len(predicting))] == list(predicting.values())


@given(examples(), st.integers(1, 120), st.booleans())
@settings(max_examples=300, deadline=None)
def test_packs_are_those_of_the_lowest_capacity(rows, budget, share):
    rows = [*rows, Example([4, 5], []), Example([4], [(0, 1)])]
    assert packs(rows, budget, share) == plain_packs(rows, budget, share)


def test_a_chain_of_rows_that_continue_each_other():
    """Deeper than Python may recurse."""
    ids = list(range(1, 6000))
    rows = [Example(ids[: 5 * length + 1], [(5 * length, 5 * length + 1)]) for length in range(1, 1200)]
    packed = pack(rows)
    assert packed.input_ids.numel() == 5 * 1199
    assert len(packed.segments[-1].above) == 1198


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


def test_every_token_knows_its_place_among_all_rows():
    rows = [Example([*range(20), 30 + number], [(5, 21)], place=100 * number) for number in range(3)]
    packed = pack(rows, share=False, multiple=32)
    places = [*range(20), *range(100, 120), *range(200, 220)]
    assert packed.token_places.tolist() == [*places, *[219] * 4]
    assert pack([*rows, example([1, 2, 3], 1)]).token_places is None


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


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_have_equal_shares_of_the_rows(ranks, share):
    rows, efficiency = alpaca_like(128), []
    for budget in (400, 1000, 2000):
        found = shares(rows, budget, share, ranks)
        assert sorted(row for packs_of_rank in found for part in packs_of_rank for row in part) == list(range(128))
        assert max(map(len, found)) - min(map(len, found)) <= 1
        tokens = [sum(pack([rows[row] for row in part], share).input_ids.numel() for part in one) for one in found]
        efficiency.append(sum(tokens) / ranks / max(tokens))
    if ranks == 1:
        assert found == [packs(rows, 2000, share)]
    assert min(efficiency) > 0.9


def test_packs_are_dealt_by_their_size_and_alike_every_time():
    assert dealt([5, 9, 9, 1, 3, 4], 2) == [[1, 0, 3], [2, 5, 4]]
    assert dealt([5, 9, 9, 1, 3, 4], 1) == [[0, 1, 2, 3, 4, 5]]
    assert dealt([7], 3) == [[0], [], []]


def test_packs_come_from_the_rows_alone():
    rows = alpaca_like(60)
    order = random.Random(1).sample(range(60), 60)
    shuffled = [rows[row] for row in order]
    expected = [[rows[row] for row in part] for part in packs(rows, 400)]
    assert [[shuffled[row] for row in part] for part in packs(shuffled, 400)] == expected


def test_a_row_without_a_prediction_is_in_no_pack():
    rows = [example([1, 2, 3], 1), Example([1, 2], []), Example([5], [(0, 1)])]
    assert packs(rows, 100) == [[0]]
    assert packs(rows[1:], 100) == []
