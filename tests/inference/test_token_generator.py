"""Token ids in, token ids out, by either generator: several readers at once, each with the answer it had got alone."""

import gc
import threading
import time
import weakref

import pytest
import torch
import transformers

from lora_alpaca.inference import workers
from lora_alpaca.inference.adapters import Adapters
from lora_alpaca.inference.one_at_a_time import OneAtATime
from lora_alpaca.inference.sampling import Request, Sampling
from lora_alpaca.inference.scheduler.scheduler import Scheduler, token_generator

PROMPTS = [[1, 9, 30, 41], [1, 77, 5], [1, 200, 201, 202, 203]]
SEEDED = Sampling(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=24, seed=3)
WITHIN = 60  # seconds, on a machine that does other things too


class Steps:
    """A count of the forwards of a model, each of which takes a moment, or fails."""

    def __init__(self, model):
        self.number, self.seconds, self.error = 0, 0.0, None
        model.register_forward_pre_hook(self)

    def __call__(self, *_):
        self.number += 1
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error


@pytest.fixture(params=["one at a time", "scheduler"])
def made(tiny_llama, request):
    """Return a token generator and the steps of its model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).eval()
    if request.param == "scheduler":
        tokens, notes = token_generator(Adapters(model), 32, 512)
        assert isinstance(tokens, Scheduler) and not notes
    else:
        tokens = OneAtATime(Adapters(model), 0)
    yield tokens, Steps(model)
    tokens.close()


def ask(tokens, prompt, sampling, stop_ids=(2,)):
    return tokens.generate(Request(prompt, sampling, stop_ids))


def joined(stream):
    return [token.id for step in stream for token in step]


def in_threads(*works):
    """Do works at the same time and return what they returned; fail where one does not end."""
    found = {}
    threads = [
        threading.Thread(target=lambda number=number, work=work: found.update({number: work()}), daemon=True)
        for number, work in enumerate(works)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN)
        assert not thread.is_alive(), "a reader waits for ever"
    return [found[number] for number in range(len(works))]


def test_tokens_come_one_by_one_and_a_beam_search_at_once(made):
    tokens, _ = made
    one_by_one = list(ask(tokens, PROMPTS[0], Sampling(temperature=0, max_new_tokens=8)))
    assert {len(step) for step in one_by_one} == {1}
    *ticks, answer = ask(tokens, PROMPTS[0], Sampling(temperature=0, max_new_tokens=8, num_beams=3))
    assert ticks == [[]] * len(ticks)
    assert len(ticks) >= len(answer) > 1


def test_a_second_answer_while_the_first_is_half_read(made):
    tokens, _ = made
    alone = [joined(ask(tokens, prompt, SEEDED)) for prompt in PROMPTS[:2]]

    def nested():
        first = ask(tokens, PROMPTS[0], SEEDED)
        begun = [token.id for token in next(first)]
        second = joined(ask(tokens, PROMPTS[1], SEEDED))
        return [begun + joined(first), second]

    assert in_threads(nested)[0] == alone


@pytest.mark.parametrize("num_beams", [1, 2])
def test_threads_get_the_answers_that_they_would_have_got_alone(made, num_beams):
    """While yet another thread draws from torch's own random numbers."""
    tokens, _ = made
    samplings = [Sampling(1.5, 1.0, 0, num_beams, 12, seed) for seed in (1, 2, 3)]
    asked = list(zip(PROMPTS, samplings, strict=True))
    alone = [joined(ask(tokens, *words)) for words in asked]
    assert len({tuple(answer) for answer in alone}) == 3
    done = threading.Event()
    drawing = threading.Thread(target=lambda: [torch.rand(9) for _ in iter(done.is_set, True)], daemon=True)
    drawing.start()
    try:
        for _ in range(2):
            assert in_threads(*(lambda words=words: joined(ask(tokens, *words)) for words in asked)) == alone
    finally:
        done.set()
        drawing.join()


def test_a_seed_leaves_the_random_numbers_of_torch_alone(made):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    joined(ask(made[0], PROMPTS[0], SEEDED))
    assert torch.equal(torch.get_rng_state(), before)


def test_no_seed_is_another_answer_every_time(made):
    torch.manual_seed(11)
    sampling = Sampling(1.5, 1.0, 0, max_new_tokens=24)
    assert len({tuple(joined(ask(made[0], PROMPTS[0], sampling))) for _ in range(4)}) > 1


