"""Templates by name, from a file or as recorded; and the one that fits rows of a format."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lora_alpaca.errors import TemplateError
from lora_alpaca.prompts.chat import ChatTemplate
from lora_alpaca.prompts.template import Template
from lora_alpaca.storage import json_files
from lora_alpaca.storage.paths import user_path

AnyTemplate = Template | ChatTemplate


def template_folder() -> Path:
    """Return where the shipped templates lie: inside an installed package, or beside it in a clone."""
    inside = Path(__file__).parent.parent / "templates"
    return inside if inside.is_dir() else Path(__file__).parent.parent.parent / "templates"


def template_names() -> list[str]:
    """Return the names of the shipped templates, and `chat`, which is the tokenizer's own."""
    return sorted([*(path.stem for path in template_folder().glob("*.json")), "chat"])


def load_template(name: str) -> AnyTemplate:
    """Return a shipped template by its name, `chat`, or one's own by the path of its .json file.

    Names are looked up in the package, never in the working directory. Raises TemplateError.
    """
    if name == "chat":
        return ChatTemplate()
    if name.endswith(".json"):
        path = user_path(name)
    elif name in template_names():
        path = template_folder() / f"{name}.json"
    else:
        raise TemplateError(
            f"no template named {name!r}; there are {', '.join(template_names())}, or give a .json file"
        )
    try:
        fields = json_files.load(path)
    except OSError as error:
        raise TemplateError(f"{path}: {error.strerror or error}") from None
    except json.JSONDecodeError as error:
        raise TemplateError(f"{path}: not JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except ValueError as error:  # not UTF-8, a number of thousands of digits, nested too deeply
        raise TemplateError(f"{path}: not JSON ({error})") from None
    return template_from_json(fields, path.stem, str(path))


def template_from_json(fields: Any, name: str, where: str) -> AnyTemplate:
    """Return the template that a JSON object describes: a template of text, or a recorded chat template."""
    if not isinstance(fields, dict):
        raise TemplateError(f"{where}: a template is an object with the keys prompt_input, prompt_no_input, ...")
    if "chat_template" in fields:
        return ChatTemplate.from_json(fields, where)
    return Template.from_json(fields, name, where)


def fitting_template(formats: Iterable[str], tokenizer: Any) -> AnyTemplate:
    """Return the template for rows of these formats, where the user has named none; TemplateError if none fits all."""
    kinds = set(formats)
    if kinds == {"Alpaca"}:
        return load_template("alpaca")
    if kinds <= {"prompt/completion", "text"}:
        return load_template("plain")
    if kinds <= {"ShareGPT", "messages", "Alpaca"}:
        return load_template("chat" if tokenizer.chat_template else "vicuna")
    raise TemplateError(f"rows in {', '.join(sorted(kinds))} format: name a --prompt_template_name that fits them all")
