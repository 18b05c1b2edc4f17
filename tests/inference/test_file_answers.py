"""A file answered row by row: in every format, in order, as one answer is, gone on with after any kill."""

import json
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from command import Result, error_line, refused, run
from faults.scene import copied
from short_run import adapter as trained

from lora_alpaca import GenerateConfig, Generator
from lora_alpaca.cli import main
from lora_alpaca.storage import atomic

ROWS: list[Any] = [
    {"instruction": "Name the opposite.", "input": "Word: hot", "output": "cold", "id": "a1"},
    {"instruction": 5, "output": "no text"},
    {"instruction": "Where does the owl live?"},
    {"messages": [{"role": "user", "content": "Describe the bee."}]},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}] * 2},
    {"prompt": "Add the numbers.", "completion": "9"},
]
OPTIONS = {
    "lora_weights": "none", "prompt_template": "alpaca", "dtype": "fp32", "device": "cpu", "max_new_tokens": 12,
    "temperature": 0,
}  # fmt: skip


@pytest.fixture
def options(tiny_llama: Path, tmp_path: Path) -> dict[str, Any]:
    """Return the options of a command that answers ROWS into `out.jsonl`."""
    (tmp_path / "rows").mkdir()
    path = tmp_path / "rows" / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    places = {"base_model": tiny_llama, "data_path": path, "output_file": tmp_path / "out.jsonl"}
    return {name: str(value) for name, value in places.items()} | OPTIONS


def words(options: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in options.items()]


def answered(options: dict[str, Any], code: int = 0) -> Result:
    """Return the result of a command that must end with an exit code."""
    result = run("generate", *words(options))
    assert result.code == code, result
    return result


def lines(options: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(options["output_file"]).read_text().splitlines()]


def test_every_row_has_its_line(options: dict[str, Any]) -> None:
    said = answered(options)
    found = lines(options)
    assert [line["row"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert "answers to 6 rows; 2 could not be answered" in said.err
    assert said.out == ""
    assert (found[0]["id"], found[0]["instruction"], found[0]["input"]) == ("a1", "Name the opposite.", "Word: hot")
    assert [line.get("expected") for line in found] == ["cold", None, None, None, "Yo", "9"]
    assert found[1] == {"row": 2, "error": "rows.jsonl:2: Alpaca format: instruction is 5, which is no text"}
    assert found[4]["error"].startswith("rows.jsonl:5: 2 turns, and the template alpaca takes one")
    assert found[3]["instruction"] == "Describe the bee."


def test_an_answer_is_that_of_the_row_alone(options: dict[str, Any]) -> None:
    answered(options | {"temperature": 1.0, "seed": 7})
    config = {name: value for name, value in options.items() if name not in ("data_path", "output_file")}
    with_seeds = [line for line in lines(options) if "answer" in line]
    generator = Generator.load(GenerateConfig(**config))
    for line in with_seeds:
        answer = generator.stream(line["instruction"], line.get("input", ""), temperature=1.0, seed=7 + line["row"])
        assert answer.read() == line["answer"]
        counts = (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens)
        assert counts == (line["finish_reason"], line["prompt_tokens"], line["completion_tokens"])


@pytest.mark.parametrize("ending", ["json", "csv", "parquet", "jsonl.gz"])
def test_files_of_every_kind(options: dict[str, Any], ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"questions.{ending}"
    rows = [{"question": "Where does the owl live?"}, {"question": "Describe the bee."}]
    if ending == "json":
        path.write_text(json.dumps(rows))
    elif ending == "csv":
        path.write_text("question\n" + "".join(f"{row['question']}\n" for row in rows))
    elif ending == "parquet":
        import pyarrow as pa
        import pyarrow.parquet

        pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        import gzip

        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    answered(options | {"data_path": path, "columns": "instruction=question"})
    assert [line["instruction"] for line in lines(options)] == [row["question"] for row in rows]
    assert all(line["completion_tokens"] > 0 for line in lines(options))


# ------------------------------------------------------------------------------------------------------- going on


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 1.0}])
def test_half_a_line_is_dropped_and_the_rest_goes_on(options: dict[str, Any], sampling: dict[str, Any]) -> None:
    """Where no seed is given, the one that was drawn is recorded."""
    options |= sampling
    answered(options)
    path = Path(options["output_file"])
    whole = path.read_bytes()
    sizes = [0, 1] if "seed" in sampling or not sampling["temperature"] else []  # begun anew, with another seed
    for size in (*sizes, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        answered(options)
        assert path.read_bytes() == whole


def test_a_finished_file_is_left_as_it_is(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    answered(options)
    path = Path(options["output_file"])
    before = path.read_bytes(), path.stat().st_mtime_ns
    monkeypatch.setattr(Generator, "load", lambda config: pytest.fail("the model was loaded"))
    assert "has the answers to all 6 rows already" in answered(options).err
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"temperature": 0.5}, "--temperature was 0.0 and is 0.5"),
        ({"max_new_tokens": 5}, "--max_new_tokens was 12 and is 5"),
        ({"system": "Be brief."}, "--system was  and is Be brief."),
        ({"prompt_template": "vicuna"}, "the prompt template is another"),
    ],
)
def test_another_question_is_refused(options: dict[str, Any], change: dict[str, Any], told: str) -> None:
    answered(options)
    path = Path(options["output_file"])
    whole = path.read_bytes()
    assert told in refused("generate", *words(options | change))
    assert path.read_bytes() == whole


