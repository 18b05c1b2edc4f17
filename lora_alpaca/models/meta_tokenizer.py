"""The tokenizer of Meta's original checkpoints as transformers reads it: SentencePiece's, or tiktoken's of Llama 3."""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers.convert_slow_tokenizer import TikTokenConverter, generate_merges

from lora_alpaca.errors import ModelError
from lora_alpaca.models.base import as_model_error

SENTENCEPIECE = b"\n"  # the first byte of its model, whose first field are the pieces
FIRST, LAST, ROUND = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
NAMED = ("<|start_header_id|>", "<|end_header_id|>")
SPECIAL_TOKENS = 256
PIECES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
SPACE = "▁"  # which SentencePiece puts for every space, and before every text


def special_tokens(scaled: bool) -> list[str]:
    """Return the special tokens of Llama 3, or those of Llama 3.1 and later, whose rope is scaled, in their order."""
    reserved = iter(f"<|reserved_special_token_{number}|>" for number in range(SPECIAL_TOKENS))
    found = [FIRST, LAST, next(reserved), next(reserved)]
    if scaled:
        found += ["<|finetune_right_pad_id|>", next(reserved), *NAMED, "<|eom_id|>", ROUND, "<|python_tag|>"]
    else:
        found += [next(reserved), next(reserved), *NAMED, next(reserved), ROUND]
    return [*found, *(next(reserved) for _ in range(SPECIAL_TOKENS - len(found)))]


class _Llama3Converter(TikTokenConverter):
    """Transformers' converter, which reads the file without the tiktoken library."""

    @staticmethod
    def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
        """Return token -> rank of a file with a token in base64 and its rank in each line."""
        lines = [line.split() for line in Path(tiktoken_url).read_bytes().splitlines() if line]
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}


@dataclass(frozen=True)
class MetaTokenizer:
    """A tokenizer of Meta's, read: `kind` is `sentencepiece` or `tiktoken`, `settings` its `tokenizer_config.json`.

    `stop_ids` are the ids of all tokens that may end an answer.
    """

    file: Path
    kind: str
    tokenizer: Any
    settings: dict[str, Any]
    stop_ids: list[int]

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into a folder."""
        with as_model_error("the tokenizer"):
            self.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))


def read(file: Path, context_length: int, scaled: bool) -> MetaTokenizer:
    """Return the tokenizer of a `tokenizer.model`; `scaled` tells Llama 3.1's special tokens from those of Llama 3.

    Raises ModelError for what neither SentencePiece nor tiktoken reads.
    """
    with open(file, "rb") as opened:
        pieces = opened.read(1) == SENTENCEPIECE
    with as_model_error(str(file)):
        tokenizer = _sentencepiece(file) if pieces else _tiktoken(file, scaled)
        ends = ["</s>"] if pieces else [LAST, *(["<|eom_id|>"] if scaled else []), ROUND]
        return MetaTokenizer(
            file,
            "sentencepiece" if pieces else "tiktoken",
            tokenizer,
            _settings(PIECES if pieces else {"bos_token": FIRST, "eos_token": LAST}, context_length),
            tokenizer.convert_tokens_to_ids(ends),
        )


def _settings(named: Mapping[str, str], context_length: int) -> dict[str, Any]:
    """Return the content of `tokenizer_config.json`.

    The class is the one of which every version of transformers reads `tokenizer.json` as it is; LLaMA's own makes of a
    space at the beginning of a text something else than Meta's tokenizer does.
    """
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": context_length,
    }


def _sentencepiece(file: Path) -> Any:
    """Return the tokenizer of a SentencePiece model.

    Transformers 5 merges by the order of the pieces, and not by their scores: of two spaces it makes one token, which
    LLaMA's tokenizer never does. Transformers 4 reads them as here.
    """
    pieces = SentencePieceProcessor(str(file))
    vocabulary = {pieces.id_to_piece(number): number for number in range(pieces.get_piece_size())}
    scores = {piece: pieces.get_score(number) for piece, number in vocabulary.items()}
    tokenizer = Tokenizer(
        BPE(vocabulary, generate_merges(vocabulary, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    special = [AddedToken(token, normalized=False, special=True) for token in PIECES.values()]
    tokenizer.add_special_tokens(special)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_first(tokenizer, PIECES, [])


def _tiktoken(file: Path, scaled: bool) -> Any:
    try:
        tokenizer = _Llama3Converter(str(file), extra_special_tokens=special_tokens(scaled)).converted()
    except (ValueError, binascii.Error):
        raise ModelError("it is no tokenizer of SentencePiece, and none of tiktoken; copy it again") from None
    return _with_first(tokenizer, {"bos_token": FIRST, "eos_token": LAST}, [processors.ByteLevel(trim_offsets=False)])


def _with_first(tokenizer: Tokenizer, named: Mapping[str, str], others: list[Any]) -> Any:
    """Return a tokenizer for transformers that begins a text with the begin token."""
    first = named["bos_token"]
    begin = processors.TemplateProcessing(
        single=f"{first}:0 $A:0",
        pair=f"{first}:0 $A:0 {first}:1 $B:1",
        special_tokens=[(first, tokenizer.token_to_id(first))],
    )
    tokenizer.post_processor = processors.Sequence([*others, begin])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
