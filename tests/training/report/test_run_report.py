"""The report of a run: it says what the run measured, it is private, and whatever fails in it costs the run nothing."""

import json
import re
import shutil

import pyarrow.parquet
import pytest
import short_run
import torch
from command import error_line, refused, run
from hostile_texts import HOSTILE, Elements

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.data import row_losses
from lora_alpaca.data.row_losses import RowLoss
from lora_alpaca.errors import DataError
from lora_alpaca.export import hub
from lora_alpaca.planning.devices import RESERVED
from lora_alpaca.prompts import Conversation
from lora_alpaca.storage.output_folder import read_record
from lora_alpaca.training.report import files
from lora_alpaca.training.report.rows import RowTable, chosen

OPTIONS = {"save_steps": 2, "eval_steps": 2, "logging_steps": 1, "max_steps": 4, "report_rows": 12, "report_answers": 3}


@pytest.fixture(scope="module")
def trained(tiny_llama, rows, tmp_path_factory):
    """Return the folder of a run whose rows say hostile things too."""
    said = [text.encode("utf-8", "ignore").decode() for text in HOSTILE]
    hostile = [Conversation.of(f"Say {number}: {text}", "", text) for number, text in enumerate(said)]
    folder = tmp_path_factory.mktemp("report")
    return short_run.adapter(folder, tiny_llama, rows + hostile, val_set_size=24, **OPTIONS)


def copied(trained, to):
    shutil.copytree(trained, to)
    return to


def facts(folder):
    return files.read_facts(folder)


def test_the_report_says_what_the_run_measured(trained):
    found, record = facts(trained), read_record(trained)
    assert found["status"] == "finished"
    assert found["history"] == record["result"]["history"]
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_second", "memory"} <= found["history"][0].keys()
    page, text = ((trained / name).read_text(encoding="utf-8") for name in (files.PAGE, files.TEXT))
    assert page.endswith("</html>\n")
    for figure in (f"{record['result']['validation_loss']:.4f}", record["data_sha256"], record["base_sha256"]):
        assert figure in page
        assert figure in text
    assert found["estimate"]["memory"] > RESERVED["cpu"]  # of libraries too, as what is measured
    assert sum(found["lengths"]["counts"]) == record["ledger"]["train"]
    assert page.count("<svg") == 6  # loss, rate, gradient norm, speed, memory, lengths
    assert "#0" not in re.sub(r"#[a-z]\w+", "", page.split("<svg", 1)[1].split("</svg>")[0]), (
        "a colour is not the page's"
    )


def test_nothing_that_rows_say_is_more_than_text(trained):
    found = Elements((trained / files.PAGE).read_text(encoding="utf-8"))
    assert not found.tags & {"script", "img", "iframe", "a", "base", "object", "link"}
    assert not [name for name in found.attributes if name.startswith("on")]
    for name in (files.PAGE, files.TEXT):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2066]", (trained / name).read_text(encoding="utf-8"))


def test_the_losses_of_rows_sum_to_those_of_the_run(trained):
    rows, known = row_losses.read(trained / files.ROWS)
    result = read_record(trained)["result"]
    validation = [row for row in rows if row.part == "validation"]
    assert len(validation) == 24
    assert known["step"] == result["best_step"]
    tokens = sum(row.tokens for row in validation)
    for when, loss in (("before", "first_validation_loss"), ("after", "validation_loss")):
        total = sum(getattr(row, when) * row.tokens for row in validation)
        assert total / tokens == pytest.approx(result[loss], rel=1e-5)
    training = [row for row in rows if row.part == "training"]
    assert len(training) == 12
    assert sum(row.after for row in training) < sum(row.before for row in training)
    assert {row.number for row in training}.isdisjoint({row.number for row in validation})
    assert all(row.where == f"rows.json:{row.number}" for row in rows)
    assert pyarrow.parquet.read_table(trained / files.ROWS).column_names == list(RowLoss._fields)


def test_held_out_rows_are_answered_before_and_after(trained):
    found = facts(trained)["answers"]
    assert [len(found[when]) for when in ("before", "after", "rows")] == [3, 3, 3]
    expected = json.loads((trained.parent / "rows.json").read_text())
    for row, answer in zip(found["rows"], found["after"], strict=True):
        assert row["expected"] == expected[row["number"] - 1]["output"]
        assert answer["ended"] in ("stop", "length")
        assert answer["tokens"] <= found["longest"]


