"""The tokenizer of a base: loaded, its special tokens checked, and given a padding token."""

from pathlib import Path
from typing import Any

import transformers

from lora_alpaca.errors import ModelError
from lora_alpaca.models import special_tokens
from lora_alpaca.models.base import Base, as_model_error, base_file, config_file, require_own_code
from lora_alpaca.storage.json_files import read_json

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
BACKEND = "tokenizer.json"
FILES = (special_tokens.CONFIG, special_tokens.MAP, special_tokens.SENTENCEPIECE, BACKEND)
LLAMA = ("LLaMATokenizer", "LlamaTokenizer", "LlamaTokenizerFast")  # the first in LLaMA's first conversions
LLAMA_TYPES = ("llama", "mistral", "mixtral")  # models whose tokenizer is LLaMA's where no file says another


def load_tokenizer(base: Base, folder: Path | None = None, trained: bool = False) -> tuple[Any, list[str]]:
    """Return the tokenizer of a base, or the one saved in `folder`, and notes on what is amiss with it.

    Its special tokens are replaced where they are wrong and it is plain what is meant, unless a model was `trained`
    with them as they are. A padding token is set once, here: padding never reaches a label or an attention mask, so
    any token can serve; the unknown token is tried first. Code beside a tokenizer runs only if it is the base's own,
    and the base is trusted. Raises ModelError.
    """
    where = Path(folder or base.path)
    if where.is_dir():
        _require_vocabulary(base, where)
    files = _files(base, folder)
    facts = special_tokens.read_facts(base.vocabulary, files)
    tokenizer, notes = _load(base, folder, files, {} if trained else facts.stand_ins())
    _require_vocabulary(base, folder or config_file(base).parent)  # what the hub's cache may hold only half of
    if not trained:
        changes, said = special_tokens.Special(tokenizer, facts).replacements(str(where))
        notes += said
        if changes:
            tokenizer = _with(base, folder, files, {"eos_token": tokenizer.eos_token} | changes)
    if extra := special_tokens.surplus(tokenizer, facts.vocabulary):
        named = ", ".join(f"{token!r}, id {number}" for token, number in list(extra.items())[:3])
        more = f" and {len(extra) - 3} more" if len(extra) > 3 else ""
        notes.append(
            f"tokenizer: it has {len(extra)} token{'s' * (len(extra) > 1)} that the model lacks ({named}{more}), "
            "which no row may use"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token in extra:
        known = [token for token in (tokenizer.unk_token, tokenizer.eos_token) if token and token not in extra]
        tokenizer.pad_token = known[0] if known else tokenizer.convert_ids_to_tokens(0)
    return tokenizer, notes


def _files(base: Base, folder: Path | None) -> dict[str, Path]:
    """Return the files that say what the special tokens are, those that are there, by name."""
    of_base = special_tokens.MODEL_FILES if folder else (*special_tokens.MODEL_FILES, *FILES)
    found = {name: path for name in of_base if (path := base_file(base, name, optional=True))}
    return found | {name: folder / name for name in FILES if folder and (folder / name).is_file()}


def _with(base: Base, folder: Path | None, files: dict[str, Path], changes: dict[str, str | None]) -> Any:
    """Return the tokenizer with other special tokens; None is no token of that role."""
    given = {name: token for name, token in changes.items() if token}
    if "unk_token" in changes and "eos_token" in given:  # transformers needs one where a file has an empty one
        given.setdefault("unk_token", given["eos_token"])
    tokenizer, _ = _load(base, folder, files, given)
    for name in changes.keys() - given.keys():
        setattr(tokenizer, name, None)
    return tokenizer


def _load(base: Base, folder: Path | None, files: dict[str, Path], given: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return the tokenizer as transformers loads it, told some special tokens, and notes on what it was told more."""
    tokenizer, notes = _read(base, folder, files, given)
    if not isinstance(tokenizer.model_max_length, (int, float)):  # which transformers compares with every length
        longest = f"model_max_length is {tokenizer.model_max_length!r:.60}"
        raise ModelError(f"the tokenizer of {folder or base.path}: {longest}; copy or download the model again")
    return tokenizer, notes


def _read(base: Base, folder: Path | None, files: dict[str, Path], given: dict[str, Any]) -> tuple[Any, list[str]]:
    """Return the tokenizer of the class that reads it, and notes.

    A SentencePiece model without a `tokenizer.json` is read by LLaMA's class if it is a LLaMA's, however that class is
    spelt, or if the class that transformers finds reads text otherwise than the model does: one that it does not know
    is read without the space before a text. A LLaMA's begins a text with its begin token unless its file says
    otherwise, which was the default when such files were written.
    """
    where = str(folder or base.path)
    settings = read_json(files[special_tokens.CONFIG]) if special_tokens.CONFIG in files else {}
    name = settings.get("tokenizer_class") or (LLAMA[0] if base.config.model_type in LLAMA_TYPES else None)
    revision = None if folder else base.revision
    pieces = None if BACKEND in files else files.get(special_tokens.SENTENCEPIECE)
    trusted = base.trust_remote_code and folder is None
    notes = []
    if pieces and name in LLAMA and not (trusted and "auto_map" in settings):
        if "add_bos_token" not in settings:
            given = given | {"add_bos_token": True}
            notes.append("tokenizer: a text begins with the begin token, as LLaMA's do, since its file does not say")
        with as_model_error(f"the tokenizer of {where}"):
            return transformers.LlamaTokenizer.from_pretrained(where, revision=revision, **given), notes
    if trusted and special_tokens.CONFIG in files:
        require_own_code(files[special_tokens.CONFIG], base.path, f"the tokenizer of {where}")
    with as_model_error(f"the tokenizer of {where}"):
        found = transformers.AutoTokenizer.from_pretrained(where, revision=revision, trust_remote_code=trusted, **given)
        if pieces is None or "auto_map" in settings or special_tokens.reads_as(found, pieces):
            return found, notes
        other = transformers.LlamaTokenizer.from_pretrained(where, revision=revision, **given)
    if special_tokens.reads_as(other, pieces):
        return other, ["tokenizer: it is read as LLaMA's, whose way with text is that of its tokenizer.model"]
    return found, [
        "warning: the tokenizer reads text otherwise than its tokenizer.model; save it with a tokenizer.json"
    ]


def _require_vocabulary(base: Base, folder: Path) -> None:
    """Raise ModelError where a folder has no vocabulary: transformers would make do with control tokens."""
    if not base.trust_remote_code and not any(path for name in VOCABULARIES for path in folder.glob(name)):
        raise ModelError(
            f"the tokenizer of {folder}: tokenizer.json is missing, and so are tokenizer.model and vocab.json; "
            "copy or download the model again"
        )
