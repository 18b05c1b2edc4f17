import json

import pytest

from lora_alpaca.errors import TemplateError
from lora_alpaca.prompts import (
    EOS,
    ChatTemplate,
    Conversation,
    Fragment,
    Message,
    Template,
    fitting_template,
    load_template,
    template_from_json,
    template_names,
)

PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
)
FRENCH = (
    "Ci-dessous se trouve une instruction qui décrit une tâche. "
    "Écrivez une réponse qui complète correctement la demande.\n\n"
)
FRENCH_WITH_INPUT = (
    "Ci-dessous se trouve une instruction qui décrit une tâche, associée à une entrée qui fournit un contexte "
    "supplémentaire. Écrivez une réponse qui complète correctement la demande.\n\n"
)
UPSTREAMS = {  # the whole prompts of alpaca-lora, without and with an input
    "alpaca": (
        PREAMBLE + "### Instruction:\nDo it.\n\n### Response:\n",
        WITH_INPUT + "### Instruction:\nDo it.\n\n### Input:\nNow.\n\n### Response:\n",
    ),
    "alpaca_legacy": (
        PREAMBLE + "### Instruction:\nDo it.\n\n### Response:",
        WITH_INPUT + "### Instruction:\nDo it.\n\n### Input:\nNow.\n\n### Response:",
    ),
    "alpaca_short": (
        "### Instruction:\nDo it.\n\n### Response:\n",
        "### Instruction:\nDo it.\n\n### Input:\nNow.\n\n### Response:\n",
    ),
    "vigogne": (
        FRENCH + "### Instruction:\nDo it.\n\n### Réponse:\n",
        FRENCH_WITH_INPUT + "### Instruction:\nDo it.\n\n### Entrée:\nNow.\n\n### Réponse:\n",
    ),
}
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
TURNS = (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "And?"), Message("assistant", "Bye."))
TALK = Conversation(TURNS, "rows.json:7")
SYSTEM = Conversation((Message("system", "Be brief."), *TURNS), "rows.json:7")


def text(fragments: list[Fragment]) -> str:
    return "".join(fragment.text for fragment in fragments)


def learned(fragments: list[Fragment]) -> list[str]:
    return [fragment.text for fragment in fragments if fragment.learned]


# --------------------------------------------------------------------------------------------- upstream's templates


@pytest.mark.parametrize("name", UPSTREAMS)
def test_upstreams_prompts_are_unchanged_to_the_letter(name):
    template = load_template(name)
    for conversation, prompt in zip(
        (Conversation.of("Do it."), Conversation.of("Do it.", "Now.")), UPSTREAMS[name], strict=True
    ):
        assert text(template.prompt(conversation)) == prompt


def test_the_shipped_templates_are_known_by_name():
    assert template_names() == [
        *("alpaca", "alpaca_legacy", "alpaca_short", "chat", "chatml", "plain", "vicuna", "vigogne")
    ]


@pytest.mark.parametrize("name", [name for name in template_names() if name != "chat"])
def test_substitution_is_one_pass(name):
    template = load_template(name)
    row = Conversation.of("{input} {0} %s {instruction} {eos}", "{instruction} {x {system}", "{output} {input}{eos}")
    prompt = template.prompt(row)
    assert "{input} {0} %s {instruction} {eos}" in text(prompt)
    assert "{instruction} {x {system}" in text(prompt)
    assert [fragment.text for fragment in prompt if fragment.control] == [
        fragment.text for fragment in template.prompt(Conversation.of("a", "b")) if fragment.control
    ]
    answer = template.examples(row)[0][-2:]
    assert answer[0].text.strip() == "{output} {input}{eos}"
    assert [fragment.control for fragment in answer] == [False, True]


def test_a_row_is_prompt_answer_end():
    template, row = load_template("alpaca"), Conversation.of("I", "", "A")
    fragments = template.examples(row)[0]
    assert [(fragment.text, fragment.learned, fragment.control) for fragment in fragments[1:]] == [
        ("A", True, False),
        (EOS, True, True),
    ]
    assert fragments[:1] == template.prompt(row) == template.prompt(Conversation.of("I"))
    assert not fragments[0].learned
    assert template.stop == EOS


def test_a_prompt_without_format_is_the_text_itself():
    template = load_template("plain")
    assert text(template.prompt(Conversation.of("Once upon"))) == "Once upon"
    assert text(template.prompt(Conversation.of("Once upon", "a time"))) == "Once upon\na time"


def test_a_document_is_all_learned_and_only_without_a_prompt():
    document = Conversation((Message("assistant", "Once upon a time"),), "book.json:1")
    plain = load_template("plain")
    plain.check(document)
    assert plain.prompt(document) == []
    assert learned(plain.examples(document)[0]) == ["Once upon a time", EOS]
    with pytest.raises(TemplateError, match=r"book\.json:1: a text without a prompt, which only the template plain"):
        load_template("vicuna").check(document)


def test_an_answer_may_hold_the_marker():
    """Upstream splits the text on it: an IndexError, or half an answer."""
    answer = " Write ### Response: twice, ### Response: like this. "
    assert load_template("alpaca").response(answer) == answer.strip()


