"""Templates of text as chat templates: what transformers renders and encodes is the prompt of training, id for id."""

import random
from pathlib import Path
from typing import Any

import pytest

from lora_alpaca.artifacts import chat_template as outgoing
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.errors import TemplateError
from lora_alpaca.prompts import (
    EOS,
    ChatTemplate,
    Conversation,
    Message,
    Template,
    load_template,
    template_from_json,
    template_names,
)
from lora_alpaca.prompts.jinja import chat_messages, chat_template

NAMES = [name for name in template_names() if name != "chat"]
TOKENIZERS = ("llama", "llama_always", "qwen", "llama_3")
WORDS = [
    "the",
    "owl",
    "hums,",
    "Größe",
    "你好",
    "שלום",
    "🦙",
    "{input}",
    "12+30=42",
    "'a'",
    '"b"',
    "C:\\new\\table",
    "\\n",
    "###",
    "it's",
    "{{",
    "bos_token",
    "}}",
    "{%",
    "if",
    "x",
    "%}",
    "{#",
    "no",
    "#}",
]
CONTROL = ["</s>", "<s>", "<|im_end|>", "<|im_start|>", "<|begin_of_text|>"]


@pytest.fixture(scope="module")
def tokenizers(tiny_model, tmp_path_factory) -> Any:
    """Return `tokenizers(kind)`: of SentencePiece with a begin token, and of bytes without one and with one."""
    import transformers
    from tokenizers import processors

    made: dict[str, Any] = {}

    def make(kind: str) -> Any:
        model = {"llama": "Llama", "llama_always": "Llama", "qwen": "Qwen2", "llama_3": "GPT2"}[kind]
        legacy = {"llama": {"legacy": False}, "llama_always": {"legacy": True}}.get(kind, {})
        tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model(model), **legacy)
        ends = ["<|im_start|>", "<|im_end|>", *(["<|begin_of_text|>"] if kind == "llama_3" else [])]
        tokenizer.add_special_tokens({"additional_special_tokens": ends})
        if kind == "llama_3":
            tokenizer.bos_token = "<|begin_of_text|>"
            begin = (tokenizer.bos_token, tokenizer.bos_token_id)
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{begin[0]} $A", special_tokens=[begin]
            )
        return tokenizer

    def once(kind: str) -> Any:
        if kind not in made:
            made[kind] = make(kind)
        return made[kind]

    return once


def text(chance: random.Random, blanks: bool = False) -> str:
    """Return some words, in several lines now and then; with `blanks`, also around them."""
    words = [chance.choice(WORDS) + chance.choice(["", "", "\n", "\n\n", "  "]) for _ in range(chance.randint(1, 9))]
    around = chance.choice(["", " ", "  ", "\n", "\n\n "]) if blanks else ""
    return around + " ".join(words).strip() + around[::-1]


def rows(template: Template, count: int = 200) -> list[Conversation]:
    """Return conversations that a template takes: with and without an input, with blanks, of several turns."""
    chance = random.Random(0)
    found = []
    for _ in range(count):
        messages = [Message("system", text(chance, blanks=True))] if template.system and chance.random() < 0.4 else []
        for turn in range(chance.randint(1, 4) if template.turn else 1):
            given = text(chance, blanks=True) if chance.random() < 0.4 else ""
            messages += [
                Message("user", text(chance, blanks=True), given if turn == 0 else ""),
                Message("assistant", text(chance)),
            ]
        found.append(Conversation(tuple(messages)))
    return found


def ids(tokenizer: Any, source: str, messages: list[Any], **more: Any) -> list[int]:
    """Return what transformers makes of messages."""
    more = {"add_generation_prompt": messages[-1]["role"] == "user"} | more
    found = tokenizer.apply_chat_template(messages, chat_template=source, tokenize=True, return_dict=False, **more)
    return list(found)


