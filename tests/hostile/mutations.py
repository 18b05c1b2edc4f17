"""Folders as somebody else may have made them: what a short run left, changed at random, the same every time.

Every reader of a folder, and every command, must read a changed folder or refuse it in one line: no traceback, nothing
changed outside of the output folder, no more than half a minute, and no more than 2 GB of memory over what the process
had before.
"""

import json
import os
import random
import re
import shutil
import struct
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

from faults.scene import Scene, memory

from lora_alpaca.artifacts import adapter_folder, checkpoint, run_record, source
from lora_alpaca.errors import LoraAlpacaError
from lora_alpaca.models.base import locate_base, weight_files
from lora_alpaca.models.fingerprint import hash_base
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.prompts import fitting_template, load_template
from lora_alpaca.storage.json_files import load, read_json
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.training import resume

SECONDS, MEGABYTES = 30, 2048  # the most that a folder may cost
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 10**9, 10**30, 0.5, -1e308, float("nan"), float("inf"), "", "x", "7"),
    *("\0", "é\n\x1b[2J", "\ud800", "../../precious/file.txt", "/etc/hostname", "{{ 1 }}", "(((((a+)+)+)+)+)+$"),
    "x" * 100_000,
    *([], {}, [[]], [None], [1, "a"], {"": {}}, {"a": {"b": [1]}}, [[[[[[[[[[]]]]]]]]]]),
]  # fmt: skip
DEEP = (b"[" * 200_000, b'{"a":' * 100_000, b"[" * 5000 + b"]" * 5000)