def test_the_answers_are_those_of_generate(trained, tiny_llama):
    found = facts(trained)["answers"]
    asked = json.loads((trained.parent / "rows.json").read_text())[found["rows"][0]["number"] - 1]
    options = {"instruction": asked["instruction"], "input": asked["input"], "temperature": 0, "dtype": "fp32"}
    options |= {"base_model": tiny_llama, "lora_weights": trained, "max_new_tokens": found["longest"], "device": "cpu"}
    result = run("generate", *short_run.flags(options | {"load_8bit": False}))
    assert found["after"][0]["text"] in result.out


def test_the_head_is_given_dense_rows(tiny_llama, rows, tmp_path, monkeypatch):
    """Of a view with gaps, as generate makes of a prompt, torch multiplies a copy of the head for every row."""
    seen, plain = [], torch.nn.Linear.forward

    def forward(self, x):
        if self.out_features > 500 and x.shape[:-1] == (3, 1):
            seen.append(x.is_contiguous())
        return plain(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", forward)
    short_run.adapter(tmp_path, tiny_llama, rows, **OPTIONS | {"max_steps": 1})
    assert seen and all(seen)


def test_the_command_makes_the_same_run(trained, tmp_path):
    (line,) = [line for line in (trained / files.TEXT).read_text().splitlines() if line.startswith("lora-alpaca fine")]
    words = line.split()[2:]
    words[words.index("--output_dir") + 1] = str(tmp_path / "again")
    assert run("finetune", *words).code == 0
    assert short_run.same(trained, tmp_path / "again")


# ---------------------------------------------------------------------------------------------------- commands


def test_show_worst_opens_the_rows_with_the_highest_loss(trained, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    result = run("show", "--run", trained, "--worst", 3)
    assert result.code == 0, result.err
    rows, _ = row_losses.read(trained / files.ROWS)
    worst = sorted(rows, key=lambda row: -row.after)[:3]
    assert re.findall(r"^(rows\.json:\d+): ", result.out, re.MULTILINE) == [row.where for row in worst]
    assert f"loss {worst[0].before:.3f} before, loss {worst[0].after:.3f} after" in result.out
    assert "\033[30;42m" in result.out


def test_show_worst_wants_the_rows_of_the_run(trained, tmp_path):
    again = copied(trained, tmp_path / "again")
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads((trained.parent / "rows.json").read_text())[:3]))
    assert "not the rows of the run" in refused("show", "--run", again, "--worst", 3, "--data_path", few)
    (again / files.ROWS).write_bytes(b"PAR1 and no more")
    assert "not a table of a run's rows" in refused("show", "--run", again, "--worst", 3)
    assert "no such file" in refused("show", "--run", tmp_path, "--worst", 3)
    assert "--row and --worst" in refused("show", "--row", 1, "--worst", 3)
    assert "--run" in refused("show", "--run", again)


def test_report_draws_it_anew(trained, tmp_path):
    again = copied(trained, tmp_path / "again")
    (again / files.PAGE).unlink()
    assert run("report", again).code == 0
    assert (again / files.PAGE).read_text().replace("again", "adapter").count("<svg") == 6
    assert "report.json is missing" in error_line(run("report", tmp_path), 2)


def test_compare_says_what_differed(trained, tiny_llama, rows, tmp_path):
    other = short_run.adapter(tmp_path, tiny_llama, rows, **OPTIONS | {"learning_rate": 1e-3, "report_answers": 0})
    result = run("compare", trained, other)
    assert result.code == 0, result.err
    assert re.search(r"^--learning_rate +0\.02 +0\.001$", result.out, re.MULTILINE)
    assert re.search(r"^data_sha256 ", result.out, re.MULTILINE)
    assert "validation rows are not the same" in result.out
    page = tmp_path / "both.html"
    assert run("compare", trained, trained, "--html", page).code == 0
    assert page.read_text().count("<svg") == 2
    assert "is +0.0000 ± 0.0000" in page.read_text()
    (tmp_path / "mine.html").write_text("mine")
    assert "something else" in refused("compare", trained, other, "--html", tmp_path / "mine.html")


# ----------------------------------------------------------------------------------------------- what it must not do


