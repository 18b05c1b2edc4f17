"""The special tokens of a base: as its tokenizer names them, held against what its other files say of them.

A name that is empty, unknown to the model, or at odds with the rest is replaced where another file says plainly what is
meant: the SentencePiece model first, which the base was trained with, then `config.json`. Otherwise it is refused: a
model that is taught `<unk>` as its end token never stops.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_alpaca.errors import ModelError
from lora_alpaca.storage.json_files import read_json

CONFIG, MAP, SENTENCEPIECE = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"
MODEL_FILES = ("config.json", "generation_config.json")
ROLES = {"eos": "end", "bos": "begin", "unk": "unknown", "pad": "padding"}
STAND_IN = "<|stand-in|>"  # for an empty unknown token, in which transformers would look for ever
PROBE = "Hello world, 12 alpacas."
UNKNOWN_TEXT = "\ufdd0\U000e0fff"  # which no vocabulary has
_MEANS = {  # what a token is for, by its text alone
    "unk": re.compile(r"\W*unk(nown)?\W*", re.IGNORECASE),
    "pad": re.compile(r"\W*(\w+_)?pad(ding)?(_\w+)?\W*", re.IGNORECASE),
    "bos": re.compile(r"<s>|\W*(bos|sos|im_start|(begin|start)[\W_]*of[\W_]*\w+)\W*", re.IGNORECASE),
}


@dataclass(frozen=True)
class Facts:
    """What the files of a base say of its special tokens, by role: `eos`, `bos`, `unk`, `pad`.

    `declared` has their texts by file, `sentencepiece` the pieces with their ids, and `config` the ids by file.
    """

    vocabulary: int  # the number of tokens that the model has
    declared: dict[str, dict[str, str]] = field(default_factory=dict)
    sentencepiece: dict[str, tuple[str, int]] = field(default_factory=dict)
    config: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    @property
    def empty(self) -> set[str]:
        """Return the roles that a file gives an empty text."""
        return {role for texts in self.declared.values() for role, text in texts.items() if not text}

    def stand_ins(self) -> dict[str, str]:
        """Return what transformers is told instead of an empty unknown token, to load a tokenizer at all."""
        return {"unk_token": STAND_IN} if "unk" in self.empty else {}


def read_facts(vocabulary: int, files: dict[str, Path]) -> Facts:
    """Return what the files of a base, those that are there, by name, say of its special tokens."""
    declared = {name: _declared(read_json(files[name])) for name in (CONFIG, MAP) if name in files}
    config = {name: _ids(read_json(files[name])) for name in MODEL_FILES if name in files}
    pieces = _pieces(files[SENTENCEPIECE]) if SENTENCEPIECE in files else {}
    return Facts(vocabulary, declared, pieces, config)


def _declared(content: dict[str, Any]) -> dict[str, str]:
    """Return role -> text of the special tokens that a tokenizer's file names."""
    found = {}
    for role in ROLES:
        token = content.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[role] = token
    return found


def _ids(content: dict[str, Any]) -> dict[str, list[int]]:
    """Return role -> ids of the special tokens that a model's file names."""
    inner = content.get("text_config")
    content = (inner if isinstance(inner, dict) else {}) | content
    found = {}
    for role in ROLES:
        value = content.get(f"{role}_token_id")
        listed = value if isinstance(value, list) else [value]
        if ids := [number for number in listed if isinstance(number, int) and number >= 0]:
            found[role] = ids
    return found


def _pieces(path: Path) -> dict[str, tuple[str, int]]:
    """Return role -> piece and id of a SentencePiece model; nothing for a file of another kind."""
    if (model := _sentencepiece(path)) is None:
        return {}
    ids = {"eos": model.eos_id(), "bos": model.bos_id(), "unk": model.unk_id(), "pad": model.pad_id()}
    return {role: (model.IdToPiece(number), number) for role, number in ids.items() if number >= 0}


def reads_as(tokenizer: Any, path: Path) -> bool:
    """Return whether a tokenizer that was made of a SentencePiece model reads a plain text as that does."""
    model = _sentencepiece(path)
    return model is None or tokenizer.tokenize(PROBE) == model.EncodeAsPieces(PROBE)


def vocabulary(path: Path) -> list[tuple[str, float, int]] | None:
    """Return text, score and kind of each piece of a SentencePiece model, None where there is none.

    Kinds are numbered as SentencePiece does: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
    """
    model = _sentencepiece(path) if path.is_file() else None
    if model is None:
        return None
    kinds = ((model.IsUnknown, 2), (model.IsControl, 3), (model.IsUnused, 5), (model.IsByte, 6))
    return [
        (model.IdToPiece(number), model.GetScore(number), next((kind for of, kind in kinds if of(number)), 1))
        for number in range(model.vocab_size())
    ]


