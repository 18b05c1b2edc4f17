"""Questions with the answers that were expected: validation rows of the run that made the adapter."""

from itertools import islice
from pathlib import Path
from threading import Lock
from typing import NamedTuple

from lora_alpaca.artifacts import privacy
from lora_alpaca.config import GenerateConfig
from lora_alpaca.config.shared import ADAPTER_DIR, DEMO
from lora_alpaca.data import Rows, held_out
from lora_alpaca.errors import LoraAlpacaError
from lora_alpaca.prompts import Conversation
from lora_alpaca.storage.output_folder import read_record
from lora_alpaca.storage.paths import user_path

MOST = 6
LONGEST = 400  # characters of a question that fits on a page
LARGEST_FILE = 64 << 20  # bytes that are read for a few examples


class Example(NamedTuple):
    """A question and the answer that was expected."""

    instruction: str
    input: str
    expected: str


class Examples:
    """The examples for an adapter, read when the first visitor asks for them.

    Rows of a file are shown on a private page only: who may see the page need not be who may see the data.
    """

    def __init__(self, config: GenerateConfig, is_private: bool):
        self._is_private = is_private
        self._folder = user_path((config.lora_weights or ADAPTER_DIR).split(",")[0].strip())
        self._lock = Lock()
        self._found: list[Example] | None = None

    def read(self) -> list[Example]:
        """Return the examples; none if the run's data is not here, is large, or is no longer what it was."""
        with self._lock:
            if self._found is None:
                try:
                    self._found = _of_run(self._folder, self._is_private)
                except (LoraAlpacaError, OSError, KeyError, TypeError, ValueError):
                    self._found = []  # the page is worth more than its examples
            return self._found

    def expected(self, instruction: str, input: str) -> str | None:
        """Return the answer that is expected to a question, if it is one of the examples."""
        return {example[:2]: example.expected for example in self.read()}.get((instruction, input))


def _of_run(folder: Path, is_private: bool) -> list[Example]:
    record = privacy.whole(folder, read_record(folder))
    options = record.get("options") or {}
    own = bool(options.get("val_data_path"))  # rows of their own, all for validation
    path = options.get("val_data_path") or options.get("data_path")
    if not path or record.get("kind") != "adapter":
        return []
    if path != DEMO:
        file = user_path(path)
        if not is_private or not file.is_file() or file.stat().st_size > LARGEST_FILE:
            return []
    rows = Rows(path, options.get("columns"), options.get("skip_bad_rows", False), options.get("ignore_fields"))
    if rows.digest != record.get("val_data_sha256" if own else "data_sha256"):
        return []
    numbers = set(range(len(rows))) if own else held_out(len(rows), options.get("val_set_size"), options["seed"])
    fitting = (row for number, row in enumerate(rows) if number in numbers and _fits(row))
    return [Example(row.question.text, row.question.input, row.answers[0]) for row in islice(fitting, MOST)]


def _fits(row: Conversation) -> bool:
    """Return whether a row is one short question and its answer."""
    if len(row.users) != 1 or len(row.answers) != 1 or row.system or not row.is_plain:
        return False
    return len(row.question.text) + len(row.question.input) <= LONGEST
