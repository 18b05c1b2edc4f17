"""`/v1/completions`: a text, or ids, in, in no template, and what follows out."""

from typing import Any

from lora_alpaca.inference.answer import Answer, TextToken
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.sampling import Token
from lora_alpaca.inference.server.api_error import ApiError
from lora_alpaca.inference.server.bodies import CompletionBody
from lora_alpaca.inference.server.choices import text_form
from lora_alpaca.inference.server.exchanges import Exchange
from lora_alpaca.inference.server.models import Models

Form = dict[str, Any]


class CompletionExchange(Exchange):
    """Prompts and what follows each, in one or several choices.

    With `echo`, a choice begins with its prompt, and so do its log-probabilities: what programs that compare answers
    (lm_eval) ask for. With `max_tokens` 0 it ends there, too.
    """

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, given: dict[str, Any], models: Models, generator: Generator):
        self.body = CompletionBody.of(given)
        super().__init__(self.body, models, generator)
        self._prompts = self.body.prompts
        self._tokens: list[list[TextToken]] = []
        self._offsets: list[int] = []
        self._echoes: list[tuple[str, Form | None]] = []
        self._only_echo = self.body.echo and self.body.max_tokens == 0
        if not self._prompts or "" in self._prompts:
            raise ApiError(400, "prompt is empty", "prompt")

    @property
    def places(self) -> int:
        """Return how many answers are asked for."""
        return self.body.n * len(self._prompts)

    def ask(self) -> list[Answer]:
        """Ask for the answers: the choices of each prompt, one prompt after another. Raises ApiError 400."""
        changes: dict[str, Any] = {} if self.body.logprobs is None else {"logprobs": self.body.logprobs}
        if self._only_echo:
            changes["max_new_tokens"] = 1
        answers = [
            self._asked(self.generator.complete, prompt, choice, **changes)
            for prompt in self._prompts
            for choice in range(self.body.n)
        ]
        if self.body.echo:
            self._echoes = [self._echo(prompt) for prompt in self._prompts]
        return answers

    def begin(self, answers: list[Answer]) -> None:
        """Take the answers, which begin to be read."""
        super().begin(answers)
        self._tokens = [[] for _ in answers]
        self._offsets = [len(self._echo_of(number)[0]) for number in range(len(answers))]

    def opening(self) -> list[dict[str, Any]]:
        """Return the choices of a stream before there is any text: their prompts, with `echo`."""
        numbers = range(len(self.answers) if self.body.echo else 0)
        return [self._choice(number, *self._echo_of(number)) for number in numbers]

    def piece(self, number: int, piece: str) -> list[dict[str, Any]]:
        """Return what of a choice a piece of its text adds to a stream; at the end, why it ended, too."""
        answer = self.answers[number]
        if self._only_echo:
            return [self._choice(number, "", None, "length")] if answer.finish_reason else []
        tokens = self.logs[number].new(piece) if self.body.logprobs is not None else []
        self._tokens[number] += tokens
        if not (piece or tokens or answer.finish_reason):
            return []
        form = self._form(tokens, self._offsets[number])
        self._offsets[number] += sum(len(token.text) for token in tokens)
        return [self._choice(number, piece, form, answer.finish_reason)]

    def choice(self, number: int) -> dict[str, Any]:
        """Return a choice that is complete."""
        answer = self.answers[number]
        text, form = self._echo_of(number)
        if self._only_echo:
            return self._choice(number, text, form, "length")
        own = self._form(self._tokens[number], len(text))
        if form is not None and own is not None:
            own = {name: form[name] + own[name] for name in own}
        return self._choice(number, text + answer.text, own, answer.finish_reason)

    def usage(self) -> dict[str, int]:
        """Return the counts of tokens; a token that is not given counts as none."""
        counts = super().usage()
        made = 0 if self._only_echo else counts["completion_tokens"]
        return counts | {"completion_tokens": made, "total_tokens": counts["prompt_tokens"] + made}

    def _choice(self, number: int, text: str, form: Form | None, finish: str | None = None) -> dict[str, Any]:
        return {"index": number, "text": text, "logprobs": form, "finish_reason": finish}

    def _form(self, tokens: list[TextToken], offset: int) -> Form | None:
        return None if self.body.logprobs is None else text_form(self.codec, tokens, offset)

    def _echo_of(self, number: int) -> tuple[str, Form | None]:
        """Return the prompt of a choice as a part of it: nothing without `echo`."""
        return self._echoes[number // self.body.n] if self.body.echo else ("", None)

    def _echo(self, prompt: str | list[int]) -> tuple[str, Form | None]:
        """Return a prompt's text and, if they are asked for, the log-probabilities of its tokens.

        The first id has none; the begin token, which comes before a text, is not told of.
        """
        ids = self.codec.text_ids(prompt) if isinstance(prompt, str) else prompt
        names = self.codec.token_texts
        if self.body.logprobs is None:
            return (prompt if isinstance(prompt, str) else "".join(map(names.text, ids))), None
        found = self.generator.score(ids, self.adapter, self.body.logprobs)
        scored = [Token(ids[0]), *found][len(self.codec.begin_ids) if isinstance(prompt, str) else 0 :]
        shown = [TextToken(token.id, names.text(token.id), token.logprob, token.top) for token in scored]
        if isinstance(prompt, str) and shown and not prompt.startswith(" "):
            shown[0] = shown[0]._replace(text=shown[0].text.removeprefix(" "))  # that of SentencePiece
        form = text_form(self.codec, shown, 0)
        if len(scored) > len(found):  # nothing is before the first token
            form["token_logprobs"][0] = form["top_logprobs"][0] = None
        return "".join(token.text for token in shown), form