def test_a_slow_reader_makes_nobody_wait(made):
    tokens, _ = made
    reader = ask(tokens, PROMPTS[0], Sampling(max_new_tokens=50), ())
    next(reader)
    in_threads(lambda: joined(ask(tokens, PROMPTS[1], Sampling(max_new_tokens=5), ())))
    deadline = time.monotonic() + WITHIN
    while reader._channel._arrived.qsize() < 50 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(joined(reader)) == 49  # it was made to its end, though nobody read it


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_an_answer_that_nobody_reads_is_stopped_within_a_token(made, leave):
    tokens, steps = made
    steps.seconds = 0.05
    answer = ask(tokens, PROMPTS[0], Sampling(max_new_tokens=400), ())
    next(answer)
    if leave == "close":
        answer.close()
    del answer
    left = steps.number
    time.sleep(0.5)
    assert steps.number <= left + 2  # the one at work, and one that had just begun
    steps.seconds = 0
    assert in_threads(lambda: len(joined(ask(tokens, PROMPTS[1], Sampling(max_new_tokens=3), ())))) == [3]


def test_closing_stops_every_answer(made):
    tokens, steps = made
    steps.seconds = 0.01
    running = ask(tokens, PROMPTS[0], Sampling(max_new_tokens=300), ())
    next(running)
    waiting = ask(tokens, PROMPTS[1], Sampling(max_new_tokens=300), ())
    beams = ask(tokens, PROMPTS[1], Sampling(max_new_tokens=300, num_beams=2), ())

    def refused(answer):
        with pytest.raises(RuntimeError, match="closed"):
            joined(answer)

    in_threads(lambda: refused(running), lambda: refused(waiting), lambda: refused(beams), tokens.close)
    assert steps.number < 300
    with pytest.raises(RuntimeError, match="closed"):
        joined(ask(tokens, PROMPTS[0], Sampling()))


def test_an_error_of_the_model_reaches_the_reader_and_the_next_answer_comes(made):
    """alpaca-lora swallows it in the thread: the page just stays empty."""
    tokens, steps = made
    steps.error = ZeroDivisionError()
    for answer in (ask(tokens, PROMPTS[0], Sampling()), ask(tokens, PROMPTS[0], Sampling(num_beams=2))):
        with pytest.raises(ZeroDivisionError):
            next(answer)
    steps.error = None
    assert len(joined(ask(tokens, PROMPTS[0], Sampling(max_new_tokens=3), ()))) == 3


def test_an_unread_answer_keeps_no_generator(tiny_llama):
    for kind in (OneAtATime, Scheduler):
        model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
        tokens = kind(Adapters(model)) if kind is OneAtATime else token_generator(Adapters(model), 4, 512)[0]
        assert isinstance(tokens, kind)
        joined(ask(tokens, PROMPTS[0], Sampling(max_new_tokens=3)))
        unread = ask(tokens, PROMPTS[0], Sampling(max_new_tokens=3))
        gone = weakref.ref(model)
        del tokens, model
        deadline = time.monotonic() + WITHIN
        while gone() is not None and time.monotonic() < deadline:
            gc.collect()
            time.sleep(0.01)
        assert gone() is None
        assert len(joined(unread)) == 3  # the answer that was asked for was made nevertheless


def test_the_turns_at_the_model_go_to_who_waited_longest():
    turns, order = workers.Turns(), []

    def take(name):
        with turns:
            order.append(name)

    with turns:
        threads = []
        for name in range(5):
            threads.append(threading.Thread(target=take, args=[name]))
            threads[-1].start()
            while len(turns._waiting) <= name:
                time.sleep(0.001)
        turns.offer()
        order.append("again")
    for thread in threads:
        thread.join(WITHIN)
    assert order == [0, 1, 2, 3, 4, "again"]


def test_a_program_that_ends_waits_for_no_worker_that_has_not_started(monkeypatch):
    leaving, woken = threading.Event(), threading.Event()
    running = threading.Thread(target=lambda: (leaving.wait(), woken.wait()), daemon=True)
    unstarted = threading.Thread(target=leaving.wait)
    running.start()
    monkeypatch.setattr(workers, "_WORKERS", {running: woken.set, unstarted: lambda: None})
    monkeypatch.setattr(workers, "leaving", leaving)
    workers._stop_all()
    assert leaving.is_set() and not running.is_alive()
