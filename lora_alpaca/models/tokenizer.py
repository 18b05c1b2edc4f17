"""The tokenizer of a base: loaded, given a padding token, and checked against the model's vocabulary."""

from pathlib import Path
from typing import Any

import transformers

from lora_alpaca.errors import ModelError
from lora_alpaca.models.base import Base, as_model_error, config_file

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")


def load_tokenizer(base: Base, folder: Path | None = None) -> Any:
    """Return the tokenizer of a base, or the one saved in `folder`, with a padding token that is set once, here.

    Padding never reaches a label or an attention mask, so any token can serve; the unknown token is tried first.
    """
    where = str(folder or base.path)
    if Path(where).is_dir():
        _require_vocabulary(base, Path(where))
    with as_model_error(f"the tokenizer of {where}"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            where, revision=None if folder else base.revision, trust_remote_code=base.trust_remote_code
        )
    _require_vocabulary(base, folder or config_file(base).parent)  # what the hub's cache may hold only half of
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if len(tokenizer) > (vocab := base.config.get_text_config().vocab_size):
        raise ModelError(f"{where}: the tokenizer has {len(tokenizer)} tokens, the model only {vocab}")
    return tokenizer


def _require_vocabulary(base: Base, folder: Path) -> None:
    """Raise ModelError where a folder has no vocabulary: transformers would make do with control tokens."""
    if not base.trust_remote_code and not any(path for name in VOCABULARIES for path in folder.glob(name)):
        raise ModelError(
            f"the tokenizer of {folder}: tokenizer.json is missing, and so are tokenizer.model and vocab.json; "
            "copy or download the model again"
        )
