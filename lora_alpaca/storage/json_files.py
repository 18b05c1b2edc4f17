"""JSON from folders that anybody may have made: of plain files, within limits, and of the types that are expected."""

import json
import os
import re
import stat
from dataclasses import MISSING, fields
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from lora_alpaca.errors import LoraAlpacaError

LARGEST = 64 * 2**20  # bytes; half a million logged steps
MOST_VALUES = 4_000_000  # of which each takes up to 70 bytes in memory
DEEPEST = 100  # levels
_TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # possessive: it remembers no way back
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}

ABSENT: Any = None  # the default of a key that need not be there; where it is, it must be of its type
Count = Annotated[int, Field(ge=0, le=2**53)]


def read_plain_file(path: Path, most: int = LARGEST) -> bytes:
    """Return the bytes of a file. Raises OSError for what is no file, and ValueError for one of more than `most`."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:  # a pipe is opened without waiting for who writes to it
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(22, "is not a plain file", str(path))
        data = file.read(min(most, found.st_size) + 1)  # as much memory is taken as is asked for
    if len(data) > most:
        raise ValueError(f"larger than {most // 2**20} MB")
    return data


def load(path: Path) -> Any:
    """Return what a JSON file holds. Raises OSError for what is no file, and ValueError for what is no JSON of ours."""
    data = read_plain_file(path)
    bare = _TEXT.sub(b"", data)  # so that all that is left of brackets and commas are the real ones
    if sum(map(bare.count, (b",", b"[", b"{"))) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values")
    brackets = bare.translate(None, _NOT_BRACKETS)
    if max(accumulate(map(_STEPS.__getitem__, brackets)), default=0) > DEEPEST:
        raise ValueError(f"nested too deeply, more than {DEEPEST} levels")
    found = json.loads(data.decode("utf-8-sig"))
    if re.search(rb"\\u[dD][89a-fA-F]", data):  # half a character, which nothing could print
        json.dumps(found, ensure_ascii=False).encode()
    return found


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file, or an empty one where there is none."""
    try:
        found = load(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Shape(BaseModel):
    """The keys that an object in a JSON file must have, with their types; other keys may be there."""

    model_config = ConfigDict(strict=True, extra="ignore", defer_build=True, protected_namespaces=())

    @classmethod
    def require(cls, content: Any, where: object, error: type[LoraAlpacaError], remedy: str = "") -> None:
        """Raise an error in one line, naming the first key that is missing or of another type."""
        if wrong := cls.what_is_wrong(content):
            raise error(f"{where}: damaged, {wrong}" + (f"; {remedy}" if remedy else ""))

    @classmethod
    def what_is_wrong(cls, content: Any) -> str:
        """Return what is wrong with an object, naming the first key, or nothing."""
        try:
            cls.model_validate(content)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            key = ".".join(map(str, first["loc"])) or "it"
            if first["type"] == "missing":
                return f"{key} is missing"
            return f"{key} is {first['input']!r:.60} ({first['msg'].lower()})"
        return ""


def shape_of(kind: type, *without: str) -> type[Shape]:
    """Return the shape of an object that holds the fields of a dataclass, and no others."""
    types = get_type_hints(kind)
    required = {field.name: field.default is MISSING and field.default_factory is MISSING for field in fields(kind)}
    entries: dict[str, Any] = {
        name: (types[name], ... if needed else ABSENT) for name, needed in required.items() if name not in without
    }
    return create_model(kind.__name__, __base__=Shape, __cls_kwargs__={"extra": "forbid"}, **entries)


def shape_of_options(kind: type[BaseModel]) -> type[Shape]:
    """Return the shape of an object that holds options, each of its type and in its range, or some of them."""
    entries: dict[str, Any] = {
        name: (Annotated[field.annotation, name, *field.metadata], ABSENT) for name, field in kind.model_fields.items()
    }
    return create_model(kind.__name__, __base__=Shape, **entries)


def require_object(path: Path, error: type[LoraAlpacaError], remedy: str, flag: str = "") -> dict[str, Any]:
    """Return the object that a JSON file holds. Raises an error in one line, after a flag, for everything else."""
    where = f"{flag}: {path}" if flag else str(path)
    try:
        found = load(path)
    except (OSError, ValueError) as reason:
        what = getattr(reason, "strerror", None) or reason
        raise error(f"{where}: cannot be read ({what}); {remedy}") from None
    if not isinstance(found, dict):
        raise error(f"{where}: holds no object; {remedy}")
    return found
