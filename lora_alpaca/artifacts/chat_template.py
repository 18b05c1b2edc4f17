"""The chat template that goes out with a model: the one which makes the prompt of training of a server's messages.

It is tried on the golden conversations of the prompt contract: a server renders a text and encodes that, and the ids
have to be those that training encoded. Only control tokens that a user types differ: a server's text does not tell
them from the template's own.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import zip_longest
from typing import Any

from lora_alpaca.artifacts.prompt_contract import GOLDEN
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.errors import TemplateError
from lora_alpaca.prompts import AnyTemplate, ChatTemplate, Conversation, Template
from lora_alpaca.prompts.jinja import chat_messages, chat_template

Source = str | dict[str, str]


def outgoing(tokenizer: Any, template: AnyTemplate) -> tuple[Source, list[str]]:
    """Return the text of the chat template of a model, and a note where it makes another prompt than training did.

    The template is bound to the tokenizer. One that the tokenizer brought is the one that was recorded.
    """
    if isinstance(template, ChatTemplate):
        return template.source, []
    source, wrong = _best(tokenizer, template)
    if not wrong:
        return source, []
    return source, [
        f"warning: a server that renders the chat template prompts otherwise than training did ({wrong}); send it the "
        "prompt as text"
    ]


@lru_cache(maxsize=1)
def _best(tokenizer: Any, template: Template) -> tuple[str, str]:
    """Return the chat template that renders most golden conversations as training did, and what the first other is."""
    encoder = Encoder.for_prompts(tokenizer, template)
    begins = bool(encoder.text.bos)
    sources = [chat_template(template, begins)] + [chat_template(template, begins, spaced=True)] * begins
    found = [(_differing(tokenizer, encoder, source), source) for source in sources]
    wrong, source = min(found, key=lambda one: len(one[0]))
    return source, next(iter(wrong), "")


def _differing(tokenizer: Any, encoder: Encoder, source: str) -> list[str]:
    """Return what differs in the golden conversations whose prompt a chat template does not render token for token."""
    found = []
    for conversation in _probes(tokenizer, encoder.template):
        try:
            text = rendered(tokenizer, encoder.template, source, conversation)
        except TemplateError as error:
            found.append(str(error))
            continue
        pairs = zip_longest(tokenizer(text, add_special_tokens=False)["input_ids"], encoder.prompt(conversation))
        for place, (got, wanted) in enumerate(pairs, start=1):
            if got != wanted:
                one, other = (
                    "missing" if token is None else repr(tokenizer.decode([token])) for token in (got, wanted)
                )
                found.append(f"token {place} of {text[:24]!r}... is {one}, and was {other}")
                break
    return found


def texts(tokenizer: Any, template: AnyTemplate, source: Source) -> list[str]:
    """Return what a chat template renders of the golden conversations that it takes."""
    found = []
    for conversation in _probes(tokenizer, template):
        with suppress(TemplateError):
            found.append(rendered(tokenizer, template, source, conversation))
    return found


def rendered(tokenizer: Any, template: AnyTemplate, source: Source, conversation: Conversation) -> str:
    """Return the text that a server renders of a conversation, for its next answer. Raises TemplateError."""
    messages = chat_messages(template, conversation)
    try:
        return str(
            tokenizer.apply_chat_template(messages, chat_template=source, tokenize=False, add_generation_prompt=True)
        )
    except Exception as error:  # Jinja's, and whatever a template raises by its own choice
        raise TemplateError(f"the chat template refuses: {' '.join(str(error).split())}") from None


def _probes(tokenizer: Any, template: AnyTemplate) -> Iterator[Conversation]:
    """Yield the prompts of those golden conversations that a template takes, without control tokens typed by a user."""
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    for conversation in GOLDEN:
        try:
            template.check(conversation)
        except TemplateError:
            continue
        if not any(token in text for text in conversation.texts() for token in control):
            yield replace(conversation.prompt, where="")
