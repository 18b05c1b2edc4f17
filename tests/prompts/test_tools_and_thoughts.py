"""Rows with tools, thoughts and weights under public chat templates: ids are transformers', and what is learned is read
from the rendered text anew.
"""

import json
import random
import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lora_alpaca.data.encoding import Choices, Encoder
from lora_alpaca.data.formats import Fields, conversation, recognise
from lora_alpaca.errors import TemplateError
from lora_alpaca.prompts import Conversation, load_template

FOLDER = Path(__file__).parent / "chat_templates"


class Family(NamedTuple):
    """A tiny tokenizer, the tokens that it needs, and how an answer is found in a rendered text."""

    model: str
    tokens: tuple[str, ...]
    named: dict[str, str]
    answer: str
    thinks: bool = False
    many_calls: bool = True


FAMILIES = {
    "qwen3": Family(
        "Qwen2", ("<|im_start|>", "<|im_end|>"), {"eos_token": "<|im_end|>"},
        r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", thinks=True,
    ),
    "llama_3_1": Family(
        "GPT2", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n(.*?<\|eot_id\|>)", many_calls=False,
    ),
    "hermes_3": Family(
        "GPT2", ("<|begin_of_text|>", "<|im_start|>", "<|im_end|>"),
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}, r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
    ),
    "mistral_nemo": Family(
        "GPT2", ("<s>", "</s>", *(f"[{slash}{name}]" for name in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS")
                                  for slash in ("", "/")), "[TOOL_CALLS]"),
        {"bos_token": "<s>", "eos_token": "</s>"}, r"(?:\[/INST\]|\[/TOOL_RESULTS\])((?:(?!\[TOOL_RESULTS).)*?</s>)",
    ),
}  # fmt: skip
SAID = 'the owl sees 12 hills, an über-warm río 🦙 {x} "quoted" it\'s <b>no</b> \\n path/to | a:b'
WORDS = SAID.split()
CHATML = (
    "{{bos_token}}{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Return the {what}.",
            "parameters": {
                "type": "object",
                "properties": {"place": {"type": "string", "description": "Where."}, "days": {"type": "integer"}},
                "required": ["place"],
            },
        },
    }
    for name, what in (("temperature", "warmth"), ("population", "number of people"))
]


@pytest.fixture(scope="module")
def tokenizers(tiny_model) -> Any:
    """Return `tokenizers(family)`: a tiny tokenizer with the family's tokens and its chat template."""
    from transformers import AddedToken, AutoTokenizer

    def make(name: str) -> Any:
        family = FAMILIES[name]
        tokenizer = AutoTokenizer.from_pretrained(tiny_model(family.model))
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in family.tokens], True)
        for key, token in family.named.items():
            setattr(tokenizer, key, token)
        source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
        tokenizer.chat_template = {"default": CHATML, "tool_use": source} if name == "hermes_3" else source
        return tokenizer

    return make


def text(draw: random.Random, least: int = 1) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(least, 8)))


def generated(draw: random.Random, family: Family, answers_only: bool = False) -> dict[str, Any]:
    """Return a row in OpenAI's form: up to three questions, with calls, results, thoughts and weights at random."""
    messages: list[dict[str, Any]] = []
    if draw.random() < 0.4:
        messages.append({"role": "system", "content": text(draw)})
    tools = draw.random() < 0.7
    made = 0

    def answer(content: str | None, **more: Any) -> dict[str, Any]:
        weight = {"weight": draw.choice([0, 1])} if draw.random() < 0.3 else {}
        thought = {"reasoning_content": text(draw)} if family.thinks and draw.random() < 0.5 else {}
        return {"role": "assistant", "content": content} | more | weight | thought

    for _ in range(draw.randint(1, 3)):
        messages.append({"role": "user", "content": text(draw)})
        for _ in range(draw.randint(0, 2) if tools else 0):
            calls = []
            for _ in range(draw.randint(1, 2) if family.many_calls else 1):
                made += 1
                arguments = {"place": text(draw), "days": draw.randint(1, 9), "deep": {"é": [True, None, 1.5]}}
                function = {"name": draw.choice(TOOLS)["function"]["name"], "arguments": json.dumps(arguments)}
                calls.append({"id": f"abcde{made:04}", "type": "function", "function": function})
            messages.append(answer(None, tool_calls=calls))
            for call in calls:
                said = draw.choice([text(draw), json.dumps({"value": text(draw)}, ensure_ascii=False)])
                messages.append({"role": "tool", "content": said, "tool_call_id": call["id"]})
        messages.append(answer(text(draw)))
    messages[-1]["weight"] = 1
    return {"messages": messages} | ({"tools": TOOLS} if tools else {})


def as_served(row: dict[str, Any], places: int) -> dict[str, Any]:
    """Return the arguments of a request to a server: messages without training's fields, arguments as objects."""
    messages = []
    for message in row["messages"][:places]:
        message = {key: value for key, value in message.items() if key != "weight"}
        if "tool_calls" in message:
            message["tool_calls"] = [
                call | {"function": call["function"] | {"arguments": json.loads(call["function"]["arguments"])}}
                for call in message["tool_calls"]
            ]
        messages.append(message)
    return {"conversation": messages, "tools": row.get("tools")}


