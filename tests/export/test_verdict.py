"""The verdict is a function of what was observed: these are observations, written by hand, and what they mean."""

import math

import pytest

from lora_alpaca.export.verify.comparison import Reply, Said, compare
from lora_alpaca.export.verify.served_receipt import Answer, Probe, ServedReceipt, Token
from lora_alpaca.export.verify.verdict import Replies, decide

END = 2
TUNED = "Alpacas are small and calm animals"
BASE = "The opposite of slow is fast"


def answer(text, ends=True, second=(), sure=-0.1):
    """Return an answer of whole words; `second` are (place, word, gap): what is nearly as likely there."""
    words = [word if not place else f" {word}" for place, word in enumerate(text.split())]
    others = {place: (word, gap) for place, word, gap in second}
    places = []
    for place, word in enumerate(words):
        other, gap = others.get(place, (" zzz", 5.0))
        places.append([Token(10 + place, word, sure), Token(99 if other else END, other, sure - gap)])
    if ends:
        other, gap = others.get(len(words), (" zzz", 5.0))
        places += [[Token(END, "", sure), Token(99, other, sure - gap)], [Token(50, " and", sure)]]
    return Answer(places, len(words) if ends else None)


def probe(number=0, **how):
    tuned = answer(f"{TUNED} {number}", **how)
    scores = [-2.1] * len(tuned.places)  # the base finds all of it far less likely
    return Probe(
        f"probe {number}", "prompt", [{"role": "user", "content": "prompt"}], [1] * 9, tuned, answer(BASE), scores
    )


def receipt(*probes, rounding=None):
    return ServedReceipt(list(probes) or [probe(number) for number in range(4)], 9, [END], rounding)


def reply(text, logprob=None, finish="stop", prompt_tokens=9, completion_tokens=None):
    words = [word if not place else f" {word}" for place, word in enumerate(text.split())]
    said = () if logprob is None else tuple(Said(word, logprob) for word in words)
    return Reply(text, finish, said, prompt_tokens, completion_tokens)


def verdict(completions, chats=None, held_to=None, **more):
    """Return the verdict on replies, one for each probe; a text with {} is the same for all, with their numbers."""
    held_to = held_to or receipt()

    def each(given):
        if given is None or isinstance(given, list):
            return given or [None] * len(held_to.probes)
        return [given(number) for number in range(len(held_to.probes))]

    pairs = zip(each(completions), each(chats), strict=True)
    return decide(held_to, [Replies(one, other, **more) for one, other in pairs])


def tuned(number, **how):
    return reply(f"{TUNED} {number}", **how)


def base(number, **how):
    return reply(BASE, **how)


@pytest.mark.parametrize(
    ("completions", "chats", "kind"),
    [
        (tuned, tuned, "equal"),
        (tuned, None, "equal"),
        (None, tuned, "equal"),
        (base, base, "base"),
        (None, base, "base"),
        (tuned, base, "prompt"),
        (base, tuned, "base"),
        (lambda number: reply("Nothing of this"), tuned, "prompt"),
        (lambda number: reply("Nothing of this"), lambda number: reply("Nor of that"), "other"),
        (None, lambda number: reply("Nothing of this"), "other"),
        (None, lambda number: reply("Nothing of this", prompt_tokens=12), "prompt"),
        (lambda number: reply(f"{TUNED} {number} and so on", finish="length"), None, "late"),
        (lambda number: reply(TUNED.rpartition(" ")[0]), None, "early"),
        (lambda number: tuned(number, logprob=-0.1), None, "equal"),
        (lambda number: tuned(number, logprob=-0.13), None, "rounding"),
        (lambda number: tuned(number, logprob=-0.3), None, "quantised"),
        (tuned, lambda number: reply(f"{TUNED} {number} and so on", finish="length"), "late"),
    ],
)
def test_observations_and_what_they_mean(completions, chats, kind):
    assert verdict(completions, chats).kind == kind


def test_nothing_was_answered():
    assert verdict(None, None).kind == "nothing"


def test_what_is_rounding_is_measured_of_the_model():
    def off_by(value):
        return lambda number: tuned(number, logprob=-0.1 - value)

    assert verdict(off_by(0.02), held_to=receipt(probe(), rounding=0.01)).kind == "rounding"
    assert verdict(off_by(0.02), held_to=receipt(probe(), rounding=0.003)).kind == "quantised"


