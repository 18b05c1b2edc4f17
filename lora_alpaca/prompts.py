"""One template for training and generation: an instruction becomes runs of text, and generation starts where they say.

    Conversation("Tell me about alpacas.", output="Alpacas hum.")
        -> [Run("Below is an instruction ... ### Response:\\n", learned=False), Run("Alpacas hum.", learned=True), END]

Generation is fed exactly the runs that come before the answer, so the two cannot drift apart.
"""

import difflib
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_alpaca.errors import TemplateError

KEYS = ("prompt_input", "prompt_no_input", "response_split")
_PLACEHOLDER = re.compile(r"\{(instruction|input)\}")
_BRACES = re.compile(r"\{[^{}\n]{0,40}\}")


@dataclass(frozen=True, slots=True)
class Conversation:
    """One instruction, the input it is about (may be empty), the answer to learn, and where the row stands."""

    instruction: str
    input: str = ""
    output: str = ""
    where: str = ""  # "alpaca.json:17", for messages


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of text that is learned or not. `text` None is the end of the answer, a token and never a text."""

    text: str | None
    learned: bool


@dataclass(frozen=True)
class Template:
    """A prompt format. Public attributes are the keys of its JSON file, which are those of alpaca-lora."""

    name: str
    prompt_input: str
    prompt_no_input: str
    response_split: str
    description: str = ""

    def prompt(self, instruction: str, input: str = "") -> str:
        """Return the text that generation starts from.

        The placeholders are filled in one pass, so that braces typed by a user, `{input}` among them, stay text.
        """
        form = self.prompt_input if input else self.prompt_no_input
        return _PLACEHOLDER.sub(lambda found: {"instruction": instruction, "input": input}[found[1]], form)

    def render(self, conversation: Conversation) -> list[Run]:
        """Return the runs of a training row: the prompt, the answer, its end."""
        prompt = self.prompt(conversation.instruction, conversation.input)
        return [Run(prompt, learned=False), Run(conversation.output, learned=True), Run(None, learned=True)]

    def response(self, text: str) -> str:
        """Return the answer in generated text, which holds new tokens only; nothing is searched for or split."""
        return text.strip()

    def to_json(self) -> dict[str, str]:
        """Return what `from_json` reads."""
        keys = ("name", "description", *KEYS)
        return {key: getattr(self, key) for key in keys}

    def digest(self) -> str:
        """Return a sha256 of everything that shapes a prompt; name and description do not."""
        return hashlib.sha256(json.dumps([getattr(self, key) for key in KEYS]).encode()).hexdigest()

    @classmethod
    def from_json(cls, fields: Any, name: str, where: str) -> "Template":
        """Return the template that a JSON object describes; TemplateError names the key that is amiss."""
        if not isinstance(fields, dict):
            raise TemplateError(f"{where}: a template is an object with the keys {', '.join(KEYS)}")
        for key in KEYS:
            if not isinstance(fields.get(key), str):
                raise TemplateError(f"{where}: the key {key} is missing or not a text")
        for key, allowed in (("prompt_input", {"instruction", "input"}), ("prompt_no_input", {"instruction"})):
            _check_placeholders(fields[key], key, allowed, where)
            if fields["response_split"] not in fields[key]:
                raise TemplateError(f"{where}: response_split {fields['response_split']!r} does not occur in {key}")
        texts = {key: fields[key] for key in KEYS}
        return cls(name=fields.get("name", name), description=str(fields.get("description", "")), **texts)


def _check_placeholders(form: str, key: str, allowed: set[str], where: str) -> None:
    """Refuse a prompt that lacks a placeholder, or has a misspelt one that would reach the model as text."""
    for needed in sorted(allowed):
        if "{" + needed + "}" not in form:
            raise TemplateError(f"{where}: {key} has no {{{needed}}}")
    for braces in _BRACES.findall(form):
        word = braces[1:-1]
        if word not in allowed and difflib.get_close_matches(re.split(r"\W", word)[0], ["instruction", "input"], n=1):
            raise TemplateError(f"{where}: {key} has {braces}; only {', '.join(sorted(allowed))} can stand in braces")


def template_folder() -> Path:
    """Return where the shipped templates lie: inside an installed package, or beside it in a clone."""
    inside = Path(__file__).parent / "templates"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "templates"


def template_names() -> list[str]:
    """Return the names of the shipped templates."""
    return sorted(path.stem for path in template_folder().glob("*.json"))


def load_template(name: str) -> Template:
    """Return a shipped template by its name, or one's own by the path of its .json file.

    Names are looked up in the package, never in the working directory. Raises TemplateError.
    """
    if name.endswith(".json"):
        path = Path(name).expanduser()
    elif name in template_names():
        path = template_folder() / f"{name}.json"
    else:
        raise TemplateError(
            f"no template named {name!r}; there are {', '.join(template_names())}, or give a .json file"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise TemplateError(f"{path}: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TemplateError(f"{path}: not JSON ({error})") from None
    return Template.from_json(fields, path.stem, str(path))
