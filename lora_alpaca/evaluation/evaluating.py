"""An evaluation as a story: which rows and models, what the expected answers cost them, and what they answer."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import run_record
from lora_alpaca.artifacts.source import ModelSource
from lora_alpaca.config import EvaluateConfig
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.questions import Question
from lora_alpaca.errors import ConfigError, LoraAlpacaError, ModelError, visible
from lora_alpaca.evaluation import held_out, report, scores, table
from lora_alpaca.evaluation.held_out import HeldOut
from lora_alpaca.evaluation.losses import Loss, row_losses
from lora_alpaca.evaluation.scores import Answered
from lora_alpaca.inference import loading
from lora_alpaca.inference.answer import Answer
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.loading import Loaded
from lora_alpaca.inference.progress import counting_rows
from lora_alpaca.inference.sampling import BASE
from lora_alpaca.models import memory
from lora_alpaca.models.fingerprint import hash_base
from lora_alpaca.storage import atomic
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.storage.paths import files_below, user_path

SCORES_FILE = "scores.json"


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Answer rows with a base and the adapters on it, write scores, answers and a page, and return the scores.

    Raises ConfigError, DataError and FolderError for what can be found before the model is loaded.
    """
    if find_spec("rouge_score") is None:
        raise ConfigError('evaluate needs rouge_score: pip install "lora-alpaca[evaluate]"')
    # 1. Where, which models, which rows: all that fails cheaply fails here
    folder = OutputFolder(user_path(config.output_dir))
    folder.check(config.overwrite, "begin anew with --overwrite, or name another folder")
    generating = config.generating()
    sources = loading.open_sources(generating)
    source = next(iter(sources.values()))
    rows = held_out.read(config, source)
    _log(rows.notes)
    _log([f"answering {rows.origin}"])
    # 2. What the expected answers cost each model
    loaded = loading.load(generating)
    with _memory_errors_named():
        losses = _losses(loaded, rows)
    # 3. What each model answers
    with closing(Generator.of(loaded, generating)) as generator, _memory_errors_named():
        rouge = scores.rouge_l()
        answered = {name: _answers(generator, name, rows.questions, losses[name], rouge, config) for name in losses}
    # 4. Scores, answers and page
    result = _result(config, sources, rows, answered)
    with folder.staging() as stage:
        atomic.write(stage / SCORES_FILE, atomic.as_json(result))
        table.write(stage / table.FILE, rows.questions, answered)
        atomic.write(stage / report.FILE, report.page(result, rows.questions, answered).encode())
        record = {"kind": "evaluation", "status": "finished", "files": files_below(stage)}
        atomic.write(stage / "lora_alpaca.json", atomic.as_json(record))
        atomic.fsync_tree(stage)
        notes = folder.publish(stage, config.overwrite)
    _log(notes)
    print(visible(in_words(result)))
    print(f"page, answers and scores are in {visible(config.output_dir)}: {report.FILE}, {table.FILE}, {SCORES_FILE}")
    return result


def _losses(loaded: Loaded, rows: HeldOut) -> dict[str, list[Loss]]:
    """Return of every model, the base first, the losses of the rows."""
    found = {}
    for name in sorted(loaded.codecs, key=lambda name: name != BASE):
        codec = loaded.codecs[name]
        ends = rows.choices.add_eos_token and codec.tokenizer.eos_token_id is not None
        encoder = Encoder(codec.tokenizer, codec.template, replace(rows.choices, add_eos_token=ends))
        examples = held_out.encode(rows.questions, encoder)
        number = sum(map(len, examples))
        with loaded.adapters.using(name) as model, counting_rows(number, what=f"{name}: loss") as advance:
            found[name] = row_losses(model, examples, advance)
        if not all(math.isfinite(loss.nats) for loss in found[name]):
            raise ModelError(f"the loss of {name} is not finite; try --dtype fp32")
    return found