@dataclass
class Report:
    """What was tried, and what went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0  # seconds
    megabytes: float = 0.0  # the most memory that a folder took


class Folders:
    """An adapter with its checkpoints, a base and a merged model, as they were made and to be changed."""

    def __init__(self, place: Path):
        self.place, self.pristine, self.work = place, place / "pristine", place / "work"
        self.precious = place / "precious"
        self.scene = Scene(place / "scene")
        for folder in (self.pristine, self.work, self.precious / "folder"):
            folder.mkdir(parents=True)
        for name in ("file.txt", "folder/model.safetensors", "folder/config.json"):
            (self.precious / name).write_text("precious")
        shutil.copytree(self.scene.model, self.work / "base")
        self.scene.options |= {"base_model": self.work / "base"}
        ended = self.scene.finetune(self.work / "adapter", save_total_limit=2)
        assert ended.code == 0, ended.said
        ended = self.scene.command("export", lora_weights=self.work / "adapter", output_dir=self.work / "merged")
        assert ended.code == 0, ended.said
        shutil.copytree(self.work, self.pristine, dirs_exist_ok=True)
        self.outside = self.state(self.precious)

    def restore(self, name: str) -> Path:
        """Put a folder back as it was made, and return it."""
        folder = self.work / name
        now, right = self.state(folder), self.state(self.pristine / name)
        if {path: facts[1:] for path, facts in now.items()} != {path: facts[1:] for path, facts in right.items()}:
            shutil.rmtree(folder)
            shutil.copytree(self.pristine / name, folder)
        return folder

    @staticmethod
    def state(folder: Path) -> dict[str, Any]:
        """Return what can be seen of a folder: times, kinds, contents."""
        found = {}
        for path in folder.rglob("*"):
            facts = path.lstat()
            regular = path.is_file() and not path.is_symlink() and facts.st_size < 2**20
            data: Any = path.read_bytes() if regular else os.readlink(path) if path.is_symlink() else facts.st_size
            found[str(path.relative_to(folder))] = (facts.st_mtime_ns, facts.st_mode, data)
        return found


def mutate(folder: Path, precious: Path, chance: random.Random) -> str:
    """Change a folder in one to three places and return what was done to it."""
    done = []
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        if not files:
            break
        path = chance.choice([path for path in files if path.suffix == ".json"] * 2 + files)
        kinds: list[Callable[..., str]] = [_bytes, _bytes, _link, _size, _mode]
        kinds += [_json] * 8 if path.suffix == ".json" else [_header] * 5 if path.suffix == ".safetensors" else []
        kind = chance.choice(kinds)
        done.append(f"{path.relative_to(folder)} {kind.__name__[1:]} {kind(path, precious, chance)}")
    if (folder / "manifest.json").exists() and chance.random() < 0.7:
        _list_again(folder)
        done.append("and listed as it is")
    return "; ".join(done)


def _bytes(path: Path, precious: Path, chance: random.Random) -> str:
    data = path.read_bytes()
    place = chance.randrange(len(data) + 1)
    match chance.randrange(6):
        case 0:
            what, data = "cut", data[:place]
        case 1:
            what, data = "longer", data + chance.randbytes(chance.choice((1, 100, 10_000)))
        case 2:
            what, data = "nested", chance.choice(DEEP)
        case 3:
            what, data = "empty", b""
        case 4:
            what, data = "random", data[:place] + chance.randbytes(20) + data[place + 20 :]
        case _:
            what, data = "inserted", data[:place] + chance.choice((b"\0", b"{", b'"', b"\xff", b"]")) + data[place:]
    path.write_bytes(data)
    return what


def _link(path: Path, precious: Path, chance: random.Random) -> str:
    kind = chance.choice(("file", "folder", "dangling", "loop", "pipe", "device", "gone", "is a folder"))
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "is a folder":
        path.mkdir()
    elif kind != "gone":
        path.symlink_to(
            {"file": precious / "file.txt", "folder": precious / "folder", "dangling": precious / "new", "loop": path,
             "device": Path("/dev/zero")}[kind]
        )  # fmt: skip
    return kind


def _size(path: Path, precious: Path, chance: random.Random) -> str:
    size = chance.choice((1, 8, 10**6, 80 * 10**6))
    os.truncate(path, size)
    return str(size)


def _mode(path: Path, precious: Path, chance: random.Random) -> str:
    mode = chance.choice((0, 0o200, 0o444, 0o777))
    path.chmod(mode)
    return oct(mode)


def _json(path: Path, precious: Path, chance: random.Random) -> str:
    try:
        content = load(path)
    except ValueError:
        return "is none"
    places = list(_places(content))[:2000]
    if not places:
        return "is empty"
    holder, key = chance.choice(places)
    match chance.randrange(5):
        case 0:
            what = f"without {key}"
            del holder[key]
        case 1 if isinstance(holder, dict):
            what = f"{key} under another name"
            holder[f"{key}_"] = holder.pop(key)
        case 2 if isinstance(holder[key], (int, float)):
            holder[key] = chance.choice((-holder[key], holder[key] * 1000, holder[key] + 1, str(holder[key])))
            what = f"{key} = {holder[key]!r:.40}"
        case _:
            holder[key] = chance.choice(ODD)
            what = f"{key} = {holder[key]!r:.40}"
    path.write_text(json.dumps(content))
    return what


def _places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every holder and key of a JSON value; those near the top first."""
    level = [content]
    while level:
        below = []
        for holder in level:
            for key in list(holder if isinstance(holder, dict) else range(len(holder))) if holder else ():
                yield holder, key
                if isinstance(holder[key], (dict, list)):
                    below.append(holder[key])
        level = below


def _header(path: Path, precious: Path, chance: random.Random) -> str:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    if len(data) < 8 or (length := struct.unpack("<Q", data[:8])[0]) > len(data):
        return "is none"
    if chance.random() < 0.1:
        path.write_bytes(struct.pack("<Q", chance.choice((0, 2**63, length + 1, 10**8))) + data[8:])
        return "length"
    header = json.loads(data[8 : 8 + length])
    name = chance.choice([name for name in header if name != "__metadata__"])
    match chance.randrange(5):
        case 0:
            header[name]["dtype"] = chance.choice(("F64", "F16", "BF16", "I8", "BOOL", "F8_E4M3", "U64", "C64", "x", 0))
        case 1:
            header[name]["shape"] = chance.choice(([], [0], [-1], [2**40, 2**40], [1], None, [64]))
        case 2:
            header[name]["data_offsets"] = chance.choice(([0, 0], [0, 2**62], [8, 0], [0, len(data)], None))
        case 3:
            header[f"{name}.x"] = header.pop(name)
        case _:
            header[name] = chance.choice(ODD)
    told = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(told)) + told + data[8 + length :])
    return f"of {name}"


