"""The served receipt: what base + adapter answers to a few prompts of our own, in a file beside the exported model.

`lora-alpaca verify` asks a server the same, and holds its answers to these. `served_receipt.json` holds no text of the
rows that were trained on. What the base answers alone is there too, so that an adapter that a server does not apply is
known for what it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain, repeat
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from lora_alpaca.artifacts import chat_template
from lora_alpaca.data.detokenization import HALF
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.errors import ConfigError, TemplateError
from lora_alpaca.export.verify.probes import PROBES
from lora_alpaca.prompts import EOS, AnyTemplate, Conversation
from lora_alpaca.prompts.jinja import chat_messages
from lora_alpaca.storage.json_files import ABSENT, Count, Shape, require_object

FILE = "served_receipt.json"
FORMAT = 1
TOP = 5  # tokens with log-probabilities at every place
NEW_TOKENS = 32
ROUNDED = 3  # probes on which the effect of 16 bits is measured
SCORED = 6  # probes whose answers by base + adapter are scored by the base too
_DIGITS = 5  # of a log-probability
ABOUT = "What `lora-alpaca verify` holds a server to. The prompts are lora_alpaca's own; no row of yours is here."


class Continuation(NamedTuple):
    """The new ids after a prompt, and at every place the likeliest ones: (id, log-probability), the first is taken."""

    ids: list[int]
    likeliest: list[list[tuple[int, float]]]


Answering = Callable[[Sequence[Sequence[int]], int], list[Continuation]]  # prompts, and how many tokens to add to each
Rounding = Callable[[Sequence[Sequence[int]], Sequence[Continuation]], float]  # prompts, and what was added to each
Scoring = Callable[[Sequence[Sequence[int]], Sequence[Continuation]], list[list[float]]]


class Token(NamedTuple):
    """A token that may come next: its id, the text that it adds, and its log-probability."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Answer:
    """A greedy answer: at every place the likeliest tokens, the first of which is taken.

    `ends` is the place of the token that ends the answer, None if it goes on. What would follow that is there too.
    """

    places: list[list[Token]]
    ends: int | None

    @property
    def text(self) -> str:
        """Return the text up to the end."""
        return self.texts[len(self.places) if self.ends is None else self.ends]

    @property
    def texts(self) -> list[str]:
        """Return the text before every place, and at last that after all of them."""
        found = [""]
        for place in self.places:
            found.append(found[-1] + place[0].text.rstrip(HALF))
        return found


@dataclass(frozen=True)
class Probe:
    """A prompt and its answers by base + adapter (`tuned`) and by the base alone (`plain`).

    `scores` are the log-probabilities that the base gives the tokens of base + adapter, empty if it was not asked.
    `prompt` is a text that the tokenizer turns into the prompt's ids, `messages` are ones that the chat template does;
    each is None where there is no such.
    """

    name: str
    prompt: str | None
    messages: list[dict[str, str]] | None
    prompt_ids: list[int]
    tuned: Answer
    plain: Answer
    scores: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class ServedReceipt:
    """The content of `served_receipt.json`: probes, how many tokens each answer has, and the ids that end one.

    `rounding` is by how many nats 16 bits change a log-probability of the model on average, None if not measured.
    """

    probes: list[Probe]
    new_tokens: int
    stop_ids: list[int]
    rounding: float | None = None


# ------------------------------------------------------------------------------------------------------------ making


def build(
    tuned: Answering,
    plain: Answering,
    tokenizer: Any,
    template: AnyTemplate,
    stop_ids: Sequence[int],
    scoring: Scoring | None = None,
    rounding: Rounding | None = None,
    new_tokens: int = NEW_TOKENS,
    most_tokens: int | None = None,
    max_length: int | None = None,
) -> dict[str, Any]:
    """Return the content of a served receipt.

    `tuned` and `plain` are `greedy.continuations` of base + adapter and of the base alone, `scoring` is
    `greedy.logprobs` of the base alone, and `rounding` is `greedy.rounding` of base + adapter. Probes that the template
    does not take, or that are longer than `max_length` with their answers, are left out; so are the last ones where
    prompts and answers have more than `most_tokens`.
    """
    encoder = Encoder.for_prompts(tokenizer, template)
    source, _ = chat_template.outgoing(tokenizer, template)
    taken, left = {}, most_tokens
    for name, conversation in PROBES.items():
        try:
            ids = encoder.prompt(conversation)
        except TemplateError:
            continue
        length = len(ids) + new_tokens
        if ids and length <= min(max_length or length, left or length):
            taken[name] = (conversation, ids)
            left = None if left is None else max(1, left - length)
    prompts = [ids for _, ids in taken.values()]
    by_tuned, by_plain = tuned(prompts, new_tokens), plain(prompts, new_tokens)
    scores = scoring(prompts[:SCORED], by_tuned[:SCORED]) if scoring else []
    return {
        "format": FORMAT,
        "about": ABOUT,
        "template_sha256": template.digest(),
        "new_tokens": new_tokens,
        "stop_ids": list(stop_ids),
        "rounding": rounding(prompts[:ROUNDED], by_tuned[:ROUNDED]) if rounding and prompts else None,
        "probes": [
            {
                "name": name,
                "prompt": _prompt_text(tokenizer, template, conversation, ids),
                "messages": _messages(tokenizer, template, source, conversation, ids),
                "prompt_ids": ids,
                "tuned": _answer(tokenizer, trained, stop_ids),
                "plain": _answer(tokenizer, base, stop_ids),
                "scores": [round(score, _DIGITS) for score in scored],
            }
            for (name, (conversation, ids)), trained, base, scored in zip(
                taken.items(), by_tuned, by_plain, chain(scores, repeat([])), strict=False
            )
        ],
    }