def bound(name: str, tokenizer: Any) -> tuple[Template, str]:
    template = load_template(name).bound(tokenizer)
    source, notes = outgoing.outgoing(tokenizer, template)
    assert notes == []
    return template, source


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_ids_of_200_rows_are_those_of_training(name, kind, tokenizers):
    tokenizer = tokenizers(kind)
    template, source = bound(name, tokenizer)
    encoder = Encoder.for_prompts(tokenizer, template)
    for row in rows(template):
        messages = chat_messages(template, row)
        assert all(message.keys() == {"role", "content"} for message in messages)
        assert ids(tokenizer, source, messages[:-1]) == encoder.prompt(row)
        if name != "plain":  # nothing stands between its prompt and the answer: a text joins them, training does not
            assert ids(tokenizer, source, messages) == encoder.encode([row])[0].ids.tolist()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_begin_token_stands_there_once(kind, tokenizers):
    tokenizer = tokenizers(kind)
    for name in NAMES:
        _, source = bound(name, tokenizer)
        found = ids(tokenizer, source, [{"role": "user", "content": "Hi."}])
        assert found.count(tokenizer.bos_token_id) == (0 if kind == "qwen" else 1)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_control_tokens_that_a_user_types_are_the_exception(kind, tokenizers):
    """A server encodes a text: only a reader that escapes what was typed gives the ids of training."""
    tokenizer = tokenizers(kind)
    template, source = bound("vicuna", tokenizer)
    typed = [token for token in CONTROL if token in tokenizer.get_vocab()]
    row = Conversation.of(f"What does {typed[0]} mean?", "")
    want = Encoder.for_prompts(tokenizer, template).prompt(row)
    messages = chat_messages(template, row)
    assert ids(tokenizer, source, messages) != want
    assert ids(tokenizer, source, messages, sanitize_control_tokens=True) == want


def test_an_earlier_answer_whose_beginning_joins_the_prompt_is_the_other_exception(tokenizers):
    """They are one token of a text, and two as they were generated."""
    tokenizer = tokenizers("llama")
    fields = {"prompt_input": "{instruction}{input} Th", "prompt_no_input": "{instruction} Th", "response_split": " Th"}
    template = template_from_json(fields | {"turn": "{instruction} Th"}, "", "own").bound(tokenizer)
    talk = Conversation((Message("user", "a"), Message("assistant", "e owl"), Message("user", "c")))
    want = Encoder.for_prompts(tokenizer, template).prompt(talk)
    found = ids(tokenizer, outgoing.outgoing(tokenizer, template)[0], chat_messages(template, talk))
    assert found != want
    assert tokenizer.decode(found) == tokenizer.decode(want)


@pytest.mark.parametrize("name", NAMES)
def test_it_needs_no_treatment_of_white_space_around_tags(name, tokenizers):
    """transformers switches on trim_blocks and lstrip_blocks, and not everybody does."""
    from jinja2 import Environment
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = load_template(name)
    source = chat_template(template, begins=True, spaced=True)
    plain = Environment().from_string(source)
    strict = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    for row in rows(template, 20):
        given = {"messages": chat_messages(template, row), "bos_token": "<s>", "eos_token": "</s>"}
        assert plain.render(given) == strict.render(given)


def test_an_input_stands_in_the_content_behind_the_words_that_the_template_has_there(tokenizers):
    tokenizer = tokenizers("llama")
    template, source = bound("alpaca", tokenizer)
    want = Encoder.for_prompts(tokenizer, template).prompt(Conversation.of("Add the numbers.", "12 + 30"))
    content = "Add the numbers.\n\n### Input:\n12 + 30"
    assert ids(tokenizer, source, [{"role": "user", "content": content}]) == want
    assert ids(tokenizer, source, [{"role": "user", "content": "Add the numbers.", "input": "12 + 30"}]) == want


