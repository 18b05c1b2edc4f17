"""Power cuts: what a disk may hold that keeps only what was flushed, after every prefix of what a run wrote.

The operations of real commands are recorded, with their data. For every prefix the folder is built anew as a disk could
hold it: of data and of names that were not flushed nothing, some or all is kept. No torch is needed to judge that:
what `checkpoints.newest` takes must be as it was written, and no older than the newest that was flushed with its name.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from faults.operations import Watch
from faults.report import Report, chosen
from faults.scene import Ended, Scene, losses, same, steps
from lora_alpaca.artifacts import checkpoint
from lora_alpaca.errors import CheckpointError
from lora_alpaca.storage.output_folder import RECORD, read_record

DATA = ("lost", "half", "kept")  # what is not flushed of a file
NAMES = ("lost", "first half", "every other", "kept")  # what is not flushed of the names in folders
NOTES = "notes.txt"  # a file of the user's own
RESUMED = 12  # every so many of the images are also gone on from
Image = dict[str, bytes | None]  # path -> contents, None of a folder


@dataclass(eq=False)
class Node:
    """A file or a folder, whatever it is called; `flushed` is None as long as nothing of a file was."""

    folder: bool
    entries: dict[str, "Node"] = field(default_factory=dict)
    data: bytes = b""
    flushed: bytes | None = None
    settled: bool = False  # of a file, whether all its data is flushed


@dataclass(eq=False)
class Naming:
    """A change of names, whole or not at all: entries of folders, None for one that goes. `place` makes it last."""

    changes: list[tuple[Node, str, Node | None]]
    place: Node
    flushed: bool = False


class Disk:
    """A folder as processes see it, with what they have not flushed yet."""

    def __init__(self, root: Path):
        self.path, self.root = str(root), Node(folder=True)
        self.names: list[Naming] = []
        for path in sorted(root.rglob("*")):  # what was there before has been there for long
            node = Node(path.is_dir())
            if not node.folder:
                node.data = node.flushed = path.read_bytes()
                node.settled = True
            self._name([(*self._place(str(path)), node)])
        for naming in self.names:
            naming.flushed = True

    def _place(self, path: str) -> tuple[Node, str]:
        *above, name = os.path.relpath(path, self.path).split(os.sep)
        folder = self.root
        for part in above:
            folder = folder.entries[part]
        return folder, name

    def node(self, path: str) -> Node | None:
        """Return what is at a path."""
        if path == self.path:
            return self.root
        try:
            folder, name = self._place(path)
        except KeyError:
            return None
        return folder.entries.get(name)

    def _name(self, changes: list[tuple[Node, str, Node | None]]) -> None:
        for folder, name, node in changes:
            if node is None:
                folder.entries.pop(name, None)
            else:
                folder.entries[name] = node
        self.names.append(Naming(changes, changes[0][0]))

    def do(self, kind: str, path: str, more: Any) -> None:
        """Let an operation happen."""
        node = self.node(path)
        if kind in ("open", "mkdir"):
            if node is None:
                self._name([(*self._place(path), Node(folder=kind == "mkdir"))])
            elif kind == "open" and more:
                node.data, node.settled = b"", False
        elif kind == "write":
            assert node is not None
            node.data, node.settled = node.data + more, False
        elif kind == "fsync" and more is None:
            for naming in self.names:
                naming.flushed |= naming.place is node
        elif kind == "fsync":
            assert node is not None
            node.data = node.flushed = more
            node.settled = True
        elif kind == "replace":
            assert node is not None
            self._name([(*self._place(str(more)), node), (*self._place(path), None)])
        elif kind in ("unlink", "rmdir") and node is not None:
            self._name([(*self._place(path), None)])

    def image(self, data: str, names: str) -> Image:
        """Return what is there after a power cut."""
        unflushed = [naming for naming in self.names if not naming.flushed]
        kept = {
            "lost": [], "first half": unflushed[: len(unflushed) // 2], "every other": unflushed[::2], "kept": unflushed
        }[names]  # fmt: skip
        entries: dict[Node, dict[str, Node]] = {}
        for naming in self.names:
            if naming.flushed or naming in kept:
                for folder, name, node in naming.changes:
                    if node is None:
                        entries.get(folder, {}).pop(name, None)
                    else:
                        entries.setdefault(folder, {})[name] = node

        def below(folder: Node, path: str) -> Iterator[tuple[str, bytes | None]]:
            for name, node in entries.get(folder, {}).items():
                yield os.path.join(path, name), None if node.folder else self._contents(node, data)
                if node.folder:
                    yield from below(node, os.path.join(path, name))

        return dict(below(self.root, ""))

    def _contents(self, node: Node, data: str) -> bytes:
        if node.settled or data == "kept":
            return node.data
        return (node.flushed or b"") if data == "lost" else node.data[: len(node.data) // 2]

    def files(self, path: str) -> dict[str, bytes]:
        """Return the files of a folder as processes see them."""
        found = {}
        node = self.node(path)
        for name, entry in node.entries.items() if node else ():
            if entry.folder:
                found |= {f"{name}/{inner}": data for inner, data in self.files(os.path.join(path, name)).items()}
            else:
                found[name] = entry.data
        return found


@dataclass
class Case:
    """A command whose power is cut, and how it is given again to what a disk then holds."""

    name: str
    command: Callable[..., Ended]  # takes `before`
    again: Callable[[Path], Ended] | None = None  # takes the folder


def programme(share: float, folder: Path) -> Report:
    """Cut the power after every operation, or a share of them, of a run, a run over an old one, and an export."""
    report = Report()
    scene = Scene(folder)
    work, image = folder / "work", folder / "image"
    out, over = work / "out", {"overwrite": True, "seed": 7}
    export = partial(scene.command, "export", output_dir=work / "hf")
    work.mkdir()
    for case in (
        Case("run", partial(scene.finetune, out), partial(scene.finetune, resume=True)),
        Case("run over a finished one", partial(scene.finetune, out, **over), partial(scene.finetune, **over)),
        Case("export", partial(export, lora_weights=out)),
        Case("export over a finished one", partial(export, lora_weights=out, overwrite=True)),
    ):
        if case.name == "export over a finished one":
            (work / "hf" / NOTES).write_text("mine")
        disk = Disk(work.resolve())
        judge = _Judge(disk, strict=not disk.names)
        log = _record(case.command, work, scene)
        for place in chosen(list(range(len(log) + 1)), share):
            for operation in log[judge.done : place]:
                judge.follow(*operation)
            for data, names in product(DATA, NAMES):
                report.count("power_cuts")
                if not judge.is_new(held := disk.image(data, names)):
                    continue
                report.count("power_cuts images")
                what = f"{case.name}: cut after {place} of {len(log)} operations, data {data}, names {names}"
                _build(held, image)
                report.failures += [f"{what}: {wrong}" for wrong in judge.wrong_with(image)]
                if case.again is not None and report.counts["power_cuts images"] % RESUMED == 1:
                    report.count("power_cuts resumed")
                    ended = case.again(image / "out")
                    right = ended.code == 0 and same(image / "out", out) and losses(image / "out") == losses(out)
                    report.expect(right, f"{what}: gone on, it comes to something else: {ended.last()}")
        assert judge.least or "export" in case.name, "no checkpoint was ever flushed"
    return report


def _record(command: Callable[..., Ended], work: Path, scene: Scene) -> list[tuple[str, str, Any]]:
    """Return the operations of a command, with what was written; of a flushed file, all its contents."""
    told = scene.folder / "operations.pickle"

    def begin() -> None:
        file = open(told, "wb")  # noqa: SIM115

        def before(kind: str, path: Path, more: Any) -> None:
            if kind == "fsync" and path.is_file():
                with watch.own_open(path, "rb") as flushed:
                    more = flushed.read()
            pickle.dump((kind, str(path), str(more) if isinstance(more, Path) else more), file)
            file.flush()

        watch = Watch(work, before)
        watch.begin()

    ended = command(before=begin)
    assert ended.code == 0, ended.said
    found = []
    with open(told, "rb") as file:
        while True:
            try:
                found.append(pickle.load(file))  # of our own process, a moment ago
            except EOFError:
                return found


def _build(held: Image, image: Path) -> None:
    shutil.rmtree(image, ignore_errors=True)
    image.mkdir()
    for path, data in sorted(held.items()):
        if data is None:
            (image / path).mkdir(parents=True, exist_ok=True)
        else:
            (image / path).parent.mkdir(parents=True, exist_ok=True)
            (image / path).write_bytes(data)


class _Judge:
    """What a disk must hold: it follows the operations, and looks at what is left. `strict`: nothing was before."""

    def __init__(self, disk: Disk, strict: bool):
        self.disk, self.strict, self.done = disk, strict, 0
        self.least = 0  # the step of the newest checkpoint that was flushed with its name
        self._renamed = 0
        self._seen: set[str] = set()
        self._saved: list[dict[str, bytes]] = []  # the files of checkpoints, as they were when they got their names
        self._finished: list[dict[str, bytes]] = []  # and of folders when their record said that they are finished
        self._notes = [path.relative_to(disk.path) for path in Path(disk.path).glob(f"*/{NOTES}")]
        for name in ("out", "hf"):
            self._note(name)
            for step in steps(Path(disk.path) / name):
                self._saved.append(disk.files(f"{disk.path}/{name}/checkpoint-{step}"))

    def _note(self, name: str) -> None:
        files = self.disk.files(f"{self.disk.path}/{name}")
        if RECORD in files and json.loads(files[RECORD])["status"] == "finished":
            self._finished.append(files)

    def follow(self, kind: str, path: str, more: Any) -> None:
        """Let an operation happen."""
        self.disk.do(kind, path, more)
        self.done += 1
        name = Path(str(more)).name if kind == "replace" else ""
        if name.startswith("checkpoint-"):
            self._renamed = int(name.removeprefix("checkpoint-"))
            self._saved.append(self.disk.files(more))
        elif name in (RECORD, "out", "hf"):
            self._note("hf" if "hf" in more else "out")
        elif kind == "fsync" and Path(path).name == "out":
            self.least = self._renamed

    def is_new(self, held: Image) -> bool:
        """Return whether the same has not been looked at before, with the same to be found."""
        key = hashlib.sha256(repr((sorted(held.items()), self.least)).encode()).hexdigest()
        return key not in self._seen and not self._seen.add(key)  # type: ignore[func-returns-value]

    def wrong_with(self, image: Path) -> list[str]:
        """Return what is wrong with what a disk holds."""
        wrong = []
        try:
            newest, _ = checkpoint.newest(image / "out") if (image / "out").exists() else (None, {})
        except CheckpointError as error:
            newest = None
            if self.strict:
                wrong.append(f"no checkpoint verifies: {error}")
        step = int(newest.name.removeprefix("checkpoint-")) if newest else 0
        if step < self.least:
            wrong.append(f"checkpoint {self.least} was flushed, and the newest that is taken is {step}")
        if newest and _files(newest) not in self._saved:
            wrong.append(f"a corrupt {newest.name} is taken")
        if not all((image / path).is_file() for path in self._notes):
            wrong.append("the user's file is lost")
        for name in ("out", "hf"):
            record = read_record(image / name)
            if record.get("status") == "finished":
                now = _files(image / name)
                if not any(all(now.get(file) == then[file] for file in record["files"]) for then in self._finished
                           if then.keys() >= set(record["files"])):  # fmt: skip
                    wrong.append(f"{name} says that it is finished, and its files are not those that were saved")
        return wrong


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
