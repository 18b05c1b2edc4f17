"""What is told of an answer: its text, tokens and end, in the two forms of OpenAI's API."""

from collections.abc import Sequence
from typing import Any

from lora_alpaca.data.detokenization import HALF
from lora_alpaca.inference.answer import Answer, TextToken
from lora_alpaca.inference.codec import Codec


def usage(answers: Sequence[Answer], prompts: Sequence[Answer]) -> dict[str, int]:
    """Return the counts of tokens of a request: those of a prompt once, however many answers it has."""
    asked = sum(answer.prompt_tokens for answer in prompts)
    made = sum(answer.completion_tokens for answer in answers)
    return {"prompt_tokens": asked, "completion_tokens": made, "total_tokens": asked + made}


class TokenLog:
    """The tokens of an answer with their log-probabilities, told as the text is shown.

    Those of a text that stopped the answer, or of white space that was stripped, are told as little as their text.
    """

    def __init__(self, answer: Answer):
        self._answer, self._told = answer, 0

    def new(self, piece: str) -> list[TextToken]:
        """Return the tokens that a piece shows; at the end all that are left, unless a text stopped the answer."""
        answer = self._answer
        if not piece and (answer.finish_reason is None or answer.stop is not None):
            return []
        new = answer.tokens[self._told :]
        self._told += len(new)
        return new


def chat_form(codec: Codec, tokens: Sequence[TextToken]) -> dict[str, Any]:
    """Return tokens in the form of chats."""

    def entry(number: int, logprob: float) -> dict[str, Any]:
        raw = codec.token_texts.bytes(number)
        text = codec.token_texts.text(number)
        return {"token": text, "logprob": logprob, "bytes": None if raw is None else list(raw)}

    content = [
        entry(token.id, token.logprob) | {"top_logprobs": [entry(number, value) for number, value in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def text_form(codec: Codec, tokens: Sequence[TextToken], offset: int) -> dict[str, Any]:
    """Return tokens in the older form of completions; `offset` is where their text begins."""

    def name(number: int) -> str:
        """Return the text of a token; of half a character its bytes, so that no two tokens have one name."""
        text = codec.token_texts.text(number)
        raw = codec.token_texts.bytes(number) if HALF in text else None
        return text if raw is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    form: dict[str, Any] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        form["tokens"].append(name(token.id) if HALF in token.text else token.text)
        form["token_logprobs"].append(token.logprob)
        form["top_logprobs"].append({name(number): value for number, value in reversed(token.top)})
        form["text_offset"].append(offset)
        offset += len(token.text)
    return form
