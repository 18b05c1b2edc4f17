"""What holds for every text, template and tokenizer, with generated conversations; STRESS=1 tries ten times more."""

import os
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_alpaca.data.encoding import Choices, Encoder
from lora_alpaca.data.examples import Example
from lora_alpaca.prompts import Conversation, Message, load_template, template_names

STRESS = os.environ.get("STRESS") == "1"
SEVERAL_TURNS = ("vicuna", "chatml", "chat")
TOKENIZERS = ("demo", "Llama", "Qwen2")  # two SentencePiece ones, with and without their whole alphabet; byte-level BPE
CHATML = ["<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}{{ message.content + eos_token }}"
    "{% else %}{{ '[' + message.role + '] ' + message.content | trim + '\n' }}{% endif %}"
    "{% if message.role == 'user' and (add_generation_prompt or not loop.last) %}{{ '[assistant] ' }}{% endif %}"
    "{% endfor %}"
)

PIECES = [
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2581", "\u200b", "\ufeff", "a", "Hello.", "12 + 3"),
    *("e\u0301", "שלום", "مرحبا\u200f", "\u202eabc", "日本", "🦙", "👩\u200d👩\u200d👧", "\U0010ffff"),
    *("{", "}", "{input}", "{instruction}", "{output}", "{eos}", "{{ bos_token }}", "{% raw %}", "%s", "qX0Xq"),
    *("</s>", "<s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_end", "|>", "<0x0A>"),
    "### Response:",
]
texts = st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=5).map("".join)


@st.composite
def conversations(draw: st.DrawFn, several_turns: bool) -> Conversation:
    """Return a conversation that ends with an answer."""
    messages = []
    if several_turns and draw(st.booleans()):
        messages.append(Message("system", draw(texts)))
    for _ in range(draw(st.integers(1, 3)) if several_turns else 1):
        messages.append(Message("user", draw(texts), draw(st.just("") | texts)))
        messages.append(Message("assistant", draw(texts)))
    return Conversation(tuple(messages), "rows.json:1")


@pytest.fixture(scope="session")
def pairs(tiny_model) -> Any:
    """Return `pairs(template, tokenizer)`: the encoder and the tokenizer of the names, each made once."""
    from transformers import AutoTokenizer

    @cache
    def make(template: str, tokenizer_name: str) -> SimpleNamespace:
        tokenizer = AutoTokenizer.from_pretrained(
            ROOT / "lora_alpaca" / "demo" / "base" if tokenizer_name == "demo" else tiny_model(tokenizer_name)
        )
        if template == "chatml":
            tokenizer.add_tokens(CHATML, special_tokens=True)
        tokenizer.chat_template = CHAT_TEMPLATE
        bound = load_template(template).bound(tokenizer)
        encoder, last = (Encoder(tokenizer, bound, Choices(train_on=which)) for which in ("all", "last"))
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        return SimpleNamespace(encoder=encoder, last=last, tokenizer=tokenizer, special=special)

    return make


def text_of(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of a stretch of tokens to the letter. (A tokenizer's own decoder strips a space in front.)"""
    from tokenizers import decoders

    space = decoders.Replace("\u2581", " ")
    byte_level = any(token.startswith("Ġ") for token in tokenizer.get_vocab())
    decoder = (
        decoders.ByteLevel() if byte_level else decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse()])
    )
    return decoder.decode(tokenizer.convert_ids_to_tokens(ids))


def control_ids(template: str, tokenizer: Any, conversation: Conversation) -> list[int]:
    """Return the control tokens that the template writes, known without it."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    if template != "chatml":
        return first + [tokenizer.eos_token_id] * len(conversation.answers)
    written = [message for message in conversation.messages if message.role != "system" or message.text]
    return first + tokenizer.convert_tokens_to_ids(CHATML) * len(written)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("template", template_names())
def test_what_is_learned_is_the_answers_and_their_ends_from_where_generation_starts(template, name, pairs):
    pair = pairs(template, name)
    encoder, tokenizer = pair.encoder, pair.tokenizer
    end = tokenizer.convert_tokens_to_ids(CHATML[1]) if template == "chatml" else tokenizer.eos_token_id

    @settings(max_examples=2000 if STRESS else 200, deadline=None, derandomize=not STRESS, database=None)
    @given(conversations(template in SEVERAL_TURNS))
    def holds(conversation: Conversation) -> None:
        (row,) = encoder.encode([conversation])
        assert len(row.spans) == len(conversation.answers)
        ids = row.ids.tolist()
        answers = [number for number, message in enumerate(conversation.messages) if message.role == "assistant"]
        for number, (first, last) in zip(answers, row.spans, strict=True):
            prompt = encoder.prompt(Conversation(conversation.messages[:number]))
            assert ids[:first] == prompt
            assert ids[last - 1] == end
            learned, answer = text_of(tokenizer, ids[first : last - 1]), conversation.messages[number].text
            if template == "vicuna":
                answer = " " + answer
            if name == "Qwen2":  # it composes characters (NFC)
                answer = tokenizer.backend_tokenizer.normalizer.normalize_str(answer)
            else:  # it has one character for a space and for this one
                answer = answer.replace("\u2581", " ")
            if len(prompt) <= 1:  # an answer that begins a row has SentencePiece's space before it, or is taken to
                learned, answer = learned.removeprefix(" "), answer.removeprefix(" ")
            assert learned == answer
        assert row.ends == [last - 1 for _, last in row.spans]
        (same,) = pair.last.encode([conversation])
        assert same == Example(row.ids, row.spans[-1:], row.ends[-1:])
        assert [token for token in ids if token in pair.special] == control_ids(template, tokenizer, conversation)

    holds()
