"""What --help prints."""

import textwrap
from typing import Any, get_args

from lora_alpaca.config.option_file import FLAG
from lora_alpaca.config.options import Options

FILE_HELP = (
    "Take options from a .yaml or .json file, under these same names; for finetune it may be the lora_alpaca.json of a "
    "run. What is said on the command line wins. [default: none]"
)


def help_text(config_class: type[Options]) -> str:
    """Return the options of a command in their groups: flag, type, meaning, unit and default."""
    groups: dict[str, list[str]] = {}
    for name, field in config_class.model_fields.items():
        extra: Any = field.json_schema_extra
        words = config_class.wording.get(name, {})
        default = words.get("auto", extra["auto"]) or _shown(field.default)
        facts = "; ".join(part for part in (extra["unit"] and f"in {extra['unit']}", f"default: {default}") if part)
        meaning = f"{words.get('help', field.description)} [{facts}]"
        groups.setdefault(extra["group"], []).append(_entry(name, type_name(config_class, name), meaning))
    if config_class.takes_file():
        groups["options in a file"] = [_entry(FLAG, "FILE", FILE_HELP)]
    title = (config_class.__doc__ or "").splitlines()[0]
    return "\n\n".join([title, *(f"{group}\n" + "\n".join(lines) for group, lines in groups.items())])


def _entry(name: str, kind: str, meaning: str) -> str:
    text = textwrap.fill(meaning, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  --{name} {kind}\n{text}"


def overview(commands: dict[str, type[Options]]) -> str:
    """Return the commands, each with the first line on its config."""
    rows = [f"  {verb:17}{(config.__doc__ or '').splitlines()[0]}" for verb, config in commands.items()]
    return "\n".join(["lora-alpaca COMMAND --flag value ...", "", *rows, "", "COMMAND --help lists its options."])


def type_name(config_class: type[Options], name: str) -> str:
    """Return how a value of this option is written: TEXT, WHOLE, NUMBER, true|false, a choice, or NAMES."""
    annotation = config_class.model_fields[name].annotation
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    if list[str] in (annotation, *map(_core, kinds)):
        return "NAMES"
    if all(isinstance(kind, str) for kind in kinds):  # a Literal
        return "|".join(str(kind) for kind in kinds if kind)
    return {bool: "true|false", int: "WHOLE", float: "NUMBER", str: "TEXT"}.get(_core(kinds[0]), "TEXT")


def _core(kind: Any) -> Any:
    """Return the plain type inside `Annotated[type, ...]`."""
    return get_args(kind)[0] if hasattr(kind, "__metadata__") else kind


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return "none" if value in ("", None) else str(value)
