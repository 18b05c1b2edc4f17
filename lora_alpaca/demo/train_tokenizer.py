"""Train the demo's tokenizer: SentencePiece BPE with byte fallback, in the layout of a LLaMA tokenizer.

    python -m lora_alpaca.demo.train_tokenizer

It takes a few seconds, and raises ValueError if transformers and SentencePiece do not read the result alike.
"""

import argparse
import io
import json
from itertools import islice
from pathlib import Path

import sentencepiece
from transformers import AutoTokenizer

from lora_alpaca.demo import corpus

BASE_DIR = Path(__file__).parent / "base"

# The words of the prompt are to cost few tokens, though no document of the corpus contains them.
PROMPT_LINES = [
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
    "### Instruction:",
    "### Input:",
    "### Response:",
]

TOKENIZER_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": None,
    "legacy": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 1024,
}


def train_tokenizer(
    output_dir: Path = BASE_DIR, vocab_size: int = 2048, num_documents: int = 20_000, seed: int = 1
) -> None:
    """Write tokenizer.model, tokenizer.json and tokenizer_config.json into `output_dir`."""
    output_dir.mkdir(parents=True, exist_ok=True)
    texts = list(islice(corpus.documents(seed), num_documents))
    lines = [line for text in texts for line in text.splitlines() if line]
    model = io.BytesIO()  # rather than a file, whose path would be written into the model
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines + 500 * PROMPT_LINES),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (output_dir / "tokenizer.model").write_bytes(model.getvalue())
    config_file = output_dir / "tokenizer_config.json"
    config_file.write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n", encoding="utf-8")

    # tokenizer.json says the same in the format of the `tokenizers` library, and spares a conversion at every start.
    AutoTokenizer.from_pretrained(output_dir).backend_tokenizer.save(str(output_dir / "tokenizer.json"))
    check_ids(output_dir, texts[:500])


def check_ids(tokenizer_dir: Path, texts: list[str]) -> None:
    """Raise ValueError unless transformers and SentencePiece encode all texts alike."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_dir / "tokenizer.model"))
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    for text in texts:
        expected = [processor.bos_id(), *processor.encode(text)]
        if tokenizer(text)["input_ids"] != expected:
            raise ValueError(f"transformers and SentencePiece disagree on {text!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=BASE_DIR)
    parser.add_argument("--vocab_size", type=int, default=2048)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    train_tokenizer(args.output_dir, vocab_size=args.vocab_size, seed=args.seed)


if __name__ == "__main__":
    main()