def _answers(
    generator: Generator,
    name: str,
    questions: Sequence[Question],
    losses: Sequence[Loss],
    rouge: Callable[[str, str], float],
    config: EvaluateConfig,
) -> list[Answered]:
    """Return what a model answers, with its scores."""
    found = []
    with counting_rows(len(questions), what=f"{name}: answers") as advance:
        for question, loss, answer in zip(questions, losses, _asked(generator, name, questions, config), strict=True):
            if isinstance(answer, str):
                found.append(Answered("", loss, error=answer))
            else:
                text = answer.read()
                stopped = answer.finish_reason == "stop"
                found.append(scores.scored(text, question.expected, loss, stopped, answer.completion_tokens, rouge))
            advance(found[-1].tokens or 0)
    return found


def _asked(
    generator: Generator, name: str, questions: Iterable[Question], config: EvaluateConfig
) -> Iterator[Answer | str]:
    """Yield the answer to each question, or why there is none, while the next ones are being made."""
    asked: deque[Answer | str] = deque()
    for question in questions:
        asked.append(_ask(generator, name, question, config))
        if len(asked) >= 2 * config.max_batch:
            yield asked.popleft()
    yield from asked


def _ask(generator: Generator, name: str, question: Question, config: EvaluateConfig) -> Answer | str:
    """Return the answer to a question as it is made; it may be as long as the context allows, at most."""
    assert question.conversation is not None
    conversation = question.conversation.with_system(config.system)
    try:
        longest = config.max_new_tokens
        if generator.max_length is not None:
            left = generator.max_length - len(generator.codecs[name].prompt_ids(conversation))
            longest = max(1, min(longest, left))
        changes: dict[str, Any] = {"seed": config.seed + question.number} if config.temperature else {}
        return generator.answer(conversation, name, max_new_tokens=longest, **changes)
    except LoraAlpacaError as error:
        return str(error)


# ------------------------------------------------------------------------------------------------------------ results


def _result(
    config: EvaluateConfig,
    sources: dict[str, ModelSource],
    rows: HeldOut,
    answered: dict[str, list[Answered]],
) -> dict[str, Any]:
    """Return what goes to scores.json."""
    source = next(iter(sources.values()))
    base = Path(source.base.name).name if Path(source.base.name).is_absolute() else source.base.name
    first = next(iter(answered))
    sampling = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "num_beams", "max_new_tokens", "seed")
    return {
        "base_model": base,
        "base_sha256": hash_base(source.base),
        "adapters": {name: one.info.adapter_sha256 for name, one in sources.items() if one.adapter and one.info},
        "rows": len(rows.questions),
        "rows_from": rows.origin,
        "sampling": {name: getattr(config, name) for name in sampling},
        "models": {name: scores.summary(found) for name, found in answered.items()},
        "differences": {
            name: scores.differences(found, answered[first]) for name, found in answered.items() if name != first
        },
        "not_answered": {name: sum(bool(row.error) for row in found) for name, found in answered.items()},
        "versions": run_record.versions(),
    }


def in_words(result: dict[str, Any]) -> str:
    """Return the scores as a table: a line for each, mean and standard error of each model, and what changed."""
    names = list(result["models"])
    heads = [f"{result['rows']:,} rows", *names, *(f"{name} - {names[0]}" for name in result["differences"])]
    lines = [heads]
    for score, (called, _) in scores.SCORES.items():
        cells = [result["models"][name].get(score) for name in names]
        cells += [found.get(score) for found in result["differences"].values()]
        if any(cells):
            signs = [False] * len(names) + [True] * len(result["differences"])
            lines.append([called, *(scores.shown(cell, score, sign) for cell, sign in zip(cells, signs, strict=True))])
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


@contextmanager
def _memory_errors_named() -> Iterator[None]:
    """Raise ModelError for a shortage of memory within this context."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, LoraAlpacaError):
            raise
        raise ModelError(f"the memory is too small ({memory.shortage(error)}); lower --max_batch") from None


def _log(notes: Iterable[str]) -> None:
    for note in notes:
        print(visible(note), file=sys.stderr)