def ids_of_transformers(tokenizer: Any, row: dict[str, Any], places: int) -> list[int]:
    generates = row["messages"][places - 1]["role"] != "assistant"
    request = as_served(row, places)
    return tokenizer.apply_chat_template(**request, add_generation_prompt=generates, return_dict=False)


def as_conversation(row: dict[str, Any], ignored: tuple[str, ...] = ()) -> Conversation:
    return conversation(row, recognise(row), "rows.jsonl:1", Fields(ignored))


def encoder_of(tokenizer: Any, **choices: Any) -> Encoder:
    return Encoder(tokenizer, load_template("chat").bound(tokenizer), Choices(**choices))


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", FAMILIES)
def test_ids_are_those_of_transformers_and_answers_are_learned_as_they_are_served(name, count, tokenizers):
    family, tokenizer = FAMILIES[name], tokenizers(name)
    encoder, draw = encoder_of(tokenizer), random.Random(name)
    several = rewritten = 0
    for _ in range(count):
        row = generated(draw, family)
        answers = [place for place, message in enumerate(row["messages"]) if message["role"] == "assistant"]
        wanted = {place for place in answers if row["messages"][place].get("weight", 1)}
        prompts = {tuple(ids_of_transformers(tokenizer, row, place)): place for place in answers}
        whole = {place: ids_of_transformers(tokenizer, row, place + 1) for place in answers}
        found = []
        examples = encoder.encode([as_conversation(row)])
        several += len(examples) > 1
        for example in examples:
            ids = example.ids.tolist()
            for first, last in example.spans:
                place = prompts[tuple(ids[:first])]  # a KeyError here: learned where nobody serves it
                found.append(place)
                served = re.findall(family.answer, tokenizer.decode(whole[place]), re.DOTALL)[-1]
                assert tokenizer.decode(ids[first:last]) == served
            if ids not in list(whole.values()):  # a template that shows its prompt otherwise once it is answered
                assert whole[place][:first] != ids[:first]
                assert last == len(ids)
                rewritten += 1
        assert sorted(found) == sorted(wanted)
    assert bool(several) == (name != "llama_3_1")
    assert bool(rewritten) == (name in ("hermes_3", "mistral_nemo"))


# ------------------------------------------------------------------------------------------------------- one by one

