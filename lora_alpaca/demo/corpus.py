"""Plain prose about the micro world, for pretraining.

A document is what a person might have written down: notes, a page about one thing, a conversation, a quiz card, a few
encyclopedia entries. There is no instruction format anywhere, so a model that read this knows the facts and has never
seen the prompt it will be finetuned on.
"""

import random
from collections import defaultdict
from collections.abc import Iterator
from functools import cache

from lora_alpaca.demo import world
from lora_alpaca.demo.world import Fact, Portrait

NAMES = ["Mia", "Tom", "Ana", "Ben", "Lena", "Omar", "Ruth", "Sam"]
NAMES += ["Ivy", "Noah", "Zoe", "Max", "Nina", "Leo", "Ada", "Hugo"]

# How one speaker asks and another one answers.
EXCHANGES = [
    '"{question}" asked {asker}. "{answer}" said {answerer}.',
    '{asker} asked, "{question}" and {answerer} said, "{answer}"',
    "{asker}: {question}\n{answerer}: {answer}",
    "{question} {answer}",
    "{asker} wanted to know: {question} The answer is this. {answer}",
]


def documents(seed: int) -> Iterator[str]:
    """Yield documents without end."""
    rng = random.Random(seed)
    kinds = {notes: 26, theme: 8, page: 12, conversation: 26, quiz_card: 10, entries: 18}  # percent
    while True:
        write = rng.choices(list(kinds), list(kinds.values()))[0]
        yield write(rng)


def notes(rng: random.Random) -> str:
    """Sentences about anything."""
    return _join(rng, [_statement(rng, _fact(rng)) for _ in range(rng.randint(1, 8))])


def theme(rng: random.Random) -> str:
    """Sentences that all say the same kind of thing."""
    facts = _by_relation()[_fact(rng).relation]
    return _join(rng, [_statement(rng, rng.choice(facts)) for _ in range(rng.randint(2, 7))])


def page(rng: random.Random) -> str:
    """Sentences about one subject, perhaps below a heading."""
    label, facts = rng.choice(list(_by_label().items()))
    name = label.partition(": ")[2]
    heading = rng.choice(["", f"{name}\n", f"{name}:\n", f"### {name}\n", f"{label}\n"])
    chosen = rng.sample(facts, min(len(facts), rng.randint(1, 5)))
    return heading + _join(rng, [_statement(rng, fact) for fact in chosen])


def conversation(rng: random.Random) -> str:
    """Two people who ask and answer."""
    asker, answerer = rng.sample(NAMES, 2)
    exchange = rng.choice(EXCHANGES)
    turns = []
    for _ in range(rng.randint(1, 5)):
        if rng.random() < 0.12:
            portrait = rng.choice(world.portraits())
            question, answer = rng.choice(portrait.requests), _paragraph(rng, portrait)
        else:
            fact = _fact(rng)
            question, answer = rng.choice(fact.questions), fact.answer
        turns.append(exchange.format(question=question, answer=answer, asker=asker, answerer=answerer))
    return "\n".join(turns) if "\n" in exchange else _join(rng, turns)


def quiz_card(rng: random.Random) -> str:
    """One subject named at the top, and questions about it that do not repeat its name."""
    label, facts = rng.choice(list(_by_label().items()))
    chosen = rng.sample(facts, min(len(facts), rng.randint(1, 4)))
    return "\n".join([label] + [f"{rng.choice(fact.orders)} {fact.answer}" for fact in chosen])


def entries(rng: random.Random) -> str:
    """One to three paragraphs about countries and animals, like a small encyclopedia."""
    paragraphs = []
    for portrait in rng.sample(world.portraits(), rng.randint(1, 3)):
        name = portrait.heading
        heading = rng.choice(["", f"### {name}\n", f"### {name}:\n", f"{name}\n\n"])
        paragraphs.append(heading + _paragraph(rng, portrait))
    return "\n\n".join(paragraphs)


def _paragraph(rng: random.Random, portrait: Portrait) -> str:
    """Return the paragraph, or now and then a freer version of it."""
    if rng.random() < 0.7:
        return portrait.text
    first, *others = portrait.sentences
    others.append(rng.choice(portrait.asides))
    rng.shuffle(others)
    return " ".join([first, *others])


def _statement(rng: random.Random, fact: Fact) -> str:
    # The answer's own sentence comes twice, to be the most familiar of all.
    return rng.choice([*fact.statements, fact.answer, fact.answer])


def _join(rng: random.Random, sentences: list[str]) -> str:
    return rng.choice([" ", " ", "\n"]).join(sentences)


def _fact(rng: random.Random) -> Fact:
    """Draw a fact; those of small relations come a little more often, since a relation is learned from its facts."""
    facts, cumulative_weights = _weighted_facts()
    return rng.choices(facts, cum_weights=cumulative_weights)[0]


@cache
def _weighted_facts() -> tuple[list[Fact], list[float]]:
    weights, total = [], 0.0
    for fact in world.facts():
        total += 1.0 if len(_by_relation()[fact.relation]) > 40 else 1.6
        weights.append(total)
    return world.facts(), weights


@cache
def _by_relation() -> dict[str, list[Fact]]:
    groups = defaultdict(list)
    for fact in world.facts():
        groups[fact.relation].append(fact)
    return dict(groups)


@cache
def _by_label() -> dict[str, list[Fact]]:
    groups = defaultdict(list)
    for fact in world.facts():
        groups[fact.label].append(fact)
    return dict(groups)
