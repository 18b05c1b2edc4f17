"""Flags of other trainers, answered by ours; `trainer_flags` has the table, which is read when a flag is unknown."""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from lora_alpaca.config.trainer_flags import ANY, FALSE, TABLE, TRUE, Answer, Each, Missing, Omit

SPREADS = {"fsdp", "deepspeed"}  # flags of trainers that train all weights unless told otherwise
SAYS_WHAT_IS_TRAINED = ("tune", "tuning", "lora", "peft", "adapter")  # parts of the names of flags
PER_DEVICE = ("per_device_train_batch_size", "per_gpu_train_batch_size", "per_device_batch_size")
ACCUMULATION = ("gradient_accumulation_steps", "accumulation_steps", "accimulation_steps", "gradient_accumulation")


class Translation(NamedTuple):
    """What flags of other trainers are here: a sentence on each, all of our words for them, and what nobody knows."""

    sentences: list[str]
    words: list[str]
    unknown: list[str]


def translate(given: Mapping[str, Any], ours: Collection[str], devices: int) -> Translation:
    """Return what those of the given flags that another trainer has, and `ours` does not, are in terms of ours.

    `given` are all flags with their values; an answer of the table that names a flag which is not among `ours` is none.
    """
    sentences, words, unknown = [], [], []
    foreign = {name: str(value) for name, value in given.items() if name not in ours}
    trains = "num_epochs" in ours
    if trains and (joined := _batch(given, foreign, devices)):
        sentences.append(joined[0])
        words += joined[1].split()
    if trains and foreign.get("finetuning_type") == "freeze":
        foreign.setdefault("freeze_trainable_layers", "2")  # which is the default where that value is known
    for name, value in foreign.items():
        answers = _answers(name, value)
        parts = [part for answer in answers if isinstance(answer, str) for part in answer.split()]
        ours_now = [part.format(value) for part in parts]
        if not answers or any(part.startswith("--") and part[2:] not in ours for part in parts):
            unknown.append(name)
        elif ours_now:
            sentences.append(f"--{name} {value} is {' '.join(ours_now)}")
            words += ours_now
        elif trains and isinstance(answers[0], Omit):
            sentences.append(f"--{name} {value}: leave it out ({answers[0].why})")
        elif trains and isinstance(answers[0], Missing):
            instead = answers[0].instead
            sentences.append(f"--{name} {value}: none yet" + (f" ({instead})" if instead else ""))
        else:
            unknown.append(name)
    if trains and foreign.keys() & SPREADS and not any(part in name for name in given for part in SAYS_WHAT_IS_TRAINED):
        sentences.append("where all weights are to be trained and no adapter, add --tune full")
        words += ["--tune", "full"]
    return Translation(sentences, words, unknown)


def _answers(name: str, value: str) -> list[Answer]:
    """Return what the table says of a flag and its value: one answer, or one to each word of it; or nothing."""
    answer = TABLE.get(name)
    if isinstance(answer, Each):
        found = [answer.get(_normal(word)) for word in value.replace(",", " ").split() or [""]]
        return [] if None in found else [one for one in found if one is not None]
    if isinstance(answer, Mapping):
        answer = answer.get(value.lower(), answer.get(_normal(value), answer.get(ANY)))
    elif callable(answer):
        answer = answer(value)
    return [] if answer is None else [answer]


def _normal(value: str) -> str:
    low = value.lower()
    return TRUE if low in ("1", "yes", "on") else FALSE if low in ("0", "no", "off") else low


def _batch(given: Mapping[str, Any], foreign: dict[str, str], devices: int) -> tuple[str, str] | None:
    """Return rows per device and accumulation steps as our two sizes, a sentence and the words, taken from `foreign`.

    Ours count the rows of a step over all devices, and those of a forward pass on one; accumulation follows.
    """
    rows = next((name for name in PER_DEVICE if name in foreign), None)
    steps = next((name for name in ACCUMULATION if name in foreign), None)
    if rows is None and steps is not None:  # rows per device under a name that is ours too
        own = "batch_size" if steps in ("accumulation_steps", "accimulation_steps") else "micro_batch_size"
        rows = own if own in given else None
    named = [f"--{name} {foreign.pop(name, given.get(name))}" for name in (rows, steps) if name is not None]
    if not named:
        return None
    if rows is None:
        return f"{named[0]}: leave it out (it is --batch_size by --micro_batch_size by devices)", ""
    numbers = [word.split()[-1] for word in named]
    if not all(number.isdecimal() for number in numbers):
        return f"{' '.join(named)}: --micro_batch_size is the rows of a forward pass, --batch_size those of a step", ""
    product = math.prod(map(int, numbers)) * devices
    words = f"--micro_batch_size {numbers[0]} --batch_size {product}"
    factors = " x ".join([*numbers, f"{devices} device{'s' * (devices > 1)}"])
    return f"{' '.join(named)} is {words} ({factors}: the rows of a step, over all devices)", words
