"""Text in, text out: a model, its tokenizer and the template it was trained with, as one object that answers.

Prompts are encoded by the code that training uses, and control strings typed by a user stay text. An answer is the
text of the new tokens: nothing in it is searched for a marker.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import takewhile
from typing import Any

from lora_alpaca.artifacts import adapter_folder, prompt_contract
from lora_alpaca.artifacts.source import open_source
from lora_alpaca.config import GenerateConfig
from lora_alpaca.data.detokenization import IncrementalDecoder
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.errors import ConfigError
from lora_alpaca.inference.token_generator import OneAtATime, Sampling, TokenGenerator
from lora_alpaca.models.base import load_base
from lora_alpaca.models.device import choose_device
from lora_alpaca.planning.preflight import check_base_fits
from lora_alpaca.prompts import AnyTemplate, Conversation, Message

History = Sequence[tuple[str, str]]


class Generator:
    """Replies to instructions. Made by `Generator.load(config)`.

    Several threads may use one generator. A reader who is slow, or who leaves, makes nobody else wait.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: AnyTemplate,
        sampling: Sampling | None = None,
        max_length: int | None = None,
        system: str = "",
        token_generator: TokenGenerator | None = None,
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.template = template.bound(tokenizer)
        self.sampling = sampling or Sampling()
        self.max_length = max_length
        self.system = system
        self.stop_ids = prompt_contract.stop_ids(model.generation_config.eos_token_id, tokenizer, template)
        self.token_generator = token_generator or OneAtATime(model, self.stop_ids, tokenizer.pad_token_id)
        self._encoder = Encoder.for_prompts(tokenizer, self.template)
        self._control_ids = set(self._encoder.text.control_tokens.values())

    @classmethod
    def load(cls, config: GenerateConfig) -> "Generator":
        """Return a generator for the adapter or model that a config names, and print on stderr which one that is.

        Raises ConfigError, ModelError, AdapterError, TemplateError or ContractError, in one line each.
        """
        source = open_source(
            config.base_model, config.lora_weights, config.revision, config.prompt_template, config.trust_remote_code
        )
        _log(source.notes)
        spec, notes = choose_device(config)
        _log(notes)
        check_base_fits(source.base, spec)
        _log(source.verify())
        tokenizer, template = source.load_tokenizer()
        model, notes = load_base(source.base, spec)
        _log(notes)
        if source.adapter is not None:
            model = adapter_folder.load(model, source.adapter).eval()
        names = ("temperature", "top_p", "top_k", "num_beams", "max_new_tokens", "seed")
        sampling = Sampling(**{name: getattr(config, name) for name in names})
        return cls(model, tokenizer, template, sampling, source.base.max_length, config.system)

    def reply(self, instruction: str, input: str = "", history: History = (), **changes: Any) -> str:
        """Return the answer to an instruction. `changes` are fields of Sampling, for this answer only."""
        return "".join(self.stream(instruction, input, history, **changes))

    def stream(self, instruction: str, input: str = "", history: History = (), **changes: Any) -> Iterator[str]:
        """Yield the answer in pieces as it is made; joined they are what `reply` returns.

        `history` are the (instruction, answer) pairs that came before, for templates that take several turns.

        There is a piece for every token, empty where there is nothing to show yet: with several beams, the whole
        answer is one piece, since a search may change its mind until its end. Closing the iterator stops the model at
        the next token. Raises ConfigError for a prompt that does not fit, TemplateError for one that the template
        does not take.
        """
        prompt = self.prompt_ids(instruction, input, history)
        sampling = self._within_length(replace(self.sampling, **changes), len(prompt))
        with closing(self.token_generator.generate(prompt, sampling)) as arriving:
            yield from stripped(self._texts(arriving))

    @property
    def takes_turns(self) -> bool:
        """Return whether the template takes the turns that came before."""
        return bool(getattr(self.template, "turn", "chat"))

    def prompt_ids(self, instruction: str, input: str = "", history: History = ()) -> list[int]:
        """Return the ids that the model is fed: those that training saw before an answer, encoded by the same code."""
        messages = [Message("system", self.system)] if self.system else []
        for asked, answer in history:
            messages += [Message("user", asked), Message("assistant", answer)]
        conversation = Conversation((*messages, Message("user", instruction, input)))
        ids = self._encoder.prompt(conversation)
        if not ids:
            raise ConfigError("the prompt is empty, and the model needs a token to begin with")
        return ids

    def reply_batch(self, prompts: list[tuple[str, str]], **changes: Any) -> list[str]:
        """Return the answers to (instruction, input) pairs, computed together, padded on the left."""
        rows = [self.prompt_ids(*pair) for pair in prompts]
        answers = self.token_generator.generate_batch(rows, replace(self.sampling, **changes))
        return [self.template.response(self._decode(list(self._until_stop(ids)))) for ids in answers]

    def _within_length(self, sampling: Sampling, prompt_length: int) -> Sampling:
        """Return sampling options with which prompt and answer fit the model; ConfigError if no answer does."""
        if self.max_length is None:
            return sampling
        if prompt_length >= self.max_length:
            raise ConfigError(
                f"the prompt has {prompt_length} tokens; this model takes at most {self.max_length}, answer included"
            )
        return replace(sampling, max_new_tokens=min(sampling.max_new_tokens, self.max_length - prompt_length))

    def _texts(self, arriving: Iterable[list[int]]) -> Iterator[str]:
        """Yield the text that each list of new ids adds, up to the id that stops the answer."""
        decoder = IncrementalDecoder(self._decode)
        for ids in arriving:
            shown = (token for token in self._until_stop(ids) if token not in self._control_ids)
            yield "".join(decoder.add(token) for token in shown)
        yield decoder.flush()

    def _until_stop(self, ids: Iterable[int]) -> Iterable[int]:
        return takewhile(lambda token: token not in self.stop_ids, ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


def stripped(pieces: Iterable[str]) -> Iterator[str]:
    """Yield as many pieces, which joined are the joined text as a template's `response` strips it.

    White space waits for the text after it, since at the end it is stripped.
    """
    begun, waiting = False, ""
    for piece in pieces:
        text = waiting + piece if begun else piece.lstrip()
        shown = text.rstrip()
        begun, waiting = begun or bool(shown), text[len(shown) :]
        yield shown


def _log(notes: Iterable[str]) -> None:
    for note in notes:
        print(note, file=sys.stderr)
