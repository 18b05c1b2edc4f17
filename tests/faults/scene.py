"""Where faults are tried: a tiny model, rows, and our commands in forked processes that may die of them."""

import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from command import error_in
from conftest import ARCHITECTURES, _save_sentencepiece
from safetensors.torch import load_file

from lora_alpaca.cli.verbs import main
from lora_alpaca.storage.json_files import read_json
from lora_alpaca.storage.output_folder import MANIFEST, RECORD

from .phases import Entry, note, read

PATIENCE = 120  # seconds for one command
ADAPTER, MODEL = "adapter_model.safetensors", "model.safetensors"


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (-n after signal n, -999 after a timeout), its output, and its phases.

    `megabytes` is the most memory that it took over what the process had that it is a copy of.
    """

    code: int
    said: str
    phases: list[Entry]
    megabytes: float = 0.0

    def error(self) -> str:
        """Return its one line of error; a traceback, or more or fewer than one such line, is none."""
        return error_in(self.said)

    def last(self) -> str:
        """Return its last words, for a failure's line."""
        return " | ".join(self.said.strip().splitlines()[-3:])[-300:]


def trace_of(log: Path) -> Path:
    """Return where a process with this log notes its phases; both are emptied before it begins."""
    return log.with_suffix(".phases")


def copied(work: Callable[[], None], log: Path) -> int:
    """Begin some work in a copy of this process and return its number; SystemExit gives its exit code, an error 70.

    Its output goes to `log`.
    """
    log.write_text("")
    trace_of(log).write_text("")
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        torch.set_num_threads(1)  # the threads of a pool are not copied
        told = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(told, 1)
        os.dup2(told, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        note(trace_of(log))
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 70
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def memory(kind: str) -> float:
    """Return what Linux says of the memory of this process, in MB: `VmRSS` now, `VmHWM` at its peak; 0 elsewhere."""
    try:
        found = re.search(rf"^{kind}:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return 0.0
    return int(found[1]) / 1024 if found else 0.0


def forked(work: Callable[[], None], log: Path, patience: float = PATIENCE) -> Ended:
    """Do some work in a copy of this process and return how that ended."""
    before = memory("VmRSS")
    process = copied(work, log)
    until = time.monotonic() + patience
    pause = 0.002
    while True:
        done, status, usage = os.wait4(process, os.WNOHANG)
        if done:
            said = log.read_text(errors="replace") if log.exists() else ""
            taken = max(0.0, usage.ru_maxrss / 1024 - before) if before else 0.0
            return Ended(os.waitstatus_to_exitcode(status), said, read(trace_of(log)), taken)
        if time.monotonic() > until:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return Ended(-999, f"no end after {patience} s: {log.read_text(errors='replace')}", [])
        time.sleep(pause)
        pause = min(0.02, pause * 1.5)


@dataclass
class Scene:
    """A folder with a tiny model and rows; `options` are those of a run of a few steps that does all a run can do."""

    folder: Path
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make model and rows."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model, self.data, self.log = self.folder / "model", self.folder / "rows.json", self.folder / "said.txt"
        make_rows(self.data)
        if not self.model.exists():
            make_model(self.model)
        self.options = {
            "base_model": self.model, "data_path": self.data, "batch_size": 4, "max_steps": 3, "save_steps": 1,
            "eval_steps": 2, "val_set_size": 2, "save_total_limit": 1, "learning_rate": 1e-2, "cutoff_len": 128,
            "prompt_template_name": "alpaca_short", "dtype": "fp32", "load_8bit": False, "logging_steps": 1,
            "lora_dropout": 0.1,
        } | self.options  # fmt: skip

    def finetune(self, out: Path, before: Callable[[], Any] | None = None, **options: Any) -> Ended:
        """Return how `finetune` into a folder ended; `before` is called in its process first."""
        return self.command("finetune", before, **self.options | {"output_dir": out} | options)

    def command(self, verb: str, before: Callable[[], Any] | None = None, **options: Any) -> Ended:
        """Return how a command ended, typed with these options."""
        words = [f"--{name}={value}" for name, value in options.items() if value is not None]

        def work() -> None:
            if before is not None:
                before()
            main([verb, *words])

        return forked(work, self.log)

    def fresh(self, name: str = "out") -> Path:
        """Return a path at which there is nothing."""
        path = self.folder / name
        for there in (path, *self.folder.glob(f"{name}.*"), *self.folder.glob(f".{name}.*")):
            shutil.rmtree(there, ignore_errors=True)
        return path


def make_rows(path: Path, count: int = 18, shift: int = 0) -> None:
    """Write rows in Alpaca's format: sums, whose answers follow; `shift` makes other ones."""
    sums = [(number, number * number + shift) for number in range(count)]
    rows = [{"instruction": "Add the numbers.", "input": f"{a} + {b}", "output": str(a + b)} for a, b in sums]
    path.write_text(json.dumps(rows), encoding="utf-8")


def make_model(folder: Path, seed: int = 0) -> None:
    """Write a random one-layer Llama with a tokenizer of its own."""
    folder.mkdir(parents=True)
    texts = [
        "### Instruction:",
        "Add the numbers.",
        "### Input:",
        "0123456789 + 0 1 2 3 4 5 6 7 8 9",
        "### Response:",
    ] * 9
    _save_sentencepiece("Llama", texts, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sizes = ARCHITECTURES["Llama"] | {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), bos_token_id=1, eos_token_id=2, pad_token_id=None, **sizes
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.LlamaForCausalLM(config).save_pretrained(folder)


def tensors(folder: Path, name: str = "") -> dict[str, torch.Tensor]:
    """Return the tensors of a file in a folder, by default of what a run has trained; none where it is not whole."""
    name = name or (MODEL if (folder / MODEL).exists() else ADAPTER)
    try:
        return load_file(folder / name)
    except Exception:
        return {}


def same(one: Path, other: Path, name: str = "") -> bool:
    """Return whether two folders hold the same tensors, to the bit."""
    first, second = tensors(one, name), tensors(other, name)
    return first.keys() == second.keys() != set() and all(torch.equal(first[key], second[key]) for key in first)


def whole(folder: Path) -> bool:
    """Return whether a folder says that it is finished, and all that it lists is there."""
    record = read_json(folder / RECORD)
    return record.get("status") == "finished" and all((folder / name).is_file() for name in record["files"])


def hidden(folder: Path) -> list[str]:
    """Return the hidden folders that are left in a folder."""
    return sorted(path.name for path in folder.glob(".*") if path.is_dir())


def steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in a folder."""
    return sorted(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*") if path.name[11:].isdigit())


def losses(folder: Path) -> list[Any]:
    """Return what the record of a finished run says of its steps, but for times and memory."""
    history: Iterable[dict[str, Any]] = read_json(folder / RECORD).get("result", {}).get("history", [])
    return [
        {key: value for key, value in entry.items() if key not in ("tokens_per_second", "memory")} for entry in history
    ]


def listed(folder: Path) -> dict[str, Any]:
    """Return the manifest of a checkpoint."""
    return read_json(folder / MANIFEST)
