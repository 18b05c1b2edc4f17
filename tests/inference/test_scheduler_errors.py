"""A request that fails in the scheduler fails alone, whatever stands beside it in the same step."""

import pytest
import torch
from scheduling import GREEDY, Only, ask, generated, ids, load, random_prompts, scheduled

from lora_alpaca.inference.sampling import Sampling


@pytest.fixture(scope="module")
def llama(tiny_llama):
    return load(tiny_llama)


@pytest.fixture
def tokens(llama):
    made = scheduled(llama)
    yield made
    made.close()


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
