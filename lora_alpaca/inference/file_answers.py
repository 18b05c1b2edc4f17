"""Answers every row of a file, many at the same time, into a file of answers in the same order."""

import secrets
import sys
from collections import deque
from collections.abc import Generator as Stream
from collections.abc import Iterable
from contextlib import closing
from itertools import islice
from typing import Any

from lora_alpaca.config import GenerateConfig
from lora_alpaca.data.questions import Question, Questions
from lora_alpaca.data.readers import sources
from lora_alpaca.errors import LoraAlpacaError, ModelError, visible
from lora_alpaca.inference.answer import Answer
from lora_alpaca.inference.answer_file import AnswerFile
from lora_alpaca.inference.generator import Generator
from lora_alpaca.inference.loading import open_sources
from lora_alpaca.inference.progress import counting_rows
from lora_alpaca.models import memory
from lora_alpaca.models.fingerprint import file_hashes, hash_base
from lora_alpaca.models.lora import WEIGHTS
from lora_alpaca.prompts import Conversation
from lora_alpaca.signals import Interrupted
from lora_alpaca.storage.paths import user_path

PRECISION = ("load_8bit", "load_4bit", "dtype", "merge_adapter")
SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "num_beams", "max_new_tokens", "stop",
)  # fmt: skip
SEED = "seed"
_CALLED = {  # what the facts that are compared are, for the user
    "data_sha256": "the rows of --data_path are others",
    "base_sha256": "the base model is another",
    "adapter_sha256": "the adapter is another",
    "template": "the prompt template is another",
}


def answer_file(config: GenerateConfig) -> None:
    """Answer the rows of --data_path into --output_file, from where an earlier run of the same command was stopped.

    A row that cannot be answered gets a line with the reason. Raises DataError where none can, FolderError for a file
    that is somebody else's, full disks, and answers that were begun otherwise.
    """
    output = AnswerFile(user_path(config.output_file))
    _require_apart(config.data_path, output)
    questions = Questions(config.data_path, config.columns, config.ignore_fields)
    _log(questions.notes)
    with output.locked():
        recorded = output.recorded()
        asked = _asked(config, questions, recorded)
        _require_same(recorded, asked, output)
        done = output.begin(asked)
        if done > len(questions):
            raise output.error(
                f"it holds {done} answers to {len(questions)} rows, so it was changed; name another file"
            )
        if done == len(questions):
            return _log([f"{output.path} has the answers to all {done:,} rows already"])
        if done:
            _log([f"{output.path} has the answers to {done:,} of {len(questions):,} rows; going on"])
        generator = Generator.load(config)
        failed = 0
        with (
            closing(generator),
            output.appending() as append,
            counting_rows(len(questions), done) as advance,
            closing(_lines(generator, questions, done, asked[SEED], 2 * config.max_batch)) as lines,
        ):
            try:
                for line in lines:
                    append(line)
                    done, failed = done + 1, failed + ("error" in line)
                    advance(line.get("completion_tokens", 0))
            except Interrupted as stop:
                done = output.answered()  # a signal may come between a line and its count
                where = f"{done:,} of {len(questions):,} rows are answered in {output.path}; the same command goes on"
                raise Interrupted(stop.exit_code - 128, where) from None
            except (RuntimeError, MemoryError) as error:
                if isinstance(error, LoraAlpacaError):
                    raise
                raise ModelError(
                    f"the memory is too small ({memory.shortage(error)}); the same command goes on from row "
                    f"{done + 1:,}, with a lower --max_batch too"
                ) from None
    unanswered = f"; {failed:,} could not be answered, and their lines say why" if failed else ""
    _log([f"{output.path} has the answers to {len(questions):,} rows{unanswered}"])


# ------------------------------------------------------------------------------------------------------- what is asked


def _asked(config: GenerateConfig, questions: Questions, recorded: dict[str, Any]) -> dict[str, Any]:
    """Return what decides the answers. Where no seed is given, it is the recorded one, or drawn now."""
    source = next(iter(open_sources(config).values()))  # of the adapter that answers
    seed = config.seed
    if seed is None and config.temperature > 0:
        seed = recorded.get(SEED) if isinstance(recorded.get(SEED), int) else secrets.randbelow(2**31)
    return {
        "data_sha256": questions.digest,
        "columns": config.columns,
        "ignore_fields": config.ignore_fields,
        "base_sha256": hash_base(source.base),
        "adapter_sha256": file_hashes([source.adapter / WEIGHTS])[0] if source.adapter else None,
        "template": source.template.to_json(),
        "system": config.system,
        **{name: getattr(config, name) for name in (*PRECISION, *SAMPLING)},
        SEED: seed if config.temperature > 0 else None,
    }


