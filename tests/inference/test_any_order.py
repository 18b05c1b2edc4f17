"""A generator is safe in any order of calls and from any thread: each answer is the one that it would be alone."""

import gc
import itertools
import random
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

from lora_alpaca import GenerateConfig, Generator
from lora_alpaca.errors import ConfigError
from lora_alpaca.inference import loading

WITHIN = 60  # seconds, on a machine that does other things too
ASKED = [
    ("Where does the owl live?", ""),
    ("What does this animal eat?", "Animal: bee"),
    ("Add the numbers.", "2 + 7"),
    ("Name the opposite.", "Word: hot"),
]
MODELS = weakref.WeakKeyDictionary()  # of generators
SAMPLED = {"temperature": 1.5, "top_p": 1.0, "top_k": 0}


@pytest.fixture(scope="module")
def load(tiny_model):
    """Return `load(architecture, **options)`: a generator of a tiny model."""

    def load_(architecture="Llama", **options):
        given = {"max_new_tokens": 10, "dtype": "fp32", "device": "cpu", "prompt_template": "alpaca"} | options
        config = GenerateConfig(base_model=str(tiny_model(architecture)), lora_weights="none", **given)
        loaded = loading.load(config)
        found = Generator.of(loaded, config)
        MODELS[found] = loaded.adapters.model
        return found

    return load_


@pytest.fixture(scope="module")
def generator(load):
    return load()


@pytest.fixture(scope="module")
def alone(generator):
    """Return (instruction, input, seed) -> the answer that it gets alone."""
    return {(*pair, seed): generator.reply(*pair, seed=seed, **SAMPLED) for pair in ASKED for seed in (1, 2)}


def at_once(*works):
    """Do works at the same time and return what they return; fail where one raises, or does not end."""
    found, threads = {}, []

    def do(number, work):
        try:
            found[number] = work()
        except BaseException as error:
            found[number] = error

    for number, work in enumerate(works):
        threads.append(threading.Thread(target=do, args=(number, work), daemon=True))
        threads[-1].start()
    for thread in threads:
        thread.join(WITHIN)
        assert not thread.is_alive(), "a caller waits for ever"
    return [found[number] for number in range(len(works))]


def test_streams_that_are_read_in_turns(generator, alone):
    def turns():
        streams = {asked: generator.stream(*asked[:2], seed=asked[2], **SAMPLED) for asked in alone}
        read = dict.fromkeys(alone, "")
        for pieces in itertools.zip_longest(*streams.values(), fillvalue=""):
            for asked, piece in zip(alone, pieces, strict=True):
                read[asked] += piece
        return read

    assert at_once(turns) == [alone]


@pytest.mark.parametrize("order", range(4))
def test_any_order_of_calls(generator, alone, order):
    """Streams that are begun, read on, closed or dropped, between replies and batches: drawn from a seed."""
    draw = random.Random(order)

    def calls():
        open_streams, wrong = [], []
        for _ in range(30):
            asked = draw.choice(list(alone))
            kind = draw.choice(["begin", "read on", "close", "drop", "finish", "reply", "reply", "batch"])
            if kind == "begin":
                stream = generator.stream(*asked[:2], seed=asked[2], **SAMPLED)
                open_streams.append([asked, stream, next(stream)])
            elif kind == "reply":
                answer = generator.reply(*asked[:2], seed=asked[2], **SAMPLED)
                wrong += [answer] * (answer != alone[asked])
            elif kind == "batch":
                [answer] = generator.batch([asked[:2]], seed=asked[2], **SAMPLED)
                wrong += [answer] * (answer != alone[asked])
            elif open_streams:
                asked, stream, read = open_streams.pop(draw.randrange(len(open_streams)))
                if kind == "read on":
                    open_streams.append([asked, stream, read + next(stream, "")])
                elif kind == "finish":
                    wrong += [read] * (read + "".join(stream) != alone[asked])
                elif kind == "close":
                    stream.close()
                    wrong += list(stream)
            del asked
            gc.collect(0)
        return wrong + [read for asked, stream, read in open_streams if read + "".join(stream) != alone[asked]]

    assert at_once(calls) == [[]]


def test_threads_reply_and_stream_at_once(generator, alone):
    """Each from a seed of its own, while another thread sets and draws torch's own random numbers."""
    done = threading.Event()

    def disturb():
        while not done.is_set():
            torch.manual_seed(5)
            torch.rand(99)
            time.sleep(0.001)

    def reply(asked):
        return generator.reply(*asked[:2], seed=asked[2], **SAMPLED)

    def stream(asked):
        return "".join(generator.stream(*asked[:2], seed=asked[2], **SAMPLED))

    def batch(asked):
        return next(generator.batch([asked[:2]], seed=asked[2], **SAMPLED))

    disturbing = threading.Thread(target=disturb, daemon=True)
    disturbing.start()
    works = [(lambda how=how, asked=asked: how(asked)) for how in (reply, stream, batch) for asked in alone]
    try:
        assert at_once(*works) == list(alone.values()) * 3
    finally:
        done.set()
        disturbing.join()


def test_a_fresh_generator_is_asked_by_threads_at_once(load):
    """What is made at the first prompt is made by one of them."""
    answers = at_once(*(lambda fresh=fresh: fresh.reply("Hi.", temperature=0) for fresh in [load()] * 8))
    assert len(set(answers)) == 1 and isinstance(answers[0], str)
    turns = load(prompt_template="vicuna")
    assert len(set(at_once(*(lambda: turns.reply("Hi.", temperature=0) for _ in range(8))))) == 1


