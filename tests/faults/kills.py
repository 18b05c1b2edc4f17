"""Runs that are killed (SIGKILL) at random moments, once or again and again, and then resumed to the end.

The moments are spread over the phases of a run, not over its time: most of that is loading. Every fourth run is a real
one, from the command line; the others are copies of this process, which has the libraries loaded. A resumed run must
end as the one that was never killed, to the bit, and may repeat no more steps than lie between two checkpoints.
"""

import random
import signal
from collections.abc import Callable
from pathlib import Path

from .phases import PHASES, first_step, last_phase, last_step
from .report import Report, chosen
from .running import Moment, Running, forked, moments, typed
from .scene import Ended, Scene, losses, same

NUMBERS = list(range(1000))
OPTIONS = {"max_steps": 8, "save_steps": 2, "eval_steps": 3, "save_total_limit": 1}
REAL = 4  # every so manyeth run is a process from the command line
AGAIN = 0.2  # how often a resumed run is killed as well
CHAOS = 30  # kills of the one run that is killed again and again


def programme(share: float, folder: Path) -> Report:
    """Kill and resume runs, and one run many times."""
    report, again = some(chosen(NUMBERS, share), folder), chaos(max(3, round(CHAOS * min(1, 5 * share))), folder)
    for name, number in again.counts.items():
        report.count(name, number)
    report.failures += again.failures
    return report


def some(numbers: list[int], folder: Path) -> Report:
    """Kill and resume the runs of these numbers; the same number draws the same moment."""
    report, scene = Report(), Scene(folder / "kills", dict(OPTIONS))
    whole = uninterrupted(scene)
    times = {}
    for begin in (forked, typed):
        times[begin] = by_phase(moments(begin(scene, scene.fresh("measured"))))
    for place, number in enumerate(numbers):
        begin, name = (forked, "copies") if place % REAL else (typed, "real processes")
        chance, first = random.Random(number), None
        while first is None:  # until it was there to be killed
            out = scene.fresh("killed")
            first = killed(report, lambda begin=begin, out=out: begin(scene, out), times[begin], chance)
        report.count(f"kills of {name}")
        step = last_step(first.phases)
        if chance.random() < AGAIN:
            again = killed(report, lambda out=out: forked(scene, out, resume=True), times[forked], chance)
            report.count("kills of resumed runs", int(again is not None))
            step = max(step, last_step(again.phases if again else []))
        judge(report, f"kill {number}", whole, forked(scene, out, resume=True), step)
    return report


def chaos(times: int, folder: Path) -> Report:
    """Kill one run so many times, each time a few steps further, and let it end."""
    report, scene = (
        Report(),
        Scene(folder / "chaos", OPTIONS | {"max_steps": 5 * times, "save_steps": 1, "eval_steps": 7}),
    )
    whole, out = uninterrupted(scene), scene.fresh("killed")
    chance, step = random.Random(times), 0
    for number in range(times):
        moment = Moment("train", step + chance.randint(1, 4), 0.01)  # a step that a resumed run is sure to take
        ended = killed(report, lambda: forked(scene, out, resume=True), {"train": [moment]}, chance)
        report.expect(ended is not None, f"chaos: kill {number} came when the run was over")
        step = max(step, last_step(ended.phases if ended else []))
    report.count("kills of one run", times)
    judge(report, "chaos", whole, forked(scene, out, resume=True), step)
    return report


def uninterrupted(scene: Scene, begin: Callable[[Scene, Path], Running] = forked) -> Path:
    """Return the folder of the run that was never killed."""
    whole = scene.fresh("whole")
    if (ended := begin(scene, whole).ended()).code != 0:
        raise RuntimeError(ended.last())
    return whole


def by_phase(found: list[Moment]) -> dict[str, list[Moment]]:
    """Return moments by their phase."""
    return {phase: [moment for moment in found if moment.phase == phase] for phase in PHASES}


def killed(
    report: Report, begin: Callable[[], Running], times: dict[str, list[Moment]], chance: random.Random
) -> Ended | None:
    """Begin a run, kill it in one of the phases, drawn evenly, and note in which it was when it died.

    None where it was over before.
    """
    running = begin()
    moment = chance.choice(times[chance.choice(list(times))])
    moment.strike(running, chance)
    ended = running.ended()
    if ended.code != -signal.SIGKILL:
        report.count("kills that came too late")
        report.expect(ended.code == 0, f"a run that nothing had killed ended with {ended.code}: {ended.last()}")
        return None
    report.count("kills")
    report.count(f"killed in: {last_phase(ended.phases)}")
    return ended


def judge(report: Report, case: str, whole: Path, running: Running, step: int) -> None:
    """Note whether a resumed run ends as the uninterrupted one did, and repeats few of the steps done before."""
    ended = running.ended()
    if ended.code != 0:
        report.count("unresumable")
        report.failures.append(f"{case}: it cannot be resumed: {ended.last()}")
    elif not (same(whole, running.out) and losses(whole) == losses(running.out)):
        report.count("different")
        report.failures.append(f"{case}: it ended in another adapter, or with other losses")
    if (begun := first_step(ended.phases)) is not None:
        repeated = step - begun
        report.expect(repeated <= running.options["save_steps"], f"{case}: {repeated} steps were repeated")
