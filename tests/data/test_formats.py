"""What the fields of rows and turns mean: what is learned, what is only seen, what is refused, and what is told."""

import json
from typing import Any

import pytest

from lora_alpaca.data import Rows
from lora_alpaca.errors import DataError
from lora_alpaca.prompts import Message

ROW = {"instruction": "Greet.", "output": "Hello."}
TURN = {"role": "user", "content": "Name a bird."}
ANSWER = {"role": "assistant", "content": "An owl."}
CALL = {"id": "a1", "type": "function", "function": {"name": "find", "arguments": '{"what": "bird"}'}}
TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture
def rows_of(tmp_path) -> Any:
    """Return `rows_of(row, ..., options)`: the Rows of a file with these rows."""

    def make(*rows: Any, **options: Any) -> Rows:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        return Rows(str(path), **options)

    return make


@pytest.fixture
def refusal(rows_of) -> Any:
    """Return `refusal(row, ..., options)`: the one line that refuses them."""

    def make(*rows: Any, **options: Any) -> str:
        with pytest.raises(DataError) as error:
            rows_of(*rows, **options)
        assert "\n" not in str(error.value)
        return str(error.value)

    return make


def only(rows: Rows) -> tuple[Message, ...]:
    (conversation,) = rows
    return conversation.messages


# --------------------------------------------------------------------------------------------------- what is learned


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"loss": False}])
@pytest.mark.parametrize("keys", [("messages", "role", "content", "user", "assistant"),
                                  ("conversations", "from", "value", "human", "gpt")])  # fmt: skip
def test_an_answer_that_is_not_to_be_learned_is_only_seen(rows_of, mark, keys):
    field, role, text, user, assistant = keys
    turns = [{role: user, text: "Try."}, {role: assistant, text: "Wrong."} | mark]
    turns += [{role: user, text: "Again."}, {role: assistant, text: "Right."}]
    found = only(rows_of({field: turns}))
    assert [message.learned for message in found if message.role == "assistant"] == [False, True]
    assert found[1].text == "Wrong."


@pytest.mark.parametrize("mark", [{"weight": 1}, {"train": True}, {"weight": None}, {"loss": 1.0}])
def test_a_mark_that_says_what_holds_anyway(rows_of, mark):
    assert [message.learned for message in only(rows_of({"messages": [TURN, ANSWER | mark]}))] == [True, True]


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([TURN, ANSWER | {"weight": 0.5}], "messages[2]: weight is 0.5; it can be 1 (learned) or 0 (only seen)"),
        ([TURN, ANSWER | {"train": "no"}], 'messages[2]: train is "no"'),
        ([TURN | {"train": True}, ANSWER], "messages[1]: train is true in a user turn, and only answers are learned"),
        ([TURN | {"thinking": "Hm."}, ANSWER], "messages[1]: a thought in a user turn; only an assistant thinks"),
        ([TURN, ANSWER | {"loss_scale": 0.5}], "messages[2].loss_scale is 0.5 and would go unused"),
        ([TURN | {"images": ["a.png"]}, ANSWER], 'messages[1].images is ["a.png"] and would go unused: only text'),
        ([TURN, ANSWER | {"refusal": "I cannot."}], "messages[2].refusal"),
        ([TURN, ANSWER | {"thinking": "a", "reasoning": "b"}], "messages[2]: reasoning and thinking are two thoughts"),
    ],
)
def test_marks_that_cannot_be_kept_are_refused(refusal, turns, said):
    assert f"rows.jsonl:1: messages format: {said}" in refusal({"messages": turns})


@pytest.mark.parametrize("verdict", [{"label": False}, {"kto_tag": False}, {"label": "false"}])
def test_answers_marked_as_bad_are_counted_and_never_learned(rows_of, refusal, verdict):
    good, bad = ROW | dict.fromkeys(verdict, True), ROW | verdict
    said = refusal(good, bad, good, bad)
    assert said.startswith(f"rows.jsonl:2: {next(iter(verdict))} is false")
    assert "2 of 4 rows are so" in said
    assert "--skip_bad_rows leaves them out" in said
    rows = rows_of(good, bad, good, bad, skip_bad_rows=True)
    assert (len(rows), [where for where, _ in rows.dropped]) == (2, ["rows.jsonl:2", "rows.jsonl:4"])
    assert "2 of 2 rows are so" in refusal(bad, bad, ignore_fields=[*verdict])  # nobody can ask to learn them


