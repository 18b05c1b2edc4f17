"""Standard input and outputs of any kind: a command works, or says in one line why not; never a traceback."""

import errno
import io
import os
import subprocess
import sys

import pytest
from command import run

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.cli.streams import OutputError, usable_streams
from lora_alpaca.cli.verbs import main
from lora_alpaca.storage.output_folder import read_record

COMMAND = f"{sys.executable} -m lora_alpaca"


def shell(line, cwd, **variables):
    """Return stdout, stderr and exit code of a line of bash in which LORA stands for our command."""
    words = ["bash", "-c", line.replace("LORA", COMMAND)]
    done = subprocess.run(
        words, cwd=cwd, env=os.environ | variables, capture_output=True, text=True, errors="replace", timeout=120
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr
    return done.stdout, done.stderr, done.returncode


KINDS = [
    ("LORA finetune --help | true; echo ${PIPESTATUS[0]}", "141\n", ""),
    ("LORA --help > /dev/full; echo $?", "1\n", "error: standard output: No space left on device\n"),
    ("LORA finetune --help >&-; echo $?", "0\n", ""),
    ("LORA finetune --foo 2>&-; echo $?", "2\n", ""),
    ("LORA finetune --foo 2>/dev/full; echo $?", "2\n", ""),
    ("LORA finetune --foo 2>&1 | true; echo ${PIPESTATUS[0]}", "2\n", ""),
    ("LORA finetune --foo <&- >&- 2>&-; echo $?", "2\n", ""),
    ("LORA export --foo <&- ; echo $?", "2\n", "error: unknown flag --foo; --help lists them all\n"),
    ("mkdir gone; cd gone; rmdir ../gone; LORA finetune; echo $?", "2\n",
     "error: the working directory cannot be used (No such file or directory); cd to another one\n"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "out", "err"), KINDS, ids=[line for line, *_ in KINDS])
def test_an_output_of_any_kind(line, out, err, tmp_path):
    found = shell(line, tmp_path)
    assert found[:2] == (out, err)


LOCALES = [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:strict"}, {"LC_ALL": "C"}, {"LANG": ""}]


@pytest.mark.parametrize("variables", LOCALES, ids=str)
def test_an_encoding_that_lacks_a_letter(variables, tmp_path):
    _, err, code = shell("LORA finetune --你好ü 3", tmp_path, **variables)
    assert code == 2
    assert err.startswith("error: unknown flag --") and err.count("\n") == 1


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", rb"\u4f60 \xfc"), ("latin-1", b"\\u4f60 \xfc")])
def test_a_letter_that_the_output_lacks_is_written_as_its_number(encoding, shown, monkeypatch):
    found = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(found, encoding=encoding))
    with usable_streams(goes_on=False):
        print("你 ü")
    assert found.getvalue() == shown + b"\n"


def test_words_that_are_no_text(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    _, err, code = shell("LORA finetune --base_model fö", tmp_path, **plain)
    assert (code, err) == (2, "error: 'f\\udcc3\\udcb6': not text in this terminal's encoding, ascii; set LANG to a "
                              "locale with UTF-8, such as C.UTF-8\n")  # fmt: skip
    _, err, code = shell(r"LORA finetune --base_model $'f\xff'", tmp_path, LC_ALL="C.UTF-8")
    assert (code, err) == (2, "error: 'f\\udcff': not text in this terminal's encoding, utf-8; rename it\n")


class Failing(io.StringIO):
    """An output that takes so many texts, and then none."""

    def __init__(self, takes, error):
        super().__init__()
        self.takes, self.error = takes, error

    def write(self, text):
        self.takes -= 1
        if self.takes < 0:
            raise self.error
        return super().write(text)


BROKEN, FULL = BrokenPipeError(errno.EPIPE, "Broken pipe"), OSError(errno.ENOSPC, "No space left on device")


def ended(words, stdout, monkeypatch):
    """Return exit code and stderr of a command that prints to a given output."""
    err = io.StringIO()
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr("sys.stderr", err)
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    monkeypatch.undo()
    return stop.value.code, err.getvalue()


SHORT = ["--max_steps", 1, "--batch_size", 2, "--val_set_size", 2, "--load_8bit", "False", "--dtype", "fp32"]


@pytest.mark.parametrize("takes", [0, 5])
@pytest.mark.parametrize("error", [BROKEN, FULL], ids=["broken", "full"])
def test_training_goes_on_without_an_output(takes, error, tiny_llama, data_path, tmp_path, monkeypatch):
    words = ["finetune", "--base_model", tiny_llama, "--data_path", data_path, "--output_dir", tmp_path / "out", *SHORT]
    code, err = ended(words, Failing(takes, error), monkeypatch)
    assert code == 0
    assert err == f"warning: standard output takes no more ({error.strerror}); the work goes on\n"
    assert read_record(tmp_path / "out")["status"] == "finished"


@pytest.mark.parametrize("error", [BROKEN, FULL, ValueError("I/O operation on closed file")], ids=repr)
def test_a_program_that_trains_loses_no_run_either(error, tiny_llama, data_path, tmp_path, monkeypatch):
    options = {"max_steps": 1, "batch_size": 2, "val_set_size": 2, "load_8bit": False, "dtype": "fp32"}
    paths = {"base_model": str(tiny_llama), "data_path": str(data_path), "output_dir": str(tmp_path / "out")}
    monkeypatch.setattr("sys.stdout", Failing(3, error))
    monkeypatch.setattr("sys.stderr", None)
    result = finetune(FinetuneConfig(**paths, **options))
    monkeypatch.undo()
    assert result.steps == 1


@pytest.mark.parametrize(("error", "code"), [(BROKEN, 141), (FULL, 1)], ids=["broken", "full"])
@pytest.mark.parametrize("verb", ["show", "generate"])
def test_what_prints_its_product_ends_without_an_output(verb, error, code, tiny_llama, data_path, monkeypatch):
    words = {
        "show": ["--data_path", data_path, "--base_model", tiny_llama],
        "generate": ["--base_model", tiny_llama, "--prompt_template", "alpaca", "--lora_weights", "none",
                     "--instruction", "Hi.", "--max_new_tokens", 5],
    }[verb]  # fmt: skip
    found, err = ended([verb, *words], Failing(0, error), monkeypatch)
    assert found == code
    said = [line for line in err.splitlines() if not line.startswith(("model ", "warning: nothing records"))]
    assert said == ([] if error is BROKEN else ["error: standard output: No space left on device"])


def test_an_error_of_the_system_is_one_line(monkeypatch):
    def full(config):
        raise OSError(errno.EMFILE, "Too many open files", "rows.json")

    monkeypatch.setattr("lora_alpaca.data.visualization.show", full)
    found = run("show")
    assert (found.code, found.out, found.err) == (1, "", "error: rows.json: Too many open files\n")


def test_the_outputs_are_put_back(monkeypatch):
    before = sys.stdout, sys.stderr
    with pytest.raises(OutputError), usable_streams(goes_on=False):
        assert sys.stdout is not before[0]
        raise OutputError(FULL)
    assert (sys.stdout, sys.stderr) == before
