"""Places and memory of the scheduler: given in order, planned, given back, and shared by what prompts begin with."""

import time

import pytest
import torch
from scheduling import ask, generated, ids, load, random_prompts, scheduled

from lora_alpaca.inference.sampling import BASE, Sampling
from lora_alpaca.inference.scheduler import cache
from lora_alpaca.inference.scheduler.cache import BLOCK


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return load(tiny_llama)


@pytest.fixture
def tokens(llama):
    made = scheduled(llama)
    yield made
    made.close()


def test_a_reader_who_leaves_frees_the_place(tiny_llama):
    model = load(tiny_llama)
    tokens = scheduled(model, places=2)
    model.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    long = Sampling(temperature=0, max_new_tokens=400)
    running = [ask(tokens, prompt, long, ()) for prompt in random_prompts(2, 9)]
    for stream in running:
        next(stream)
    waiting = ask(tokens, [1, 2, 3])
    time.sleep(0.1)
    assert not waiting.is_ready
    steps = tokens.counts.steps
    running[0].close()
    assert len(ids(waiting)) == 12
    assert tokens.counts.steps <= steps + 12 + 4
    tokens.close()


def test_places_are_given_in_order_and_no_more_than_there_are(llama, monkeypatch):
    tokens = scheduled(llama, places=3)
    most, finished = [0], []
    lane = tokens._loop.lanes[BASE]
    step = lane.step

    def counted(model):
        most[0] = max(most[0], len(lane.running))
        step(model)

    lane.step = counted
    streams = [ask(tokens, prompt, Sampling(temperature=0, max_new_tokens=6), ()) for prompt in random_prompts(12, 9)]
    for number, stream in enumerate(streams):
        stream.on_arrival(lambda number=number, stream=stream: finished.append(number))
    for stream in streams:
        assert len(ids(stream)) == 6
    assert most[0] == 3
    begun = list(dict.fromkeys(finished))
    assert begun == sorted(begun)
    tokens.close()


def test_a_long_answer_keeps_its_beginning_while_rows_are_made_for_short_ones(llama, tokens):
    long = random_prompts(40, 20)[0] + [token for prompt in random_prompts(40, 9, seed=8) for token in prompt]
    first = ask(tokens, long, Sampling(temperature=0, max_new_tokens=200), ())
    next(first)
    short = [ask(tokens, prompt) for prompt in random_prompts(9, 9)]
    assert [ids(stream) for stream in short] == [generated(llama, prompt) for prompt in random_prompts(9, 9)]
    assert ids(first) == generated(llama, long, 200, eos_token_id=None)[1:]


def test_no_memory_for_another_row_is_the_error_of_that_request(tiny_llama, monkeypatch):
    model = load(tiny_llama)
    tokens = scheduled(model)
    prompts = random_prompts(4, 20)
    expected = [generated(model, prompt, 200) for prompt in prompts]
    sampling = Sampling(temperature=0, max_new_tokens=200)
    running = [ask(tokens, prompt, sampling) for prompt in prompts[:2]]
    begun = [[token.id for token in next(stream)] for stream in running]
    resized, calls = cache._resized, []

    def fails(*size):
        calls.append(size)
        if len(calls) == 3:  # half-way through the layers
            raise torch.OutOfMemoryError("out of memory")
        return resized(*size)

    monkeypatch.setattr(cache, "_resized", fails)
    with pytest.raises(torch.OutOfMemoryError):
        ids(ask(tokens, prompts[2], sampling))
    last = ask(tokens, prompts[3], sampling)
    assert [start + ids(stream) for start, stream in zip(begun, running, strict=True)] == expected[:2]
    assert ids(last) == expected[3]
    tokens.close()


def test_memory_is_planned(tiny_llama):
    """Rows of long answers wait for memory, and what was answered is kept up to a number of tokens."""
    tokens = scheduled(load(tiny_llama), places=8)
    loop, lane = tokens._loop, tokens._loop.lanes[BASE]
    loop.memory = loop.per_token * 600
    lane.prefixes.most_tokens = 300
    most = [0]
    step = lane.step

    def counted(model):
        step(model)
        most[0] = max(most[0], lane.cache.rows * lane.cache.length)

    lane.step = counted
    long = Sampling(temperature=0, max_new_tokens=180)
    streams = [ask(tokens, prompt, long, ()) for prompt in random_prompts(10, 9)]
    assert [len(ids(stream)) for stream in streams] == [180] * 10
    assert 0 < most[0] <= 2 * 600 + 8 * BLOCK
    assert 0 < lane.prefixes.tokens <= 300
    tokens.close()


def test_an_answer_of_any_length_that_the_context_allows(tiny_llama):
    tokens = scheduled(load(tiny_llama), places=8)
    assert len(ids(ask(tokens, [1, 5], Sampling(temperature=0, max_new_tokens=None), ()))) == 510
    tokens.close()


# ---------------------------------------------------------------------------------------------------- the same prefix


def test_what_prompts_begin_with_is_computed_once(llama, tokens):
    preamble = random_prompts(1, 1)[0] + random_prompts(20, 9, seed=4)[7] * 6 + list(range(100, 140))
    prompts = [preamble + rest for rest in random_prompts(20, 8, seed=5)]
    expected = [generated(llama, prompt) for prompt in prompts]
    for again in range(2):  # at the same time, and when all are gone
        before = tokens.counts.computed_prompt_tokens
        streams = [ask(tokens, prompt) for prompt in prompts]
        assert [ids(stream) for stream in streams] == expected
        computed = tokens.counts.computed_prompt_tokens - before
        assert computed <= len(preamble) * (1 - again) + sum(len(p) - len(preamble) for p in prompts)


def test_the_next_turn_of_a_chat_is_computed_without_the_turns_before(llama, tokens):
    talk = random_prompts(1, 1)[0] + list(range(200, 240))
    for turn in range(3):
        before = tokens.counts.computed_prompt_tokens
        answer = ids(ask(tokens, talk, stop_ids=()))
        assert answer == generated(llama, talk, eos_token_id=None)
        if turn:
            assert tokens.counts.computed_prompt_tokens - before == 6  # the last token of the answer, and the question
        talk = talk + answer + [31, 32, 33, 34, 35]
