"""A file of options, `--config FILE`: YAML or JSON with the names of the flags, or the record of a run.

Every value is the text that stands in the file, as a word of a command line is: `1e-4`, `no`, `0123` and `2024-01-01`
stay what they are, whatever YAML 1.1 would make of them, and go through the same checks. A list is what a command line
writes with commas between.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_alpaca.config.options import Options
from lora_alpaca.config.recorded import BY_HAND, FOLDERS, options_of
from lora_alpaca.config.training import FinetuneConfig
from lora_alpaca.errors import ConfigError
from lora_alpaca.storage import json_files
from lora_alpaca.storage.output_folder import PRIVATE, RECORD
from lora_alpaca.storage.paths import user_path

FLAG = "config"
LARGEST = 2**20  # bytes of a YAML file, which takes a second
_YAML = "tag:yaml.org,2002:"
_PLAIN = {f"{_YAML}{kind}" for kind in ("str", "int", "float", "bool", "null", "seq", "map", "timestamp")}
_MARKS = ("path", "name_or_path", "ds_path")  # what a dataset is called by that other trainers describe in a mapping


@dataclass(frozen=True)
class OptionFile:
    """The options of a file: name -> text or list of texts, and the line that each stands in, where that is known."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def located(self, message: str, names: Collection[str]) -> str:
        """Return a message after the file and the lines of those of some options that it names as `--flag`."""
        found = [name for name in re.findall(r"--(\w+)", message) if name in names]
        lines = sorted({self.lines[name] for name in found if name in self.lines})
        where = ":".join(filter(None, [self.name, ",".join(map(str, lines))]))
        return f"{where}: {message}" if found else message


def read(name: str, config_class: type[Options]) -> OptionFile:
    """Return the options of the file that a user named. Raises ConfigError, naming file and line or key."""
    path = user_path(name)
    if path.is_dir():
        hint = f"; the record of its run is {path / RECORD}" if (path / RECORD).is_file() else "; name the file in it"
        raise ConfigError(f"--config {name}: a folder{hint}")
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise ConfigError(f"--config {name}: options are read from .yaml, .yml and .json files")
    is_json = path.suffix.lower() == ".json"
    try:
        text = json_files.read_plain_file(path, json_files.LARGEST if is_json else LARGEST).decode("utf-8-sig")
        found = json_files.load(path) if is_json else None
    except OSError as error:
        raise ConfigError(f"--config {name}: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name}:{error.lineno}: not JSON at column {error.colno}: {error.msg}") from None
    except ValueError as error:
        raise ConfigError(f"--config {name}: cannot be read ({error})") from None
    if not is_json:
        return _read_yaml(text, name, config_class)
    return (_of_record if _is_record(path, found) else _read_json)(text, name, config_class)


def _value(found: Any, key: str, where: str, config_class: type[Options]) -> Any:
    """Return a value of the file as a command line has it; `found` is made of texts, lists and dicts.

    What an option of another trainer holds is told in an error only, so the paths alone are taken from a mapping.
    """
    is_ours = key in config_class.model_fields
    if isinstance(found, dict):
        if is_ours:
            raise ConfigError(f"{where}: {key} has options below it; every option stands by itself, at the left")
        return next((str(found[mark]) for mark in _MARKS if mark in found), "{...}")
    if not isinstance(found, list):
        return found
    if is_ours and not all(isinstance(one, str) for one in found):
        raise ConfigError(f"{where}: {key} is a list of more than words")
    words = [_value(one, "", where, config_class) if isinstance(one, dict) else str(one) for one in found]
    return words if config_class.is_list(key) else ",".join(words)


def _name(key: Any, where: str) -> str:
    """Return the name of an option. Raises ConfigError for a key that is none."""
    if not isinstance(key, str):
        raise ConfigError(f"{where}: a key that is no name of an option")
    name = key.replace("-", "_")
    if name == FLAG:
        raise ConfigError(f"{where}: a file of options names no other one; {key} is said on the command line")
    return name


# -------------------------------------------------------------------------------------------------------------- YAML