def _prompt_text(tokenizer: Any, template: AnyTemplate, conversation: Conversation, ids: list[int]) -> str | None:
    """Return the text that the tokenizer, as a server calls it, turns into the ids of a prompt; None if none does."""
    names = {EOS: tokenizer.eos_token or ""}
    fragments = template.prompt(conversation)
    text = "".join(names.get(part.text, part.text) if part.control else part.text for part in fragments)
    without = text.removeprefix(tokenizer.bos_token or "")  # which the server adds
    return next((one for one in (text, without) if tokenizer(one)["input_ids"] == ids), None)


def _messages(
    tokenizer: Any, template: AnyTemplate, source: chat_template.Source, conversation: Conversation, ids: list[int]
) -> list[dict[str, str]] | None:
    """Return the messages that the chat template turns into the ids of a prompt; None if it does not."""
    messages = chat_messages(template, conversation)
    if any(message.keys() - {"role", "content"} for message in messages):  # which servers do not pass on
        return None
    try:
        text = chat_template.rendered(tokenizer, template, source, conversation)
    except TemplateError:
        return None
    return messages if tokenizer(text, add_special_tokens=False)["input_ids"] == ids else None


def _answer(tokenizer: Any, continuation: Continuation, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Return a continuation with the texts of its tokens."""

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)) if ids else ""

    ids, places = continuation.ids, []
    for number, likeliest in enumerate(continuation.likeliest):
        before = ids[:number]
        known = len(decode(before).rstrip(HALF))
        places.append([[token, decode([*before, token])[known:], round(value, _DIGITS)] for token, value in likeliest])
    ends = next((place for place, token in enumerate(ids) if token in stop_ids), None)
    return {"text": decode(ids[:ends]), "ends": ends, "places": places}


# ------------------------------------------------------------------------------------------------------------ reading


_Token = Annotated[tuple[Count, str, float], Field(strict=False)]  # a list, as JSON has it


class _Answer(Shape):
    text: str
    ends: Count | None
    places: list[list[_Token]]


class _Probe(Shape):
    name: str
    prompt: str | None
    messages: list[dict[str, str]] | None
    prompt_ids: list[Count]
    tuned: _Answer
    plain: _Answer
    scores: list[float] = ABSENT


class _Content(Shape):
    format: Count
    new_tokens: Count
    stop_ids: list[Count]
    rounding: float | None = ABSENT
    probes: list[_Probe]


def read(folder: Path, flag: str) -> ServedReceipt:
    """Return the served receipt of a folder. Raises ConfigError, naming the flag, for none or a damaged one."""
    path = folder / FILE
    if not path.exists():
        raise ConfigError(f"{flag} {folder}: holds no {FILE}; export the model again, or name the folder that it is in")
    content = require_object(path, ConfigError, "copy it again", flag)
    _Content.require(content, f"{flag} {path}", ConfigError, "copy it again")
    if content["format"] != FORMAT:
        raise ConfigError(f"{flag} {path}: format {content['format']}, which this version of lora_alpaca cannot read")
    probes = [
        Probe(
            **{key: probe[key] for key in ("name", "prompt", "messages", "prompt_ids")},
            tuned=_read_answer(probe["tuned"]),
            plain=_read_answer(probe["plain"]),
            scores=probe.get("scores", []),
        )
        for probe in content["probes"]
    ]
    return ServedReceipt(probes, content["new_tokens"], content["stop_ids"], content.get("rounding"))


def _read_answer(content: dict[str, Any]) -> Answer:
    return Answer([[Token(*token) for token in place] for place in content["places"]], content["ends"])
