"""Runs on two ranks whose weights are sharded: stopped, killed, with a rank or a disk that fails, and resumed.

Both ranks are copies of this process, or, where it goes on with another number of them, one is. In full finetuning a
checkpoint is one of all ranks or none, and a signal that reaches one of them stops them all.
"""

import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import psutil

from faults.operations import Watch
from lora_alpaca.artifacts import checkpoint

from . import faulty
from .disk import ERRORS, REMOVALS, WARNING, failing
from .kills import by_phase, judge, killed, uninterrupted
from .library import STEP, steps_done, wrap
from .phases import last_step
from .rank_faults import GONE, HANGS, TIMEOUT, WITHIN, lines
from .report import Report, chosen
from .running import Running, forked, moments, other_rank, pair
from .scene import Ended, Scene, hidden, losses, same, steps

LORA = {
    "load_8bit": True,
    "lora_dropout": 0.0,
    "shard": "full",
    "learning_rate": 1e-3,
    "engine": "padded",
    "max_steps": 6,
    "eval_steps": 3,
}
FULL = LORA | {"load_8bit": None, "tune": "full", "lora_dropout": None}
STOP = 3  # the step after which a signal comes
CASES = list(product(("full", "offload"), ("lora", "full"), ((2, 2), (2, 1), (1, 2))))
KILLS = 60
FAULTS = [  # what happens, the rank to which it does, and what is said of it
    ("kill", 1, rf"rank 1 failed: {re.escape(GONE)}"),
    ("kill", 0, rf"rank 0 failed: {re.escape(GONE)}"),
    ("raise", 1, r"rank 1 failed: the sky fell"),
    ("raise", 0, rf"rank 0 failed: (the sky fell|{re.escape(GONE)})"),  # it takes the store along
    ("exit", 1, r"rank 1 failed: it left in the middle of the run, with exit code 0"),
    ("_exit", 0, rf"rank 0 failed: {re.escape(GONE)}"),
    ("data", 1, r"rank 1 failed: rows.json:7: Alpaca"),
    ("memory", 1, r"rank 1 failed: .*out of memory"),
    ("nan", 1, r"step 6: the loss is nan"),
    ("hang", 1, rf"rank 1 failed: {re.escape(HANGS)}"),
]
FAULT_STEP = 6


def programme(share: float, folder: Path) -> Report:
    """Try every part, or a share of each."""
    report = Report()
    exactness(report, folder, share)
    kills(report, folder, share)
    rank_faults(report, folder, share)
    disk_errors(report, folder, share)
    return report


# ---------------------------------------------------------------------------------------------------------- exactness


def exactness(report: Report, folder: Path, share: float) -> None:
    """Stop runs by a signal and go on with them, on as many ranks or on others."""
    for where, tune, (before, after) in chosen(CASES, share):
        name = f"{where}, {tune}, {before} ranks, then {after}"
        scene = Scene(folder / "exact", FULL if tune == "full" else LORA)
        sharding: dict[str, Any] = {"shard": "full", "offload": "cpu" if where == "offload" else None}
        one: dict[str, Any] = {"shard": "none", "offload": None, "micro_batch_size": 2}
        changes = "ranks,shard,offload" if before != after else None
        report.count("sharded exact cases")
        whole, out = scene.fresh("whole"), scene.fresh("out")
        two = sharding | {"micro_batch_size": 2}
        pair(scene, whole, **two).ended()
        stopped = _begin(scene, out, before, two if before == 2 else one, stops=tune)
        report.expect(stopped.code == 143, f"{name}: stopped, it ended with {stopped.code}: {stopped.last()}")
        report.expect(f"step {STOP} of 6 is saved" in stopped.said, f"{name}: {stopped.last()}")
        options = (two if after == 2 else one) | {"resume": True, "allow_change": changes}
        ended = _begin(scene, out, after, options)
        report.expect(ended.code == 0, f"{name}: gone on, it ended with {ended.code}: {ended.last()}")
        if before == after:
            report.expect(same(whole, out) and losses(whole) == losses(out), f"{name}: it came to something else")
            last = f"checkpoint-{steps(whole)[-1]}"
            report.expect(_same_parts(whole / last, out / last), f"{name}: its checkpoints have other tensors")
        else:
            report.expect(_near(losses(whole), losses(out)), f"{name}: {losses(whole)} became {losses(out)}")


def _begin(scene: Scene, out: Path, ranks: int, options: dict[str, Any], stops: str = "", step: int = STOP) -> Ended:
    """Return how a run ended; with `stops`, a signal came to its last rank, or, of an adapter, to every rank."""

    def signals(rank: int) -> None:
        if stops and (stops == "lora" or rank == ranks - 1):
            wrap(STEP, partial(_stopping, step))

    if ranks == 2:
        return pair(scene, out, signals, **options).ended()
    return forked(scene, out, partial(signals, 0), **options).ended()


def _stopping(number: int, step: Any) -> Any:
    def call(loop: Any) -> None:
        step(loop)
        if steps_done(loop) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    return call


def _same_parts(one: Path, other: Path) -> bool:
    """Return whether two checkpoints have the same tensors in the same files, to the bit."""
    files = sorted(path.relative_to(one) for path in one.rglob("*.safetensors"))
    return bool(files) and all(same(one, other, str(name)) for name in files)


def _near(one: list[dict[str, float]], other: list[dict[str, float]]) -> bool:
    """Return whether two runs have logged the same but for the rounding of sums in another order."""
    return len(one) == len(other) and all(
        a.keys() == b.keys() and all(abs(a[key] - b[key]) <= 1e-3 * max(1, abs(a[key])) for key in a)
        for a, b in zip(one, other, strict=True)
    )


