"""Answers: a model, a tokenizer and the template it was trained with, as one object that replies or streams.

Prompts are encoded by the same code as in training, control strings typed by a user stay text, and an answer is what
the new tokens say: no text is searched for a marker.
"""

import os
import queue
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from lora_alpaca.artifacts import adapter_folder, prompt_contract
from lora_alpaca.artifacts.adapter_folder import AdapterInfo
from lora_alpaca.artifacts.source import UNCHECKED, agreed_template
from lora_alpaca.config import GenerateConfig
from lora_alpaca.config.shared import ADAPTER_DIR, DEMO
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.errors import ConfigError
from lora_alpaca.models import lora
from lora_alpaca.models.base import Base, load_base, locate_base
from lora_alpaca.models.device import choose_device
from lora_alpaca.models.fingerprint import weight_hashes
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.planning.preflight import check_base_fits
from lora_alpaca.prompts import AnyTemplate, Conversation, Message, load_template
from lora_alpaca.storage import output_folder
from lora_alpaca.storage.paths import user_path

History = Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 always takes the likeliest; then top p and top k have nothing to do."""

    temperature: float = 0.1
    top_p: float = 0.75
    top_k: int = 40
    num_beams: int = 1
    max_new_tokens: int = 128
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """Return the keyword arguments for `generate`; every one of them has an effect."""
        sampled = {"temperature": float(self.temperature), "top_p": float(self.top_p), "top_k": self.top_k}
        unsampled = dict.fromkeys(sampled)  # None: nothing of the model's own generation config slips in
        chosen = sampled if self.temperature > 0 else unsampled
        return {
            "do_sample": self.temperature > 0,
            "num_beams": self.num_beams,
            "max_new_tokens": self.max_new_tokens,
            **chosen,
        }


class Generator:
    """Replies to instructions. Made by `Generator.load(config)`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        template: AnyTemplate,
        sampling: Sampling | None = None,
        max_length: int | None = None,
        system: str = "",
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.template = template.bound(tokenizer)
        self.sampling = sampling or Sampling()
        self.max_length = max_length
        self.system = system
        self.stop_ids = prompt_contract.stop_ids(model.generation_config.eos_token_id, tokenizer, template)
        self._encoder = Encoder.for_prompts(tokenizer, self.template)
        self._one_at_a_time = threading.Lock()  # the random state and the key-value cache belong to one answer

    @classmethod
    def load(cls, config: GenerateConfig) -> "Generator":
        """Return a generator for the adapter or model that a config names; what was chosen for it is said on stderr.

        Raises ConfigError, ModelError, AdapterError, TemplateError or ContractError, in one line each.
        """
        source = _find(config)
        template = _template(config, source)
        spec, said = choose_device(config)
        _say(*said)
        check_base_fits(source.base, spec)
        if source.adapter is not None and source.origin is not None:
            _say(*adapter_folder.verify(source.adapter, source.origin, source.base))
        tokenizer = load_tokenizer(source.base, source.tokenizer_dir)
        contract = source.origin.contract if source.origin else None
        template = contract.keep(tokenizer) if contract else template.bound(tokenizer)
        model = load_base(source.base, spec)
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

        `history` are the (instruction, answer) pairs that came before, for templates that have several turns.

        There is a piece for every token, empty where there is nothing to show yet: with several beams, all but the
        last are, since a search may change its mind until its end. Closing the iterator stops the model at the next
        token. Raises ConfigError for a prompt that does not fit, and TemplateError for one that the template has not.
        """
        sampling = replace(self.sampling, **changes)
        prompt = self.prompt_ids(instruction, input, history)
        if self.max_length is not None and len(prompt) >= self.max_length:
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens; this model takes at most {self.max_length}, answer included"
            )
        if self.max_length is not None:
            sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, self.max_length - len(prompt)))
        with self._one_at_a_time:
            shown = text = ""
            for ids in self._token_ids(prompt, sampling):
                text = self.template.response(self._decode(ids))
                ready = not text.endswith("\ufffd")  # half a character waits for its other half
                yield text[len(shown) :] if ready else ""
                shown = text if ready else shown
            yield text[len(shown) :]

    @property
    def takes_turns(self) -> bool:
        """Return whether the template has a place for what was said before."""
        return bool(getattr(self.template, "turn", "chat"))

    def prompt_ids(self, instruction: str, input: str = "", history: History = ()) -> list[int]:
        """Return the ids that the model is fed: those that training saw before an answer, encoded by the same code."""
        messages = [Message("system", self.system)] if self.system else []
        for said, answer in history:
            messages += [Message("user", said), Message("assistant", answer)]
        conversation = Conversation((*messages, Message("user", instruction, input)))
        ids = self._encoder.prompt(conversation)
        if not ids:
            raise ConfigError("the prompt is empty, and the model needs a token to begin with")
        return ids

    def reply_batch(self, prompts: list[tuple[str, str]], **changes: Any) -> list[str]:
        """Return the answers to (instruction, input) pairs, computed together, padded on the left."""
        sampling = replace(self.sampling, **changes)
        rows = [self.prompt_ids(*pair) for pair in prompts]
        longest, pad = max(map(len, rows)), self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        with self._one_at_a_time:
            output = self._generate(ids, mask, sampling)
        return [self.template.response(self._decode(row[longest:].tolist())) for row in output]

    def _decode(self, new_ids: list[int]) -> str:
        """Return new tokens as text, up to and without the one that stops."""
        end = next((place for place, token in enumerate(new_ids) if token in self.stop_ids), len(new_ids))
        return str(self.tokenizer.decode(new_ids[:end], skip_special_tokens=True))

    def _generate(
        self, ids: torch.Tensor, mask: torch.Tensor, sampling: Sampling, watcher: StoppingCriteria | None = None
    ) -> torch.Tensor:
        """Return prompts and answers as token ids [rows, prompt + new]."""
        if sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        device = self.model.device
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                pad_token_id=self.tokenizer.pad_token_id,
                eos_token_id=self.stop_ids or None,
                stopping_criteria=StoppingCriteriaList([watcher] if watcher else []),
                **sampling.options(),
            )
        assert isinstance(output, torch.Tensor)
        return output

    def _token_ids(self, prompt: list[int], sampling: Sampling) -> Iterator[list[int]]:
        """Yield the new ids so far, after every token; with several beams none until the end.

        `generate` runs in a thread of its own. Its errors are raised here, and leaving early makes it stop.
        """
        arrived: queue.Queue[list[int] | BaseException | None] = queue.Queue()
        left = threading.Event()
        ids = torch.tensor([prompt])

        def work() -> None:
            try:
                watcher = _Watcher(len(prompt), arrived, left, shows=sampling.num_beams == 1)
                output = self._generate(ids, torch.ones_like(ids), sampling, watcher)
                arrived.put(output[0, len(prompt) :].tolist())
            except BaseException as error:  # handed to the reader, who raises it
                arrived.put(error)
            arrived.put(None)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while (item := arrived.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            left.set()
            thread.join()


class _Watcher(StoppingCriteria):
    """Called by `generate` after every token: passes the new ids on, and says stop when the reader has left."""

    def __init__(self, prompt_length: int, arrived: "queue.Queue[Any]", left: threading.Event, shows: bool):
        self.prompt_length, self.arrived, self.left, self.shows = prompt_length, arrived, left, shows

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.arrived.put(input_ids[0, self.prompt_length :].tolist() if self.shows else [])
        return torch.full((input_ids.shape[0],), self.left.is_set(), device=input_ids.device, dtype=torch.bool)


# ------------------------------------------------------------------------------------------------ what to load


@dataclass(frozen=True)
class ModelSource:
    """What to load: base, adapter folder if any, folder of the tokenizer if not the base's, and what is recorded."""

    base: Base
    adapter: Path | None
    tokenizer_dir: Path | None
    origin: AdapterInfo | None