def _require_same(recorded: dict[str, Any], asked: dict[str, Any], output: AnswerFile) -> None:
    """Raise FolderError where the answers that are there were asked for otherwise."""
    different = [name for name, value in asked.items() if recorded and recorded.get(name) != value]
    if "temperature" in different and SEED in different:  # which greedy answers have none of
        different.remove(SEED)
    if different:
        told = (_CALLED.get(name, f"--{name} was {recorded.get(name)} and is {asked[name]}") for name in different)
        raise output.error(
            f"its answers were begun otherwise: {'; '.join(told)}; say the same to go on, or remove the file or name "
            "another one to begin anew"
        )


def _require_apart(data_path: str, output: AnswerFile) -> None:
    """Raise FolderError for an output that would be read as rows, itself or by a folder or pattern that has it."""
    found, _ = sources.open_sources(data_path)
    paths = [source.path.resolve() for source in found if source.path is not None]
    many = user_path(data_path).is_dir() or len(paths) > 1
    if output.real in paths or (many and output.real.parent in {path.parent for path in paths}):
        raise output.error("it would lie among the rows of --data_path; name a file in another folder")


# ----------------------------------------------------------------------------------------------------------- answering


def _lines(
    generator: Generator, questions: Questions, done: int, seed: int | None, ahead: int
) -> Stream[dict[str, Any], None, None]:
    """Yield a line for every question behind the first `done`, in order, while those `ahead` are being answered."""
    asked: deque[tuple[Question, Answer | str]] = deque()
    coming = islice(questions, done, None)
    try:
        while True:
            for question in islice(coming, ahead - len(asked)):
                asked.append((question, _ask(generator, question, seed)))
            if not asked:
                return
            yield _line(*asked[0])
            asked.popleft()
    finally:
        for _, answer in asked:
            if isinstance(answer, Answer):
                answer.close()


def _ask(generator: Generator, question: Question, seed: int | None) -> Answer | str:
    """Return the answer as it is made, or why there is none. With a seed, every row draws from one of its own."""
    if question.conversation is None:
        return question.reason
    changes: dict[str, Any] = {} if seed is None else {SEED: seed + question.number}
    try:
        return generator.answer(question.conversation.with_system(generator.system), **changes)
    except LoraAlpacaError as error:
        return f"{question.where}: {str(error).removeprefix(f'{question.where}: ')}"


def _line(question: Question, answer: Answer | str) -> dict[str, Any]:
    """Return the line of a question: its number, what was asked and expected, and the answer, or the reason of none."""
    line: dict[str, Any] = {"row": question.number}
    if question.id is not None:
        line["id"] = question.id
    if question.conversation is not None:
        line |= _as_row(question.conversation)
    if question.expected is not None:
        line["expected"] = question.expected
    if isinstance(answer, str):
        return line | {"error": visible(answer)}
    return line | {
        "answer": answer.read(),
        "finish_reason": answer.finish_reason,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
    }


def _as_row(conversation: Conversation) -> dict[str, Any]:
    """Return what is asked under the names of Alpaca's format, or as messages where that has no place for it."""
    asked = conversation.messages[1:] if conversation.system else conversation.messages
    if len(asked) > 1 or not conversation.is_plain:
        return {"messages": as_messages(conversation)}
    row = {"system": conversation.system, "instruction": asked[0].text, "input": asked[0].input}
    return {name: text for name, text in row.items() if text or name == "instruction"}


def as_messages(conversation: Conversation) -> list[dict[str, Any]]:
    """Return a conversation as messages of the chat format."""
    messages = []
    for message in conversation.messages:
        text = "\n\n".join(filter(None, (message.text, message.input)))
        calls: dict[str, Any] = {"tool_calls": list(message.calls)} if message.calls else {}
        result = {"tool_call_id": message.call_id, "name": message.name} if message.role == "tool" else {}
        messages.append({"role": message.role, "content": text, **calls, **result})
    return messages


def _log(notes: Iterable[str]) -> None:
    for note in notes:
        print(visible(note), file=sys.stderr)