def test_it_is_not_published(trained, tmp_path):
    present = {path.name for path in trained.iterdir()}
    assert {files.PAGE, files.TEXT, files.FACTS, files.ROWS} <= present
    assert not any(hub._may_go_out(trained, name) for name in (files.PAGE, files.TEXT, files.FACTS, files.ROWS))
    assert not {files.PAGE, files.TEXT, files.FACTS, files.ROWS} & set(read_record(trained)["files"])


def test_a_report_that_fails_costs_one_line(trained, tiny_llama, rows, tmp_path, capsys):
    """Something of the user's own has the name of the page: it stays as it is, and the run ends as it would have."""
    again = copied(trained, tmp_path / "adapter")
    (again / files.PAGE).write_text("mine")
    short_run.adapter(tmp_path, tiny_llama, rows, **OPTIONS, overwrite=True)
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if "report of the run is incomplete" in line] == [
        f"warning: the report of the run is incomplete ({again / files.PAGE} was not made by a report; move it away); "
        "the run goes on"
    ]
    assert (again / files.PAGE).read_text() == "mine"
    assert read_record(again)["status"] == "finished"


def test_without_a_report_that_of_an_earlier_run_is_gone(trained, tiny_llama, rows, tmp_path):
    again = copied(trained, tmp_path / "adapter")
    short_run.adapter(tmp_path, tiny_llama, rows, **OPTIONS | {"report": False}, overwrite=True)
    assert not [name for name in (files.PAGE, files.TEXT, files.FACTS, files.ROWS) if (again / name).exists()]


def test_a_report_changes_no_bit_of_the_adapter(trained, tmp_path):
    record = read_record(trained)["options"]
    options = {name: value for name, value in record.items() if name in OPTIONS or name in ("seed", "val_set_size")}
    assert options["report_rows"] == 12
    found = facts(trained)["record"]
    said = {name: found["options"][name] for name in found["said"]}
    finetune(FinetuneConfig(**said | {"output_dir": str(tmp_path / "bare"), "report": False}))
    assert short_run.same(trained, tmp_path / "bare")


def test_a_run_that_resumes_keeps_what_was_measured_before(trained, tmp_path):
    folder = copied(trained, tmp_path / "adapter")
    before = {(row.part, row.number): row.before for row in row_losses.read(folder / files.ROWS)[0]}
    answers = facts(folder)["answers"]["before"]
    short_run.interrupt(folder, last_checkpoint=2)
    found = facts(folder)["record"]
    said = {name: found["options"][name] for name in found["said"]}
    finetune(FinetuneConfig(**said | {"output_dir": str(folder), "resume": True}))
    assert {(row.part, row.number): row.before for row in row_losses.read(folder / files.ROWS)[0]} == before
    assert facts(folder)["answers"]["before"] == answers
    assert facts(folder)["status"] == "finished"


def test_a_hundredth_of_the_rows_is_measured_unless_more_are_asked_for():
    train = range(5000)
    assert len(chosen(train, 10_000, None, 0)) == 100
    assert len(chosen(train, 10_000_000, None, 0)) == 2000
    assert chosen(train, 10, 7000, 0) == list(train)
    assert chosen(train, 10_000, None, 0) == chosen(train, 10_000, None, 0) != chosen(train, 10_000, None, 1)


def test_a_damaged_table_is_refused(trained, tmp_path):
    whole = (trained / files.ROWS).read_bytes()
    for number, data in enumerate((b"", whole[:-20], whole[: len(whole) // 2], b"{}")):
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(data)
        with pytest.raises(DataError, match="not a table"):
            row_losses.read(path)


def test_rows_of_a_file_of_their_own_have_its_numbers():
    class Two:
        train, validation = range(10), range(5)

    class Some:
        def __init__(self):
            self.numbers = [12, 14]

        def __getitem__(self, place):
            return type("Row", (), {"num_labels": lambda self: 4})()

    table = RowTable(Two())
    table.note("before", "validation", Some(), [0, 1], [4.0, 8.0])
    assert table.lines() == [RowLoss("validation", 3, "", 4, 1.0, None), RowLoss("validation", 5, "", 4, 2.0, None)]
    table.recall([RowLoss("validation", 3, "", 4, 7.0, 6.0)], 3)
    assert table.lines()[0] == RowLoss("validation", 3, "", 4, 7.0, 6.0)
