"""Disks that are full, fail or refuse: the older checkpoint stays, one line is said, and the run can be gone on with.

The faults are put into Python's own functions in a forked process, where the real command runs: a disk with so many
bytes left, errors of single operations, and every operation failing once. A limit on the size of files, which the
system keeps, stands for the writers in other languages.
"""

import errno
import itertools
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from faults.operations import Before, Watch
from faults.report import Report, chosen
from faults.scene import Ended, Scene, hidden, losses, same, whole
from lora_alpaca.artifacts import checkpoint
from lora_alpaca.storage.output_folder import RECORD

SIZES = 20
ERRORS = [
    ("write", errno.ENOSPC), ("write", errno.EIO), ("fsync", errno.EIO), ("fsync", errno.ENOSPC),
    ("replace", errno.EIO), ("replace", errno.EACCES), ("open", errno.EACCES), ("open", errno.EROFS),
    ("mkdir", errno.ENOSPC), ("chmod", errno.EROFS), ("unlink", errno.EIO), ("rmdir", errno.EIO),
]  # fmt: skip
REMOVALS = {"unlink", "rmdir"}  # without which nothing is lost
TOO_LARGE = 6000  # bytes: more than a checkpoint's largest file has, less than a tokenizer
WARNING = "warning: step "


def failing(kind: str, number: int, where: str, times: float = float("inf")) -> Before:
    """Return what raises an error before operations of a kind on paths with `where` in them, so many times."""
    left = times

    def before(found: str, path: Path, more: Any) -> None:
        nonlocal left
        if found == kind and where in f"{path}/" and left:
            left -= 1
            raise OSError(number, os.strerror(number), str(path))

    return before


def failing_at(place: int, number: int) -> Before:
    """Return what raises an error before the operation of that number, counted from 1."""
    counted = itertools.count(1)

    def before(kind: str, path: Path, more: Any) -> None:
        if next(counted) == place:
            raise OSError(number, os.strerror(number), str(path))

    return before


def nearly_full(folder: Path, left: int) -> Before:
    """Return what lets files below a folder grow by so many bytes: a write ends there, and the next one fails."""
    begun = _bytes(folder)

    def before(kind: str, path: Path, more: Any) -> int | None:
        if kind != "write":
            return None
        free = begun + left - _bytes(folder)
        if free <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return free if free < len(more) else None

    return before


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _limit_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (TOO_LARGE, resource.RLIM_INFINITY))


def programme(share: float, folder: Path) -> Report:
    """Try the sizes, the errors, the final save, and every operation of a run and of an export; or a share of each."""
    disk = _Disk(Scene(folder, {"max_steps": 6, "save_total_limit": 2}))
    disk.sizes(share)
    disk.errors(share)
    disk.final_saves(share)
    disk.every_operation(share)
    return disk.report


