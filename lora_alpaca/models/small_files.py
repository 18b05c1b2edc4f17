"""The small files of a model, beside its weights: found by their names, in a folder or in the cache of the hub."""

from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from lora_alpaca.models.base import Base, base_file, config_file
from lora_alpaca.storage.json_files import read_plain_file

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "*.model", "*.tiktoken", "tekken.json", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
CHAT_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja")
CONFIGS = ("config.json", "generation_config.json")
LARGEST = 2**28  # bytes; the vocabulary of 262,144 tokens takes 33 MB


def small_files(base: Base, patterns: Iterable[str]) -> dict[str, bytes]:
    """Return those files of a base whose names match patterns, by name, downloaded where a pattern is a name."""
    patterns = tuple(patterns)
    for name in patterns:
        if not any(sign in name for sign in "*["):
            base_file(base, name, optional=True)  # which downloads it
    return files_of(config_file(base).parent, patterns)


def files_of(folder: Path, patterns: Iterable[str]) -> dict[str, bytes]:
    """Return the plain files of a folder whose names match patterns, by name.

    A link is followed inside the folder alone, and from a snapshot in the hub's cache to the content that it names.
    """
    patterns = tuple(patterns)
    top = [path for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in patterns)]
    deeper = [path for pattern in patterns if "/" in pattern for path in folder.glob(pattern)]
    found = {}
    for path in sorted({*top, *deeper}):
        if path.is_file() and _belongs(path, folder) and path.stat().st_size <= LARGEST:
            found[path.relative_to(folder).as_posix()] = read_plain_file(path, LARGEST)
    return found


def _belongs(path: Path, folder: Path) -> bool:
    """Return whether a path leads to a file of a folder, and to none elsewhere."""
    real, folder = path.resolve(), folder.resolve()
    in_cache = folder.parent.name == "snapshots" and real.parent == folder.parent.parent / "blobs"
    return in_cache or real.is_relative_to(folder)
