"""Rows: from a file or the hub to checked conversations, and from those to a training and a validation part.

Local files are read strictly with the standard library's decoder: texts arrive exactly as they stand in the file, and
a row that is not what it should be is named by file and row before anything is trained on it.
"""

import difflib
import hashlib
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lora_alpaca.config import DEMO
from lora_alpaca.errors import DataError
from lora_alpaca.prompts import Conversation

FIELDS = ("instruction", "input", "output")
MAX_VALIDATION_ROWS = 2000


def demo_file(name: str) -> Path:
    """Return the path of a part of the demo data: train, development, final or spare."""
    return Path(__file__).parent / "demo" / "instructions" / f"{name}.json"


def load_conversations(data_path: str) -> list[Conversation]:
    """Return every row of a .json or .jsonl file, of a hub dataset's train split, or of `demo`.

    Raises DataError naming the file and the row.
    """
    if data_path == DEMO:
        return load_conversations(str(demo_file("train")))
    path = Path(data_path).expanduser()
    if path.suffix.lower() in (".json", ".jsonl"):
        if not path.is_file():
            raise DataError(f"{data_path}: " + ("not a regular file" if path.exists() else "no such file"))
        rows: Iterable[tuple[int, Any]] = _read_local(path)
    elif path.exists() or path.is_absolute() or data_path.count("/") > 1 or path.suffix in (".csv", ".txt", ".parquet"):
        raise DataError(f"{data_path}: not a .json or .jsonl file" if path.exists() else f"{data_path}: no such file")
    else:
        rows = _read_hub(data_path)
    conversations = [_conversation(row, f"{path.name if path.suffix else data_path}:{n}") for n, row in rows]
    if not conversations:
        raise DataError(f"{data_path}: contains 0 rows")
    if not any(conversation.output for conversation in conversations):
        raise DataError(f"{data_path}: the output of every row is empty; there is nothing to learn")
    return conversations


def _read_local(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield (number from 1, value) of a JSON array or of JSON lines, told apart by the first character."""
    data = path.read_bytes()
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}: looks like UTF-16; convert it to UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}: not UTF-8 at line {line}, byte {error.start}") from None
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    if text.lstrip().startswith("["):
        yield from enumerate(_decode(text, str(path)), start=1)
        return
    for number, row in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a text
        if row.strip():
            yield number, _decode(row, f"{path}:{number}")


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        ends = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")
        around = " (the file ends too early: truncated?)" if ends else f", near {text[error.pos : error.pos + 40]!r}"
        raise DataError(
            f"{where}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}{around}"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: nested too deeply") from None
    except ValueError as error:  # from the two hooks below
        raise DataError(f"{where}: {error}") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(
            f"the key {twice!r} is given twice in one row (instruction: {str(row.get('instruction'))[:40]!r})"
        )
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _read_hub(dataset: str) -> Iterator[tuple[int, Any]]:
    """Yield the rows of the train split of a dataset on the hub, from its cache when that is complete."""
    import datasets

    try:
        rows = datasets.load_dataset(dataset, split="train")
    except Exception as error:  # the hub's many errors have no common base; the user needs the name and the reason
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"--data_path {dataset}: not a local file, and the hub gives none ({reason}); pass a .json file"
        ) from None
    yield from enumerate(rows, start=1)


def _conversation(row: Any, where: str) -> Conversation:
    """Return a row as a conversation; DataError if it is not an object of texts. `input` may be missing or null."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: a row is an object with {', '.join(FIELDS)}, not a {type(row).__name__}")
    texts = {}
    for field in FIELDS:
        value = row.get(field)
        if field == "input" and value is None:
            value = ""
        if field not in row and field != "input":
            near = difflib.get_close_matches(field, [str(key) for key in row], n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(f"{where}: no {field}; the row has {', '.join(map(repr, row)) or 'no keys'}{hint}")
        if not isinstance(value, str):
            raise DataError(f"{where}: {field} is {json.dumps(value)[:40]}, which is no text")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise DataError(f"{where}: {field} holds half of a surrogate pair, which no tokenizer can encode")
        texts[field] = value
    return Conversation(**texts, where=where)


def split(rows: Sequence[Any], val_set_size: float | None, seed: int) -> tuple[list[Any], list[Any]]:
    """Return (training rows, validation rows): the same for the same seed, on every rank and every machine.

    `val_set_size` is a number of rows, a share below 1, or None for 2000 but at most a tenth of the rows.
    """
    if val_set_size is None:
        held_out = min(MAX_VALIDATION_ROWS, len(rows) // 10)
    elif val_set_size < 1:
        held_out = math.ceil(val_set_size * len(rows))
    else:
        held_out = int(val_set_size)
    if held_out >= len(rows):
        raise DataError(
            f"--val_set_size {held_out}: there are only {len(rows)} rows, and none would be left to train on"
        )
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    validation = set(order[:held_out])
    return [row for n, row in enumerate(rows) if n not in validation], [rows[n] for n in sorted(validation)]


def digest(conversations: Sequence[Conversation]) -> str:
    """Return a sha256 of the texts of all rows in their order."""
    sha = hashlib.sha256()
    for row in conversations:
        sha.update(json.dumps([row.instruction, row.input, row.output]).encode())
    return sha.hexdigest()