def test_another_word_at_a_near_tie_is_rounding_and_any_other_place_is_not():
    held_to = receipt(probe(second=[(2, " large", 0.05)]))
    assert verdict(lambda number: reply("Alpacas are large and strong"), held_to=held_to).kind == "rounding"
    held_to = receipt(probe(second=[(2, " large", 0.5)]))
    assert verdict(lambda number: reply("Alpacas are large and strong"), held_to=held_to).kind == "quantised"
    assert verdict(lambda number: reply("Alpacas are huge"), held_to=held_to).kind == "other"


def test_of_weights_that_differ_the_effect_of_the_adapter_tells_quantised_from_other():
    """The second word is another one, within reach; the base gives ours 2 nats less than the trained model."""

    def served(logprob):
        first = [Said(word, logprob) for word in ("Alpacas", " are")]
        return lambda number: Reply("Alpacas are large", "stop", (*first, Said(" large", -0.2, ((" small", logprob),))))

    held_to = receipt(*[probe(number, second=[(2, " large", 0.5)]) for number in range(4)])
    quantised, other = (verdict(served(value), held_to=held_to) for value in (-0.4, -1.9))
    assert (quantised.kind, other.kind) == ("quantised", "other")
    assert quantised.tuned["completions"].effect == pytest.approx(1.7 / 2)
    assert other.tuned["completions"].effect == pytest.approx(0.2 / 2)


def test_of_a_token_that_is_not_among_the_servers_likeliest_nothing_is_there():
    def served(number):
        others = ((" fast", -0.1), (" slow", -2.0))
        return Reply(BASE, "stop", (Said("The", -0.1, others), *(Said(" x", -0.1, others) for _ in range(5))))

    found = verdict(served, held_to=receipt(*[probe(number) for number in range(6)]))
    assert found.kind == "base"
    assert found.tuned["completions"].effect == 0
    assert not any("log-probabilities" in one for one in found.unchecked)


def test_an_answer_that_ends_where_nobody_sees_it_goes_on():
    """A server that hides the end token, and goes on to its limit: the text is ours, the reason for its end is not."""
    assert verdict(lambda number: tuned(number, finish="length", completion_tokens=9)).kind == "late"
    assert verdict(lambda number: tuned(number, finish="length", completion_tokens=7)).kind == "equal"


def test_a_server_that_allows_fewer_tokens_is_compared_that_far():
    found = verdict(lambda number: reply("Alpacas are small", finish="length"))
    assert found.kind == "equal"
    assert found.tuned["completions"].share == 1


def test_sampling_is_two_answers_to_one_question():
    assert verdict(tuned, again=reply("Something else")).kind == "sampling"
    assert verdict(tuned, again=None).kind == "equal"
    assert verdict(base, again=reply(BASE)).kind == "base"


def test_the_prompt_as_ids_tells_other_tokens_from_other_weights():
    found = verdict(lambda number: reply("Nothing of this"), held_to=receipt(probe(0)), ids=tuned(0))
    assert found.kind == "prompt"


@pytest.mark.parametrize(
    "text", ["  Alpacas are small and calm animals 0\n", "Alpacas are small and calm animals 0\ufffd"]
)
def test_white_space_around_an_answer_and_half_a_character_are_nothing(text):
    assert compare(reply(text), probe().tuned, [END], 9).gap == 0


def test_white_space_that_ends_an_answer_is_nothing_where_a_server_strips_it():
    lines = [[Token(10, "One", -0.1)], [Token(11, "\n", -0.1)], [Token(11, "\n", -0.1)], [Token(END, "", -0.1)]]
    assert compare(reply("One"), Answer(lines, 3), [END], 9).gap == 0


def test_a_longer_token_that_begins_like_ours_is_found_where_it_was_taken():
    tied = probe(second=[(2, " smallish", 0.05)])
    assert compare(reply("Alpacas are smallish"), tied.tuned, [END], 9).gap == pytest.approx(0.05)


def test_ending_at_a_near_tie_is_rounding():
    tied = probe(second=[(3, "", 0.05)])  # which is the end token
    early = compare(reply("Alpacas are small"), tied.tuned, [END], 9)
    assert (early.end, early.same) == ("early", True)
    far = compare(reply("Alpacas are small"), probe().tuned, [END], 9)
    assert (far.end, far.gap) == ("early", math.inf)


def test_what_could_not_be_checked_is_said():
    endless = receipt(probe(ends=False))
    unchecked = verdict(tuned, held_to=endless).unchecked
    assert any("log-probabilities" in one for one in unchecked)
    assert any("where answers end" in one for one in unchecked)
    assert not verdict(lambda number: tuned(number, logprob=-0.1)).unchecked
