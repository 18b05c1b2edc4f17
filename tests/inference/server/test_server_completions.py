"""`/v1/completions`: texts and ids that are gone on with, in no template, and the scores of prompts."""

import math

import openai
import pytest
import torch

pytest_plugins = ["server_fixtures"]

TEXT = "Where does the owl live?"
GREEDY = {"temperature": 0, "max_new_tokens": 8}


def complete(server, prompt=TEXT, **parameters):
    return server.client.completions.create(
        **{"model": "", "temperature": 0, "max_tokens": 8, "prompt": prompt} | parameters
    )


def test_a_text_is_gone_on_with(server, generator):
    expected = generator.complete(TEXT, **GREEDY).read()
    found = complete(server)
    assert found.object == "text_completion"
    assert found.choices[0].text == expected
    assert found.usage.prompt_tokens == len(generator.codecs[generator.default].text_ids(TEXT))
    assert "".join(chunk.choices[0].text for chunk in complete(server, stream=True)) == expected


def test_several_prompts(server, generator):
    prompts = [TEXT, "Name the opposite.", "An owl"]
    expected = [generator.complete(prompt, **GREEDY).read() for prompt in prompts]
    assert [choice.text for choice in complete(server, prompts).choices] == expected
    twice = complete(server, prompts, n=2)
    assert [choice.text for choice in twice.choices] == [text for text in expected for _ in range(2)]
    assert [choice.index for choice in twice.choices] == list(range(6))
    assert twice.usage.prompt_tokens == complete(server, prompts).usage.prompt_tokens


def test_ids_are_gone_on_with(server, generator):
    ids = generator.codecs[generator.default].text_ids(TEXT)
    expected = complete(server).choices[0].text
    assert complete(server, ids).choices[0].text == expected
    assert [choice.text for choice in complete(server, [ids, ids]).choices] == [expected] * 2
    with pytest.raises(openai.BadRequestError, match="the prompt has the id 1000000"):
        complete(server, [1_000_000])


def test_log_probabilities_in_the_older_form(server, generator):
    answer = generator.complete(TEXT, logprobs=2, **GREEDY)
    answer.read()
    [choice] = complete(server, logprobs=2).choices
    found = choice.logprobs
    assert found.token_logprobs == [token.logprob for token in answer.tokens]
    assert [max(top.values()) for top in found.top_logprobs] == found.token_logprobs
    assert all(len(top) == 2 for top in found.top_logprobs)
    assert found.text_offset[0] == 0 and len(found.text_offset) == len(found.tokens)
    if not any(token.startswith("bytes:") for token in found.tokens):
        assert "".join(found.tokens) == choice.text


def test_a_prompt_is_scored(server, generator):
    """What lm_eval asks for. The reference is transformers' model itself."""
    codec = generator.codecs[generator.default]
    ids = codec.text_ids(TEXT)
    model = generator.token_generator._loop.adapters.model
    with torch.inference_mode():
        scores = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(scores[place - 1, number]) for place, number in enumerate(ids)][1:]
    for prompt in (ids, TEXT):
        [choice] = complete(server, prompt, echo=True, logprobs=1, max_tokens=1).choices
        found = choice.logprobs
        known = found.token_logprobs[:-1]
        if prompt is ids:
            assert known.pop(0) is None and found.top_logprobs[0] is None
        assert known == pytest.approx(expected, abs=1e-4)
        assert choice.text.endswith(complete(server, max_tokens=1).choices[0].text)
        for place, top in enumerate(found.top_logprobs[len(found.top_logprobs) - len(ids) : -1]):
            assert max(top.values()) == pytest.approx(float(scores[place].max()), abs=1e-4)
    assert choice.text.startswith(TEXT)
    prompt_tokens = list(zip(found.tokens, found.text_offset, strict=True))[:-1]
    assert "".join(token for token, _ in prompt_tokens) == TEXT
    assert all(TEXT[place:].startswith(token) for token, place in prompt_tokens)
    assert found.text_offset[-1] == len(TEXT)


def test_a_prompt_is_scored_alone(server, generator):
    found = complete(server, [TEXT, "An owl"], echo=True, logprobs=0, max_tokens=0)
    assert [choice.text for choice in found.choices] == [TEXT, "An owl"]
    assert [choice.finish_reason for choice in found.choices] == ["length"] * 2
    assert found.usage.completion_tokens == 0
    assert all(math.isfinite(value) for value in found.choices[0].logprobs.token_logprobs)
    with pytest.raises(openai.BadRequestError, match="max_tokens 0"):
        complete(server, max_tokens=0)


def test_an_echo_is_the_prompt(server):
    text = complete(server).choices[0].text
    assert complete(server, echo=True).choices[0].text == TEXT + text
    assert "".join(chunk.choices[0].text for chunk in complete(server, echo=True, stream=True, n=1)) == TEXT + text


def test_a_long_prompt_is_scored_in_parts(server, generator, monkeypatch):
    codec = generator.codecs[generator.default]
    ids = codec.text_ids(TEXT * 12)
    whole = generator.score(ids, top=2)
    monkeypatch.setattr("lora_alpaca.inference.scoring.CHUNK", 7)
    parts = generator.score(ids, top=2)
    assert [token.id for token in parts] == ids[1:]
    assert [token.logprob for token in parts] == pytest.approx([token.logprob for token in whole], abs=1e-4)
