"""A template of text as a chat template (Jinja) that transformers and servers render: the same prompt, for messages.

A message `{"role": "user", "content": ...}` is an instruction. A second text, Alpaca's `input`, stands in its content
behind the instruction, with what the template has between the two:

    Add the numbers.

    ### Input:
    12 + 30

Where a program passes on other keys of a message, `{"role": "user", "content": ..., "input": ...}` says the same.
What a template has no place for, such as a second question, is refused in a sentence. Only constructs are used that
every reader of chat templates knows, and nothing depends on how it treats white space around a tag.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

from lora_alpaca.prompts.chat import ChatTemplate
from lora_alpaca.prompts.conversation import EOS, Conversation
from lora_alpaca.prompts.loading import AnyTemplate
from lora_alpaca.prompts.rendering import as_chat
from lora_alpaca.prompts.template import Template, pieces

_Piece = tuple[str, str]
_ESCAPES = str.maketrans({"\\": "\\\\", "'": "\\'", "\n": "\\n", "\r": "\\r", "\t": "\\t"})


class _TwoTexts(NamedTuple):
    """How a form holds instruction and input: which comes first, what is before, between and behind them."""

    first: str
    before: str
    between: str
    behind: str


def chat_template(template: Template, begins: bool, spaced: bool = False) -> str:
    """Return the chat template that renders conversations as a template of text does.

    `begins` is whether it writes the token that begins a text, as it must where the tokenizer puts one before every
    text. `spaced` is whether a space follows that token, unless there is one: of tokenizers that put a space before a
    text, some do not put it behind a token.
    """
    writer = _Writer(template, spaced and begins)
    return "\n".join(
        filter(
            None,
            [
                _refuse_if("tools", f"The prompt template {template.name} has no place for tools."),
                f"{{%- set system = {_quoted(template.default_system)} -%}}",
                "{%- set turns = messages -%}",
                "{%- if messages[0]['role'] == 'system' -%}{%- set turns = messages[1:] -%}",
                "{%- if messages[0]['content'] -%}{%- set system = messages[0]['content'] -%}{%- endif -%}",
                "{%- endif -%}",
                _refuse_if("not turns", "A conversation begins with a message of the user."),
                *([] if template.turn else [_refuse_if("turns[2:]", _one_turn(template))]),
                "{{- bos_token -}}" if begins else "",
                writer.system(),
                "{%- for message in turns -%}",
                _refuse_if(
                    "message['role'] != ('assistant' if loop.index0 % 2 else 'user')",
                    "After a system message, if there is one, messages of user and assistant take turns.",
                ),
                _refuse_if(
                    "message['tool_calls'] or message['reasoning_content']",
                    f"The prompt template {template.name} has no place for tool calls and thoughts.",
                ),
                "{%- set text = message['content'] -%}",
                "{%- if message['role'] == 'assistant' -%}",
                writer.answer(),
                "{%- elif loop.first -%}",
                writer.first_prompt(),
                "{%- else -%}" + writer.later_prompt() if template.turn else "",
                "{%- endif -%}{%- endfor -%}",
            ],
        )
    )


def chat_messages(template: AnyTemplate, conversation: Conversation) -> list[dict[str, Any]]:
    """Return a conversation as the messages of which a server's chat template makes its prompt."""
    messages = [as_chat(message) for message in conversation.messages]
    if isinstance(template, ChatTemplate):
        return messages
    first = next((place for place, message in enumerate(conversation.messages) if message.role == "user"), None)
    if first is None or not (message := conversation.messages[first]).input:
        return messages
    two = two_texts(template)
    if two is None or not in_one(template, two):
        messages[first] |= {"content": message.text, "input": message.input}
        return messages
    texts = (message.text, message.input) if two.first == "instruction" else (message.input, message.text)
    messages[first]["content"] = two.between.join(texts)
    return messages


def with_input(template: AnyTemplate, conversation: Conversation) -> Conversation:
    """Return a conversation whose first question is in two texts, if its content holds both; see `chat_messages`."""
    first = next((place for place, message in enumerate(conversation.messages) if message.role == "user"), None)
    if isinstance(template, ChatTemplate) or first is None or conversation.messages[first].input:
        return conversation
    message, two = conversation.messages[first], two_texts(template)
    if two is None or not in_one(template, two) or two == around(template, two) or two.between not in message.text:
        return conversation
    texts = message.text.split(two.between, 1)
    instruction, input = texts if two.first == "instruction" else reversed(texts)
    messages = list(conversation.messages)
    messages[first] = replace(message, text=instruction, input=input)
    return replace(conversation, messages=tuple(messages))


