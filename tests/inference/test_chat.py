"""A conversation in the terminal: what is remembered, and what the commands do."""

import io
import json
import os
import pty
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults.scene import copied

from lora_alpaca import GenerateConfig, Generator
from lora_alpaca.cli import main
from lora_alpaca.data import Rows
from lora_alpaca.inference.chat import Chat

OPTIONS = {"lora_weights": "none", "dtype": "fp32", "device": "cpu", "max_new_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def generators(tiny_llama: Path) -> dict[str, Generator]:
    """Return a generator with a template of one turn, and one with a template of several."""
    return {
        name: Generator.load(GenerateConfig(base_model=str(tiny_llama), prompt_template=name, **OPTIONS))
        for name in ("alpaca", "vicuna")
    }


@pytest.fixture
def talk(
    generators: dict[str, Generator], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[list[str], list[str]]]:
    """Return `talk(*lines, template=...)`: the lines on stdout and on stderr of a conversation."""

    def talk(*lines: str, template: str = "vicuna") -> tuple[list[str], list[str]]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        capsys.readouterr()
        Chat(generators[template]).run()
        told = capsys.readouterr()
        return told.out.splitlines(), told.err.splitlines()

    return talk


def test_what_was_said_before_is_part_of_the_prompt(
    talk: Any, generators: dict[str, Generator], tmp_path: Path
) -> None:
    path = tmp_path / "said.json"
    out, _ = talk("Where does the owl live?", "And the bee?", f"/save {path}")
    messages = json.loads(path.read_text())[0]["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    generator = generators["vicuna"]
    assert generator.chat(messages[:1]).read() == messages[1]["content"]
    assert generator.chat(messages[:3]).read() == messages[3]["content"]
    assert "\n".join(out) == "\n".join(message["content"] for message in messages[1::2])


def test_reset_forgets(talk: Any, tmp_path: Path) -> None:
    path = tmp_path / "said.json"
    talk("Hi.", "/reset", "Where does the owl live?", f"/save {path}")
    assert len(json.loads(path.read_text())[0]["messages"]) == 2


def test_a_template_of_one_turn_says_so_and_remembers_nothing(talk: Any, tmp_path: Path) -> None:
    path = tmp_path / "said.jsonl"
    out, told = talk("Hi.", "Hi.", f"/save {path}", template="alpaca")
    assert "alpaca has one turn" in told[0]
    assert len(path.read_text().splitlines()) == 2
    assert out[: len(out) // 2] == out[len(out) // 2 :]


@pytest.mark.parametrize("template", ["alpaca", "vicuna"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_finetune_reads_what_was_saved(talk: Any, tmp_path: Path, template: str, ending: str) -> None:
    path = tmp_path / f"said.{ending}"
    talk("Hi.", "Where does the owl live?", f"/save {path}", template=template)
    rows = list(Rows(str(path)))
    assert [message.text for row in rows for message in row.users] == ["Hi.", "Where does the owl live?"]


def test_save_overwrites_nothing(talk: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text("mine")
    _, told = talk("Hi.", f"/save {path}", "/save", "/save x.txt", f"/save {tmp_path}/no/folder.json")
    errors = [line for line in told if line.startswith("error")]
    assert path.read_text() == "mine"
    assert "it is there already" in errors[0]
    assert "ends in .json" in errors[1] and "ends in .json" in errors[2]
    assert "could not be written (No such file or directory)" in errors[3]
    assert talk("/save x.json")[1][-1] == "error: /save: nothing was said yet"


def test_params_are_shown_and_set(talk: Any) -> None:
    _, told = talk("/params", "/params max_new_tokens=1 temperature=0.5 seed=3", "Hi.", "/params seed=none")
    assert "temperature=0 " in told[1] and "max_new_tokens=8" in told[1]
    assert "temperature=0.5" in told[2] and "max_new_tokens=1 " in told[2] and "seed=3" in told[2]
    assert told[3].startswith("(not at its end: the limit of 1 new tokens was met")
    assert "seed=none" in told[4]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/params warmth=1", "the names are temperature"),
        ("/params temperature", "NAME=VALUE"),
        ("/params temperature=warm", "warm is no number"),
        ("/params temperature=-1", "temperature -1"),
        ("/params top_p=nan", "top_p nan"),
        ("/rest", "/rest is no command"),
        ("/adapter other", "there are base"),
    ],
)
def test_a_command_that_cannot_be_done_is_one_line(talk: Any, line: str, told: str) -> None:
    _, lines = talk(line, "/params")
    assert lines[1].startswith("error: ") and told in lines[1]
    assert "temperature=0 top_p=0.75" in lines[2]


def test_the_system_message(talk: Any, generators: dict[str, Generator], tmp_path: Path) -> None:
    path = tmp_path / "said.json"
    _, told = talk("/system Be brief.", "Hi.", f"/save {path}")
    messages = json.loads(path.read_text())[0]["messages"]
    assert messages[0] == {"role": "system", "content": "Be brief."}
    assert generators["vicuna"].chat(messages[:2]).read() == messages[2]["content"]
    _, told = talk("/system Be brief.", "Hi.", template="alpaca")
    assert told[1].startswith("error: ") and "a system message" in told[1]


def test_a_history_that_is_too_long_says_what_to_do(talk: Any) -> None:
    long = "owl " * 190
    out, told = talk(long, long, "/reset", long)
    errors = [line for line in told if line.startswith("error")]
    assert len(errors) == 1 and errors[0].endswith("/reset forgets what was said before"), told
    assert len(out) == 2


def test_lines_with_slashes_and_lines_that_go_on(talk: Any, tmp_path: Path) -> None:
    path = tmp_path / "said.json"
    talk("//help", "One \\", "two", f"/save {path}", "/quit", "never")
    asked = [message["content"] for message in json.loads(path.read_text())[0]["messages"][::2]]
    assert asked == ["/help", "One \ntwo"]


def test_ctrl_c_stops_the_answer_and_not_the_program(tiny_llama: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"base_model": tiny_llama, "prompt_template": "vicuna", "max_new_tokens": 300}
    words = [f"--{name}={value}" for name, value in options.items()]
    master, slave = pty.openpty()

    def chat() -> None:
        os.close(master)
        os.dup2(slave, 0)
        sys.stdin = os.fdopen(0)
        main(["generate", "--chat", *words])

    log = tmp_path / "log"
    process = copied(chat, log)
    os.close(slave)

    def wait_for(text: str, longer_than: int = 0) -> None:
        until = time.monotonic() + 20
        while text not in log.read_text()[longer_than:]:
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.02)

    try:
        wait_for("/help lists")
        os.write(master, b"Where does the owl live?\n")
        wait_for("> ")
        size = len(log.read_text())
        while len(log.read_text()) < size + 20:
            time.sleep(0.01)
        os.kill(process, signal.SIGINT)
        wait_for("(stopped)")
        size = len(log.read_text())
        os.write(master, b"/params max_new_tokens=2\nHi.\n")
        wait_for("the limit of 2 new tokens was met", size)
        os.kill(process, signal.SIGINT)  # at the prompt
        wait_for("Ctrl-D or /quit leaves", size + 50)
        os.write(master, b"\x04")
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0, log.read_text()
        process = 0
        assert "Traceback" not in log.read_text()
    finally:
        os.close(master)
        if process:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