def test_other_rows_or_another_model_are_refused(options: dict[str, Any], tiny_model: Any) -> None:
    answered(options)
    other = tiny_model("Qwen2")
    assert "the base model is another" in refused("generate", *words(options | {"base_model": str(other)}))
    Path(options["data_path"]).write_text(json.dumps(ROWS[:1]))
    assert "the rows of --data_path are others" in refused("generate", *words(options))


def test_another_adapter_is_refused(options: dict[str, Any], tiny_llama: Path, rows: Any, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "other")]
    for seed, folder in enumerate(folders):
        folder.mkdir()
        trained(folder, tiny_llama, rows, max_steps=1, seed=seed, val_set_size=0)
    one, other = (options | {"lora_weights": str(folder / "adapter")} for folder in folders)
    answered(one)
    assert "the adapter is another" in refused("generate", *words(other))
    assert "already" in answered(one).err


def test_a_file_of_somebody_else_is_never_touched(options: dict[str, Any], no_model_loads: None) -> None:
    path = Path(options["output_file"])
    path.write_text("mine\n")
    assert "is there already" in refused("generate", *words(options))
    assert path.read_text() == "mine\n"
    path.unlink()
    beside = path.with_name("out.jsonl.run.json")
    beside.write_text("{}")
    assert "out.jsonl.run.json is there already" in refused("generate", *words(options))
    assert beside.read_text() == "{}" and not path.exists()


def test_a_changed_line_is_told(options: dict[str, Any]) -> None:
    answered(options)
    path = Path(options["output_file"])
    kept = path.read_text().splitlines(keepends=True)
    for number, text in ((1, "{}\n"), (3, kept[1]), (2, "no json\n")):
        changed = "".join([*kept[: number - 1], text, *kept[number:]])
        path.write_text(changed)
        assert f"line {number} is not the answer to row {number}" in refused("generate", *words(options))
        assert path.read_text() == changed


def test_an_empty_beginning_may_be_of_another_model(options: dict[str, Any]) -> None:
    """What failed before its first answer is begun anew with other options."""
    answered(options)
    Path(options["output_file"]).write_text("")
    answered(options | {"max_new_tokens": 3})
    assert all(line.get("completion_tokens", 0) <= 3 for line in lines(options))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"output_file": "out.csv"}, "name a file that ends in .jsonl"),
        ({"output_file": "{data_path}"}, "is there already"),
        ({"data_path": "{folder}", "output_file": "{folder}/out.jsonl"}, "it would lie among the rows"),
        ({"output_file": ""}, "--output_file is missing"),
        ({"columns": "instruction=question"}, "no output"),
        ({"data_path": "missing.jsonl"}, "no such file"),
    ],
)
def test_mistakes_are_told_before_the_model_loads(
    options: dict[str, Any], changes: dict[str, str], told: str, no_model_loads: None
) -> None:
    folder = os.path.dirname(options["data_path"])
    changed = {name: value.format(data_path=options["data_path"], folder=folder) for name, value in changes.items()}
    if "columns" in changes:
        Path(options["data_path"]).write_text('{"text": "a document"}\n')
        told = "a document has no question"
    refused_line = refused("generate", *words(options | changed))
    assert told in refused_line


