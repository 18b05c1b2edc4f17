"""The vocabulary of a GGUF file: tokens with their scores and types, merges, special tokens and the chat template.

llama.cpp reads text with code of its own. A SentencePiece vocabulary it merges by score; a byte-level one by merges,
after it has split the text in a way that it knows by name.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

import gguf
from gguf import TokenType

from lora_alpaca.artifacts.prompt_contract import GOLDEN
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.errors import ModelError, TemplateError
from lora_alpaca.export.tensors import ModelFacts
from lora_alpaca.export.writers.gguf.pretokenizers import NAMES, PROBE
from lora_alpaca.models import special_tokens
from lora_alpaca.prompts import Template
from lora_alpaca.prompts.jinja import chat_template

_CONTROL = re.compile(r"<\|.*\|>|<｜.*｜>|<pad>|<mask>|<unused\d+>")  # noqa: RUF001  control tokens by their looks
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_ADDED = -1000.0  # the score of a token that no merge makes
_LLAMA3 = (  # how Llama 3 splits text; Qwen2 takes digits one by one
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS = {_LLAMA3: "llama-bpe", _LLAMA3.replace("{1,3}", ""): "qwen2"}


class Token(NamedTuple):
    """A token of a GGUF vocabulary."""

    text: str
    type: TokenType = TokenType.NORMAL
    score: float = 0.0


def add_vocabulary(writer: gguf.GGUFWriter, facts: ModelFacts, size: int) -> None:
    """Add a vocabulary of so many tokens, which is how many the model has weights for. Raises ModelError."""
    backend = _backend(facts.tokenizer)
    model = backend["model"]
    if model["type"] != "BPE":
        raise ModelError(
            f"--format gguf: llama.cpp would read text otherwise than this vocabulary does, which is of the kind "
            f"{model['type']}; use hf"
        )
    pieces = special_tokens.vocabulary(facts.companions / special_tokens.SENTENCEPIECE)
    if pieces is None and model.get("byte_fallback"):
        pieces = _scored(model)
    if pieces is not None:
        tokens = _with_added([Token(text, TokenType(kind), score) for text, score, kind in pieces], facts.tokenizer)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        if not is_spaced(facts.tokenizer):
            writer.add_add_space_prefix(False)
    else:
        tokens = _with_added([Token(text) for text in _by_id(facts.tokenizer)], facts.tokenizer)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pretokenizer(facts.tokenizer, backend))
    unused = [Token(f"[PAD{number}]", TokenType.UNUSED, -10000.0) for number in range(len(tokens), size)]
    tokens = [*tokens, *unused][:size]
    writer.add_token_list([token.text.encode("utf-8", "surrogateescape") for token in tokens])
    if pieces is not None:
        writer.add_token_scores([token.score for token in tokens])
    writer.add_token_types([token.type for token in tokens])
    _add_special(writer, facts, size, merges=pieces is None, spaced=is_spaced(facts.tokenizer))


def notes(facts: ModelFacts) -> Iterator[str]:
    """Yield a warning where llama.cpp reads prompts otherwise than training did.

    Where it puts a space before a text, it does so behind every control token, and some tokenizers do not.
    """
    encoder = Encoder.for_prompts(facts.tokenizer, facts.template)
    if not is_spaced(facts.tokenizer) or encoder.text.encode(["a"], "after_token") == encoder.text.encode(
        ["a"], "first"
    ):
        return
    for conversation in GOLDEN:
        with suppress(TemplateError):
            facts.template.check(conversation)
            fragments = facts.template.prompt(conversation)
            if any(one.control and not other.control for one, other in pairwise(fragments)):
                turns = len(conversation.users)
                yield (
                    f"warning: gguf: llama.cpp puts a space before a text behind a control token, and this tokenizer "
                    f"does not: it reads a prompt of {turns} turn{'s' * (turns > 1)} otherwise than training did"
                )
                return


def is_spaced(tokenizer: Any) -> bool:
    """Return whether a space is put before a text."""
    return str(tokenizer.tokenize("a")[0]).startswith("\u2581")


def _add_special(writer: gguf.GGUFWriter, facts: ModelFacts, size: int, merges: bool, spaced: bool) -> None:
    """Add merges, special ids, what begins and ends a text, the ids that end an answer, and the chat template.

    An answer ends with the tokenizer's end token (eos), the template's (eot), and one more (eom) if the model has one;
    llama.cpp knows others by their texts. `spaced` is whether it puts a space before every text by itself.
    """
    tokenizer = facts.tokenizer
    read = gguf.SpecialVocab(facts.companions, load_merges=merges, n_vocab=size)
    if merges and not read.merges:
        read.merges = [" ".join(pair) for pair in _backend(tokenizer)["model"]["merges"]]
    ids = {role: getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "unk")}
    others = [number for number in facts.stop_ids if number != ids["eos"]]
    ids |= dict(zip(("eot", "eom"), others, strict=False))
    read.special_token_ids |= {role: number for role, number in ids.items() if number is not None and number < size}
    text = tokenizer("a")["input_ids"]
    if isinstance(facts.template, Template) and spaced:  # which is where a template for transformers may write one
        read.chat_template = chat_template(facts.template, begins=ids["bos"] is not None and text[0] == ids["bos"])
    read.add_special_token["bos"] = ids["bos"] is not None and text[0] == ids["bos"]
    if ids["eos"] is not None and len(text) > 1 and text[-1] == ids["eos"]:
        read.add_special_token["eos"] = True
    read.add_to_gguf(writer, quiet=True)


def _with_added(tokens: list[Token], tokenizer: Any) -> list[Token]:
    """Return tokens with those that were added to them: control tokens, and words that are kept whole."""
    for number, added in sorted(tokenizer.added_tokens_decoder.items()):
        control = added.special or _CONTROL.fullmatch(added.content) is not None
        kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
        text = added.content if control else added.content.replace("\u2581", " ")
        tokens += [Token(f"[PAD{n}]", TokenType.UNUSED, -10000.0) for n in range(len(tokens), number + 1)]
        if tokens[number].text != text or tokens[number].type is TokenType.NORMAL:
            tokens[number] = Token(text, kind, _ADDED)
    return tokens


def _by_id(tokenizer: Any) -> Iterable[str]:
    """Return the texts of a vocabulary in the order of their ids; a number without one has a stand-in."""
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    return [texts.get(number, f"[PAD{number}]") for number in range(1 + max(texts))]


def _scored(model: dict[str, Any]) -> list[tuple[str, float, int]]:
    """Return the pieces of a BPE model in tokenizer.json with scores that merge them in the order of its merges."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(left + right, rank)
    pieces: list[tuple[str, float, int]] = [("", 0.0, TokenType.UNUSED)] * (1 + max(model["vocab"].values()))
    for text, number in model["vocab"].items():
        kind = TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL
        kind = TokenType.UNKNOWN if text == model.get("unk_token") else kind
        pieces[number] = (text, -float(ranks.get(text, 0)), kind)
    return pieces