def test_a_stream_begun_in_one_thread_is_read_in_others(generator, alone):
    asked = next(iter(alone))
    stream = generator.stream(*asked[:2], seed=asked[2], **SAMPLED)
    read = []
    for _ in range(4):
        read += at_once(lambda: next(stream, ""))
    read += at_once(lambda: "".join(stream))
    assert "".join(read) == alone[asked]


def test_a_reply_in_another_thread_waits_for_an_open_stream_and_comes(generator, alone):
    first, second = list(alone)[:2]
    stream = generator.stream(*first[:2], seed=first[2], **SAMPLED)
    begun = next(stream)
    assert at_once(lambda: generator.reply(*second[:2], seed=second[2], **SAMPLED)) == [alone[second]]
    assert begun + "".join(stream) == alone[first]


def test_streams_that_are_never_read_keep_nobody_waiting(generator, alone):
    asked = next(iter(alone))
    streams = [generator.stream(*asked[:2], max_new_tokens=400) for _ in range(50)]
    del streams
    streams = [generator.stream(*asked[:2]) for _ in range(10)]
    assert at_once(lambda: generator.reply(*asked[:2], seed=asked[2], **SAMPLED)) == [alone[asked]]
    del streams


@pytest.mark.parametrize("raising", [ZeroDivisionError, KeyboardInterrupt, MemoryError])
def test_an_error_in_the_middle_leaves_it_usable(generator, alone, raising):
    asked, steps = next(iter(alone)), []

    def broken(module, args, kwargs, output):
        steps.append(1)
        if len(steps) == 3:
            raise raising("in the middle")

    hook = MODELS[generator].register_forward_hook(broken, with_kwargs=True)
    try:
        [error] = at_once(lambda: generator.reply(*asked[:2], seed=asked[2], **SAMPLED))
        assert isinstance(error, raising)
        del steps[:]
        [error] = at_once(lambda: list(generator.batch([asked[:2]], seed=asked[2], **SAMPLED)))
        assert isinstance(error, raising)
        del steps[:]
        stream = generator.stream(*asked[:2], seed=asked[2], **SAMPLED)
        with pytest.raises(raising):
            list(stream)
        assert list(stream) == []
    finally:
        hook.remove()
    assert at_once(lambda: generator.reply(*asked[:2], seed=asked[2], **SAMPLED)) == [alone[asked]]


def test_a_reader_that_raises_leaves_it_usable(generator, alone):
    asked = next(iter(alone))
    with pytest.raises(ZeroDivisionError):
        for _ in generator.stream(*asked[:2], max_new_tokens=400):
            raise ZeroDivisionError
    assert at_once(lambda: generator.reply(*asked[:2], seed=asked[2], **SAMPLED)) == [alone[asked]]


def test_a_prompt_that_is_refused_leaves_it_usable(generator, alone):
    asked = next(iter(alone))
    with pytest.raises(ConfigError):
        generator.reply("word " * 600)
    with pytest.raises(ConfigError):
        list(generator.batch([asked[:2], ("word " * 600, "")]))
    assert at_once(lambda: generator.reply(*asked[:2], seed=asked[2], **SAMPLED)) == [alone[asked]]


EXIT = """
import threading
from lora_alpaca import GenerateConfig, Generator
g = Generator.load(GenerateConfig(base_model="demo", lora_weights="none", max_new_tokens=400, temperature=2.0))
streams = [g.stream("Tell me about owls.") for _ in range(3)]
print([bool(next(s) or True) for s in streams[:1]], flush=True)
for ask in (lambda: g.reply("Hi."), lambda: list(g.batch([("Hi.", "")]))):
    threading.Thread(target=ask, daemon=True).start()
"""


def test_a_program_that_ends_in_the_middle_of_answers_ends_well(tmp_path):
    """A thread that Python leaves behind inside of torch aborts the process."""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", EXIT], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "[True]\n"), done.stderr
    assert done.stderr == "model demo, without an adapter\n"
    assert time.monotonic() - begun < WITHIN


# ----------------------------------------------------------------------------------------------------------- batches


def test_a_batch_of_nothing(generator):
    assert list(generator.batch([])) == []


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])  # GPT2's positions are a table with an end
def test_a_batch_keeps_within_the_context_as_one_by_one_does(load, architecture):
    """A long prompt has little room for its answer, and does not cut the answers of the others."""
    generator = load(architecture)
    words = "owl " * 1000
    longest = next(n for n in range(600) if len(generator.prompt_ids(words[: 4 * (n + 1)])) > 508)
    long = (words[: 4 * longest], "")
    assert 500 < len(generator.prompt_ids(*long)) <= 508
    asked = [ASKED[0], long, ASKED[2], long]
    for changes in ({"max_new_tokens": 4}, {"max_new_tokens": None}):
        options = {"temperature": 0, **changes}
        assert list(generator.batch(asked, **options)) == [generator.reply(*pair, **options) for pair in asked]


def test_texts_that_are_not_set_may_be_none():
    """In a program None is what is not given."""
    options = {"prompt_template": None, "lora_weights": None, "base_model": None, "system": None, "input": None}
    config = GenerateConfig(**options)
    assert config == GenerateConfig()
    assert not config.model_fields_set