def _read_yaml(text: str, name: str, config_class: type[Options]) -> OptionFile:
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.BaseLoader)  # nodes alone: nothing is made of them
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"{line}: not YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0] if isinstance(error, yaml.YAMLError) else "nested too deeply"
        raise ConfigError(f"--config {name}: not YAML: {reason}") from None
    file = OptionFile(name)
    if root is None or root.value == "":
        return file
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{name}:{root.start_mark.line + 1}: options are written as NAME: VALUE, one on a line")
    plain = _Plain(name)
    for key, node in root.value:
        where = f"{name}:{key.start_mark.line + 1}"
        option = _name(plain.value(key), where)
        if option in file.lines:
            raise ConfigError(f"{where}: {option} is given twice; line {file.lines[option]} has it too")
        file.lines[option] = key.start_mark.line + 1
        value = plain.value(node)
        if value == "" and node.style is None and config_class.is_switch(option):
            raise ConfigError(f"{where}: --{option} needs a value: {option}: true, or false")
        if not (isinstance(value, str) and node.style is None and value.lower() in ("", "~", "null")):
            file.values[option] = _value(value, option, where, config_class)
    return file


class _Plain:
    """YAML nodes to texts, lists and dicts, within what a file of options needs: each once, and of no type."""

    def __init__(self, name: str):
        self._name = name
        self._seen: set[int] = set()

    def value(self, node: Any) -> Any:
        """Return what a node holds. Raises ConfigError for an alias, which could hold itself, and for a tag."""
        where = f"{self._name}:{node.start_mark.line + 1}"
        if id(node) in self._seen:
            raise ConfigError(f"{where}: an alias (*name) is used; write the value itself")
        self._seen.add(id(node))
        if node.tag not in _PLAIN:
            raise ConfigError(f"{where}: the tag {node.tag.replace(_YAML, '!!')} is not read; write the value alone")
        if node.id == "scalar":
            return node.value
        if node.id == "sequence":
            return [self.value(item) for item in node.value]
        return {str(self.value(key)): self.value(item) for key, item in node.value}


# -------------------------------------------------------------------------------------------------------------- JSON


def _read_json(text: str, name: str, config_class: type[Options]) -> OptionFile:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ConfigError(f"{name}: {key} is given twice")
            found[key] = value
        return found

    found = json.loads(text, object_pairs_hook=once, parse_int=str, parse_float=str, parse_constant=str)
    if not isinstance(found, dict):
        raise ConfigError(f'{name}: options are one object, {{"NAME": VALUE, ...}}')
    values = {_name(key, name): _text(value) for key, value in found.items() if value is not None}
    return OptionFile(name, {key: _value(value, key, name, config_class) for key, value in values.items()})


def _text(value: Any) -> Any:
    """Return a value with true and false as a command line has them."""
    if isinstance(value, list):
        return [_text(one) for one in value]
    return str(value) if isinstance(value, bool) else value


# ------------------------------------------------------------------------------------------------------------ record


def _is_record(path: Path, found: Any) -> bool:
    return path.name == PRIVATE or (isinstance(found, dict) and {"options", "said", "status"} <= found.keys())


def _of_record(text: str, name: str, config_class: type[Options]) -> OptionFile:
    """Return the options of a run by its record, public or private; its output folder is not one of them."""
    if not issubclass(config_class, FinetuneConfig):
        raise ConfigError(f"--config {name}: the record of a run, whose options are those of finetune")
    folder = user_path(name).parent
    record = json_files.read_json(folder / RECORD) if user_path(name).name == PRIVATE else json.loads(text)
    if not isinstance(record.get("options"), dict) or not isinstance(record.get("said"), list):
        raise ConfigError(f"--config {name}: of {RECORD} and {PRIVATE}, the former is needed, and is not beside it")
    private = json_files.read_json(folder / PRIVATE)
    is_of_run = private.get("run") == record.get("run") and isinstance(private.get("options"), dict)
    whole = {**record, "options": record["options"] | (private["options"] if is_of_run else {})}
    return OptionFile(name, {key: value for key, value in options_of(whole).items() if key not in FOLDERS | BY_HAND})
