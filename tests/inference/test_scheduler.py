"""Many answers at the same time, held to transformers: the same text, by any model, and each with its own adapter."""

import subprocess
import sys
import threading

import pytest
import torch
import transformers
from conftest import ARCHITECTURES
from scheduling import GREEDY, Only, ask, generated, ids, load, random_prompts, scheduled, two_adapters

from lora_alpaca import Generator
from lora_alpaca.inference.adapters import Adapters
from lora_alpaca.inference.one_at_a_time import OneAtATime
from lora_alpaca.inference.sampling import Sampling
from lora_alpaca.inference.scheduler import scheduler as module
from lora_alpaca.inference.scheduler.scheduler import Scheduler, token_generator

WITHIN = 60  # seconds, on a machine that does other things too


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return load(tiny_llama)


@pytest.fixture
def tokens(llama):
    made = scheduled(llama)
    yield made
    made.close()


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


# ------------------------------------------------------------------------------------------------------------ adapters


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