PROMPT = {"prompt": "Name a bird."}


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        (PROMPT | {"chosen": "An owl.", "rejected": "A cat."}, "completion=chosen"),
        ({"chosen": [TURN, ANSWER], "rejected": [TURN, ANSWER]}, "messages=chosen"),
        ({"prompt": [TURN], "chosen": [ANSWER], "rejected": [ANSWER]}, "completion=chosen"),
        ({"instruction": "Name a bird.", "chosen": "An owl.", "rejected": "A cat."}, "output=chosen"),
        ({"chosen": "Human: a Assistant: b", "rejected": "Human: a Assistant: c"}, "text=chosen"),
    ],
)
def test_preference_pairs_are_named_and_their_good_answers_can_be_trained_on(rows_of, refusal, row, columns):
    assert refusal(row).endswith(
        "chosen and rejected are a preference pair, which is not trained on; "
        f"--columns {columns} trains on the good answers alone"
    )
    rows = rows_of(row, columns=[columns])
    assert only(rows)[-1].text in ("An owl.", "Human: a Assistant: b")
    assert not rows.fields.unknown


def test_a_bad_answer_beside_a_good_one_is_an_error(refusal):
    assert 'rejected is "x" and would go unused: preference pairs' in refusal(ROW | {"rejected": "x"})
    assert "chosen and rejected are a preference pair" in refusal(ROW | {"rejected": "x", "chosen": "y"})


# ----------------------------------------------------------------------------------------------- what else is in rows


@pytest.mark.parametrize(
    ("row", "name", "said"),
    [
        (ROW | {"context": "Owls."}, "context", "--columns input=context puts it into the prompt"),
        (ROW | {"system_prompt": "Be brief."}, "system_prompt", "--columns system=system_prompt makes it"),
        (ROW | {"Complex_CoT": "Hm."}, "Complex_CoT", "--columns reasoning_content=Complex_CoT"),
        (ROW | {"images": ["a.png"]}, "images", "only text is trained on"),
        (ROW | {"label": 0}, "label", "a verdict on the answer is true or false"),
        (ROW | {"weight": 0.3}, "weight", "it belongs into a turn"),
        ({"text": "Once.", "tools": [TOOL]}, "tools", "rows of this format have none"),
        ({"messages": [TURN, ANSWER], "reasoning_content": "Hm."}, "reasoning_content", "it belongs into a turn"),
    ],
)
def test_a_field_that_carries_meaning_is_an_error_unless_it_is_named(rows_of, refusal, row, name, said):
    line = refusal(row)
    assert f"{name} is " in line
    assert said in line
    assert f"--ignore_fields {name} leaves it out" in line
    rows = rows_of(row, ignore_fields=[name])
    assert (len(rows), rows.fields.lines()) == (1, [])


@pytest.mark.parametrize("nothing", [None, "", [], {}])
@pytest.mark.parametrize("name", ["history", "images", "system_prompt", "rejected", "weight", "tools", "context"])
def test_a_field_that_says_nothing_is_as_good_as_absent(rows_of, name, nothing):
    assert [message.text for message in only(rows_of(ROW | {name: nothing}))] == ["Greet.", "Hello."]


def test_fields_are_told_by_what_they_are(rows_of):
    rows = rows_of(ROW | {"id": 1, "Source": "x", "mood": "good"}, ROW | {"colour": "blue"})
    assert rows.fields.lines() == [
        "fields that are not used: Source, id",
        "warning: fields that are not used: colour, mood; --ignore_fields says that this is meant",
    ]
    rows = rows_of({"messages": [TURN, ANSWER | {"mood": "good", "timestamp": 3}]})
    assert (rows.fields.harmless, rows.fields.unknown) == ({"messages[].timestamp"}, {"messages[].mood"})
    assert rows_of({"messages": [TURN, ANSWER | {"mood": "good"}]}, ignore_fields=["mood"]).fields.lines() == []