def _sentencepiece(path: Path) -> Any:
    """Return the SentencePiece model of a file, None for a file of another kind."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    try:
        model.LoadFromSerializedProto(path.read_bytes())
    except (OSError, RuntimeError):  # tiktoken's vocabularies have the same name
        return None
    return model


class Special:
    """The special tokens of a loaded tokenizer, against the facts of its base."""

    def __init__(self, tokenizer: Any, facts: Facts):
        self._tokenizer, self._facts = tokenizer, facts
        self._vocabulary: dict[str, int] = tokenizer.get_vocab()

    def replacements(self, where: str) -> tuple[dict[str, str | None], list[str]]:
        """Return `eos_token` -> text, and so on, for the tokens that are to be replaced, and a note on them.

        Raises ModelError, naming the token, where a token is needed and nothing says plainly which one is meant.
        """
        changes: dict[str, str | None] = {}
        said = []
        for role, name in ROLES.items():
            token = getattr(self._tokenizer, f"{role}_token")
            if not (fault := self._fault(role, token)):
                continue
            found = next(self._candidates(role), None)
            if found is None and token is None:
                continue  # a base without an end token: who needs one says so
            if found is None and self._is_needed(role):
                raise ModelError(
                    f"{where}: the tokenizer's {name} token {token!r} {fault}, and neither {SENTENCEPIECE} nor "
                    f"config.json says plainly which one it is; name it as {role}_token in {CONFIG}"
                )
            changes[f"{role}_token"], source = found or (None, "")
            what = f"the {name} token {'' if token is None else repr(token) + ' '}{fault}"
            said.append(what + (f", {found[0]} of {source} is taken" if found else ", none is used"))
        return changes, [f"tokenizer: {'; '.join(said)}"] if said else []

    def _fault(self, role: str, token: str | None) -> str:
        """Return what is wrong with a token in a role, as a predicate, or nothing."""
        if token is None:
            return "is missing" if role == "eos" else ""
        if not token or token == STAND_IN:
            return "is empty"
        number = self._id(token)
        if number is None:  # padding never reaches the model
            return "" if role == "pad" else "is not in the model's vocabulary"
        if role == "eos" and len(texts := self._contradicting()) > 1:
            return f"is another one in {' and in '.join(texts)}"
        if role in ("eos", "bos") and (wrong := self._other_role(role, token, number)):
            return f"is the {ROLES[wrong]} token"
        return ""

    def _contradicting(self) -> dict[str, str]:
        """Return file -> end token where the tokenizer's files name different ones."""
        named = {name: texts["eos"] for name, texts in self._facts.declared.items() if texts.get("eos")}
        return named if len(set(named.values())) > 1 else {}

    def _other_role(self, role: str, token: str, number: int) -> str:
        """Return the role that a token really has where it cannot end or begin a text, or nothing.

        An end token may also be the padding, the begin or the unknown token, as GPT-2's is, unless the base has others
        for these roles.
        """
        pieces, config = self._facts.sentencepiece, self._facts.config.get(MODEL_FILES[0], {})
        for other in ("unk", "pad", "bos") if role == "eos" else ("unk", "pad"):
            own, piece = pieces.get(role, ("", None))[1], pieces.get(other, ("", None))[1]
            if _MEANS[other].fullmatch(token) or (number == piece and own not in (None, number)):
                return other
        if role == "eos" and number in config.get("pad", []) and number not in self._ends():
            return "pad"
        is_unknown = role == "eos" and number in self._tokenizer(UNKNOWN_TEXT, add_special_tokens=False)["input_ids"]
        return "unk" if is_unknown else ""

    def _ends(self) -> list[int]:
        """Return the ids that end a text by the model's files; where these say nothing, any id may."""
        named = [number for ids in self._facts.config.values() for number in ids.get("eos", [])]
        return named or list(range(self._facts.vocabulary))

    def _candidates(self, role: str) -> Iterator[tuple[str, str]]:
        """Yield tokens, with the file that names them, that a token in a role can be replaced by."""
        contradicting = self._contradicting() if role == "eos" else {}
        found = [(piece, SENTENCEPIECE) for piece, number in self._piece(role) if self._id(piece) == number]
        single = {name: ids[role][0] for name, ids in self._facts.config.items() if len(ids.get(role, [])) == 1}
        of_config = [
            (str(self._tokenizer.convert_ids_to_tokens(number)), name)
            for name, number in single.items()
            if number < min(self._facts.vocabulary, len(self._tokenizer))
        ]
        if contradicting:  # one of the two it must be; which, the model says that was made last
            found = [(token, name) for token, name in of_config + found if token in contradicting.values()]
        else:
            found += of_config
        if role == "unk" and (own := self._backend_unknown()):
            found.append((own, "tokenizer.json"))
        for token, name in found:
            number = self._id(token)
            if number is None or (role in ("eos", "bos") and self._other_role(role, token, number)):
                continue
            yield token, name

    def _piece(self, role: str) -> list[tuple[str, int]]:
        return [self._facts.sentencepiece[role]] if role in self._facts.sentencepiece else []

    def _backend_unknown(self) -> str | None:
        """Return what the tokenizer itself reads unknown text as."""
        model = getattr(getattr(self._tokenizer, "backend_tokenizer", None), "model", None)
        return getattr(model, "unk_token", None)

    def _id(self, token: str) -> int | None:
        """Return the id of a token, None where the tokenizer or the model does not know it."""
        number = self._vocabulary.get(token)
        return number if number is not None and number < self._facts.vocabulary else None

    def _is_needed(self, role: str) -> bool:
        """Return whether rows cannot be made without a token: the end, and a beginning that is put before them."""
        return role == "eos" or (role == "bos" and bool(self._tokenizer("")["input_ids"]))


def surplus(tokenizer: Any, vocabulary: int) -> dict[str, int]:
    """Return the tokens of a tokenizer that a model of so many has no weights for, with their ids."""
    most = max(len(tokenizer), 1 + max(tokenizer.added_tokens_decoder, default=-1))
    if most <= vocabulary:
        return {}
    beyond = ((number, token) for token, number in tokenizer.get_vocab().items() if number >= vocabulary)
    return {token: number for number, token in sorted(beyond)}
