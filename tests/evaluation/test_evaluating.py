"""An evaluation: its loss is that of training, its answers those of generate, and what it leaves can be read."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from command import error_in, error_line, refused, run
from conftest import as_row
from short_run import adapter as trained

from lora_alpaca import Generator
from lora_alpaca.config import EvaluateConfig
from lora_alpaca.evaluation.evaluating import evaluate
from lora_alpaca.storage.output_folder import read_record

EXACT = {"dtype": "fp32", "device": "cpu", "max_new_tokens": 12}


@pytest.fixture(scope="module")
def adapter(tiny_llama: Path, rows: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an adapter whose run held out eight rows."""
    return trained(tmp_path_factory.mktemp("run"), tiny_llama, rows, val_set_size=8, learning_rate=5e-3)


def evaluated(adapter: Path, folder: Path, **options: Any) -> dict[str, Any]:
    return evaluate(EvaluateConfig(lora_weights=str(adapter), output_dir=str(folder), **EXACT | options))


def table(folder: Path) -> list[dict[str, Any]]:
    return pyarrow.parquet.read_table(folder / "answers.parquet").to_pylist()


# -------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(
    "options",
    [
        {"val_set_size": 8},
        {"val_set_size": 0.3, "cutoff_len": 60},  # cuts answers
        {"val_set_size": 8, "cutoff_len": 60, "overlong": "drop", "train_on_inputs": True},
        {"val_set_size": 5, "add_eos_token": False, "engine": "padded"},
    ],
    ids=str,
)
def test_the_loss_is_the_validation_loss_of_the_run(
    tiny_llama: Path, rows: Any, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Of the base, it is the one before the first step."""
    folder = trained(tmp_path, tiny_llama, rows, learning_rate=5e-3, max_steps=4, **options)
    result = read_record(folder)["result"]
    assert result["validation_loss"] < result["first_validation_loss"]
    for merge in ("true", "false"):
        found = evaluated(folder, tmp_path / merge, merge_adapter=merge, max_new_tokens=1)["models"]
        assert found["base"]["loss"]["mean"] == pytest.approx(result["first_validation_loss"], rel=1e-5)
        assert found["adapter"]["loss"]["mean"] == pytest.approx(result["validation_loss"], rel=1e-5)


def test_the_loss_of_rows_of_a_validation_file(tiny_llama: Path, rows: Any, tmp_path: Path) -> None:
    path = tmp_path / "validation.json"
    path.write_text(json.dumps([as_row(row) for row in rows[:7]]))
    folder = trained(tmp_path, tiny_llama, rows[7:], val_data_path=str(path), val_set_size=None)
    result = read_record(folder)["result"]
    for options in ({}, {"data_path": str(path)}):
        found = evaluated(folder, tmp_path / "scores", max_new_tokens=1, overwrite=True, **options)
        assert found["models"]["adapter"]["loss"]["mean"] == pytest.approx(result["validation_loss"], rel=1e-5)
        assert found["rows"] == 7


def test_the_loss_of_a_checkpoint_is_the_one_of_its_step(tiny_llama: Path, rows: Any, tmp_path: Path) -> None:
    folder = trained(tmp_path, tiny_llama, rows, max_steps=4, eval_steps=2, save_steps=2, save_total_limit=3)
    history = read_record(folder)["result"]["history"]
    losses = {entry["step"]: entry["validation_loss"] for entry in history if "validation_loss" in entry}
    found = evaluated(folder / "checkpoint-2", tmp_path / "out", max_new_tokens=1, prompt_template="alpaca")["models"]
    assert found["checkpoint-2"]["loss"]["mean"] == pytest.approx(losses[2], rel=1e-5)


# ----------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_the_answers_are_those_of_generate(adapter: Path, rows: Any, tmp_path: Path, temperature: float) -> None:
    """Where they are sampled, every row draws from a seed of its own."""
    result = evaluated(adapter, tmp_path / "out", temperature=temperature, seed=7)
    lines = table(tmp_path / "out")
    generator = Generator.load(str(adapter), **EXACT, temperature=temperature)
    assert len(lines) == 8
    for line in lines:
        row = rows[line["row"] - 1]
        assert line["expected"] == row.answers[0]
        assert line["prompt"] == "\n\n".join(filter(None, (row.question.text, row.question.input)))
        for name in ("base", "adapter"):
            answer = generator.answer(row.prompt, name, seed=7 + line["row"])
            assert (answer.read(), answer.completion_tokens) == (line[f"{name}_answer"], line[f"{name}_tokens"])
            assert (answer.finish_reason == "stop") == line[f"{name}_stopped"]
    assert result["models"]["base"]["tokens"]["mean"] == sum(line["base_tokens"] for line in lines) / 8


def test_rows_of_any_file_with_and_without_answers(adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    asked = [
        {"question": "Where does the owl live?", "output": "the forest"},
        {"question": "Where does the bee live?"},
        {"question": "Where is it? " * 400, "output": "too long for the context"},
        {"question": 5},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    result = evaluated(adapter, tmp_path / "out", data_path=str(path), columns=["instruction=question"])
    lines = table(tmp_path / "out")
    assert [line["row"] for line in lines] == [1, 2, 3]
    assert lines[1]["expected"] is None and lines[1]["adapter_loss"] is None and lines[1]["adapter_rouge_l"] is None
    assert lines[1]["adapter_answer"] and lines[1]["adapter_tokens"]
    assert "takes at most 512" in lines[2]["adapter_error"] and lines[2]["adapter_answer"] is None
    assert result["models"]["adapter"]["exact_match"]["rows"] == 1
    assert result["models"]["adapter"]["stopped"]["rows"] == 2
    assert result["not_answered"] == {"base": 1, "adapter": 1}


def test_an_answer_may_be_as_long_as_the_context_allows(adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "Where does the owl live?", "output": "x"}))
    evaluated(adapter, tmp_path / "out", data_path=str(path), max_new_tokens=100_000)
    assert table(tmp_path / "out")[0]["base_error"] is None


def test_several_adapters_are_compared_with_their_base(
    adapter: Path, tiny_llama: Path, rows: Any, tmp_path: Path
) -> None:
    other = trained(tmp_path, tiny_llama, rows, max_steps=2).rename(tmp_path / "other")
    both = evaluate(EvaluateConfig(lora_weights=f"{adapter},{other}", output_dir=str(tmp_path / "both"), **EXACT))
    alone = evaluated(adapter, tmp_path / "alone", merge_adapter="false")
    assert list(both["models"]) == ["base", "adapter", "other"]
    for name in ("base", "adapter"):
        assert both["models"][name] == alone["models"][name]
    assert both["differences"]["adapter"] == alone["differences"]["adapter"]
    assert both["models"]["other"]["loss"] != both["models"]["adapter"]["loss"]
    assert {"base_answer", "adapter_answer", "other_answer"} <= table(tmp_path / "both")[0].keys()


def test_a_model_alone_is_scored_alone(tiny_llama: Path, data_path: Path, tmp_path: Path) -> None:
    words = {
        "base_model": tiny_llama, "lora_weights": "none", "prompt_template": "alpaca", "data_path": data_path,
        "output_dir": tmp_path / "out", "max_rows": 5, **EXACT, "max_new_tokens": 2,
    }  # fmt: skip
    result = run("evaluate", *(f"--{name}={value}" for name, value in words.items()))
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert list(found["models"]) == ["base"] and found["differences"] == {} and found["rows"] == 5
    assert "the first 5 of 48 rows" in result.err
    assert result.out.splitlines()[0].split() == ["5", "rows", "base"]


# ------------------------------------------------------------------------------------------------------------ refusals


def test_mistakes_are_told_before_the_model_loads(
    adapter: Path, tiny_llama: Path, data_path: Path, tmp_path: Path, no_model_loads: None
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    model = [f"--lora_weights={adapter}", f"--output_dir={tmp_path / 'out'}"]
    assert "was not made by lora_alpaca" in refused("evaluate", model[0], f"--output_dir={mine}")
    assert "no such file" in refused("evaluate", *model, "--data_path=missing.jsonl")
    alone = [f"--base_model={tiny_llama}", "--lora_weights=none", "--prompt_template=alpaca", model[1]]
    assert "--data_path is missing" in error_line(run("evaluate", *alone), 2)
    assert not (tmp_path / "out").exists()


def test_rows_that_are_not_those_of_training_any_more(adapter: Path, tmp_path: Path, no_model_loads: None) -> None:
    path = adapter.parent / "rows.json"
    before = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(before)[1:]))
        told = refused("evaluate", f"--lora_weights={adapter}", f"--output_dir={tmp_path / 'out'}")
        assert "not the rows of the run any more" in told and "--data_path" in told
        path.unlink()
        told = refused("evaluate", f"--lora_weights={adapter}", f"--output_dir={tmp_path / 'out'}")
        assert "cannot be read" in told and "--data_path" in told
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "the memory is too small"),
        (RuntimeError("CUDA out of memory. Tried 2 GiB"), "lower --max_batch"),
    ],
    ids=["of the system", "of a device"],
)
def test_a_full_memory_is_one_line(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(Generator, "answer", fail)
    result = run("evaluate", f"--lora_weights={adapter}", f"--output_dir={tmp_path / 'out'}", "--dtype=fp32")
    assert result.code == 1 and told in error_in(result.err)
    assert not (tmp_path / "out").exists()


def test_earlier_results_are_set_aside_or_removed_when_asked(adapter: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", {"max_rows": 2, "max_new_tokens": 1}
    evaluated(adapter, out, **options)
    evaluated(adapter, out, **options)
    assert (tmp_path / "out.1" / "scores.json").is_file()
    evaluated(adapter, out, overwrite=True, **options)
    names = ["answers.parquet", "index.html", "lora_alpaca.json", "scores.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.1"]