def _find(config: GenerateConfig) -> ModelSource:
    """Return what a config names, or what the steps before have left here, and say which."""
    named = config.base_model or os.environ.get("BASE_MODEL", "")
    if config.lora_weights == "none":
        return _model_alone(config, named or DEMO)
    default = Path(ADAPTER_DIR)
    adapter = user_path(config.lora_weights) if config.lora_weights else None
    if adapter is None and (default / lora.CONFIG).is_file():
        origin = adapter_folder.read_info(default)
        if not named or _same_base(named, origin.base_model):
            adapter = default
        else:
            _say(f"{default} was made for {origin.base_model or 'an unknown base'}: answering with {named} alone")
    if adapter is None:
        return _model_alone(config, named)
    if not adapter.exists() and str(config.lora_weights).count("/") == 1:
        adapter = adapter_folder.download(config.lora_weights)
    adapter_folder.require_adapter("--lora_weights", adapter)
    origin = adapter_folder.read_info(adapter)
    if not named and not origin.base_model:
        raise ConfigError(f"{adapter} does not record its base model; name it with --base_model")
    revision = config.revision or (None if named and not _same_base(named, origin.base_model) else origin.base_revision)
    base = locate_base(named or origin.base_model, revision, config.trust_remote_code)
    _say(f"adapter {adapter} on {base.name}")
    return ModelSource(base, adapter, adapter if (adapter / "tokenizer_config.json").is_file() else None, origin)


def _model_alone(config: GenerateConfig, named: str) -> ModelSource:
    if not named:
        _say(f"no adapter in {ADAPTER_DIR} yet: answering with the untrained demo base")
    base = locate_base(named or DEMO, config.revision, config.trust_remote_code)
    folder = Path(base.path)
    origin = adapter_folder.read_info(folder) if output_folder.read_record(folder) else None
    if origin is not None:
        weight_hashes(base)  # which checks them
    if named:
        _say(f"model {base.name}" + (", merged by lora_alpaca" if origin else ", without an adapter"))
    return ModelSource(base, None, None, origin)


def _same_base(named: str, recorded: str) -> bool:
    """Return whether two names mean the same base: equal, or paths of one folder."""
    if named == recorded:
        return True
    return (
        user_path(named).exists() and Path(recorded).exists() and user_path(named).resolve() == Path(recorded).resolve()
    )


def _template(config: GenerateConfig, source: ModelSource) -> AnyTemplate:
    """Return the template that the prompts are made with; TemplateError where it cannot be known or is another."""
    contract = source.origin.contract if source.origin else None
    if contract is None and source.base.name == DEMO and not config.prompt_template:
        return load_template("alpaca")  # the untrained demo base: any would do
    template = agreed_template(config.prompt_template, contract, str(source.adapter or source.base.name))
    if contract is None:
        _say(UNCHECKED)
    return template


def _say(*lines: str) -> None:
    for line in lines:
        print(line, file=sys.stderr)