# ----------------------------------------------------------------------------------------------------- several turns


def test_vicuna_is_fastchats_v1_1():
    template = load_template("vicuna")
    prompt = "USER: Hi ASSISTANT: Hello.</s>USER: And? ASSISTANT:"
    assert text(template.prompt(TALK)).replace(EOS, "</s>") == VICUNA + prompt
    assert text(template.examples(TALK)[0]).replace(EOS, "</s>") == VICUNA + prompt + " Bye.</s>"
    assert text(template.examples(SYSTEM)[0]).replace(EOS, "</s>") == "Be brief. " + prompt + " Bye.</s>"
    assert learned(template.examples(TALK)[0]) == [" Hello.", EOS, " Bye.", EOS]


def test_chatml_has_its_own_two_tokens():
    template = load_template("chatml")
    turns = (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert text(template.prompt(TALK)) == turns
    assert text(template.examples(TALK)[0]) == turns + "Bye.<|im_end|>"
    assert text(template.examples(SYSTEM)[0]) == "<|im_start|>system\nBe brief.<|im_end|>\n" + turns + "Bye.<|im_end|>"
    assert learned(template.examples(TALK)[0]) == ["Hello.", "<|im_end|>", "Bye.", "<|im_end|>"]
    assert {fragment.text for fragment in template.examples(SYSTEM)[0] if fragment.control} == {
        "<|im_start|>",
        "<|im_end|>",
    }
    assert template.stop == "<|im_end|>"


@pytest.mark.parametrize("name", ["vicuna", "chatml"])
def test_the_input_of_a_later_turn_stands_below_its_instruction(name):
    later = Conversation((*TURNS[:2], Message("user", "Add.", "1 + 2"), Message("assistant", "3")))
    assert "Add.\n\n1 + 2" in text(load_template(name).prompt(later))


@pytest.mark.parametrize("name", ["vicuna", "chatml"])
def test_the_last_answer_alone_is_learned_on_demand_with_the_same_runs(name):
    template = load_template(name)
    every, last = template.examples(TALK)[0], template.examples(TALK.learning({3}))[0]
    assert [(fragment.text, fragment.control) for fragment in last] == [
        (fragment.text, fragment.control) for fragment in every
    ]
    assert learned(last) == learned(every)[2:]


@pytest.mark.parametrize("name", ["vicuna", "chatml"])
def test_every_prompt_is_what_stands_before_the_answer_run_by_run(name):
    template = load_template(name)
    fragments = [(fragment.text, fragment.control) for fragment in template.examples(SYSTEM)[0]]
    for asked in (2, 4):
        prompt = [
            (fragment.text, fragment.control) for fragment in template.prompt(Conversation(SYSTEM.messages[:asked]))
        ]
        assert fragments[: len(prompt)] == prompt


def test_a_row_that_has_no_place_in_a_template_is_refused_with_its_place():
    template = load_template("alpaca")
    template.check(Conversation(TURNS[:2]))
    with pytest.raises(TemplateError, match=r"^rows\.json:7: 2 turns, and the template alpaca takes one; use vicuna"):
        template.check(TALK)
    with pytest.raises(TemplateError, match=r"^rows\.json:7: a system message, and the template alpaca has none"):
        template.check(Conversation(SYSTEM.messages[:3], "rows.json:7"))
    for name in ("vicuna", "chatml", "chat"):
        load_template(name).check(SYSTEM)


def test_chatml_refuses_a_tokenizer_without_its_tokens(tiny_model):
    from transformers import AutoTokenizer

    template, tokenizer = load_template("chatml"), AutoTokenizer.from_pretrained(tiny_model("Llama"))
    tokenizer.add_tokens(["<|im_start|>"], special_tokens=True)
    with pytest.raises(TemplateError, match=r"template chatml: the tokenizer has no control token <\|im_end\|>"):
        template.bound(tokenizer)
    tokenizer.add_tokens(["<|im_end|>"])  # a common word, which a user's text would turn into as well
    with pytest.raises(TemplateError, match=r"no control token <\|im_end\|>"):
        template.bound(tokenizer)
    tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    assert template.bound(tokenizer) is template
    assert load_template("vicuna").bound(tokenizer).name == "vicuna"


def test_rows_find_a_template_that_fits_them(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("Llama"))
    assert fitting_template(["Alpaca"], tokenizer).name == "alpaca"
    assert fitting_template(["text", "prompt/completion"], tokenizer).name == "plain"
    assert fitting_template(["messages", "Alpaca"], tokenizer).name == "vicuna"
    with pytest.raises(TemplateError, match="rows in Alpaca, text format: name a --prompt_template_name"):
        fitting_template(["text", "Alpaca"], tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert isinstance(fitting_template(["ShareGPT"], tokenizer), ChatTemplate)


# ------------------------------------------------------------------------------------------------- files of templates


def test_templates_are_not_looked_up_in_the_working_directory(tmp_path, monkeypatch):
    """Upstream reads templates/ relative to where one stands."""
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "alpaca.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert load_template("alpaca").response_split == "### Response:"


GOOD = {"prompt_input": "{instruction} {input} R:", "prompt_no_input": "{instruction} R:", "response_split": "R:"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt_input": None}, "the key prompt_input is not a text"),
        ({"response_split": 3}, "the key response_split is not a text"),
        ({"prompt_no_input": "R:"}, "prompt_no_input has no {instruction}"),
        ({"prompt_input": "{instruction} R:"}, "prompt_input has no {input}"),
        ({"prompt_no_input": "{instruction} {instruciton} R:"}, "{instruciton}"),
        ({"prompt_no_input": "{instruction} {instruction.__class__} R:"}, "{instruction.__class__}"),
        ({"prompt_no_input": "{instruction} {output} R:"}, "only instruction, eos can stand in braces"),
        ({"response_split": "Answer:"}, "response_split 'Answer:' does not occur in prompt_input"),
        ({"turns": "{instruction}"}, "unknown key 'turns'; did you mean turn?"),
        ({"zzz": "", "kwyjibo": ""}, "unknown key 'kwyjibo'; keys: ['name', 'prompt_input'"),
        ({"turn": "USER:"}, "turn has no {instruction}"),
        ({"system": "SYSTEM:"}, "system has no {system}"),
        ({"answer": "A:"}, "answer has no {output}"),
        ({"end": "\n"}, "end has no {eos} and no control token; answers would not stop"),
        ({"end": "<|end|>"}, "end has no {eos} and no control token; answers would not stop"),
        ({"default_system": "Be brief."}, "default_system needs the key system, which says where it stands"),
        ({"control": "<|end|>"}, "the key control is not a list of tokens"),
        ({"control": ["<|end|>", ""]}, "the key control is not a list of tokens"),
        ({"control": [3]}, "the key control is not a list of tokens"),
    ],
)
def test_a_wrong_template_names_its_key(tmp_path, change, said):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD | change))
    with pytest.raises(TemplateError) as error:
        load_template(str(path))
    assert said in str(error.value)
    assert "mine.json" in str(error.value)