# -------------------------------------------------------------------------------------------------------------- kills


def kills(report: Report, folder: Path, share: float) -> None:
    """Kill both ranks of full finetuning at once, at moments spread over its phases, and go on."""
    scene = Scene(folder / "killed", FULL | {"save_steps": 2})
    whole = uninterrupted(scene, pair)
    times = by_phase(moments(pair(scene, scene.fresh("measured"))))
    times = {phase: found for phase, found in times.items() if found}
    for number in chosen(list(range(KILLS)), share):
        chance, first = random.Random(number), None
        while first is None:
            out = scene.fresh("out")
            first = killed(report, lambda out=out: pair(scene, out), times, chance)
        judge(report, f"sharded kill {number}", whole, pair(scene, out, resume=True), last_step(first.phases))


# -------------------------------------------------------------------------------------------------------- rank faults


def rank_faults(report: Report, folder: Path, share: float) -> None:
    """Let one rank fail in a step: the other one names it, saves nothing, and the newest checkpoint is whole."""
    scene = Scene(folder / "ranks", FULL | {"max_steps": 8, "save_steps": 2, "eval_steps": 8})
    whole = uninterrupted(scene, pair)
    for fault, rank, wanted in chosen(FAULTS, share):
        name = f"sharded: {fault} on rank {rank}"
        options = {"rank_timeout": TIMEOUT} if fault == "hang" else {}
        report.count("sharded rank faults")

        def before(own: int, fault: str = fault, rank: int = rank) -> None:
            if own == rank:
                faulty.put_in(fault, FAULT_STEP)

        out = scene.fresh("out")
        running = pair(scene, out, before, **options)
        running.waits_for(lambda running: "the fault happens" in running.said())
        begun = time.monotonic()
        ended = _all_ended(running, int(other_rank(scene, out).read_text()))
        crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        seconds = time.monotonic() - begun
        report.expect(seconds < (WITHIN + TIMEOUT * (fault == "hang")) * crowd, f"{name}: it took {seconds:.0f} s")
        report.expect(bool(re.search(wanted, ended.said)), f"{name}: not named: {lines(ended.said)}")
        report.expect("Traceback" not in ended.said or fault == "raise", f"{name}: {ended.last()}")
        kept = 5 if fault == "nan" else 4  # that error is one of all ranks, which then save together
        report.expect(max(steps(out), default=0) == kept, f"{name}: checkpoints of the steps {steps(out)}")
        report.expect(not checkpoint.verify(out / f"checkpoint-{kept}"), f"{name}: checkpoint-{kept} is damaged")
        gone_on = pair(scene, out, resume=True).ended()
        report.expect(gone_on.code == 0 and same(whole, out), f"{name}: gone on, {gone_on.last()}")


def _all_ended(running: Running, other: int) -> Ended:
    """Wait for both ranks; the second one may live on when the first is dead, or hang."""
    ended = running.ended(120)
    with suppress(psutil.NoSuchProcess):
        second = psutil.Process(other)
        if psutil.wait_procs([second], timeout=60)[1]:
            second.kill()
    return Ended(ended.code, running.said(), ended.phases)


# -------------------------------------------------------------------------------------------------------- disk errors


def disk_errors(report: Report, folder: Path, share: float) -> None:
    """Let every save of one rank fail with an error, or one save alone: none of the ranks believes in it."""
    scene = Scene(folder / "disk", FULL | {"save_steps": 1, "save_total_limit": 2})
    right, begun, out = scene.fresh("right"), scene.fresh("begun"), scene.folder / "work" / "out"
    ended = pair(scene, right).ended()
    assert ended.code == 0, ended.last()
    _begin(scene, begun, 2, {}, stops="full", step=2)
    for number, (kind, error) in enumerate(chosen(ERRORS, share)):
        failing_rank = number % 2 if kind in ("open", "write", "fsync") else 0
        name = f"sharded: {kind} fails with {error} on rank {failing_rank}"
        report.count("sharded disk errors")
        shutil.rmtree(out.parent, ignore_errors=True)
        shutil.copytree(begun, out)

        def before(rank: int, kind: str = kind, error: int = error, failing_rank: int = failing_rank) -> None:
            if rank == failing_rank:
                Watch(out.parent, failing(kind, error, "checkpoint-" if kind in REMOVALS else ".checkpoint-")).begin()

        ended = pair(scene, out, before, resume=True).ended()
        warnings = [line for line in ended.said.splitlines() if line.startswith(WARNING)]
        if kind in REMOVALS:
            report.expect(ended.code == 0, f"{name}: ended with {ended.code}: {ended.last()}")
        else:
            report.expect(ended.code == 1 and len(warnings) == 3, f"{name}: {ended.code}, {warnings}, {ended.last()}")
            report.expect(all(f"(rank {failing_rank}: " in line for line in warnings), f"{name}: {warnings}")
            report.expect("3 times in a row" in ended.said, f"{name}: {ended.last()}")
            report.expect(steps(out) == [1, 2] or steps(out) == [2], f"{name}: {steps(out)}")
            report.expect(not hidden(out), f"{name}: left behind: {hidden(out)}")
        report.expect(not checkpoint.verify(out / "checkpoint-2") or kind in REMOVALS, f"{name}: damaged")
        gone_on = pair(scene, out, resume=True).ended()
        right_again = gone_on.code == 0 and same(out, right) and losses(out) == losses(right)
        report.expect(right_again, f"{name}: gone on, it comes to something else: {gone_on.last()}")
