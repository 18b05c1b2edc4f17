"""Many answers at the same time, held to transformers: the same text, the same distribution, and nobody in the way."""

import subprocess
import sys
import threading
import time

import pytest
import torch
import transformers
from conftest import ARCHITECTURES
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from lora_alpaca import Generator
from lora_alpaca.inference.adapters import Adapters
from lora_alpaca.inference.one_at_a_time import OneAtATime
from lora_alpaca.inference.sampling import BASE, Request, Sampling
from lora_alpaca.inference.scheduler import cache
from lora_alpaca.inference.scheduler import scheduler as module
from lora_alpaca.inference.scheduler.attention import Span, Step
from lora_alpaca.inference.scheduler.cache import BLOCK, Cache
from lora_alpaca.inference.scheduler.choosing import Chooser, choose, sample
from lora_alpaca.inference.scheduler.lookup import Lookup, Pace
from lora_alpaca.inference.scheduler.scheduler import Scheduler, token_generator

GREEDY = Sampling(temperature=0, max_new_tokens=12)
WITHIN = 60  # seconds, on a machine that does other things too


def random_prompts(number, longest, vocabulary=600, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (number,), generator=numbers).tolist()
    return [torch.randint(5, vocabulary, (length,), generator=numbers).tolist() for length in lengths]


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


def scheduled(model, places=32, adapters=None):
    tokens, notes = token_generator(adapters or Adapters(model), places, 512)
    assert isinstance(tokens, Scheduler), notes
    return tokens


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return load(tiny_llama)


@pytest.fixture
def tokens(llama):
    made = scheduled(llama)
    yield made
    made.close()


def ask(tokens, prompt, sampling=GREEDY, stop_ids=(2,), **options):
    return tokens.generate(Request(prompt, sampling, stop_ids, **options))


def ids(stream):
    return [token.id for step in stream for token in step]


@torch.inference_mode()
def generated(model, prompt, length=12, **options):
    """Return what `generate` of transformers answers."""
    given = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": 2, "pad_token_id": 0} | options
    output = model.generate(given, attention_mask=torch.ones_like(given), max_new_tokens=length, **options)
    return output[0, len(prompt) :].tolist()


# ------------------------------------------------------------------------------------------------- the same answers


@pytest.mark.parametrize("architecture", ["Llama", "GPT2", "Qwen2"])
def test_200_prompts_at_once_are_answered_as_each_alone(architecture, tiny_model):
    model = load(tiny_model(architecture))
    prompts = random_prompts(200, 60, model.config.vocab_size)
    expected = [generated(model, prompt, 6) for prompt in prompts]
    tokens = scheduled(model)
    streams = [ask(tokens, prompt, Sampling(temperature=0, max_new_tokens=6)) for prompt in prompts]
    assert [ids(stream) for stream in streams] == expected
    assert len({tuple(answer) for answer in expected}) > 100
    assert tokens.counts.steps < 200 * 6 / 8  # and not one after another
    tokens.close()