@pytest.mark.parametrize("key", GOOD)
def test_a_missing_key_is_named(key):
    with pytest.raises(TemplateError, match=f"mine: the key {key} is missing"):
        template_from_json({other: value for other, value in GOOD.items() if other != key}, "mine", "mine")


@pytest.mark.parametrize("name", ["alpcaa", "../alpaca", "/etc/passwd", ""])
def test_an_unknown_name_lists_the_known(name):
    with pytest.raises(TemplateError, match=", ".join(template_names())):
        load_template(name)


def test_ones_own_template_with_literal_braces(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text("\ufeff" + json.dumps(GOOD | {"prompt_no_input": '{"a": 1} {instruction} R:'}), encoding="utf-8")
    assert text(load_template(str(path)).prompt(Conversation.of("x"))) == '{"a": 1} x R:'
    assert load_template(str(path)).name == "mine"


def test_what_stands_before_the_end_token_is_learned_and_what_stands_behind_it_is_not():
    fields = GOOD | {"turn": "{instruction} R:", "end": "\n<|end|>|{eos}", "control": ["<|end|>"]}
    template = template_from_json(fields, "", "")
    assert text(template.examples(TALK)[0]) == "Hi R:Hello.\n<|end|>|{eos}And? R:Bye.\n<|end|>"
    assert learned(template.examples(TALK)[0]) == ["Hello.\n", "<|end|>", "Bye.\n", "<|end|>"]
    assert template.stop == "<|end|>"


@pytest.mark.parametrize("content", ["{", "[]", "", "[" * 100_000, b"\xff\xfe"])
def test_a_file_that_is_no_template(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TemplateError, match=r"mine\.json"):
        load_template(str(path))
    with pytest.raises(TemplateError, match=r"other\.json: No such file"):
        load_template(str(tmp_path / "other.json"))


@pytest.mark.parametrize("name", [name for name in template_names() if name != "chat"])
def test_a_recorded_template_is_the_same(name):
    template = load_template(name)
    again = template_from_json(json.loads(json.dumps(template.to_json())), "", "contract")
    assert again == template
    assert again.digest() == template.digest()


def test_the_digest_is_of_what_shapes_a_prompt():
    digests = {load_template(name).digest() for name in template_names()}
    assert len(digests) == len(template_names())
    one = load_template("vicuna")
    again = Template.from_json(one.to_json() | {"name": "else", "description": "else"}, "x", "x")
    assert again.digest() == one.digest()
    assert Template.from_json(one.to_json() | {"answer": "{output}"}, "x", "x").digest() != one.digest()


# ---------------------------------------------------------------------------------------------------- conversations


def test_a_conversation_knows_its_parts():
    assert SYSTEM.system == "Be brief."
    assert TALK.system == ""
    assert SYSTEM.answers == ["Hello.", "Bye."]
    assert SYSTEM.question == Message("user", "And?")
    assert [*Conversation.of("Add.", "1 + 2", "3").texts()] == ["Add.", "1 + 2", "3"]
    assert not TALK.is_document
    assert Conversation((Message("assistant", "Once"),)).is_document
    assert Conversation.of("I").answers == []
