"""The files of a tokenizer as they go out with a model: the base's own, byte for byte, wherever nothing was changed.

A tokenizer that transformers 5 saves names a class that nothing else knows, and loses `tokenizer.model`, so that what
reads it otherwise gets other tokens, or none. Here the files of the base are taken if they are read as the tokenizer in
hand, then those of the adapter's folder, and what transformers writes only after these. Of a file that must change, the
keys that must are changed, and nothing else.
"""

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import chat_template
from lora_alpaca.data.tokenization import prepends, reads_alike, reads_same, tokenizer_json
from lora_alpaca.models.base import Base
from lora_alpaca.models.small_files import CHAT_TEMPLATES, TOKENIZER, files_of, small_files
from lora_alpaca.models.special_tokens import CONFIG, MAP
from lora_alpaca.models.tokenizer import BACKEND, load_tokenizer
from lora_alpaca.prompts import AnyTemplate
from lora_alpaca.storage import atomic

Files = dict[str, bytes]
PATTERNS = (*TOKENIZER, *CHAT_TEMPLATES)
JINJA = "chat_template.jinja"
_PATHS = ("name_or_path", "tokenizer_file", "special_tokens_map_file", "vocab_file")
_STRAY = ("backend", "is_local", "local_files_only")  # what transformers 5 notes for itself


def write(folder: Path, base: Base, tokenizer: Any, template: AnyTemplate, own: Path | None = None) -> list[str]:
    """Write the files of a tokenizer, and the chat template that renders a bound template, into a folder.

    `own` is the adapter's folder if a tokenizer was saved there. Returns a note where the chat template cannot make the
    prompt of training.
    """
    source, notes = chat_template.outgoing(tokenizer, template)
    texts = chat_template.texts(tokenizer, template, source)
    files, found = _chosen(folder, base, tokenizer, own, texts)
    for name, content in _with_chat_template(files, source, found).items():
        atomic.make_folder((folder / name).parent)
        atomic.write(folder / name, content)
    return notes


def _chosen(folder: Path, base: Base, tokenizer: Any, own: Path | None, texts: list[str]) -> tuple[Files, Any]:
    """Return the first files that are read as a tokenizer, and what they are read as; `folder` is for trying them.

    Files whose tokenizer is code of a trusted base are taken untried: it runs from the base alone.
    """
    for place in (None, own) if own else (None,):
        try:
            files = files_of(place, PATTERNS) if place else small_files(base, PATTERNS)
            needs_code = place is None and base.trust_remote_code and "auto_map" in _settings(files)
            files = _readable(_with_padding(files, base, tokenizer), base, tokenizer, texts)
            found = tokenizer if needs_code else _loaded(files, base, folder)
            if needs_code or reads_same(found, tokenizer):
                return files, found
        except Exception:  # what files make of a library can be any error, and here it would cost the end of a run
            continue
    with tempfile.TemporaryDirectory(dir=folder) as saved:
        tokenizer.save_pretrained(saved)
        return _readable(files_of(Path(saved), PATTERNS), base, tokenizer, texts), tokenizer


def _readable(files: Files, base: Base, tokenizer: Any, texts: list[str]) -> Files:
    """Return the files of a tokenizer as every reader takes them for what they are for this version of transformers.

    A `tokenizer.json` that is missing, or which transformers 5 does not read as it stands, is written as it is read.
    Code that was not trusted is not named, and neither is a path of the machine where the files were made.
    """
    files, settings = dict(files), _settings(files)
    left = [*_STRAY, *(() if base.trust_remote_code else ("auto_map",))]
    left += [key for key in _PATHS if os.path.isabs(str(settings.get(key)))]
    changed = {key: value for key, value in settings.items() if key not in left}
    name = str(settings.get("tokenizer_class") or type(tokenizer).__name__)
    changed.setdefault("tokenizer_class", name)
    if name.endswith("Backend"):
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
        tokens = tokenizer.added_tokens_decoder.items()
        changed.setdefault("added_tokens_decoder", {str(number): token.__getstate__() for number, token in tokens})
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):  # transformers 4 has this name for a dict
        del changed["extra_special_tokens"]
        changed.setdefault("additional_special_tokens", extra)
    if "auto_map" not in changed and not (BACKEND in files and reads_alike(tokenizer, files[BACKEND], texts)):
        files[BACKEND] = tokenizer_json(tokenizer)
        if "Llama" in name and (scheme := prepends(tokenizer)):
            changed["legacy"] = scheme == "always"
    begins = tokenizer.bos_token_id in tokenizer("")["input_ids"]
    if re.match("Llama|CodeLlama|Gemma", name) and not begins:  # as they do in transformers 4 unless they are told
        changed.setdefault("add_bos_token", False)
    if changed != settings:
        files[CONFIG] = atomic.as_json(changed)
    return files


def _with_padding(files: Files, base: Base, tokenizer: Any) -> Files:
    """Return the files of a tokenizer, whose padding token is another one if the model lacks it."""
    for name in (CONFIG, MAP):
        settings = _settings(files, name)
        token = settings.get("pad_token")
        number = tokenizer.get_vocab().get(token["content"] if isinstance(token, dict) else token)
        if number is not None and number >= base.vocabulary:
            files = files | {name: atomic.as_json(settings | {"pad_token": tokenizer.pad_token})}
    return files


def _with_chat_template(files: Files, source: chat_template.Source, found: Any) -> Files:
    """Return the files of a tokenizer with a chat template, each program's way; as they are if they have that one."""
    if found.chat_template == source:
        return files
    kept = {name: content for name, content in files.items() if not _is_chat_template(name)}
    by_name = {"default": source} if isinstance(source, str) else source
    for name, text in by_name.items():
        kept[JINJA if name == "default" else f"additional_chat_templates/{name}.jinja"] = text.encode()
    listed = [{"name": name, "template": text} for name, text in by_name.items()]
    key = source if isinstance(source, str) else listed
    return kept | {CONFIG: atomic.as_json(_settings(files) | {"chat_template": key})}


def _is_chat_template(name: str) -> bool:
    """Return whether a file says how to prompt; `tekken.json` does so to Mistral's library, which vLLM asks."""
    return name == "tekken.json" or any(Path(name).match(pattern) for pattern in CHAT_TEMPLATES)


def _loaded(files: Files, base: Base, folder: Path) -> Any:
    """Return the tokenizer that files are read as; they are put below a folder for that."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        for name, content in files.items():
            atomic.make_folder((Path(place) / name).parent)
            (Path(place) / name).write_bytes(content)
        return load_tokenizer(base, Path(place), trained=True)[0]


def _settings(files: Files, name: str = CONFIG) -> dict[str, Any]:
    try:
        found = json.loads(files.get(name, b"{}"))
    except ValueError:
        found = {}
    return found if isinstance(found, dict) else {}
