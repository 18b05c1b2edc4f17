"""Signals at random moments: the promised exit code and line, a whole checkpoint, and the same bits in the end."""

import random
import re
import signal
import time
from pathlib import Path

from lora_alpaca import signals
from lora_alpaca.artifacts import checkpoint

from .kills import OPTIONS, by_phase, uninterrupted
from .library import LOSS, wrap
from .phases import last_step
from .report import Report, chosen
from .running import Moment, Running, forked, moments, torchrun, typed
from .scene import Ended, Scene, losses, same, whole

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PHASES = ("load", "train", "validate", "save")
CASES = [(number, PHASES[number // 3 % 4], SIGNALS[number % 3]) for number in range(60)]
STOPPED = re.compile(r"^(?:rank (\d): )?stopped by (\w+): (.*)$", re.MULTILINE)
SAVED = re.compile(r"step (\d+) of \d+ is saved; --resume goes on from there")


def programme(share: float, folder: Path) -> Report:
    """Send sixty signals: every sixth under torchrun, and every sixth to a process from the command line."""
    report, scene = Report(), Scene(folder / "signals", dict(OPTIONS))
    reference = uninterrupted(scene)
    by_ranks, times = scene.folder / "measured by torchrun", {}
    for place, (number, phase, sent) in enumerate(chosen(CASES, share)):
        begin = {1: torchrun, 4: typed}.get(place % 6, forked)
        if begin not in times:
            measured = scene.fresh(f"measured by {begin.__name__}")
            times[begin] = by_phase(moments(begin(scene, measured)))
        chance, ended = random.Random(number), None
        while ended is None:  # until it was there to get it
            running = begin(scene, scene.fresh("stopped"))
            chance.choice(times[begin][phase]).strike(running, chance, sent)
            ended = in_time(running)
        report.count("signals")
        report.count(f"signals to {begin.__name__}")
        report.count(f"signals in: {phase}")
        case = f"{sent.name} {number} in {phase} of {begin.__name__}"
        judge_end(report, case, running, ended, sent, 2 if begin is torchrun else 1)
        resumed = (
            begin(scene, running.out, resume=True) if begin is torchrun else forked(scene, running.out, resume=True)
        )
        judge_resumed(report, case, by_ranks if begin is torchrun else reference, resumed)
    twice(report, scene, reference)
    too_long(report, scene, reference)
    paused(report, scene, reference)
    return report


def in_time(running: Running) -> Ended | None:
    """Return how a run ended; None where the signal found all done, and processes that were only about to exit."""
    ended = running.ended()
    return None if whole(running.out) and not STOPPED.search(ended.said) else ended


def judge_end(report: Report, case: str, running: Running, ended: Ended, sent: signal.Signals, ranks: int) -> None:
    """Note whether exit code, line and checkpoint are those promised."""
    report.expect(
        ended.code == (128 + sent if ranks == 1 else 1), f"{case}: it ended with {ended.code}: {ended.last()}"
    )
    found = STOPPED.findall(ended.said)
    named = len(found) == ranks and all(name == sent.name for _, name, _ in found)
    report.expect(named, f"{case}: it said {found or ended.said[-600:]}")
    report.expect("Traceback" not in ended.said or ranks > 1, f"{case}: a traceback")
    step = last_step(ended.phases)
    for rank, _, said in found:
        saved = SAVED.search(said)
        if "the run was at its end" in said:
            report.expect(whole(running.out), f"{case}: {said}, but it is not")
            continue
        report.expect(bool(saved) or step == 0, f"{case}: step {step} was done, and it said {said!r}")
        if saved and rank in ("", "0"):
            damage = checkpoint.verify(running.out / f"checkpoint-{saved[1]}")
            report.expect(int(saved[1]) >= step and not damage, f"{case}: after step {step}: {said}: {damage}")


def judge_resumed(report: Report, case: str, reference: Path, resumed: Running) -> None:
    """Note whether it went on to the same bits."""
    ended = resumed.ended()
    report.expect(ended.code == 0, f"{case}: it cannot be resumed: {ended.last()}")
    report.expect(
        same(reference, resumed.out) and losses(reference) == losses(resumed.out),
        f"{case}: it ended in another adapter",
    )


def slow_step(number: int, seconds: float) -> None:
    """Let the n-th loss that is computed take long; called in the process of a run."""
    computed = 0

    def around(loss):
        def slow(engine, batch):
            nonlocal computed
            if engine.model.training:
                computed += 1
                if computed == number:
                    time.sleep(seconds)
            return loss(engine, batch)

        return slow

    wrap(LOSS, around)


def twice(report: Report, scene: Scene, reference: Path) -> None:
    """A second signal, whichever, ends a run at once, with what had been saved before."""
    for number, (first, second) in enumerate(zip(SIGNALS, SIGNALS[1:] + SIGNALS[:1], strict=True)):
        case = f"{first.name}, then {second.name}"
        running = forked(scene, scene.fresh("stopped"), lambda: slow_step(6, 60))
        running.waits_for(Moment("train", 5).has_come)
        time.sleep(0.3)
        running.send(first)
        time.sleep(0.3 + 0.1 * number)
        running.send(second)
        sent = time.monotonic()
        ended = running.ended(30)
        report.count("signals", 2)
        report.count("second signals")
        report.expect(ended.code == 128 + second, f"{case}: it ended with {ended.code}: {ended.last()}")
        report.expect(time.monotonic() - sent < 5, f"{case}: it took {time.monotonic() - sent:.1f} s to end")
        judge_resumed(report, case, reference, forked(scene, running.out, resume=True))


def too_long(report: Report, scene: Scene, reference: Path) -> None:
    """A step that takes longer than GRACE is given up, and the one before is what is saved."""

    def before() -> None:
        signals.GRACE = 0.5
        slow_step(6, 60)

    for sent in SIGNALS:
        running = forked(scene, scene.fresh("stopped"), before)
        running.waits_for(Moment("train", 5).has_come)
        time.sleep(0.3)
        running.send(sent)
        ended = running.ended(30)
        report.count("signals")
        report.count("abandoned steps")
        case = f"{sent.name} in a step that takes too long"
        judge_end(report, case, running, ended, sent, 1)
        report.expect("step 5 of 8 is saved" in ended.said, f"{case}: it said {ended.last()}")
        judge_resumed(report, case, reference, forked(scene, running.out, resume=True))


def paused(report: Report, scene: Scene, reference: Path) -> None:
    """A run that is stopped and continued (SIGSTOP, SIGCONT) goes on as if nothing had been."""
    running = forked(scene, scene.fresh("stopped"))
    running.waits_for(Moment("train", 2).has_come)
    running.send(signal.SIGSTOP)
    time.sleep(1)
    running.send(signal.SIGCONT)
    report.count("signals", 2)
    judge_resumed(report, "SIGSTOP, then SIGCONT", reference, running)
