"""Tokens that are guessed, and computed in one step where one by one they would take several."""

import pytest
import torch
from scheduling import ask, generated, ids, load, random_prompts, scheduled

from lora_alpaca.inference.sampling import Sampling
from lora_alpaca.inference.scheduler.attention import Span, Step
from lora_alpaca.inference.scheduler.cache import Cache
from lora_alpaca.inference.scheduler.lookup import Lookup, Pace


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
