"""`/v1/chat/completions`: messages in, through the adapter's template, and a message out."""

from typing import Any

from lora_alpaca.inference.answer import Answer, TextToken
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.server import tool_calls
from lora_alpaca.inference.server.api_error import ApiError
from lora_alpaca.inference.server.bodies import ChatBody
from lora_alpaca.inference.server.choices import chat_form
from lora_alpaca.inference.server.constraints import GrammarConstraint, Grammars
from lora_alpaca.inference.server.conversations import conversation_of
from lora_alpaca.inference.server.exchanges import Exchange
from lora_alpaca.inference.server.models import Models


class ChatExchange(Exchange):
    """Messages and the message that answers them, in one or several choices."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, given: dict[str, Any], models: Models, generator: Generator, grammars: Grammars):
        self.body = ChatBody.of(given)
        super().__init__(self.body, models, generator)
        self._grammars = grammars
        self._tools = [] if self.body.tool_choice == "none" else self.body.tools
        self._form: tool_calls.ToolForm | None = None
        self._finders: list[tool_calls.CallFinder | None] = []
        self._tokens: list[list[TextToken]] = []
        self._texts: list[str] = []
        if self.body.top_logprobs is not None and not self.body.logprobs:
            raise ApiError(400, "top_logprobs goes with logprobs: true", "top_logprobs")
        has_format = self.body.response_format is not None and self.body.response_format.type != "text"
        if self._tools and has_format:
            raise ApiError(400, "response_format and tools exclude each other here; leave one of them out", "tools")

    def ask(self) -> list[Answer]:
        """Ask for the answers. Raises ApiError 400 for messages and tools that the template cannot hold."""
        conversation = conversation_of(self.body, self.codec.template, self.generator.system, self._tools)
        self._form = tool_calls.learn(self.codec) if self._tools else None
        logprobs = {"logprobs": self.body.top_logprobs or 0} if self.body.logprobs else {}
        answers = []
        for choice in range(self.body.n):
            changes: dict[str, Any] = {"constraint": self._constraint()} | logprobs
            answers.append(self._asked(self.generator.answer, conversation, choice, **changes))
            if self._form is not None:
                answers[-1].shown_ids = self._form.control_ids(self.codec)
        return answers

    def begin(self, answers: list[Answer]) -> None:
        """Take the answers, which begin to be read."""
        super().begin(answers)
        names = [tool["function"]["name"] for tool in self._tools]
        form = self._form
        self._finders = [None if form is None else tool_calls.CallFinder(form, names) for _ in answers]
        self._tokens = [[] for _ in answers]
        self._texts = [""] * len(answers)

    def opening(self) -> list[dict[str, Any]]:
        """Return the choices of a stream before there is any text."""
        return [self._delta(number, {"role": "assistant", "content": ""}) for number in range(len(self.answers))]

    def piece(self, number: int, piece: str) -> list[dict[str, Any]]:
        """Return what of a choice a piece of its text adds to a stream; at the end, why it ended, too."""
        answer, finder = self.answers[number], self._finders[number]
        tokens = self.logs[number].new(piece) if self.body.logprobs else []
        self._tokens[number] += tokens
        ended = answer.finish_reason is not None
        if finder is not None:
            piece = finder.add(piece) + (finder.end() if ended else "")
        self._texts[number] += piece
        found = []
        if piece or tokens:
            found.append(self._delta(number, {"content": piece}))
            if self.body.logprobs:
                found[0]["logprobs"] = chat_form(self.codec, tokens)
        if ended and finder is not None and finder.calls:
            calls = [call | {"index": position} for position, call in enumerate(finder.calls)]
            found.append(self._delta(number, {"tool_calls": calls}))
        return [*found, self._delta(number, {}, self._finish(number))] if ended else found

    def choice(self, number: int) -> dict[str, Any]:
        """Return a choice that is complete."""
        finder = self._finders[number]
        logprobs = chat_form(self.codec, self._tokens[number]) if self.body.logprobs else None
        message: dict[str, Any] = {"role": "assistant", "content": self._texts[number], "refusal": None}
        if finder is not None and finder.calls:
            message |= {"content": self._texts[number].rstrip() or None, "tool_calls": finder.calls}
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": self._finish(number)}

    def _constraint(self) -> GrammarConstraint | None:
        """Return what an answer has to be. Raises ApiError 400."""
        asked = self.body.tool_choice
        if asked in (None, "none", "auto"):
            return self._grammars.of_format(self.body.response_format, self.codec)
        functions = [tool["function"] for tool in self._tools]
        if isinstance(asked, dict):
            named = asked.get("function", asked)
            functions = [one for one in functions if isinstance(named, dict) and one["name"] == named.get("name")]
        elif asked != "required":
            raise ApiError(400, "tool_choice is none, auto, required, or a function by its name", "tool_choice")
        if not functions:
            raise ApiError(400, "tool_choice: there is no such tool", "tool_choice")
        if self._form is None:
            raise ApiError(400, "tool_choice: how this template writes calls is not known here", "tool_choice")
        return self._grammars.of_calls(self._form, functions, self.codec)

    def _finish(self, number: int) -> str | None:
        finder = self._finders[number]
        return "tool_calls" if finder is not None and finder.calls else self.answers[number].finish_reason

    def _delta(self, number: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": None, "finish_reason": finish}