@pytest.mark.parametrize("architecture", ["Mistral", "Gemma3Text", "Gemma", "OPT", "GPTNeoX", "Glm", "Phi3"])
def test_other_attention_and_windows(architecture):
    sizes = ARCHITECTURES.get(architecture, ARCHITECTURES["Llama"])
    if architecture in ("Mistral", "Gemma3Text", "Phi3"):
        sizes = sizes | {"sliding_window": 6}
    kind = getattr(transformers, f"{architecture}Config")
    torch.manual_seed(0)
    config = kind(vocab_size=640, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    prompts = random_prompts(8, 30)
    expected = [generated(model, prompt) for prompt in prompts]
    tokens = scheduled(model)
    streams = [ask(tokens, prompt) for prompt in prompts]
    assert [ids(stream) for stream in streams] == expected
    tokens.close()


def test_a_prompt_longer_than_a_step_among_short_ones(llama, tokens):
    prompts = [*random_prompts(4, 20), random_prompts(1, 1)[0] * 450, *random_prompts(4, 20, seed=1)]
    prompts[4] = (
        random_prompts(60, 10, seed=2)[0] + [token for p in random_prompts(80, 10, seed=3) for token in p][:440]
    )
    assert len(prompts[4]) > module.CHUNK["cpu"]
    streams = [ask(tokens, prompt) for prompt in prompts]
    assert [ids(stream) for stream in streams] == [generated(llama, prompt) for prompt in prompts]


def test_log_probabilities_are_those_of_a_plain_forward(llama, tokens, tiny_llama):
    sampling = Sampling(1.2, 0.9, 20, max_new_tokens=16, seed=5, repetition_penalty=1.3, logprobs=4)
    exact = load(tiny_llama).double()
    for prompt in random_prompts(4, 20):
        made = [token for step in ask(tokens, prompt, sampling) for token in step]
        text = prompt + [token.id for token in made]
        with torch.inference_mode():
            known = exact(torch.tensor([text])).logits[0].log_softmax(-1)[len(prompt) - 1 :]
        for token, row in zip(made, known, strict=False):
            assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
            assert [number for number, _ in token.top] == row.topk(4).indices.tolist()
            assert [value for _, value in token.top] == pytest.approx(row.topk(4).values.tolist(), abs=1e-4)


def test_penalties_are_those_of_transformers_and_of_the_other_generator(llama, tokens):
    alone = OneAtATime(Adapters(llama), 0)
    changes = [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7},
        {"logit_bias": {7: 4.0, 9: -100.0}},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {11: 2.0}},
    ]
    plain = ids(ask(tokens, [1, 9, 30, 41], Sampling(temperature=0, max_new_tokens=40)))
    for change in changes:
        sampling = Sampling(temperature=0, max_new_tokens=40, **change)
        answer = ids(ask(tokens, [1, 9, 30, 41], sampling))
        assert answer == ids(ask(alone, [1, 9, 30, 41], sampling)) != plain
    expected = generated(llama, [1, 9, 30, 41], 40, repetition_penalty=1.5)
    assert (
        ids(ask(tokens, [1, 9, 30, 41], Sampling(temperature=0, max_new_tokens=40, repetition_penalty=1.5))) == expected
    )


# ------------------------------------------------------------------------------------------------------- sampling

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


def test_a_seeded_answer_is_the_same_alone_and_in_company(tokens):
    prompts = random_prompts(24, 30)
    samplings = [Sampling(1.3, 0.95, 30, max_new_tokens=20, seed=seed) for seed in range(24)]
    alone = [ids(ask(tokens, *asked)) for asked in zip(prompts, samplings, strict=True)]
    company = [ask(tokens, prompt) for prompt in random_prompts(6, 40, seed=9)]
    streams = [ask(tokens, *asked) for asked in zip(prompts, samplings, strict=True)]
    assert [ids(stream) for stream in streams] == alone
    assert len({tuple(answer) for answer in alone}) > 20
    assert all(ids(stream) for stream in company)
    assert ids(ask(tokens, prompts[0], Sampling(1.3, 0.95, 30, max_new_tokens=20, seed=100))) != alone[0]


# ---------------------------------------------------------------------------------------------------- one fails alone


class Only:
    """A constraint: some tokens, and after a number of them an error."""

    def __init__(self, allowed, fails_after=1000, vocabulary=640):
        self.mask = torch.zeros(vocabulary, dtype=torch.bool)
        self.mask[allowed] = True
        self.seen, self.fails_after = [], fails_after

    def allowed(self):
        if len(self.seen) >= self.fails_after:
            raise ZeroDivisionError
        return self.mask

    def accept(self, token):
        self.seen.append(token)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.5, 1.0, 0, max_new_tokens=12, seed=2)])
def test_a_constraint_holds_and_sees_every_token(tokens, sampling):
    constraint = Only([50, 60, 70])
    answer = ids(ask(tokens, [1, 5, 9], sampling, constraint=constraint))
    assert constraint.seen == answer
    assert len(answer) == 12 and set(answer) <= {50, 60, 70}


def test_an_error_in_one_request_fails_that_one_alone(llama, tokens):
    prompts = random_prompts(6, 20)
    bad = [Only([50], fails_after=3), Only([])]
    streams = [ask(tokens, prompt) for prompt in prompts[:3]]
    broken = [ask(tokens, [1, 7], constraint=constraint) for constraint in bad]
    broken.append(ask(tokens, [1, 8], Sampling(temperature=0, logit_bias={10**6: 1.0})))
    streams += [ask(tokens, prompt) for prompt in prompts[3:]]
    for stream, error in zip(broken, (ZeroDivisionError, RuntimeError, IndexError), strict=True):
        with pytest.raises(error):
            ids(stream)
    assert [ids(stream) for stream in streams] == [generated(llama, prompt) for prompt in prompts]