class _Disk:
    def __init__(self, scene: Scene):
        self.scene, self.report, self.work = scene, Report(), scene.folder / "work"
        self.out, self.lock = self.work / "out", self.work / ".out.lock"
        self.right, self.begun, self.elsewhere = (scene.folder / name for name in ("right", "begun", "tmp"))
        self.elsewhere.mkdir()
        ended = scene.finetune(self.right)
        assert ended.code == 0, ended.said

        def killed(kind: str, path: Path, more: Any) -> None:
            if "checkpoint-3" in str(path):
                os._exit(9)

        died = scene.finetune(self.begun, lambda: Watch(self.begun, killed).begin())
        assert died.code == 9, died.said

    # ----------------------------------------------------------------------------------------------- the faults

    def sizes(self, share: float) -> None:
        """Go on from step 2 on disks with ever more space left, from none to two checkpoints and the final adapter."""
        one, record = _bytes(self.right / "checkpoint-5"), (self.begun / RECORD).stat().st_size
        for left in chosen([round(3 * one * number / (SIZES - 1)) for number in range(SIZES)], share):
            self.report.count("disk_full")
            ended = self._fault(lambda left=left: nearly_full(self.out, left))
            if left < record:  # too little even to begin
                self.report.expect(ended.code == 2, f"{left} bytes left: ended with {ended.code}: {ended.last()}")
            self._judge(f"{left} bytes left", ended, must_fail=record <= left < one)

    def errors(self, share: float) -> None:
        """Let every save fail with an error, and then one save alone."""
        for kind, number in chosen(ERRORS, share):
            name = f"{kind} {errno.errorcode[number]}"
            place = "checkpoint-" if kind in REMOVALS else ".checkpoint-"
            self.report.count("disk_errors")
            ended = self._fault(lambda case=(kind, number, place): failing(*case))
            self._judge(f"always {name}", ended, must_fail=kind not in REMOVALS)
            self.report.count("disk_errors once")
            ended = self._fault(lambda case=(kind, number, place): failing(*case, times=1))
            self._judge(f"once {name}", ended)
            self.report.expect(ended.code == 0, f"once {name}: ended with {ended.code}: {ended.last()}")

    def final_saves(self, share: float) -> None:
        """Let the final save fail: the adapter lies elsewhere, complete, and loads."""
        places = [(*error, "/.final.partial") for error in ERRORS if error[0] not in REMOVALS]
        places += [("replace", errno.EIO, f"/{name}.partial") for name in (".lora_alpaca.json",)]
        for kind, number, where in chosen([*places, ("", 0, "")], share):
            name = f"final save {kind} {errno.errorcode.get(number, 'file too large')} {where}"
            self.report.count("disk_final_saves")
            ended = self._fault(lambda case=(kind, number, where): self._final(*case))
            self._judge(name, ended)
            found = list(self.elsewhere.iterdir())
            self.report.expect(ended.code == 1, f"{name}: ended with {ended.code}: {ended.last()}")
            if kind:  # a limit on files is one there too
                complete = len(found) == 1 and whole(found[0]) and same(found[0], self.right)
                self.report.expect(complete, f"{name}: no complete adapter elsewhere: {found}")
                self.report.expect(bool(found) and str(found[0]) in ended.error(), f"{name}: {ended.error()}")
                exported = self.scene.command("export", lora_weights=found[0], output_dir=self.scene.fresh("hf"))
                self.report.expect(exported.code == 0, f"{name}: what lies elsewhere cannot be used: {exported.last()}")

    def _final(self, kind: str, number: int, where: str) -> Before:
        if not kind:
            return lambda found, path, more: _limit_files() if self._over(path) and ".final" in str(path) else None
        fails = failing(kind, number, where)
        return lambda found, path, more: fails(found, path, more) if self._over(path) else None

    def _over(self, path: Path) -> bool:
        """Whether the last step was taken: the record is written at the beginning too."""
        return (self.out / "checkpoint-5").exists()

    def every_operation(self, share: float) -> None:
        """Let every operation of a run, of making room for it, and of an export, fail once."""
        hf = self.scene.folder / "exports" / "hf"
        hf.parent.mkdir()
        run, over = (partial(self.scene.finetune, self.out, **{way: True}) for way in ("resume", "overwrite"))
        export = partial(self.scene.command, "export", lora_weights=self.right, output_dir=hf)
        limited = export(before=_limit_files)
        self.report.count("disk_operations")
        self.report.expect(limited.code != 0, f"export with limited files: {limited.last()}")
        self._judge_export(hf, export, "export: files too large", limited)
        for name, command, watched, start in (
            ("run", run, self.work, self._start),
            ("overwriting run", over, self.work, self._start_over),
            ("export", export, hf.parent, lambda: shutil.rmtree(hf, ignore_errors=True)),
        ):
            start()
            kinds = self._operations(watched, command)
            if command is over:  # what comes after the beginning is as in the other run
                kinds = kinds[: kinds.index("first save")]
            kinds = [kind for kind in kinds if kind != "first save"]
            for place in chosen(list(range(1, len(kinds) + 1)), share):
                kind, error = kinds[place - 1], (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EROFS)[place % 4]
                start()
                ended = command(before=lambda w=watched, case=(place, error): Watch(w, failing_at(*case)).begin())
                what = f"{name}: operation {place} of {len(kinds)}, {kind}, fails with {errno.errorcode[error]}"
                self.report.count("disk_operations")
                if command is export:
                    self._judge_export(hf, export, what, ended)
                else:
                    self._judge(what, ended, again=over if ended.code == 2 and command is over else run)

    def _operations(self, watched: Path, command: Callable[..., Ended]) -> list[str]:
        told = self.scene.folder / "kinds.txt"
        told.write_text("")

        def before(kind: str, path: Path, more: Any) -> None:
            with watch.own_open(told, "a") as file:
                first = ".checkpoint-" in str(path) and "first save" not in told.read_text()
                file.write(("first save\n" if first else "") + f"{kind}\n")

        watch = Watch(watched, before)
        ended = command(before=watch.begin)
        assert ended.code == 0, ended.said
        return told.read_text().splitlines()

    # --------------------------------------------------------------------------------------------- the judgement

    def _start(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.begun, self.out)
        shutil.rmtree(self.elsewhere)
        self.elsewhere.mkdir()

    def _start_over(self) -> None:
        self._start()
        shutil.rmtree(self.out)
        shutil.copytree(self.right, self.out)

    def _fault(self, before: Callable[[], Before]) -> Ended:
        """Go on from step 2 with a fault."""
        self._start()

        def begin() -> None:
            tempfile.tempdir = str(self.elsewhere)
            Watch(self.work, before()).begin()

        return self.scene.finetune(self.out, begin, resume=True)

    def _judge(
        self, what: str, ended: Ended, must_fail: bool = False, again: Callable[[], Ended] | None = None
    ) -> None:
        """Look at what a run with a fault says and leaves, and go on with it on a sound disk."""
        expect, out = self.report.expect, self.out
        warnings = [line for line in ended.said.splitlines() if line.startswith(WARNING)]
        named = all("no checkpoint could be written (" in line for line in warnings)
        expect(named, f"{what}: {warnings}")
        expect("Traceback" not in ended.said, f"{what}: {ended.last()}")
        expect(ended.code in (0, 1, 2), f"{what}: ended with {ended.code}: {ended.last()}")
        expect(ended.code == 0 or bool(ended.error()), f"{what}: not one line: {ended.last()}")
        if ended.code == 0:
            expect(same(out, self.right), f"{what}: it came to something else")
        if must_fail:
            expect(ended.code == 1 and len(warnings) == 3, f"{what}: {len(warnings)} warnings, then {ended.last()}")
            expect("3 times in a row" in ended.error(), f"{what}: {ended.error()}")
            expect((out / "checkpoint-2").is_dir(), f"{what}: the older checkpoint is gone")
        if ended.code == 1:
            newest, _ = checkpoint.newest(out)
            expect(newest is not None, f"{what}: no checkpoint is whole")
        if not any(kind in what for kind in REMOVALS):  # what cannot be removed stays
            expect(not hidden(out), f"{what}: left behind: {hidden(out)}")
            expect(not self.lock.exists(), f"{what}: the lock is left")
        gone_on = again() if again else self.scene.finetune(out, resume=True)
        right = gone_on.code == 0 and same(out, self.right) and losses(out) == losses(self.right)
        expect(right, f"{what}: gone on, it comes to something else: {gone_on.last()}")

    def _judge_export(self, hf: Path, export: Callable[[], Ended], what: str, ended: Ended) -> None:
        expect = self.report.expect
        expect(ended.code == 0 or bool(ended.error()), f"{what}: not one line: {ended.last()}")
        expect(ended.code != 0 or whole(hf), f"{what}: it is not whole")
        expect(not hf.exists() or not any(hf.iterdir()) or whole(hf), f"{what}: half an export is in its place")
        again = export()
        expect(again.code == 0 and whole(hf), f"{what}: cannot export again: {again.last()}")
        for path in hf.parent.glob("*hf*"):
            expect(path == hf or whole(path), f"{what}: left behind: {path.name}")
            shutil.rmtree(path)
