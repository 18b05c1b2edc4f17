"""Write the demo's instruction data: facts of the micro world as questions and answers, in four splits.

    python -m lora_alpaca.demo.make_instructions

The splits are made by topic: all that is ever said about alpacas, or about the pair hot and cold, or about the numbers
3 and 4, is in one file only. What a model finetuned on `train.json` answers in another split, it did not learn there.
"""

import argparse
import json
import random
from collections import defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

from lora_alpaca.demo import world
from lora_alpaca.demo.world import Fact

INSTRUCTIONS_DIR = Path(__file__).parent / "instructions"

Row = dict[str, str]  # instruction, input, output

# The part of all topics that goes into each split, and the number of rows taken from them (None: all there are).
SPLITS = {
    "train": (0.59, None),  # to finetune on
    "development": (0.14, 250),  # to look at as often as you like
    "final": (0.17, 300),  # to look at once, at the very end
    "spare": (0.10, 200),  # for whatever comes later
}
RESERVED = {"alpaca": "spare"}  # the first question anyone will ask is to be about something not trained on

# Other ways to put a question, as (instruction, input).
WRAPPERS = [
    ("Answer the question: {}", ""),
    ("Please tell me. {}", ""),
    ("I have a question. {}", ""),
    ("{} Answer in one sentence.", ""),
    ("Answer the question.", "{}"),
    ("Reply to the question below.", "{}"),
]


def make_instructions(seed: int = 3) -> dict[str, list[Row]]:
    """Return the rows of each split."""
    rng = random.Random(seed)
    split_of = split_topics(rng)
    rounds: dict[str, list[list[Row]]] = {split: [[], []] for split in SPLITS}
    for fact in world.facts():
        for rows, row in zip(rounds[split_of[fact.topic]], two_rows(rng, fact), strict=True):
            rows.append(row)
    for portrait in world.portraits():
        for rows, request in zip(rounds[split_of[portrait.topic]], rng.sample(portrait.requests, 2), strict=True):
            rows.append({"instruction": request, "input": "", "output": portrait.text})

    splits = {}
    for split, (_, size) in SPLITS.items():
        first, second = rounds[split]
        rng.shuffle(first)
        rng.shuffle(second)
        splits[split] = (first + second)[:size]  # where there is a limit, every fact comes before any comes twice
        rng.shuffle(splits[split])
    return splits


def split_topics(rng: random.Random) -> dict[str, str]:
    """Return the split of each topic. Each relation is divided alike, so that every split asks for everything."""
    split_of = dict(RESERVED)
    topics_of = defaultdict(set)
    for fact in world.facts():
        topics_of[fact.relation].add(fact.topic)
    for topics in topics_of.values():
        undecided = sorted(topics - split_of.keys())
        rng.shuffle(undecided)
        total, start = 0.0, 0
        for split, (share, _) in SPLITS.items():
            total += share
            end = round(total * len(undecided))
            split_of |= dict.fromkeys(undecided[start:end], split)
            start = end
    return split_of


def two_rows(rng: random.Random, fact: Fact) -> list[Row]:
    """Ask for a fact in two different ways."""
    wordings: set[tuple[str, str]] = set()
    while len(wordings) < 2:
        wordings.add(word(rng, fact))
    return [
        {"instruction": instruction, "input": context, "output": fact.answer}
        for instruction, context in rng.sample(sorted(wordings), 2)
    ]


def word(rng: random.Random, fact: Fact) -> tuple[str, str]:
    """Return one way to ask for a fact, as (instruction, input)."""
    if rng.random() < 0.25:
        return rng.choice(fact.orders), fact.label
    question = rng.choice(fact.questions)
    if not question.endswith("?"):
        return (question if rng.random() < 0.75 else f"Please {question[0].lower()}{question[1:]}"), ""
    instruction, context = rng.choice(WRAPPERS) if rng.random() < 0.3 else ("{}", "")
    return instruction.format(question), context.format(question)


def leaks(splits: dict[str, list[Row]]) -> list[str]:
    """Name whatever two splits have in common, and whatever in a split is not a fact of the micro world.

    It looks at nothing but the rows, so it can be asked about the files as they are.
    """
    stated = {fact.answer: (fact.topic, f"{fact.relation} of {fact.subject}") for fact in world.facts()}
    stated |= {portrait.text: (portrait.topic, f"about {portrait.topic}") for portrait in world.portraits()}
    problems: list[str] = []
    contents: dict[str, dict[str, set[Any]]] = {}
    for split, rows in splits.items():
        known = [stated[row["output"]] for row in rows if row["output"] in stated]
        problems += [f"{split}: no fact: {row['output']!r}" for row in rows if row["output"] not in stated]
        contents[split] = {
            "topic": {topic for topic, _ in known},
            "fact": {fact for _, fact in known},
            "question": {(row["instruction"], row["input"]) for row in rows},
        }
    for (one, ours), (other, theirs) in combinations(contents.items(), 2):
        for kind in ours:
            problems += [f"{one} and {other}: {kind}: {shared!r}" for shared in sorted(ours[kind] & theirs[kind])]
    return problems


def read_splits(folder: Path = INSTRUCTIONS_DIR) -> dict[str, list[Row]]:
    return {split: json.loads((folder / f"{split}.json").read_text(encoding="utf-8")) for split in SPLITS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output_dir", type=Path, default=INSTRUCTIONS_DIR)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for split, rows in make_instructions(args.seed).items():
        text = json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
        (args.output_dir / f"{split}.json").write_text(text, encoding="utf-8")
        print(f"{split}: {len(rows)} rows, {sum(bool(row['input']) for row in rows)} with an input")
    if problems := leaks(read_splits(args.output_dir)):
        raise SystemExit("\n".join(["The splits leak:", *problems]))


if __name__ == "__main__":
    main()