def test_history_becomes_turns(rows_of, refusal):
    row = ROW | {"history": [["Who?", "An owl."], ["Where?", "There."]]}
    for given in (row, row | {"history": json.dumps(row["history"])}):
        assert [(message.role, message.text) for message in only(rows_of(given))] == [
            ("user", "Who?"), ("assistant", "An owl."), ("user", "Where?"), ("assistant", "There."),
            ("user", "Greet."), ("assistant", "Hello."),
        ]  # fmt: skip
    for wrong in ("Who?", [["Who?"]], [["Who?", 3]], [{"user": "Who?"}]):
        assert "Alpaca format: history" in refusal(ROW | {"history": wrong})


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "thought"])
def test_a_thought_is_read_from_a_field_of_its_own(rows_of, name):
    for row in (ROW, {"prompt": "Greet.", "completion": "Hello."}):
        assert only(rows_of(row | {name: "Hm."}))[-1] == Message("assistant", "Hello.", reasoning="Hm.")
    turns = {"messages": [TURN, ANSWER | {name: [{"type": "text", "text": "Hm."}]}]}
    assert only(rows_of(turns))[-1].reasoning == "Hm."
    assert only(rows_of(turns, ignore_fields=[name]))[-1].reasoning == ""


# ------------------------------------------------------------------------------------------------- forms of messages


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [TURN, ANSWER]},
        {"conversations": [TURN, ANSWER]},
        {"messages": [{"from": "human", "value": "Name a bird."}, {"from": "gpt", "value": "An owl."}]},
        {"messages": json.dumps([TURN, ANSWER])},
        {"conversations": json.dumps([{"from": "user", "value": "Name a bird."}, {"from": "gpt", "value": "An owl."}])},
        {"messages": [TURN | {"role": " Human "}, ANSWER | {"role": "Assistant"}]},
        {"messages": [TURN | {"content": [{"type": "text", "text": "Name "}, {"text": "a bird."}]}, ANSWER]},
        {"messages": [TURN | {"content": ["Name a ", "bird."]}, ANSWER]},
        {"prompt": [TURN], "completion": [ANSWER]},
        {"prompt": [TURN], "completion": ANSWER},
        {"prompt": [TURN], "completion": "An owl."},
        {"prompt": "Name a bird.", "completion": [ANSWER]},
    ],
)  # fmt: skip
def test_one_conversation_in_the_forms_that_people_have(rows_of, row):
    rows = rows_of(row)
    assert only(rows) == (Message("user", "Name a bird."), Message("assistant", "An owl."))
    assert rows.formats.keys() <= {"messages", "ShareGPT"}


def test_bare_lists_of_messages(tmp_path, refusal):
    conversations = [[TURN, ANSWER], [TURN, ANSWER, TURN, ANSWER]]
    lines, array = "\n".join(map(json.dumps, conversations)), json.dumps(conversations)
    for number, content in enumerate((lines, lines + "\n", array, json.dumps(conversations, indent=1))):
        path = tmp_path / f"bare{number}.jsonl"
        path.write_text(content)
        assert [len(conversation.messages) for conversation in Rows(str(path))] == [2, 4]
    assert "one message, and a row is a whole conversation" in refusal([TURN, ANSWER])  # an array of two rows
    assert "a row is an object with" in refusal([[3]])


def test_the_answers_of_a_prompt_in_messages_are_only_seen(rows_of):
    found = only(rows_of({"prompt": [TURN, ANSWER, TURN], "completion": [ANSWER]}))
    assert [message.learned for message in found if message.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (TURN, "one message, and a row is a whole conversation"),
        ({"from": "human", "value": "Hi"}, "one message, and a row is a whole conversation"),
        ({"messages": "[{"}, "messages format: messages is a text that begins like JSON and is none"),
        ({"messages": [TURN | {"content": [{"type": "image_url", "image_url": {}}]}, ANSWER]},
         'messages[1].content[1] is a part of type "image_url", and only text is trained on'),
        ({"messages": [TURN | {"content": [3]}, ANSWER]}, "messages[1].content[1] is 3, and not a part"),
        ({"messages": [TURN | {"content": []}, ANSWER]}, "messages[1].content is [], which is no text"),
        ({"messages": [TURN, ANSWER | {"content": None}]}, "messages[2].content is null, which is no text"),
    ],
)  # fmt: skip
def test_forms_that_are_none(refusal, row, said):
    assert said in refusal(row)