class _Writer:
    """Writes the forms of a template as Jinja, in which `text` is the content of the message at hand."""

    def __init__(self, template: Template, spaced: bool):
        self._template, self._spaced = template, spaced

    def system(self) -> str:
        template, values = self._template, {"system": "system"}
        if not template.system:
            return _refuse_if("system", f"The prompt template {template.name} has no place for a system message.")
        form = self._space(template.system, values) + _written(pieces(template.system, template.control), values)
        return f"{{%- if system -%}}{form}{{%- endif -%}}"

    def first_prompt(self) -> str:
        template, two = self._template, two_texts(self._template)
        both = {"instruction": "text", "input": "message['input']"}
        written = f"{{%- if message['input'] -%}}{self._prompt(template.prompt_input, both)}"
        if two and in_one(template, two) and two != around(template, two):
            form = f"{two.before}{{instruction}}{two.behind}"
            written += f"{{%- elif {_quoted(two.between)} in text -%}}{self._prompt(form, both)}"
        return f"{written}{{%- else -%}}{self._prompt(template.prompt_no_input, both)}{{%- endif -%}}"

    def later_prompt(self) -> str:
        joined = "{%- if message['input'] -%}{%- set text = text + '\\n\\n' + message['input'] -%}{%- endif -%}"
        return joined + self._turn(self._template.turn, {"instruction": "text"})

    def answer(self) -> str:
        template = self._template
        ending = pieces(template.end, template.control)
        ends = 1 + next(place for place, (kind, _) in enumerate(ending) if kind == "control")
        answer = _written([*pieces(template.answer, template.control), *ending[:ends]], {"output": "text"})
        rest = _written(ending[ends:], {})
        return answer + (f"{{%- if not loop.last -%}}{rest}{{%- endif -%}}" if rest else "")

    def _prompt(self, form: str, values: dict[str, str]) -> str:
        """Return the prompt of a first turn."""
        space = self._space(form, values)
        if space and self._template.system:
            space = f"{{%- if not system -%}}{space}{{%- endif -%}}"
        return space + self._turn(form, values)

    def _turn(self, form: str, values: dict[str, str]) -> str:
        """Return a prompt, without what announces an answer where none is to follow."""
        found = pieces(form, self._template.control)
        before, announcing = _announcement(found, self._template.response_split)
        if not announcing:
            return _written(before, values)
        shown = "{%- if add_generation_prompt or not loop.last -%}"
        return f"{_written(before, values)}{shown}{_written(announcing, values)}{{%- endif -%}}"

    def _space(self, form: str, values: dict[str, str]) -> str:
        """Return the space before a form that is the first text of a conversation."""
        if not self._spaced:
            return ""
        kind, piece = next(iter(pieces(form, self._template.control)), ("text", ""))
        if kind == "control" or piece.startswith(" "):
            return ""
        if kind == "text":
            return "{{- ' ' -}}"
        return f"{{%- if not {values.get(piece, 'text')}.startswith(' ') -%}}{{{{- ' ' -}}}}{{%- endif -%}}"


def two_texts(template: Template) -> _TwoTexts | None:
    """Return how `prompt_input` holds its two texts; None if not one after the other with a text between them."""
    found = pieces(template.prompt_input, template.control)
    places = [place for place, (kind, _) in enumerate(found) if kind == "placeholder"]
    if len(places) != 2 or found[places[0]][1] == found[places[1]][1]:
        return None
    first, second = places
    between = found[first + 1 : second]
    if len(between) != 1 or between[0][0] != "text":
        return None
    before, behind = ("".join(piece for _, piece in part) for part in (found[:first], found[second + 1 :]))
    return _TwoTexts(found[first][1], before, between[0][1], behind)


def around(template: Template, two: _TwoTexts) -> _TwoTexts:
    """Return two texts with what is around the only one of `prompt_no_input`; so are both where the prompt is one."""
    before, _, behind = template.prompt_no_input.partition("{instruction}")
    return two._replace(before=before, behind=behind)


def in_one(template: Template, two: _TwoTexts) -> bool:
    """Return whether one content can hold both texts: what is between them tells them, or it makes no difference."""
    return bool(two.between.strip()) or two == around(template, two)


def _announcement(found: list[_Piece], announcing: str) -> tuple[list[_Piece], list[_Piece]]:
    """Return the pieces of a prompt as those before and from the text that announces an answer.

    A control token right before that text belongs to it.
    """
    last = max((place for place, (kind, _) in enumerate(found) if kind == "placeholder"), default=-1)
    for place in range(len(found) - 1, last, -1):
        kind, piece = found[place]
        if kind == "text" and announcing and announcing in piece:
            start = piece.rindex(announcing)
            before, after = found[:place], [("text", piece[start:]), *found[place + 1 :]]
            if start:
                return [*before, ("text", piece[:start])], after
            if before and before[-1][0] == "control":
                return before[:-1], [before[-1], *after]
            return before, after
    return found, []


def _written(found: Iterable[_Piece], values: dict[str, str]) -> str:
    """Return the pieces of a form as Jinja."""
    names = {"placeholder": values, "control": {EOS: "eos_token"}}
    return "".join(f"{{{{- {names.get(kind, {}).get(piece) or _quoted(piece)} -}}}}" for kind, piece in found)


def _refuse_if(condition: str, sentence: str) -> str:
    return f"{{%- if {condition} -%}}{{{{- raise_exception({_quoted(sentence)}) -}}}}{{%- endif -%}}"


def _one_turn(template: Template) -> str:
    return f"The prompt template {template.name} takes one question and its answer, and this conversation has more."


def _quoted(text: str) -> str:
    return f"'{text.translate(_ESCAPES)}'"
