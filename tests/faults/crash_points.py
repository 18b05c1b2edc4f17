"""Dying before every single operation on files, of a run, of what makes room for it, of going on, and of an export.

A forked process runs the real command and ends without a word before its n-th operation (of a write also after half of
its bytes). What it leaves is looked at, then the command is given again: it must come to what it would have come to.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from faults.operations import Watch, dies_before
from faults.phases import last_step
from faults.report import Report, chosen
from faults.scene import Ended, Scene, hidden, losses, same, steps, whole
from lora_alpaca.artifacts import checkpoint
from lora_alpaca.errors import CheckpointError
from lora_alpaca.storage.output_folder import MANIFEST, OutputFolder

MODEL = "model.safetensors"
NOTES = "notes.txt"  # a file of the user's own
Operation = tuple[str, str, str]  # kind, path, new path


@dataclass
class Scenario:
    """A command in `work`, which `start` has set up; `look` and `again` judge what its death has left."""

    name: str
    start: Callable[[], Any]
    command: Callable[..., Ended]  # takes `before`
    look: Callable[[list[Operation], Ended], list[str]]
    again: Callable[[], list[str]]
    first_save_ends: bool = False  # only what comes before the first save is new here

    def operations(self, work: Path, log: Path) -> list[Operation]:
        """Return the operations of an undisturbed command, in order."""
        seen = log.with_name("operations.json")

        def note() -> None:
            found: list[Operation] = []

            def before(kind: str, path: Path, more: Any) -> None:
                found.append((kind, str(path.relative_to(root)), more.name if isinstance(more, Path) else ""))
                with watch.own_open(seen, "w") as file:
                    json.dump(found, file)

            root = work.resolve()
            watch = Watch(work, before)
            watch.begin()

        seen.unlink(missing_ok=True)
        self.start()
        ended = self.command(before=note)
        assert ended.code == 0, f"{self.name}: {ended.last()}"
        found: list[Operation] = [(kind, path, to) for kind, path, to in json.loads(seen.read_text())]
        saves = [place for place, (_, path, _) in enumerate(found) if ".checkpoint-" in path]
        return found[: saves[0]] if self.first_save_ends and saves else found


def programme(share: float, folder: Path) -> Report:
    """Die before every operation, or a share of them, in every scenario."""
    report = Report()
    stage = _Stage(Scene(folder))
    for scenario in stage.scenarios():
        operations = scenario.operations(stage.work, stage.scene.log)
        cases = [(number, False) for number in range(1, len(operations) + 1)]
        cases += [(number, True) for number, _ in cases if operations[number - 1][0] == "write"]
        for number, halfway in chosen(sorted(cases), share):
            kind, path, to = operations[number - 1]
            what = f"{scenario.name}: died {'halfway through' if halfway else 'before'} {number}: {kind} {path} {to}"
            scenario.start()
            died = scenario.command(before=lambda case=(number, halfway): Watch(stage.work, dies_before(*case)).begin())
            report.expect(died.code == 9, f"{what}: did not die there but ended with {died.code}: {died.last()}")
            for wrong in (*scenario.look(operations[: number - 1], died), *scenario.again()):
                report.failures.append(f"{what}: {wrong}")
            report.count("crash_points")
            report.count(f"crash_points {scenario.name}")
            report.count(f"crash_points {kind}")
    return report


class _Stage:
    """The scenarios, and what an undisturbed run and export come to."""

    def __init__(self, scene: Scene):
        self.scene, self.kept = scene, scene.folder / "kept"
        self.work = scene.folder / "work"
        self.out, self.hf, self.adapter = self.work / "out", self.work / "hf", self.kept / "run"
        self.empty()
        assert scene.finetune(self.adapter).code == 0, scene.log.read_text()
        ended = scene.command("export", lora_weights=self.adapter, output_dir=self.kept / "hf")
        assert ended.code == 0, ended.said
        self.interrupted = self._interrupted()

    def empty(self, *copied: tuple[Path, str]) -> None:
        """Let the place of work hold nothing but copies."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for path, name in copied:
            shutil.copytree(path, self.work / name)

    def _interrupted(self) -> Path:
        """Return a run that was killed in its third save, and whose second checkpoint is damaged since."""
        self.empty()
        options = {"save_total_limit": 3, "max_steps": 4}

        def before(kind: str, path: Path, more: Any) -> None:
            if path.name == MANIFEST and ".checkpoint-3.partial-" in str(path):
                dies_before(1)(kind, path, more)

        died = self.scene.finetune(self.out, lambda: Watch(self.work, before).begin(), **options)
        assert died.code == 9, died.said
        with open(self.out / "checkpoint-2" / checkpoint.OPTIMIZER, "r+b") as file:
            file.truncate(100)
        shutil.copytree(self.out, self.kept / "interrupted")
        whole = self.scene.finetune(self.kept / "run of four", **options)
        assert whole.code == 0, whole.said
        return self.kept / "interrupted"

    def scenarios(self) -> list[Scenario]:
        """Return all of them."""
        finetune = partial(self.scene.finetune, self.out)
        export = partial(self.scene.command, "export", lora_weights=self.adapter, output_dir=self.hf)
        four = {"save_total_limit": 3, "max_steps": 4, "resume": True}
        model = (self.kept / "hf", "hf")
        return [
            Scenario("run", self.empty, finetune, self._look_at_run, self._resume),
            Scenario("overwrite", partial(self._with_notes, self.adapter, "out"), partial(finetune, overwrite=True),
                     self._notes_and_no_half, self._overwrite, first_save_ends=True),
            Scenario("run set aside", partial(self.empty, (self.adapter, "out")), finetune,
                     self._one_whole_run, self._resume, first_save_ends=True),
            Scenario("resume", partial(self.empty, (self.interrupted, "out")), partial(finetune, **four),
                     self._first_checkpoint_stays, self._resume_four, first_save_ends=True),
            Scenario("export", self.empty, export, self._all_or_nothing, partial(self._export, export)),
            Scenario("export over notes", partial(self._with_notes, *model), partial(export, overwrite=True),
                     self._notes_and_no_half, partial(self._export, partial(export, overwrite=True), NOTES)),
            Scenario("export set aside", partial(self.empty, model), export,
                     self._all_or_nothing, partial(self._export, export)),
        ]  # fmt: skip

    def _with_notes(self, path: Path, name: str) -> None:
        self.empty((path, name))
        (self.work / name / NOTES).write_text("mine")

    # ------------------------------------------------------------------------------------ what is left behind

    def _look_at_run(self, done: list[Operation], died: Ended) -> list[str]:
        """A checkpoint that was renamed is there and whole, and no more than save_steps steps were taken after it."""
        renamed = [int(to.removeprefix("checkpoint-")) for kind, _, to in done if to.startswith("checkpoint-")]
        try:
            newest, _ = checkpoint.newest(self.out) if self.out.exists() else (None, {})
        except CheckpointError as error:
            return [f"no checkpoint verifies: {error}"]
        step = int(newest.name.removeprefix("checkpoint-")) if newest else 0
        taken = last_step(died.phases)
        return [
            *([f"checkpoint {max(renamed)} is lost, the newest is {step}"] if renamed and step < max(renamed) else []),
            *([f"{taken} steps were taken, and {step} saved"] if taken - step > 1 else []),
            *self._no_half(self.out),
        ]

    def _no_half(self, folder: Path) -> list[str]:
        return ["finished, but not whole"] if OutputFolder(folder).status == "finished" and not whole(folder) else []

    def _notes_and_no_half(self, done: list[Operation], died: Ended) -> list[str]:
        notes = list(self.work.glob(f"*/{NOTES}"))
        folder = self.out if self.out.exists() else self.hf
        return ([] if notes else ["the user's file is lost"]) + self._no_half(folder)

    def _one_whole_run(self, done: list[Operation], died: Ended) -> list[str]:
        return [] if any(map(whole, self.work.iterdir())) else ["the finished run is lost"]

    def _first_checkpoint_stays(self, done: list[Operation], died: Ended) -> list[str]:
        newest, _ = checkpoint.newest(self.out)
        return [] if newest == self.out / "checkpoint-1" else [f"the newest checkpoint is {newest}"]

    def _all_or_nothing(self, done: list[Operation], died: Ended) -> list[str]:
        if not self.hf.exists() or not any(self.hf.iterdir()):
            return []
        return [] if whole(self.hf) and same(self.hf, self.kept / "hf", MODEL) else ["half an export is in its place"]

    # ----------------------------------------------------------------------------------- the command once more

    def _resume(self) -> list[str]:
        return self._compared(self.scene.finetune(self.out, resume=True), "run")

    def _overwrite(self) -> list[str]:
        ended = self.scene.finetune(self.out, overwrite=True)
        notes = (self.out / NOTES).is_file()
        return self._compared(ended, "run") + ([] if notes else ["the user's file is lost"])

    def _resume_four(self) -> list[str]:
        ended = self.scene.finetune(self.out, resume=True, save_total_limit=3, max_steps=4)
        aside = [path.name for path in self.out.glob("checkpoint-2.damaged*")]
        missing = [] if aside == ["checkpoint-2.damaged"] else [f"set aside: {aside}"]
        return self._compared(ended, "run of four") + missing

    def _compared(self, ended: Ended, name: str) -> list[str]:
        right = self.kept / name
        if ended.code:
            return [f"cannot go on: {ended.last()}"]
        wrong = {
            "the adapter differs": not same(self.out, right),
            "the losses differ": losses(self.out) != losses(right),
            "it is not whole": not whole(self.out),
            f"checkpoints {steps(self.out)} are left": steps(self.out) != steps(right),
            f"left behind: {hidden(self.out)}": bool(hidden(self.out)),
            "the lock is left": (self.work / ".out.lock").exists(),
        }
        return [what for what, is_so in wrong.items() if is_so]

    def _export(self, export: Callable[[], Ended], kept: str = "") -> list[str]:
        ended = export()
        if ended.code:
            return [f"cannot export again: {ended.last()}"]
        wrong = {
            "the model differs": not same(self.hf, self.kept / "hf", MODEL),
            "it is not whole": not whole(self.hf),
            f"left behind: {hidden(self.work)}": bool(hidden(self.work)),
            "the lock is left": (self.work / ".hf.lock").exists(),
            "the user's file is lost": bool(kept) and not (self.hf / kept).is_file(),
        }
        return [what for what, is_so in wrong.items() if is_so]