def test_a_full_disk_is_one_line(options: dict[str, Any], tmp_path: Path) -> None:
    def on_a_full_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        main(["generate", *words(options)])

    Path(options["data_path"]).write_text("".join(json.dumps(ROWS[0]) + "\n" for _ in range(40)))
    log = tmp_path / "log"
    _, status = os.waitpid(copied(on_a_full_disk, log), 0)
    errors = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert os.waitstatus_to_exitcode(status) == 2 and len(errors) == 1, log.read_text()
    assert "could not be written (File too large); the same command goes on" in errors[0]
    before = len([line for line in Path(options["output_file"]).read_bytes().splitlines(True) if line[-1:] == b"\n"])
    assert 0 < before < 40
    assert f"has the answers to {before} of 40 rows; going on" in answered(options).err
    assert [line["row"] for line in lines(options)] == list(range(1, 41))


def test_twenty_kills(options: dict[str, Any], tmp_path: Path) -> None:
    """At random moments, one after the other, of a command that goes on: nothing is lost, nothing is there twice."""
    Path(options["data_path"]).write_text(
        "".join(json.dumps({"instruction": f"Say {number}.", "output": ""}) + "\n" for number in range(150))
    )
    options |= {"temperature": 1.0, "seed": 5}
    began = time.monotonic()
    answered(options)
    seconds = time.monotonic() - began
    whole = Path(options["output_file"]).read_bytes()
    chance, killed, sizes = random.Random(0), 0, set()
    begun = options | {"output_file": str(tmp_path / "killed.jsonl")}
    path = Path(begun["output_file"])
    while killed < 20:
        process = copied(lambda: main(["generate", *words(begun)]), tmp_path / "log")
        time.sleep(chance.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(process, 0)[1])
        found = path.read_bytes() if path.exists() else b""
        assert whole.startswith(found)
        sizes.add(len(found))
        if found == whole:
            path.unlink()
    assert len(sizes) > 5
    answered(begun)
    assert path.read_bytes() == whole
    assert sorted(found.name for found in tmp_path.iterdir()) == [
        "killed.jsonl", "killed.jsonl.run.json", "log", "log.phases", "out.jsonl", "out.jsonl.run.json", "rows",
    ]  # fmt: skip


def test_what_a_kill_left_of_the_record_is_removed(options: dict[str, Any], tmp_path: Path) -> None:
    """Which is a moment that twenty random ones hardly ever hit."""

    def killed_while_it_writes() -> None:
        with atomic.hidden_folder(tmp_path / "out.jsonl.run.json") as hidden:
            atomic.write(hidden / "out.jsonl.run.json", b"{")
            os.kill(os.getpid(), signal.SIGKILL)

    os.waitpid(copied(killed_while_it_writes, tmp_path / "log"), 0)
    assert list(tmp_path.glob(".out.jsonl.run.json.partial-*"))
    answered(options)
    assert not list(tmp_path.glob(".*"))


def test_two_at_the_same_time_are_refused(options: dict[str, Any], no_model_loads: None) -> None:
    path = Path(options["output_file"])
    with atomic.locked(path.with_name(".out.jsonl.lock")):
        assert "another process is writing it" in refused("generate", *words(options))


def test_a_full_memory_is_one_line(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Generator.answer

    def short_of_memory(self: Generator, conversation: Any, *rest: Any, **changes: Any) -> Any:
        if conversation.question.text == "Add the numbers.":
            raise MemoryError
        return answer(self, conversation, *rest, **changes)

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "answer", short_of_memory)
        told = error_line(answered(options, 1), 1)
        assert "memory" in told and "goes on from row 1" in told
    answered(options)
    assert len(lines(options)) == 6


def test_ctrl_c_says_where_it_goes_on(options: dict[str, Any], tmp_path: Path) -> None:
    Path(options["data_path"]).write_text(
        "".join(json.dumps({"instruction": f"Say {number}."}) + "\n" for number in range(2000))
    )
    process = copied(lambda: main(["generate", *words(options)]), tmp_path / "log")
    path = Path(options["output_file"])
    until = time.monotonic() + 60
    while not (path.exists() and path.read_bytes().count(b"\n") > 3) and time.monotonic() < until:
        time.sleep(0.05)
    os.kill(process, signal.SIGINT)
    _, status = os.waitpid(process, 0)
    said = (tmp_path / "log").read_text()
    number = path.read_bytes().count(b"\n")
    assert os.waitstatus_to_exitcode(status) == 130, said
    assert f"stopped by SIGINT: {number} of 2,000 rows are answered in {path}; the same command goes on" in said
    assert "Traceback" not in said
