"""The prompt of a row that need not have an answer, in every format."""

import pytest

from lora_alpaca.data.formats.prompts import prompt_of
from lora_alpaca.data.formats.values import RowError

CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
ASKED = {"role": "user", "content": "Hi."}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"instruction": "Hi."}, [("user", "Hi.", "")]),
        ({"instruction": "Hi.", "input": "you", "output": "Hello."}, [("user", "Hi.", "you")]),
        ({"instruction": "Hi.", "output": None}, [("user", "Hi.", "")]),
        ({"prompt": "Hi."}, [("user", "Hi.", "")]),
        ({"prompt": "Hi.", "completion": ""}, [("user", "Hi.", "")]),
        ({"prompt": [ASKED]}, [("user", "Hi.", "")]),
        ([ASKED], [("user", "Hi.", "")]),
        ({"messages": [ASKED, {"role": "assistant", "content": "Hello."}]}, [("user", "Hi.", "")]),
        ({"messages": [ASKED, {"role": "assistant", "content": ""}]}, [("user", "Hi.", "")]),
        (
            {"messages": [{"role": "developer", "content": "Be short."}, ASKED]},
            [("system", "Be short.", ""), ("user", "Hi.", "")],
        ),
        ({"conversations": [{"from": "human", "value": "Hi."}]}, [("user", "Hi.", "")]),
        (
            {"messages": [ASKED, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "And?"}]},
            [("user", "Hi.", ""), ("assistant", "Hello.", ""), ("user", "And?", "")],
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi."}]}]}, [("user", "Hi.", "")]),
    ],
)
def test_a_row_with_or_without_an_answer(row, messages):
    assert [(each.role, each.text, each.input) for each in prompt_of(row).messages] == messages


def test_the_result_of_a_tool_is_to_be_answered():
    turns = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    found = prompt_of({"messages": turns, "tools": [TOOL]})
    assert [each.role for each in found.messages] == ["user", "assistant", "tool"]
    assert found.messages[1].calls and found.tools == (TOOL,)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "A document."}, "no question"),
        ({"instruction": "", "output": ""}, "the question is empty"),
        ({"messages": [{"role": "user", "content": " "}]}, "the question is empty"),
        ({"messages": []}, "not a list of turns"),
        ({"messages": [{"role": "user", "content": None}]}, "content is null"),
        ({"messages": [{"role": "assistant", "content": "Hello."}]}, "at the beginning"),
        ({"messages": [ASKED, ASKED]}, "a user turn after a user turn"),
        ({"messages": [{"role": "wizard", "content": "Hi."}]}, "role is"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "image_url"),
        ({}, "no fields"),
        (5, "not 5"),
    ],
)
def test_what_cannot_be_answered_is_said(row, reason):
    with pytest.raises(RowError, match=reason):
        prompt_of(row)
