"""Answers in the terminal: what controls a terminal is shown there, and arrives as it is where a program reads."""

import io
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command import run

from lora_alpaca import GenerateConfig
from lora_alpaca.errors import ConfigError
from lora_alpaca.inference import terminal
from lora_alpaca.inference.sampling import Sampling

PIECES = ("Hi\x1b]0;own", "ed\x07\r\n", "\tb\u202ec\n")


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


class Spoken:
    """An answer of PIECES that came to its end."""

    finish_reason, completion_tokens = "stop", 9

    def __init__(self) -> None:
        self.text = "".join(PIECES)

    def __iter__(self) -> Any:
        return iter(PIECES)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return `answered(output, **options)`: what a command writes to such an output."""

    def answer(output: io.StringIO, **options: Any) -> str:
        codec = SimpleNamespace(takes_turns=False, template=SimpleNamespace(name="alpaca"))
        generator = SimpleNamespace(
            stream=lambda *words, **more: Spoken(),
            answer=lambda *words, **more: Spoken(),
            codecs={"base": codec},
            default="base",
            system="",
            sampling=Sampling(),
            close=lambda: None,
        )
        monkeypatch.setattr("lora_alpaca.inference.generator.Generator.load", lambda config: generator)
        monkeypatch.setattr(sys, "stdout", output)
        monkeypatch.setattr(sys, "stdin", io.StringIO("Say it.\n"))
        terminal.generate(GenerateConfig(**options))
        return output.getvalue()

    return answer


@pytest.mark.parametrize("options", [{"instruction": "Say it."}, {"chat": True}])
def test_a_terminal_shows_control_characters(answered: Any, options: dict[str, Any]) -> None:
    assert answered(Screen(), **options) == "Hi\\x1b]0;owned\\x07\\r\n\tb\\u202ec\n\n"


def test_a_pipe_gets_the_answer_to_the_byte(answered: Any) -> None:
    assert answered(io.StringIO(), instruction="Say it.") == "".join(PIECES) + "\n"


def test_an_answer_that_met_its_limit_says_so(
    answered: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answered(io.StringIO(), instruction="Say it.")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Spoken, "finish_reason", "length")
    answered(io.StringIO(), instruction="Say it.")
    assert capsys.readouterr().err == "(not at its end: the limit of 9 new tokens was met; max_new_tokens sets it)\n"


def test_the_limit_of_a_real_answer(tiny_llama: Path) -> None:
    words = {
        "base_model": tiny_llama, "lora_weights": "none", "prompt_template": "alpaca", "instruction": "Hi.",
        "max_new_tokens": 1, "temperature": 0, "dtype": "fp32", "device": "cpu",
    }  # fmt: skip
    result = run("generate", *(f"--{name}={value}" for name, value in words.items()))
    assert result.code == 0
    assert "the limit of 1 new tokens was met" in result.err


@pytest.mark.parametrize(
    ("options", "library"),
    [({}, "gradio"), ({"serve": True}, "fastapi")],
)
def test_a_missing_library_is_told_before_the_model_loads(
    monkeypatch: pytest.MonkeyPatch, no_model_loads: None, options: dict[str, Any], library: str
) -> None:
    monkeypatch.setattr("lora_alpaca.inference.terminal.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"needs {library}"):
        terminal.generate(GenerateConfig(**options))


def test_a_start_takes_little_more_than_its_imports(tmp_path: Path) -> None:
    """At most two seconds of processor time over what every program needs that loads a Llama with transformers."""
    imports = ["-c", "import torch; from transformers import LlamaForCausalLM"]
    words = ["-m", "lora_alpaca", "generate", "--instruction=Hi.", "--max_new_tokens=1", "--device=cpu"]

    def seconds(words: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    on_top: list[float] = []
    while len(on_top) < 4 and min(on_top, default=2) >= 2:  # on a busy machine a process takes longer
        least = seconds(imports)
        on_top.append(seconds(words) - least)
    assert min(on_top) < 2