# ------------------------------------------------------------------------------------------------------------- tools


def test_openai_and_sharegpt_say_the_same_with_tools(rows_of):
    openai = {
        "tools": [TOOL],
        "messages": [TURN, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                     {"role": "tool", "tool_call_id": "a1", "content": "owl"}, ANSWER],
    }  # fmt: skip
    sharegpt = {
        "tools": json.dumps([TOOL["function"]]),
        "conversations": [
            {"from": "human", "value": "Name a bird."},
            {"from": "function_call", "value": json.dumps({"name": "find", "arguments": {"what": "bird"}})},
            {"from": "observation", "value": "owl"},
            {"from": "gpt", "value": "An owl."},
        ],
    }
    legacy = {
        "tools": [TOOL],
        "messages": [TURN, {"role": "assistant", "content": None, "function_call": CALL["function"]},
                     {"role": "function", "name": "find", "content": "owl"}, ANSWER],
    }  # fmt: skip
    for row, number in ((openai, "a1"), (sharegpt, "call00001"), (legacy, "call00001")):
        (conversation,) = rows_of(row)
        function = {"name": "find", "arguments": {"what": "bird"}}
        assert conversation.tools == (TOOL,)
        assert conversation.messages[1].calls == ({"id": number, "type": "function", "function": function},)
        assert conversation.messages[2] == Message("tool", "owl", call_id=number, name="find")
    (fresh,) = rows_of(openai, ignore_fields=["tool_call_id"])
    assert (fresh.messages[1].calls[0]["id"], fresh.messages[2].call_id) == ("call00001", "call00001")


def test_results_are_matched_to_their_calls(rows_of):
    calls = [CALL | {"id": "x"}, CALL | {"id": "y", "function": {"name": "other", "arguments": {}}}]
    results = [{"role": "tool", "tool_call_id": "y", "content": {"found": ["ö", 1]}},
               {"role": "tool", "tool_call_id": "x", "content": 3}]  # fmt: skip
    found = only(rows_of({"messages": [TURN, {"role": "assistant", "tool_calls": calls}, *results, ANSWER]}))
    assert [(message.call_id, message.name, message.text) for message in found[2:4]] == [
        ("y", "other", '{"found": ["ö", 1]}'), ("x", "find", "3"),
    ]  # fmt: skip


CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "owl"}


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        ([TURN, CALLING, ANSWER], "messages[3]: an assistant turn after an assistant turn that calls; a tool turn"),
        ([TURN, CALLING, RESULT], "messages ends with a tool turn, so there is no answer to learn"),
        ([TURN, RESULT, ANSWER], "messages[2]: a tool turn after a user turn; an assistant turn belongs there"),
        ([TURN, CALLING, RESULT | {"tool_call_id": "zz"}, ANSWER], 'turn 3 is the result of "zz", a call that was not'),
        ([TURN, CALLING | {"tool_calls": ["find"]}], 'messages[2].tool_calls[1] is "find", and not a call with a name'),
        ([TURN, CALLING | {"tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}],
         "messages[2].tool_calls[1].arguments is [1], and not a JSON object"),
        ([TURN, CALLING | {"tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}], "begins like JSON and is"),
    ],
)  # fmt: skip
def test_tools_that_are_none(refusal, turns, said):
    assert said in refusal({"messages": turns})
    assert 'tools[1] is {"parameters": {}}, and not a function with a name' in refusal(
        {"messages": [TURN, ANSWER], "tools": [{"parameters": {}}]}
    )


def test_rows_that_differ_in_what_is_learned_are_no_doubles_and_change_the_digest(rows_of):
    turns = [TURN, ANSWER, TURN, ANSWER]
    variants = [
        {"messages": turns},
        {"messages": [TURN, ANSWER | {"weight": 0}, TURN, ANSWER]},
        {"messages": [TURN, ANSWER | {"thinking": "Hm."}, TURN, ANSWER]},
        {"messages": turns, "tools": [TOOL]},
        {"messages": [TURN, CALLING, RESULT, ANSWER]},
    ]
    assert len({rows_of(row).digest for row in variants}) == len(variants)
    assert len(set(rows_of(*variants).keys)) == len(variants)