OWN = {
    "the input first": {
        "prompt_input": "Given {input}\nQ: {instruction}\nA:",
        "prompt_no_input": "Q: {instruction}\nA:",
    },
    "two prompts, nothing but a line between": {
        "prompt_input": "Use it. {instruction}\n{input}\nA:",
        "prompt_no_input": "{instruction}\nA:",
    },
    "a text twice": {
        "prompt_input": "{instruction}: {input}; {instruction}\nA:",
        "prompt_no_input": "{instruction}; {instruction}\nA:",
    },
    "quotes and backslashes": {
        "prompt_input": "'\\n' \"{instruction}\"\t}}}} {{% {input} '\r\nA:",
        "prompt_no_input": "'\\n' \"{instruction}\"\t}}}} {{% \r\nA:",
    },
    "control tokens everywhere": {
        "prompt_input": "<|im_start|>{instruction}<|im_end|>{input}{eos}\nA:",
        "prompt_no_input": "<|im_start|>{instruction}{eos}A:",
        "turn": "{eos}<|im_start|> {instruction}\nA:",
        "end": " <|im_end|>{eos}\n",
        "control": ["<|im_start|>", "<|im_end|>"],
    },
    "a system message and turns": {
        "system": "[{system}]\n",
        "prompt_input": "### Q\n{instruction}\n### With\n{input}\nA:",
        "prompt_no_input": "Q {instruction}\nA:",
        "turn": "\nThen {instruction}\nA:",
        "answer": " {output} ",
    },
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("what", OWN)
def test_templates_of_ones_own(what, kind, tokenizers):
    tokenizer = tokenizers(kind)
    template = template_from_json(OWN[what] | {"response_split": "A:"}, "it's mine", "own").bound(tokenizer)
    source = outgoing.outgoing(tokenizer, template)[0]
    encoder = Encoder.for_prompts(tokenizer, template)
    for row in rows(template, 60):
        assert ids(tokenizer, source, chat_messages(template, row.prompt)) == encoder.prompt(row)


def test_an_input_in_a_later_turn(tokenizers):
    tokenizer = tokenizers("llama_3")
    template, source = bound("vicuna", tokenizer)
    talk = Conversation((Message("user", "a"), Message("assistant", "b"), Message("user", "Add.", "1 + 2")))
    assert ids(tokenizer, source, chat_messages(template, talk)) == Encoder.for_prompts(tokenizer, template).prompt(
        talk
    )


def test_the_words_that_announce_an_answer_are_left_out_where_none_is_to_follow():
    from jinja2 import Environment

    def shown(name: str, content: str) -> str:
        found = Environment().from_string(chat_template(load_template(name), begins=False))
        return found.render(messages=[{"role": "user", "content": content}], eos_token="</s>")

    assert shown("chatml", "Hi.") == "<|im_start|>user\nHi.<|im_end|>\n"
    assert shown("alpaca", "Hi.").endswith("### Instruction:\nHi.\n\n")
    assert shown("alpaca", "Hi.\n\n### Input:\nHo.").endswith("### Input:\nHo.\n\n")
    assert shown("plain", "Hi.") == "Hi."


REFUSED = {
    "takes one question and its answer": ("alpaca", ["user", "assistant", "user"], {}),
    "no place for a system message": ("plain", ["system", "user"], {}),
    "no place for tools": ("vicuna", ["user"], {"tools": [{"type": "function", "function": {"name": "f"}}]}),
    "take turns": ("vicuna", ["user", "user"], {}),
    "begins with a message of the user": ("vicuna", ["system"], {}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_template_cannot_hold_is_refused_in_a_sentence(what, tokenizers):
    name, roles, more = REFUSED[what]
    tokenizer = tokenizers("llama_3")
    _, source = bound(name, tokenizer)
    with pytest.raises(Exception, match=what):
        ids(tokenizer, source, [{"role": role, "content": "x"} for role in roles], **more)
    with pytest.raises(Exception, match="no place for tool calls and thoughts"):
        ids(tokenizer, source, [{"role": "user", "content": "x", "reasoning_content": "hm"}])


@pytest.fixture
def nothing_kept():
    """Let no chat template be taken from an earlier test, or into a later one."""
    outgoing._best.cache_clear()
    yield
    outgoing._best.cache_clear()


def test_a_tokenizer_whose_begin_token_cannot_be_followed_as_in_training_is_told(tokenizers, monkeypatch, nothing_kept):
    tokenizer = tokenizers("llama")
    template = load_template("alpaca").bound(tokenizer)
    monkeypatch.setattr(outgoing, "chat_template", lambda *_, **__: "{{ messages[0].content }}")
    [note] = outgoing.outgoing(tokenizer, template)[1]
    assert note.startswith(
        "warning: a server that renders the chat template prompts otherwise than training did (token"
    )
    assert "\n" not in note


def test_the_template_of_a_tokenizer_goes_out_as_it_was_recorded(tokenizers):
    tokenizer = tokenizers("qwen")
    source = (Path(__file__).parent / "chat_templates" / "qwen2_5.jinja").read_text()
    recorded = template_from_json({"name": "chat", "chat_template": source}, "", "contract").bound(tokenizer)
    assert outgoing.outgoing(tokenizer, recorded) == (source, [])
    with pytest.raises(TemplateError, match="refuses"):
        outgoing.rendered(tokenizer, recorded, "{{ raise_exception('no') }}", Conversation.of("a"))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_trained_on_takes_it_as_the_chat_template_that_it_is(name, kind, tokenizers):
    """`--prompt_template_name chat` on an exported folder: the prompt that its model knows, not that of its base."""
    tokenizer = tokenizers(kind)
    template, source = bound(name, tokenizer)
    chat = ChatTemplate(source).bound(tokenizer)
    assert chat.stop == (tokenizer.eos_token if template.stop == EOS else template.stop)
    first, then = (Encoder.for_prompts(tokenizer, one) for one in (template, chat))
    for row in rows(template, 20):
        if not row.question.input and not row.users[0].input:
            assert then.prompt(row) == first.prompt(row)
