"""Text from tokens, one at a time: the text of all of them, in linear time."""

import random

import pytest
import transformers

from lora_alpaca.data.detokenization import IncrementalDecoder

TEXTS = [
    "Hello, 你好, שלום 🦙🦙 naïve!",
    " Write a list. \n- one\n\n- two\n   ",
    "🦙" * 20,
    "",
    "It isn't , is it ?",
]


def pieces_of(decode, ids):
    decoder = IncrementalDecoder(decode)
    return [*(decoder.add(token) for token in ids), decoder.flush()]


@pytest.fixture(params=["Llama", "Gemma", "GPT2", "OPT", "Qwen2"])
def tokenizer(request, tiny_model):
    return transformers.AutoTokenizer.from_pretrained(tiny_model(request.param))


@pytest.mark.parametrize("text", TEXTS)
def test_joined_pieces_are_the_decoded_text(tokenizer, text):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    pieces = pieces_of(tokenizer.decode, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert pieces[-1] == ""
    assert not any("\ufffd" in piece for piece in pieces)


def test_so_are_those_of_random_tokens(tokenizer):
    """Where the bytes are text: what a tokenizer with byte fallback makes of broken ones depends on those around."""
    chance = random.Random(0)
    control = set(tokenizer.all_special_ids)
    compared = 0
    for _ in range(300):
        ids = [token for token in chance.choices(range(len(tokenizer)), k=chance.randrange(40)) if token not in control]
        whole = tokenizer.decode(ids)
        if "\ufffd" not in whole:
            assert "".join(pieces_of(tokenizer.decode, ids)) == whole
            compared += 1
    assert compared > 20


def test_half_a_character_at_the_end_is_flushed(tokenizer):
    ids = tokenizer("Hi 🦙", add_special_tokens=False)["input_ids"][:-1]
    assert "".join(pieces_of(tokenizer.decode, ids)) == tokenizer.decode(ids)
    decoder = IncrementalDecoder(tokenizer.decode)
    assert [decoder.add(token) for token in ids][-1] == ""
    assert "\ufffd" in decoder.flush()
    assert decoder.flush() == ""


@pytest.mark.parametrize("broken", [False, True])
def test_time_is_linear(tokenizer, broken):
    """Counted in decoded tokens; `broken` is a model that makes half characters and nothing else."""

    def cost(tokens):
        decoded = []
        half = tokenizer("🦙", add_special_tokens=False)["input_ids"][-4:-3]
        words = tokenizer("Hello, 你好, 🦙! ", add_special_tokens=False)["input_ids"]
        ids = half * tokens if broken else (words * tokens)[:tokens]
        pieces_of(lambda ids: (decoded.append(len(ids)), tokenizer.decode(ids))[1], ids)
        return sum(decoded)

    assert cost(2000) < 2.5 * cost(1000)
    assert cost(2000) < 20 * 2000