def test_after_a_step_that_fails_a_prompt_that_was_answered_before_is_answered_again(llama, tokens):
    prompt = random_prompts(1, 40)[0] * 4
    before = ids(ask(tokens, prompt))
    with pytest.raises(RuntimeError, match="dtype"):
        ids(ask(tokens, [1, None]))
    assert ids(ask(tokens, prompt)) == before


def test_logits_that_are_no_numbers_fail_their_answer_alone_and_leave_nothing_behind(tiny_llama):
    model = load(tiny_llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[639] = float("nan")
    prompts = random_prompts(6, 20)
    expected = [generated(model, prompt) for prompt in prompts]
    tokens = scheduled(model)
    for _ in range(2):
        streams = [ask(tokens, prompt) for prompt in prompts[:3]]
        spoilt = ask(tokens, [1, 8, 639, 9])
        streams += [ask(tokens, prompt) for prompt in prompts[3:]]
        with pytest.raises(FloatingPointError):
            ids(spoilt)
        assert [ids(stream) for stream in streams] == expected
    tokens.close()


def test_rows_without_a_number_are_errors():
    scores = torch.randn(3, 50)
    scores[1, 7] = float("nan")
    choosers = [Chooser(Request([1], Sampling(temperature=t, seed=0))) for t in (0, 0.5, 0.5)]
    first, second, third = choose(scores, choosers)
    assert first.id == int(scores[0].argmax()) and isinstance(second, FloatingPointError) and third.id < 50


# ------------------------------------------------------------------------------------------------------------ places


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


# ----------------------------------------------------------------------------------------------------------- guesses


def test_guessed_tokens_are_those_that_are_chosen_one_by_one(tiny_llama):
    """The answers of a random model go round in circles, which is what is guessed."""
    model = load(tiny_llama)
    tokens, long = scheduled(model), Sampling(temperature=0, max_new_tokens=200, logprobs=0)
    for prompt in random_prompts(6, 40):
        made = [token for step in ask(tokens, prompt, long) for token in step]
        answer = [token.id for token in made]
        assert answer == generated(model, prompt, 200)
        with torch.inference_mode():
            known = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)[len(prompt) - 1 :]
        assert all(t.logprob == pytest.approx(float(row[t.id]), abs=1e-4) for t, row in zip(made, known, strict=False))
    assert tokens.counts.steps < tokens.counts.answer_tokens - 50
    tokens.close()


def test_guesses_beside_answers_that_end(tiny_llama):
    """A row that moves into the place of an answer that ended takes along what was guessed right in the same step."""
    model = load(tiny_llama)
    tokens = scheduled(model)
    for number, prompt in enumerate(random_prompts(6, 20, seed=11)):
        lengths = [20 + 14 * number, 110, 120, 130]
        answer = generated(model, prompt, 130, eos_token_id=None)
        streams = [ask(tokens, prompt, Sampling(temperature=0, max_new_tokens=length), ()) for length in lengths]
        assert [ids(stream) for stream in streams] == [answer[:length] for length in lengths]
    tokens.close()


