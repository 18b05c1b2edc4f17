"""A conversation in the terminal: lines that begin with a slash are commands, all others are said to the model."""

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from lora_alpaca.errors import ConfigError, LoraAlpacaError, visible
from lora_alpaca.inference.answer import Answer
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.sampling import Sampling
from lora_alpaca.prompts import Conversation, Message
from lora_alpaca.signals import Interrupted
from lora_alpaca.storage import atomic
from lora_alpaca.storage.paths import user_path

HELP = """\
/reset               forget what was said before
/params              show how answers are sampled; /params temperature=0.7 max_new_tokens=50 changes it
/system TEXT         set the system message, which also forgets what was said before; without a text, remove it
/adapter NAME        answer with another adapter; without a name, list them
/save FILE           write the conversation to a new .json or .jsonl file, which finetune reads
/quit                leave, as Ctrl-D does; Ctrl-C stops an answer
A line that ends with \\ goes on in the next one. A line to the model that begins with / is written with two, //."""
PARAMETERS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "num_beams", "max_new_tokens", "seed",
)  # fmt: skip


class Chat:
    """A conversation with a generator: what was said, how answers are sampled, and what the commands do to both."""

    def __init__(self, generator: Generator):
        self.generator = generator
        self.adapter = generator.default
        self.sampling: Sampling = generator.sampling
        self.system = generator.system
        self.messages: list[Message] = []
        self.commands: dict[str, Callable[[str], None]] = {
            "help": self._help,
            "reset": self._reset,
            "params": self._params,
            "system": self._system,
            "adapter": self._adapter,
            "save": self._save,
        }

    # ---------------------------------------------------------------------------------------------------- talking

    def run(self) -> None:
        """Read lines from standard input until its end, or /quit; answers go to standard output, all else to stderr."""
        _tell(f"{self._first_note()}/help lists the commands, Ctrl-D leaves")
        with _interrupting_answers():
            while (line := _read()) is not None and line != "/quit":
                try:
                    self.take(line)
                except LoraAlpacaError as error:
                    _tell(f"error: {error}")

    def take(self, line: str) -> None:
        """Do what a line says, a command or something for the model. Raises LoraAlpacaError where it cannot be done."""
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            if name not in self.commands:
                raise ConfigError(f"/{name} is no command; /help lists them, and //{name} is said to the model")
            self.commands[name](rest.strip())
        elif line.strip():
            self._say(line.removeprefix("/") if line.startswith("//") else line)

    def _say(self, text: str) -> None:
        """Print the answer to a text, and remember both."""
        asked = Message("user", text)
        answer = self._ask(self._conversation(asked))
        try:
            print_answer(answer)
        except Interrupted:
            raise
        except KeyboardInterrupt:
            answer.close()
            print(flush=True)
            _tell("(stopped)")
        else:
            tell_limit(answer)
        if answer.text.strip():
            self.messages += [asked, Message("assistant", answer.text.strip())]

    def _ask(self, conversation: Conversation) -> Answer:
        """Return the answer as it is made. Raises ConfigError, with what to do, for a history that became too long."""
        changes = {name: getattr(self.sampling, name) for name in PARAMETERS}
        try:
            return self.generator.answer(conversation, self.adapter, **changes)
        except ConfigError as error:
            if len(conversation.users) == 1:
                raise
            raise ConfigError(f"{error}; /reset forgets what was said before") from None

    def _conversation(self, asked: Message) -> Conversation:
        """Return the system message, what was said before if the template takes it, and what is asked now."""
        system = [Message("system", self.system)] if self.system else []
        return Conversation((*system, *(self.messages if self._takes_turns else ()), asked))

    @property
    def _takes_turns(self) -> bool:
        return self.generator.codecs[self.adapter].takes_turns

    def _first_note(self) -> str:
        name = self.generator.codecs[self.adapter].template.name
        return "" if self._takes_turns else f"template {name} has one turn: nothing said before is remembered; "

    # --------------------------------------------------------------------------------------------------- commands

    def _help(self, rest: str) -> None:
        _tell(HELP)

    def _reset(self, rest: str) -> None:
        self.messages = []
        _tell("what was said before is forgotten")

    def _params(self, rest: str) -> None:
        self.sampling = replace(self.sampling, **dict(map(_parameter, rest.split())))
        _tell(" ".join(f"{name}={_shown(getattr(self.sampling, name))}" for name in PARAMETERS))

    def _system(self, rest: str) -> None:
        before, self.system = self.system, rest
        try:
            self.generator.codecs[self.adapter].prompt_ids(
                Conversation((Message("system", rest), Message("user", ".")))
            )
        except LoraAlpacaError:
            if rest:
                self.system = before
                raise
        self.messages = []
        _tell(f"system message: {visible(rest)}" if rest else "no system message")

    def _adapter(self, rest: str) -> None:
        if rest and rest not in self.generator.names:
            raise ConfigError(f"/adapter {rest}: there are {', '.join(self.generator.names)}")
        remembered, self.adapter = self._takes_turns, rest or self.adapter
        names = (f"{name} *" if name == self.adapter else name for name in self.generator.names)
        _tell(f"{self._first_note() if remembered else ''}adapters: {', '.join(names)}")

    def _save(self, rest: str) -> None:
        if not self.messages:
            raise ConfigError("/save: nothing was said yet")
        path = user_path(rest)
        if path.suffix.lower() not in (".json", ".jsonl"):
            raise ConfigError(f"/save {rest}: name a new file that ends in .json or .jsonl, which finetune reads")
        rows = [{"messages": messages} for messages in self._saved()]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "replace")
        try:
            atomic.write(path, atomic.as_json(rows) if path.suffix.lower() == ".json" else lines)
        except FileExistsError:
            raise ConfigError(f"/save {rest}: it is there already; name a new file") from None
        except OSError as error:
            raise ConfigError(f"/save {rest}: it could not be written ({error.strerror or error})") from None
        _tell(f"saved: {len(self.messages)} messages in {path}")

    def _saved(self) -> Iterator[list[dict[str, str]]]:
        """Yield the conversation, or each exchange of a template that has one turn."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        size = len(self.messages) if self._takes_turns else 2
        for first in range(0, len(self.messages), size):
            said = self.messages[first : first + size]
            yield [*system, *({"role": message.role, "content": message.text} for message in said)]


# ------------------------------------------------------------------------------------------------------------ terminal


def print_answer(answer: Iterator[str]) -> None:
    """Print an answer as it is made. A terminal is shown control characters, a pipe gets them."""
    shown = visible if sys.stdout.isatty() else str
    for piece in answer:
        print(shown(piece), end="", flush=True)
    print(flush=True)


def tell_limit(answer: Answer) -> None:
    """Say on stderr that an answer met its limit, if it did."""
    if answer.finish_reason == "length":
        _tell(f"(not at its end: the limit of {answer.completion_tokens} new tokens was met; max_new_tokens sets it)")


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _read() -> str | None:
    """Return the next line, joined with those that it goes on in; None at the end of the input."""
    lines: list[str] = []
    while not lines or lines[-1].endswith("\\"):
        try:
            lines.append(_read_line("... " if lines else "> "))
        except EOFError:
            if sys.stdin.isatty():
                _tell("")
            if not lines:
                return None
            break
        except Interrupted:
            raise
        except KeyboardInterrupt:
            _tell("\nCtrl-D or /quit leaves")
            lines = []
    return "\n".join(line.removesuffix("\\") for line in lines).strip()


def _read_line(prompt: str) -> str:
    """Return a line of standard input; at a terminal the arrow keys edit it and go back to earlier ones."""
    if not sys.stdin.isatty():
        return input()
    with suppress(ImportError):
        import readline  # noqa: F401  which input() then uses
    if not sys.stdout.isatty():
        print(prompt, end="", file=sys.stderr, flush=True)
    return input(prompt if sys.stdout.isatty() else "")


@contextmanager
def _interrupting_answers() -> Iterator[None]:
    """Let Ctrl-C stop what is being done, and not the program, within this context."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _parameter(word: str) -> tuple[str, Any]:
    """Return name and value of `name=value`. Raises ConfigError for one that there is not."""
    name, equals, text = word.partition("=")
    if not equals or name not in PARAMETERS:
        raise ConfigError(f"/params {word}: NAME=VALUE is needed, and the names are {', '.join(PARAMETERS)}")
    if text == "none" and name in ("seed", "max_new_tokens"):
        return name, None
    try:
        return name, int(text)
    except ValueError:
        pass
    try:
        return name, float(text)
    except ValueError:
        raise ConfigError(f"/params {word}: {text} is no number") from None


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value:g}"
