"""Text in, text out: a model, its tokenizer and the template it was trained with, as one object that answers.

An answer is the text of the new tokens: nothing in it is searched for a marker.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from lora_alpaca.config import GenerateConfig
from lora_alpaca.data.formats.prompts import prompt_of
from lora_alpaca.data.formats.values import RowError
from lora_alpaca.errors import ConfigError, DataError, LoraAlpacaError
from lora_alpaca.inference import loading
from lora_alpaca.inference.answer import Answer
from lora_alpaca.inference.codec import Codec
from lora_alpaca.inference.sampling import Constraint, Request, Sampling, Token
from lora_alpaca.inference.scheduler.scheduler import token_generator
from lora_alpaca.inference.token_generator import Channel, TokenGenerator, TokenStream
from lora_alpaca.prompts import Conversation, Message

History = Sequence[tuple[str, str]]
AHEAD = 64  # answers of a batch that are asked for before the first of them is read


class Generator:
    """Replies to instructions. Made by `Generator.load("my-adapter")`.

    Several threads may use one generator. A reader who is slow, or who leaves, makes nobody else wait.
    """

    def __init__(
        self,
        codecs: Mapping[str, Codec],
        token_generator: TokenGenerator,
        sampling: Sampling | None = None,
        max_length: int | None = None,
        system: str = "",
        base_name: str = "",
    ):
        self.codecs, self.token_generator = dict(codecs), token_generator
        self.sampling = sampling or Sampling()
        self.max_length = max_length
        self.system = system
        self.base_name = base_name
        self.default = next(iter(self.codecs))

    @classmethod
    def load(cls, source: GenerateConfig | str | Path = "", **options: Any) -> "Generator":
        """Return a generator for an adapter, a merged model or what a config names; notes are printed on stderr.

        A path or hub id is that of an adapter, or of a model; `options` are those of GenerateConfig. Raises
        ConfigError, ModelError, AdapterError, TemplateError or ContractError, in one line each.
        """
        config = source if isinstance(source, GenerateConfig) else _config(source, options)
        return cls.of(loading.load(config), config)

    @classmethod
    def of(cls, loaded: loading.Loaded, config: GenerateConfig) -> "Generator":
        """Return a generator for what is loaded, with the sampling options of a config; notes are printed on stderr."""
        names = ("temperature", "top_p", "top_k", "num_beams", "max_new_tokens", "seed", "min_p", "repetition_penalty")
        sampling = Sampling(**{name: getattr(config, name) for name in names}, stop=tuple(config.stop or ()))
        tokens = _token_generator(loaded, config)
        return cls(loaded.codecs, tokens, sampling, loaded.max_length, config.system, loaded.base_name)

    @property
    def names(self) -> list[str]:
        """Return the names of the adapters that can be asked for, the default first, and `base`."""
        return list(self.codecs)

    @property
    def takes_turns(self) -> bool:
        """Return whether the default adapter's template takes the turns that came before."""
        return self.codecs[self.default].takes_turns

    # ------------------------------------------------------------------------------------------------- asking

    def reply(self, instruction: str, input: str = "", history: History = (), **changes: Any) -> str:
        """Return the answer to an instruction. `changes` are fields of Sampling, for this answer only."""
        return self.stream(instruction, input, history, **changes).read()

    def stream(self, instruction: str, input: str = "", history: History = (), **changes: Any) -> Answer:
        """Return the answer as an iterator over its pieces; joined they are what `reply` returns.

        `history` are the (instruction, answer) pairs that came before, for templates that take several turns. Raises
        ConfigError for a prompt that does not fit, TemplateError for one that the template does not take.
        """
        return self.answer(self.conversation(instruction, input, history), **changes)

    def chat(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] = (), **changes: Any) -> Answer:
        """Return the answer to messages with `role` and `content`, the last one the user's, or a tool's.

        Raises DataError for messages that are none or in no order, TemplateError for what the template does not take.
        """
        try:
            conversation = prompt_of({"messages": list(messages), "tools": list(tools)})
        except RowError as error:
            raise DataError(str(error)) from None
        return self.answer(conversation, **changes)

    def batch(self, prompts: Iterable[str | tuple[str, str] | Conversation], **changes: Any) -> Iterator[str]:
        """Yield the answers to prompts in their order: instructions, (instruction, input) pairs, or conversations.

        Prompts are taken as they are needed, and many are answered at the same time. Raises what `stream` does in the
        place of the answer.
        """
        for answer in self.answers(prompts, **changes):
            yield answer.read()

    def answers(self, prompts: Iterable[str | tuple[str, str] | Conversation], **changes: Any) -> Iterator[Answer]:
        """Yield the answers to prompts in their order, each to be read; one that cannot be asked for raises then."""
        asked: deque[Answer] = deque()
        coming = iter(prompts)
        try:
            while True:
                for prompt in islice(coming, AHEAD - len(asked)):
                    asked.append(self._answer_or_error(prompt, changes))
                if not asked:
                    return
                yield asked.popleft()
        finally:
            for answer in asked:
                answer.close()

    def answer(
        self, conversation: Conversation, adapter: str = "", constraint: Constraint | None = None, **changes: Any
    ) -> Answer:
        """Return the answer to a conversation of one of the adapters, the default one if none is named."""
        name = self._known(adapter)
        return self._ask(name, self.codecs[name].prompt_ids(conversation), constraint, True, changes)

    def complete(
        self,
        prompt: str | Sequence[int],
        adapter: str = "",
        constraint: Constraint | None = None,
        **changes: Any,
    ) -> Answer:
        """Return what follows a bare text, or ids, in no template; nothing is stripped from it."""
        name = self._known(adapter)
        codec = self.codecs[name]
        ids = codec.text_ids(prompt) if isinstance(prompt, str) else codec.known_ids(prompt)
        return self._ask(name, ids, constraint, False, changes)

    def score(self, prompt: str | Sequence[int], adapter: str = "", top: int = 0) -> list[Token]:
        """Return the tokens of a bare text, or ids, behind the first id, with log-probabilities and the likeliest."""
        name = self._known(adapter)
        codec = self.codecs[name]
        ids = codec.text_ids(prompt) if isinstance(prompt, str) else codec.known_ids(prompt)
        self._within_length(replace(self.sampling, max_new_tokens=None), len(ids))
        request = Request(ids, replace(self.sampling, logprobs=top, num_beams=1), (), name)
        return [token for tokens in self.token_generator.score(request) for token in tokens]

    def conversation(self, instruction: str, input: str = "", history: History = ()) -> Conversation:
        """Return an instruction as a conversation, after the system message and the turns before."""
        messages = [Message("system", self.system)] if self.system else []
        for asked, answer in history:
            messages += [Message("user", asked), Message("assistant", answer)]
        return Conversation((*messages, Message("user", instruction, input)))

    def prompt_ids(self, instruction: str, input: str = "", history: History = ()) -> list[int]:
        """Return the ids that the model is fed."""
        return self.codecs[self.default].prompt_ids(self.conversation(instruction, input, history))

    def close(self) -> None:
        """Stop every answer."""
        self.token_generator.close()

    # ------------------------------------------------------------------------------------------------- inside

    def _ask(
        self, name: str, ids: list[int], constraint: Constraint | None, strip: bool, changes: Mapping[str, Any]
    ) -> Answer:
        codec = self.codecs[name]
        sampling = self._within_length(replace(self.sampling, **changes), len(ids))
        request = Request(ids, sampling, codec.stop_ids, name, constraint)
        return Answer(codec, request, self.token_generator.generate(request), strip)

    def _answer_or_error(self, prompt: str | tuple[str, str] | Conversation, changes: Mapping[str, Any]) -> Answer:
        """Return the answer to a prompt, or one that raises at its first piece what asking for it raised."""
        try:
            return self.answer(self._as_conversation(prompt), **changes)
        except LoraAlpacaError as error:
            channel = Channel()
            channel.end(error)
            return Answer(self.codecs[self.default], Request((), self.sampling), TokenStream(channel))

    def _known(self, adapter: str) -> str:
        if adapter and adapter not in self.codecs:
            raise ConfigError(f"adapter {adapter!r}: there are {', '.join(self.codecs)}")
        return adapter or self.default

    def _as_conversation(self, prompt: str | tuple[str, str] | Conversation) -> Conversation:
        if isinstance(prompt, Conversation):
            return prompt
        return self.conversation(prompt) if isinstance(prompt, str) else self.conversation(*prompt)

    def _within_length(self, sampling: Sampling, prompt_length: int) -> Sampling:
        """Return sampling options with a length. Raises ConfigError if prompt and answer are beyond the context."""
        asked, most = sampling.max_new_tokens, self.max_length
        if most is None:
            return sampling if asked else replace(sampling, max_new_tokens=Sampling.max_new_tokens)
        if prompt_length >= most:
            raise ConfigError(
                f"the prompt has {prompt_length} tokens; this model takes at most {most}, answer included"
            )
        if asked is not None and prompt_length + asked > most:
            raise ConfigError(
                f"the prompt has {prompt_length} tokens and max_new_tokens is {asked}, together "
                f"{prompt_length + asked - most} more than the {most} that this model takes; lower max_new_tokens to "
                f"{most - prompt_length} or less"
            )
        return replace(sampling, max_new_tokens=asked or most - prompt_length)


def _token_generator(loaded: loading.Loaded, config: GenerateConfig) -> TokenGenerator:
    """Return what answers on a model."""
    tokens, notes = token_generator(loaded.adapters, config.max_batch, loaded.max_length)
    loading.log(notes)
    return tokens


def _config(source: str | Path, options: dict[str, Any]) -> GenerateConfig:
    """Return the config for an adapter folder, a model folder or a hub id."""
    name = str(source)
    is_model = bool(name) and (Path(name).expanduser() / "config.json").is_file()
    named = {"base_model": name, "lora_weights": "none"} if is_model else {"lora_weights": name}
    return GenerateConfig(**named | options)