def test_clients_of_all_kinds_at_the_same_time(tiny_llama):
    """Greedy and seeded, with beams, broken and left, of two adapters, in few places: who stays gets the answer."""
    adapters, put = two_adapters(tiny_llama)
    tokens = scheduled(adapters.model, places=5, adapters=adapters)
    preamble, rest = random_prompts(2, 60, seed=3)[0] * 2, random_prompts(24, 40, seed=6)
    asked = []
    for number, prompt in enumerate(rest):
        sampling = Sampling(temperature=0, max_new_tokens=5 + 3 * number)
        if number % 3 == 0:
            sampling = Sampling(1.2, 0.9, 20, max_new_tokens=20, seed=number, repetition_penalty=1.1)
        asked.append((preamble[: 5 * number] + prompt, sampling, "ab"[number % 2]))
    alone = [ids(ask(tokens, prompt, sampling, adapter=name)) for prompt, sampling, name in asked]
    for (prompt, sampling, name), answer in zip(asked, alone, strict=True):
        if not sampling.temperature:
            put(name)
            assert answer == generated(adapters.model, prompt, sampling.max_new_tokens)
    adapters.at_work = ""
    wrong, ended = [], []

    def client(seed):
        order = torch.randperm(len(asked), generator=torch.Generator().manual_seed(seed)).tolist()
        for number in order:
            prompt, sampling, name = asked[number]
            if (number + seed) % 6 == 0:
                with pytest.raises(ZeroDivisionError):
                    ids(ask(tokens, prompt, GREEDY, (), adapter=name, constraint=Only([50], fails_after=number % 4)))
            elif (number + seed) % 6 == 1:
                left = ask(tokens, prompt, sampling, adapter=name)
                next(left, None)
                left.close()
            elif (number + seed) % 12 == 2:
                ids(ask(tokens, prompt, Sampling(temperature=0, num_beams=2, max_new_tokens=4), adapter=name))
            elif ids(ask(tokens, prompt, sampling, adapter=name)) != alone[number]:
                wrong.append(number)
        ended.append(seed)

    threads = [threading.Thread(target=client, args=[seed], daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN)
    assert sorted(ended) == list(range(8)) and not wrong
    assert not any(lane.running for lane in tokens._loop.lanes.values())
    tokens.close()


def test_a_step_is_parted_behind_the_guesses():
    spans = [Span(1, 8, 12, 1), Span(2, 0, 3, 5)]
    step = Step(Cache(), list(range(8)), [0, 1, 1, 1, 1, 2, 2, 2], [12, 8, 9, 10, 11, 0, 1, 2], spans, guesses=4)
    answers, prompts = step.parts()
    assert answers.ids.tolist() == [0, 1, 2, 3, 4] and answers.spans == spans[:1]
    assert (answers.singles, answers.answering, answers.longest) == (1, 5, 13)
    assert prompts.ids.tolist() == [5, 6, 7] and prompts.spans == [Span(2, 0, 3, 0)]
    assert (prompts.singles, prompts.answering) == (0, 0)


def test_guesses_are_as_long_as_they_pay():
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 1, 2, 3]
    dear, cheap = Pace(), Pace()
    for more in (0, 1, 2, 4, 8):
        dear.learn(1 + more, 1 + more)
        cheap.learn(1 + more, 1.0)
    assert Lookup(15).guess(text, 9, cheap, 1) == [4, 5, 6, 7, 8, 9, 10, 11]
    assert Lookup(15).guess(text, 2, cheap, 1) == [4, 5]
    assert Lookup(15).guess([*text, 99], 9, cheap, 1) == []
    assert Lookup(15).guess(text, 9, dear, 1) == []
    often_wrong = Lookup(15)
    often_wrong.share = 0.01
    assert often_wrong.guess(text, 9, Pace(), 1) == []
    assert len(Lookup(15).guess(text, 9, Pace(), 1)) > 1  # what a step costs is found out


def test_what_follows_is_watched_also_where_nothing_is_guessed():
    right, wrong = Lookup(3), Lookup(3)
    right.read([1, 2, 3, 4] * 20)
    wrong.read([token for number in range(20) for token in (1, 2, 3, 10 + number)])
    assert right.share > 0.9 and wrong.share < 0.1


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


# ------------------------------------------------------------------------------------------------------------ adapters


def two_adapters(tiny_llama):
    """Return adapters that are heads of a model, and the model's answers with each."""
    model = load(tiny_llama)
    heads = {name: torch.randn_like(model.lm_head.weight) * 0.1 for name in ("a", "b")}
    heads[BASE] = model.lm_head.weight.detach().clone()

    def put(name):
        model.lm_head.weight.data = heads[name]

    put("a")
    return Adapters(model, ("a", "b"), put), put


def test_adapters_take_turns(tiny_llama):
    adapters, put = two_adapters(tiny_llama)
    asked = [(prompt, name) for prompt in random_prompts(6, 20) for name in adapters.names]
    expected = []
    for prompt, name in asked:
        put(name)
        expected.append(generated(adapters.model, prompt))
    put("a")
    tokens = scheduled(adapters.model, adapters=adapters)
    streams = [ask(tokens, prompt, adapter=name) for prompt, name in asked]
    assert [ids(stream) for stream in streams] == expected
    assert len({tuple(answer) for answer in expected}) == len(asked)
    tokens.close()