def _list_again(folder: Path) -> None:
    """Let the manifest of a checkpoint list the files as they are now."""
    manifest = read_json(folder / "manifest.json")
    if not isinstance(manifest.get("files"), dict):
        return
    for name in manifest["files"]:
        path = folder / str(name).replace("\0", "")
        if path.is_file() and folder in path.parents and path.stat().st_size < 10**7:
            data = path.read_bytes()
            manifest["files"][name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


# ------------------------------------------------------------------------------------------------------- in process


def read_adapter(folder: Path) -> None:
    OutputFolder(folder).check(overwrite=True, remedy="")
    opened = source.open_source(lora_weights=str(folder), template="alpaca_short")
    opened.verify()
    opened.load_tokenizer()
    adapter_folder.read_weights(folder)


def read_finished(folder: Path) -> None:
    found = OutputFolder(folder)
    if found.status == "finished":
        run_record.finished_run(folder)
        run_record.require_comparable(found.record, folder, LoraAlpacaError, "")
    checkpoint.newest(folder)


def read_checkpoint(folder: Path) -> None:
    found = checkpoint.load(checkpoint.resolve(str(folder)))
    resume._require_complete(found, folder / checkpoint.STATE)


def read_checkpoint_as_adapter(folder: Path) -> None:
    info = adapter_folder.read_info(folder)
    adapter_folder.verify(folder, info, locate_base(info.base_model))


def read_base(folder: Path) -> None:
    base = locate_base(str(folder))
    weight_files(base)
    hash_base(base)
    meta_model(base)
    fitting_template(["messages"], load_tokenizer(base)[0])


def read_merged(folder: Path) -> None:
    opened = source.open_source(base_model=str(folder))
    opened.load_tokenizer()
    meta_model(opened.base)


def read_template(folder: Path) -> None:
    for path in folder.glob("*.json"):
        try:
            load_template(str(path))
        except LoraAlpacaError:
            continue


READERS: list[tuple[str, Callable[[Path], None]]] = [
    ("adapter", read_adapter), ("adapter", read_finished), ("adapter/checkpoint-3", read_checkpoint),
    ("adapter/checkpoint-3", read_checkpoint_as_adapter), ("base", read_base), ("merged", read_merged),
    ("adapter", read_template),
]  # fmt: skip


def in_process(folders: Folders, number: int, report: Report, seed: int = 0) -> None:
    """Read so many changed folders in this process."""
    for case in range(number):
        chance = random.Random(f"{seed} {case}")
        name, reader = READERS[case % len(READERS)]
        for restored in ("adapter", "base", "merged"):
            folders.restore(restored)
        what = f"{case} {reader.__name__}: {mutate(folders.work / name, folders.precious, chance)}"
        before, begun = folders.state(folders.work), time.monotonic()
        had = _forget_peak()
        report.counts[f"in process {reader.__name__}"] += 1
        try:
            with warnings.catch_warnings(), silence():
                warnings.simplefilter("ignore")
                reader(folders.work / name)
        except LoraAlpacaError as error:
            report.counts["in process refused"] += 1
            if "\n" in str(error) or _is_unprintable(str(error)) or len(str(error)) > 5000:
                report.faults.append(f"{what}: no plain line: {str(error)[:300]!r}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            where = sys.exc_info()[2]
            while where and where.tb_next:
                where = where.tb_next
            at = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where else ""
            report.faults.append(f"{what}: {type(error).__name__} at {at}: {str(error)[:200]!r}")
        taken = max(0.0, memory("VmHWM") - had) if had else 0.0
        _judge(folders, what, before, time.monotonic() - begun, taken, report)


def _forget_peak() -> float:
    """Let the peak of this process's memory begin anew, and return its memory in MB; 0 where neither can be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return 0.0
    return memory("VmRSS")


def _judge(
    folders: Folders, what: str, before: dict[str, Any], seconds: float, megabytes: float, report: Report
) -> None:
    report.slowest, report.megabytes = max(report.slowest, seconds), max(report.megabytes, megabytes)
    if seconds > SECONDS:
        report.faults.append(f"{what}: took {seconds:.0f} s")
    if megabytes > MEGABYTES:
        report.faults.append(f"{what}: took {megabytes:.0f} MB")
    if folders.state(folders.precious) != folders.outside:
        report.faults.append(f"{what}: changed what lies outside")
        folders.outside = folders.state(folders.precious)
    if folders.state(folders.work) != before:
        report.faults.append(f"{what}: changed the folder that it reads")


@contextmanager
def silence() -> Iterator[None]:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


def _is_unprintable(text: str) -> bool:
    """Return whether a line could not be printed, or would do something to a terminal."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return bool(re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text))


# --------------------------------------------------------------------------------------------------- whole commands


def _commands(folders: Folders, out: Path) -> list[tuple[str, str, dict[str, Any]]]:
    """Return the folder to change, the command and its options, of every command that reads a folder."""
    work, tune = folders.work, folders.scene.options
    said = {"instruction": "Hi.", "max_new_tokens": 2, "prompt_template": "alpaca_short"}
    return [
        ("adapter", "generate", {"lora_weights": work / "adapter"} | said),
        ("adapter", "export", {"lora_weights": work / "adapter", "output_dir": out}),
        ("adapter", "finetune", tune | {"init_adapter": work / "adapter", "output_dir": out}),
        ("adapter", "finetune", tune | {"resume": True, "output_dir": work / "adapter"}),
        ("adapter", "export", {"lora_weights": work / "merged", "output_dir": work / "adapter", "overwrite": True}),
        ("adapter/checkpoint-3", "finetune", tune | {"resume_from_checkpoint": work / "adapter" / "checkpoint-3",
                                                     "output_dir": out, "max_steps": 4}),
        ("adapter/checkpoint-3", "generate", {"lora_weights": work / "adapter" / "checkpoint-3"} | said),
        ("base", "finetune", tune | {"output_dir": out}),
        ("base", "generate", {"base_model": work / "base", "lora_weights": "none"} | said),
        ("merged", "generate", {"base_model": work / "merged"} | said),
        ("adapter", "finetune", tune | {"overwrite": True, "output_dir": work / "adapter"}),
    ]  # fmt: skip


def commands(folders: Folders, number: int, report: Report, seed: int = 0) -> None:
    """Give so many whole commands changed folders."""
    out = folders.place / "out"
    for case in range(number):
        chance = random.Random(f"commands {seed} {case}")
        shutil.rmtree(out, ignore_errors=True)
        for restored in ("adapter", "base", "merged"):
            folders.restore(restored)
        choices = _commands(folders, out)
        name, verb, options = choices[case % len(choices)]
        what = f"command {case} {verb} {name}: {mutate(folders.work / name, folders.precious, chance)}"
        before, begun = folders.state(folders.work), time.monotonic()
        ended = folders.scene.command(verb, **options)
        report.counts[f"commands {verb}"] += 1
        report.counts["commands refused"] += ended.code != 0
        if ended.code not in (0, 1, 2) or "Traceback" in ended.said or (ended.code and not ended.error()):
            report.faults.append(f"{what}: ended with {ended.code}: {ended.last()}")
        elif ended.code and _is_unprintable(ended.error()):
            report.faults.append(f"{what}: {ended.error()!r}")
        if Path(str(options.get("output_dir"))) == folders.work / "adapter":
            before = folders.state(folders.work)  # it is the output folder
        _judge(folders, what, before, time.monotonic() - begun, ended.megabytes, report)
