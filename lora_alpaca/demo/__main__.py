"""The main job on the embedded data, for a person to watch: python -m lora_alpaca.demo (or make demo).

Finetunes the demo base in 8-bit, merges, asks base and merged model the same held-out instructions, shows some of
their answers side by side, and ends with one line of figures. Everything is written below ./demo-run.
"""

import sys
import textwrap
import time
from pathlib import Path

from lora_alpaca import ExportConfig, FinetuneConfig, GenerateConfig, Generator, export_hf, finetune
from lora_alpaca.data import Rows, demo_file
from lora_alpaca.demo.picture import draw
from lora_alpaca.errors import LoraAlpacaError
from lora_alpaca.prompts import Conversation

FOLDER = Path("demo-run")
SHOWN = [Conversation.of("Tell me about alpacas."), Conversation.of("What is a volcano?")]  # no training rows either
BATCH = 50
LONGEST_ANSWER = 128  # tokens


def main(*, picture: Path | None = None) -> None:
    """Run the demo; with `picture`, also draw its before and after as an SVG file."""
    begun = time.perf_counter()
    held_out = list(Rows(str(demo_file("final"))))

    base = Generator.load(
        GenerateConfig(base_model="demo", lora_weights="none", temperature=0, max_new_tokens=LONGEST_ANSWER)
    )
    before = exact_match(base, held_out)
    print(f"before: {before:.2f} of {len(held_out)} held-out instructions are answered word for word\n", flush=True)

    run = finetune(FinetuneConfig(output_dir=str(FOLDER / "adapter"), overwrite=True))
    merged_dir = export_hf(
        ExportConfig(lora_weights=str(run.output_dir), output_dir=str(FOLDER / "merged"), overwrite=True)
    )
    merged = Generator.load(
        GenerateConfig(base_model=str(merged_dir), lora_weights="none", temperature=0, max_new_tokens=LONGEST_ANSWER)
    )
    after = exact_match(merged, held_out)

    asked = [*SHOWN, *held_out[:4]]
    answers = []
    for row in asked:
        old, new = (model.reply(row.question.text, row.question.input) for model in (base, merged))
        answers.append((row, old, new))
        print(side_by_side(row, old, new), flush=True)
    if picture:
        picture.write_text(draw(answers[:5], before, after, len(held_out)), encoding="utf-8")
    print(
        f"demo: exact match {before:.2f} -> {after:.2f} on {len(held_out)} held-out instructions; "
        f"validation loss {run.first_validation_loss:.2f} -> {run.validation_loss:.2f}; "
        f"{time.perf_counter() - begun:.0f} s"
    )


def exact_match(generator: Generator, rows: list[Conversation]) -> float:
    """Return the share of rows that are answered word for word as written, greedily, in batches of like length."""
    ordered = sorted(rows, key=lambda row: len(row.question.text) + len(row.question.input))
    hits = 0
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        replies = generator.batch([(row.question.text, row.question.input) for row in batch])
        hits += sum([reply] == row.answers for reply, row in zip(replies, batch, strict=True))
    return hits / len(rows)


def side_by_side(row: Conversation, old: str, new: str, width: int = 56) -> str:
    """Return an instruction and its two answers as columns of text."""
    columns = [textwrap.wrap(title + " " + text, width) for title, text in (("base:", old), ("merged:", new))]
    height = max(map(len, columns))
    lines = [
        f"  {left:{width}}  |  {right}"
        for left, right in zip(*(c + [""] * (height - len(c)) for c in columns), strict=True)
    ]
    asked = row.question
    return "\n".join([f"> {asked.text}" + (f" [{asked.input}]" if asked.input else ""), *lines, ""])


if __name__ == "__main__":
    try:
        main(picture=Path(sys.argv[2]) if sys.argv[1:2] == ["--picture"] else None)
    except LoraAlpacaError as error:
        sys.exit(f"error: {error}")