USER, THINKING = {"role": "user", "content": "How much is 6 * 7?"}, "Six sevens.\nThat is 42."
ANSWER = {"role": "assistant", "content": "It is 42.", "reasoning_content": THINKING}
CALL = {"id": "call00001", "type": "function", "function": {"name": "temperature", "arguments": '{"place": "Cusco"}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "12", "tool_call_id": "call00001"}


def pieces_of(encoder: Encoder, row: dict[str, Any]) -> tuple[str, str]:
    """Return what is seen and what is learned of a row that is one example."""
    (example,) = encoder.encode([as_conversation(row)])
    texts = list(zip(encoder.text.pieces(example.ids.tolist()), example.mask(), strict=True))
    return tuple("".join(text for text, learned in texts if learned == kind) for kind in (False, True))


WRITTEN = f"<think>\n{THINKING}\n</think>\n\n"


@pytest.mark.parametrize("answer", [ANSWER, {"role": "assistant", "content": f"{WRITTEN}It is 42."}])
def test_thoughts_are_only_seen_where_nobody_wants_to_learn_them(tokenizers, answer):
    row = {"messages": [USER, answer]}
    tokenizer = tokenizers("qwen3")
    assert pieces_of(encoder_of(tokenizer), row)[1] == f"{WRITTEN}It is 42.<|im_end|>"
    seen, learned = pieces_of(encoder_of(tokenizer, train_on_reasoning=False), row)
    assert learned == "It is 42.<|im_end|>"
    assert seen == f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n{WRITTEN}\n"
    whole, without = (
        encoder_of(tokenizer, train_on_reasoning=choice).encode([as_conversation(row)])[0] for choice in (True, False)
    )
    assert whole.ids.tolist() == without.ids.tolist()  # a thought that is only seen does not change a token


def test_the_thought_before_a_call_is_only_seen_too(tokenizers):
    row = {"tools": TOOLS, "messages": [USER, CALLING | {"reasoning_content": THINKING}]}
    seen, learned = pieces_of(encoder_of(tokenizers("qwen3"), train_on_reasoning=False), row)
    assert learned.startswith('<tool_call>\n{"name": "temperature"')
    assert THINKING in seen


def test_a_thought_in_the_text_of_an_answer_is_only_seen_under_a_template_of_text(tiny_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model("Llama"))
    row = {"messages": [USER, {"role": "assistant", "content": "<think>Hm.</think> It is 42."}]}
    for learns, written in ((True, " <think>Hm.</think> It is 42.</s>"), (False, "It is 42.</s>")):
        encoder = Encoder(tokenizer, load_template("vicuna"), Choices(train_on_reasoning=learns))
        assert pieces_of(encoder, row)[1].lstrip() == written.lstrip()


def test_an_empty_thought_of_the_template_is_learned(tokenizers):
    row = {"messages": [USER, {"role": "assistant", "content": "It is 42."}]}
    for learns in (True, False):
        encoder = encoder_of(tokenizers("qwen3"), train_on_reasoning=learns)
        assert pieces_of(encoder, row)[1] == "<think>\n\n</think>\n\nIt is 42.<|im_end|>"


@pytest.mark.parametrize("name", FAMILIES)
def test_control_strings_in_calls_results_and_definitions_stay_text(name, tokenizers):
    tokenizer = tokenizers(name)
    encoder = encoder_of(tokenizer)
    special = encoder.text.control_tokens
    for token in FAMILIES[name].tokens:
        rows = []
        for word in ("word", token):
            function = CALL["function"] | {"arguments": json.dumps({"place": f"in {word} now"})}
            tools = json.loads(json.dumps(TOOLS).replace("Return the", f"Return {word}, the"))
            calling = CALLING | {"tool_calls": [CALL | {"function": function}]}
            result = RESULT | {"content": f"It is {word} there."}
            rows.append({"tools": tools, "messages": [USER, calling, result, {"role": "assistant", "content": word}]})
        plain, typed = (encoder.encode([as_conversation(row)]) for row in rows)
        for one, other in zip(plain, typed, strict=True):
            found = [[i for i in example.ids.tolist() if i in special.values()] for example in (one, other)]
            assert found[0] == found[1]
            assert "word" in tokenizer.decode(one.ids)
            assert tokenizer.decode(one.ids).count(token) < tokenizer.decode(other.ids).count(token)


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("llama_3_1", {"messages": [USER, ANSWER]}, r"thoughts \(.*\), which the chat template leaves out"),
        ("llama_3_1", {"messages": [USER, CALLING | {"tool_calls": [CALL, CALL]}]}, "single tool-calls"),
        ("llama_3_1", {"tools": TOOLS, "messages": [USER, CALLING | {"content": "I ask."}]},
         r"leaves out the text beside a tool call \('I ask\.'\)"),
        ("mistral_nemo", {"messages": [USER, CALLING | {"tool_calls": [CALL | {"id": "long-number"}]}]}, "length 9"),
    ],
)  # fmt: skip
def test_what_a_template_would_leave_out_is_refused_in_one_line(name, row, said, tokenizers):
    with pytest.raises(TemplateError, match=rf"^rows\.jsonl:1: .*{said}") as error:
        encoder_of(tokenizers(name)).encode([as_conversation(row)])
    assert "\n" not in str(error.value)


def test_a_template_without_tools_refuses_them_and_so_do_the_templates_of_text(tokenizers):
    tokenizer = tokenizers("qwen3")
    tokenizer.chat_template = CHATML.replace("{{bos_token}}", "")
    for template in ("chat", "vicuna", "alpaca"):
        encoder = Encoder(tokenizer, load_template(template).bound(tokenizer), Choices())
        for row in ({"messages": [USER, CALLING, RESULT, {"role": "assistant", "content": "12"}]},
                    {"messages": [USER, {"role": "assistant", "content": "12"}], "tools": TOOLS}):  # fmt: skip
            with pytest.raises(TemplateError, match=r"^rows\.jsonl:1: (tool|tools)\b[^\n]*$"):
                encoder.encode([as_conversation(row)])
        with pytest.raises(TemplateError, match="--ignore_fields"):
            encoder.encode([as_conversation({"messages": [USER, ANSWER]})])
        encoder.encode([as_conversation({"messages": [USER, ANSWER]}, ("reasoning_content",))])


def test_what_is_learned_is_what_generation_marks_say(tokenizers):
    """Where a template marks what an assistant generates, transformers' own mask says the same."""
    tokenizer = tokenizers("qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}{{ m.content + '<|im_end|>\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    encoder, draw = encoder_of(tokenizer), random.Random(3)
    for _ in range(100):
        messages = [
            {"role": role, "content": text(draw)} for _ in range(draw.randint(1, 4)) for role in ("user", "assistant")
        ]
        (example,) = encoder.encode([as_conversation({"messages": messages})])
        found = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
        assert example.ids.tolist() == found["input_ids"]
        assert example.mask().tolist() == [bool(learned) for learned in found["assistant_masks"]]


def test_a_thought_in_marks_of_the_templates_own_is_only_seen_with_them(tokenizers):
    tokenizer = tokenizers("qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}"
        "{{ '[THINK]' + m.reasoning_content + '[/THINK] ' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    seen, learned = pieces_of(encoder_of(tokenizer, train_on_reasoning=False), {"messages": [USER, ANSWER]})
    assert learned == " It is 42.<|im_end|>"  # the space belongs to the first token of what is said
    assert f"[THINK]{THINKING}[/THINK]" in seen
