"""The rows of an evaluation: those of a file, or those that the adapter's run held out, encoded as training does."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import checkpoint, privacy
from lora_alpaca.artifacts.source import ModelSource, is_finetuned
from lora_alpaca.config import EvaluateConfig
from lora_alpaca.data import Rows, held_out
from lora_alpaca.data.encoding import Choices, Encoder
from lora_alpaca.data.examples import Example
from lora_alpaca.data.questions import Question, Questions
from lora_alpaca.errors import ConfigError, DataError, LoraAlpacaError
from lora_alpaca.prompts import Conversation
from lora_alpaca.storage.output_folder import read_record


@dataclass(frozen=True)
class HeldOut:
    """The rows to answer, how training encodes them, where they are from, and notes."""

    questions: list[Question]
    choices: Choices
    origin: str
    notes: list[str]


def read(config: EvaluateConfig, source: ModelSource) -> HeldOut:
    """Return the rows of a config: those of --data_path, or else those that the run of the adapter held out.

    Raises ConfigError where there are neither, DataError where the rows are not those of training any more.
    """
    record = _record(source)
    options = record.get("options", {})
    known = {name.name: options[name.name] for name in fields(Choices) if name.name in options}
    choices = Choices(**known) if known else Choices(cutoff_len=source.base.max_length or 1 << 20)
    if not config.data_path:
        questions, origin, notes = _of_the_run(record, source)
    else:
        rows = Questions(config.data_path, config.columns, config.ignore_fields)
        questions, origin, notes = list(rows), f"{len(rows):,} rows of {config.data_path}", rows.notes
    bad = [question for question in questions if question.conversation is None]
    all_good = [question for question in questions if question.conversation is not None]
    good = all_good[: config.max_rows]
    if bad:
        notes = [*notes, f"warning: {len(bad):,} rows cannot be asked and are left out (first: {bad[0].reason})"]
    if not good:
        raise DataError(f"{origin}: no row has a question")
    if len(good) < len(all_good):
        origin = f"the first {len(good):,} of {origin}"
    if choices.train_on_inputs:
        notes = [*notes, "the run learned its prompts too, so the loss is that of prompts and answers"]
    return HeldOut(good, choices, origin, notes)


def encode(questions: Iterable[Question], encoder: Encoder) -> list[list[Example]]:
    """Return of every row what training makes of it, cut to its cutoff; nothing of one without an answer."""
    return [_fitted(question, encoder) for question in questions]


def _fitted(question: Question, encoder: Encoder) -> list[Example]:
    if question.answer is None or question.conversation is None:
        return []
    whole = replace(question.conversation, messages=(*question.conversation.messages, question.answer))
    cutoff, overlong = encoder.choices.cutoff_len, encoder.choices.overlong
    try:
        examples = encoder.encode([whole])
    except LoraAlpacaError:  # the template or the model cannot hold this row, which asking it tells
        return []
    fitting = [example for example in examples if len(example.ids) <= cutoff or overlong != "drop"]
    cut = [example.cut(cutoff) if len(example.ids) > cutoff else example for example in fitting]
    return [example for example in cut if example.num_labels()]


def _record(source: ModelSource) -> dict[str, Any]:
    """Return the record of the run that made an adapter, paths included if they are still known; or an empty one."""
    if source.adapter is None:
        folder = Path(source.base.path)
        return privacy.whole(folder, read_record(folder)) if is_finetuned(folder) else {}
    if source.info is not None and source.info.checkpoint:
        return dict(checkpoint.read_state(source.adapter)["record"])
    return privacy.whole(source.adapter, read_record(source.adapter))


def _of_the_run(record: dict[str, Any], source: ModelSource) -> tuple[list[Question], str, list[str]]:
    """Return the rows that a run held out, where they are from, and notes."""
    options = record.get("options")
    if not options:
        raise ConfigError("--data_path is missing: the model records no run, so name rows that it was not trained on")
    asked = (options["columns"], options["skip_bad_rows"], options["ignore_fields"])
    of_file, fact = ("val_data_path", "val_data_sha256") if options["val_data_path"] else ("data_path", "data_sha256")
    path = options[of_file]
    try:
        rows = Rows(path, *asked)
    except DataError as error:
        raise DataError(f"the rows of the run cannot be read ({error}); name rows with --data_path") from None
    if rows.digest != record.get(fact):
        raise DataError(
            f"{path}: not the rows of the run any more (their sha256 is another); name rows with --data_path"
        )
    numbers = set(range(len(rows)))
    if of_file == "data_path":
        numbers = held_out(len(rows), options["val_set_size"], options["seed"])
    if not numbers:
        raise ConfigError(
            f"--data_path is missing: the run of {source.adapter or source.base.name} held out no rows; name some"
        )
    chosen = [(number, row) for number, row in enumerate(rows, start=1) if number - 1 in numbers]
    origin = f"{len(chosen):,} rows of {path} that the run held out"
    return [_question(number, row) for number, row in chosen], origin, rows.notes


def _question(number: int, row: Conversation) -> Question:
    if row.is_document or row.prompt.messages[-1].is_blank:
        return Question(number, row.where, None, None, f"{row.where}: the row asks nothing")
    return Question(number, row.where, row.prompt, row.messages[-1])