def _pretokenizer(tokenizer: Any, backend: dict[str, Any]) -> str:
    """Return llama.cpp's name for how a byte-level tokenizer splits text: known by its ids, or by its expressions."""
    digest = hashlib.sha256(str(tokenizer.encode(PROBE)).encode()).hexdigest()
    if digest in NAMES:
        return NAMES[digest]
    steps = backend.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    plain = not steps[-1].get("add_prefix_space") and not backend["model"].get("dropout")
    whole = bool(backend["model"].get("ignore_merges"))
    if plain and kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not whole and not backend["normalizer"]:
        return "gpt-2"
    if plain and kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        name = _SPLITS.get(steps[0]["pattern"].get("Regex", ""), "")
        if name and whole == (name == "llama-bpe"):
            return name
    raise ModelError(
        f"--format gguf: llama.cpp has no name for how this tokenizer splits text (hash {digest[:12]}); a newer "
        "llama.cpp may have one: export with --format hf, and convert that with its convert_hf_to_gguf.py"
    )


def _backend(tokenizer: Any) -> dict[str, Any]:
    """Return what tokenizer.json says of a tokenizer. Raises ModelError for one that is written in Python alone."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("--format gguf: this tokenizer is made of code of its own, which llama.cpp has not; use hf")
    return dict(json.loads(backend.to_str()))
