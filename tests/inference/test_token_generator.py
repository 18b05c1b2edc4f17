"""Token ids in, token ids out: several readers at once, each with the answer that it would have got alone."""

import gc
import threading
import time
import weakref

import pytest
import torch
import transformers

from lora_alpaca.inference.token_generator import OneAtATime, Sampling

PROMPTS = [[1, 9, 30, 41], [1, 77, 5], [1, 200, 201, 202, 203]]
SEEDED = Sampling(temperature=1.5, top_p=1.0, top_k=0, max_new_tokens=24, seed=3)
WITHIN = 60  # seconds, on a machine that does other things too


@pytest.fixture(scope="module")
def model(tiny_llama):
    return transformers.AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


@pytest.fixture
def tokens(model):
    return OneAtATime(model, [2], 0)


class Slow(torch.nn.Module):
    """A model of which every step takes a moment, and counts."""

    def __init__(self, model, seconds):
        super().__init__()
        self.model, self.seconds, self.steps = model, seconds, 0
        self.device = model.device

    def generate(self, **options):
        watcher, ids = options["stopping_criteria"], options["input_ids"]
        for _ in range(options["max_new_tokens"]):
            time.sleep(self.seconds)
            self.steps += 1
            ids = torch.cat([ids, torch.tensor([[5]])], 1)
            if watcher(ids, None).any():
                break
        return ids


def joined(lists):
    return [token for ids in lists for token in ids]


def in_threads(*works):
    """Do works at the same time and return what they return; fail where one does not end."""
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


def test_ids_come_one_by_one_and_a_beam_search_at_once(tokens):
    greedy = Sampling(temperature=0, max_new_tokens=8)
    one_by_one = list(tokens.generate(PROMPTS[0], greedy))
    assert {len(ids) for ids in one_by_one} == {1}
    assert [joined(one_by_one)] == tokens.generate_batch(PROMPTS[:1], greedy)
    *ticks, answer = tokens.generate(PROMPTS[0], Sampling(temperature=0, max_new_tokens=8, num_beams=3))
    assert ticks == [[]] * len(ticks)
    assert len(ticks) >= len(answer) > 1


def test_a_second_answer_while_the_first_is_half_read(tokens):
    alone = [joined(tokens.generate(prompt, SEEDED)) for prompt in PROMPTS]

    def nested():
        first = tokens.generate(PROMPTS[0], SEEDED)
        begun = next(first)
        second = joined(tokens.generate(PROMPTS[1], SEEDED))
        together = tokens.generate_batch([PROMPTS[2]], SEEDED)
        return [begun + joined(first), second, together[0]]

    assert in_threads(nested)[0] == alone


@pytest.mark.parametrize("num_beams", [1, 2])
def test_threads_get_the_answers_that_they_would_have_got_alone(tokens, num_beams):
    """While yet another thread draws from torch's own random numbers."""
    samplings = [Sampling(1.5, 1.0, 0, num_beams, 12, seed) for seed in (1, 2, 3)]
    asked = list(zip(PROMPTS, samplings, strict=True))
    alone = [joined(tokens.generate(*words)) for words in asked]
    assert len({tuple(answer) for answer in alone}) == 3
    done = threading.Event()
    drawing = threading.Thread(target=lambda: [torch.rand(9) for _ in iter(done.is_set, True)], daemon=True)
    drawing.start()
    try:
        for _ in range(2):
            assert in_threads(*(lambda words=words: joined(tokens.generate(*words)) for words in asked)) == alone
    finally:
        done.set()
        drawing.join()


def test_a_seed_is_that_of_torch_and_leaves_its_numbers_alone(model, tokens):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    private = joined(tokens.generate(PROMPTS[0], SEEDED))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(SEEDED.seed)
    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        options = SEEDED.options() | {"eos_token_id": [2], "pad_token_id": 0}
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    assert private == output[0, len(PROMPTS[0]) :].tolist()


def test_a_slow_reader_makes_nobody_wait(model):
    slow = Slow(model, 0.0)
    tokens = OneAtATime(slow, [2], 0)
    reader = tokens.generate(PROMPTS[0], Sampling(max_new_tokens=50))
    next(reader)
    in_threads(lambda: list(tokens.generate(PROMPTS[1], Sampling(max_new_tokens=5))))
    assert slow.steps == 55  # the first answer was made to its end, though nobody read it


@pytest.mark.parametrize("leave", ["close", "drop"])
def test_an_answer_that_nobody_reads_is_stopped(model, leave):
    slow = Slow(model, 0.01)
    tokens = OneAtATime(slow, [2], 0)
    answer = tokens.generate(PROMPTS[0], Sampling(max_new_tokens=100_000))
    next(answer)
    if leave == "close":
        answer.close()
    del answer
    assert in_threads(lambda: len(list(tokens.generate(PROMPTS[1], Sampling(max_new_tokens=3))))) == [3]
    assert slow.steps < 1000


def test_closing_stops_every_answer(model):
    slow = Slow(model, 0.01)
    tokens = OneAtATime(slow, [2], 0)
    running = tokens.generate(PROMPTS[0], Sampling(max_new_tokens=30))
    next(running)
    waiting = tokens.generate(PROMPTS[1], Sampling(max_new_tokens=100_000))

    def refused(answer):
        with pytest.raises(RuntimeError, match="closed"):
            list(answer)

    in_threads(lambda: refused(running), lambda: refused(waiting), tokens.close)
    assert slow.steps < 30
    with pytest.raises(RuntimeError, match="closed"):
        tokens.generate_batch(PROMPTS, Sampling())


def test_an_error_of_the_model_reaches_the_reader_and_the_next_answer_comes(model):
    """alpaca-lora swallows it in the thread: the page just stays empty."""

    class Broken(Slow):
        def generate(self, **options):
            if self.seconds:
                raise ZeroDivisionError
            return super().generate(**options)

    broken = Broken(model, 1)
    tokens = OneAtATime(broken, [2], 0)
    for ask in (tokens.generate(PROMPTS[0], Sampling()), tokens.generate(PROMPTS[0], Sampling(num_beams=2))):
        with pytest.raises(ZeroDivisionError):
            next(ask)
    broken.seconds = 0
    assert len(list(tokens.generate(PROMPTS[0], Sampling(max_new_tokens=3)))) == 3


def test_an_unread_answer_keeps_no_model(model):
    slow = Slow(model, 0.0)
    tokens = OneAtATime(slow, [2], 0)
    list(tokens.generate(PROMPTS[0], Sampling(max_new_tokens=3)))
    gone = weakref.ref(tokens)
    del tokens
    deadline = time.monotonic() + WITHIN
    while gone() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert gone() is None