def test_a_beam_search_and_steps_take_turns_at_the_model_with_adapters_of_their_own(tiny_llama):
    adapters, _ = two_adapters(tiny_llama)
    tokens = scheduled(adapters.model, adapters=adapters)
    beams = Sampling(temperature=0, num_beams=3, max_new_tokens=30)
    long = Sampling(temperature=0, max_new_tokens=60)
    alone = [ids(ask(tokens, [1, 9], beams, (), adapter="a")), ids(ask(tokens, [1, 8], long, (), adapter="b"))]
    search, steps = ask(tokens, [1, 9], beams, (), adapter="a"), ask(tokens, [1, 8], long, (), adapter="b")
    order = []
    search.on_arrival(lambda: order.append("search"))
    steps.on_arrival(lambda: order.append("step"))
    assert [ids(search), ids(steps)] == alone
    tokens.close()


# --------------------------------------------------------------------------------------------------- models and process


@pytest.mark.parametrize("architecture", ["GPTJ", "Bloom", "Falcon"])
def test_a_model_that_cannot_be_scheduled_answers_one_at_a_time(architecture, tiny_model, capfd):
    model = load(tiny_model(architecture))
    tokens, notes = token_generator(Adapters(model), 32, 512)
    assert isinstance(tokens, OneAtATime)
    assert len(notes) == 1 and "one answer at a time" in notes[0]
    assert ids(ask(tokens, [1, 9, 30])) == generated(model, [1, 9, 30])
    assert "attention" not in capfd.readouterr().err


def test_a_model_that_computes_something_else_in_steps_is_found_out(tiny_llama):
    model = load(tiny_llama)
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, torch.arange(x.shape[1])[None])  # positions in the call
    tokens, notes = token_generator(Adapters(model), 32, 512)
    assert isinstance(tokens, OneAtATime) and "differ" in notes[0]
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"load_8bit": True}, {"load_4bit": True}], ids=str)
def test_in_fewer_bits(options, capsys):
    generator = Generator.load(base_model="demo", lora_weights="none", temperature=0, **options)
    assert isinstance(generator.token_generator, Scheduler), capsys.readouterr().err
    answers = list(generator.batch([f"Name {number} animals." for number in range(9)], max_new_tokens=12))
    assert all(answers)
    generator.close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(tiny_llama):
    model = load(tiny_llama).cuda()
    prompts = random_prompts(40, 60)
    expected = [generated(load(tiny_llama), prompt) for prompt in prompts]
    tokens = scheduled(model)
    assert [ids(stream) for stream in [ask(tokens, prompt) for prompt in prompts]] == expected
    sampling = Sampling(1.0, 0.9, 20, max_new_tokens=12, seed=1, repetition_penalty=1.1, logprobs=2)
    assert ids(ask(tokens, prompts[0], sampling)) == ids(ask(tokens, prompts[0], sampling))
    tokens.close()


PROGRAM = """
import sys, torch, transformers
from lora_alpaca.inference.adapters import Adapters
from lora_alpaca.inference.sampling import Request, Sampling
from lora_alpaca.inference.scheduler.lookup import Lookup, Pace
from lora_alpaca.inference.scheduler.scheduler import token_generator
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokens, _ = token_generator(Adapters(model), 8, None)
kinds = [Sampling(max_new_tokens=100_000, num_beams=beams) for beams in (1, 1, 2, 2)]
answers = [tokens.generate(Request([1, 5, number], kind)) for number, kind in enumerate(kinds)]
next(answers[0])
print(torch.get_num_threads())
"""


def test_a_program_may_end_while_answers_are_made(tiny_llama):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, tiny_llama], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and not done.stderr.strip(), done.stderr


def test_the_thread_of_the_scheduler_uses_the_cores_of_the_program(llama):
    tokens, threads = scheduled(llama), []
    handle = llama.register_forward_pre_hook(
        lambda *_: threads.append((torch.get_num_threads(), threading.current_thread()))
    )
    try:
        ids(ask(tokens, [1, 2, 3]))
    finally:
        handle.remove()
        tokens.close()
    assert {number for number, _ in threads} == {torch.get_num_threads()}
    assert threading.current_thread() not in {thread for _, thread in threads}
