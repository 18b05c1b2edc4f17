"""One of two ranks fails, dies or hangs, under torchrun: the job ends, and the other one says which and why.

Each fault is put into a step of one rank (see `faulty.py`). Looked at are the time until everything has ended, the one
line that names rank and cause, the exit codes, processes that are left, and the checkpoint.
"""

import os
import re
import signal
import time
from pathlib import Path

import psutil

from lora_alpaca.artifacts import checkpoint

from .kills import OPTIONS
from .phases import last_step
from .report import Report, chosen
from .running import PATIENCE, Running, torchrun
from .scene import Scene, steps

STEP = 6  # in which it happens: the one before was finished
WITHIN = 15.0  # seconds from the fault to the end, on a machine with a core for each process that wants one
KILLED_BY_TORCHRUN = 30.0  # seconds after which torchrun ends a process that is stopped
TIMEOUT = 4  # seconds of --rank_timeout, for those that hang
GONE = "it is gone without a word; was it killed, for its memory perhaps?"
HANGS = "it hangs: the others waited for it as long as --rank_timeout says"
FAULTS = [  # what happens, the rank to which it does, and what is said of it
    ("kill", 1, rf"error: rank 0: rank 1 failed: {re.escape(GONE)}"),
    ("raise", 1, r"error: rank 0: rank 1 failed: the sky fell"),
    ("raise", 0, r"error: rank 1: rank 0 failed: the sky fell"),
    ("exit", 1, r"error: rank 0: rank 1 failed: it left in the middle of the run, with exit code 0"),
    ("_exit", 0, rf"error: rank 1: rank 0 failed: {re.escape(GONE)}"),
    ("hang", 1, rf"error: rank 0: rank 1 failed: {re.escape(HANGS)}"),
    ("data", 1, r"error: rank (1: rows.json:7: Alpaca|0: rank 1 failed: rows.json:7: Alpaca)"),
    ("early", 1, r"error: rank 1: rows.json:7: Alpaca format: no output"),
    ("memory", 1, r"error: rank 1: out of memory \(CUDA out of memory. Tried to allocate 2.00 GiB.\)"),
    ("nan", 1, r"error: rank 0: step 6: the loss is nan"),
    ("rows", 1, r"error: rank \d: .*the processes read different rows"),
    ("kill", 0, rf"error: rank 1: rank 0 failed: {re.escape(GONE)}"),
    ("SIGSTOP", 1, rf"error: rank 0: rank 1 failed: {re.escape(GONE)}"),
]


def programme(share: float, folder: Path) -> Report:
    """Let a rank fail, in thirteen ways."""
    report, scene = Report(), Scene(folder / "ranks", dict(OPTIONS))
    for fault, rank, wanted in chosen(FAULTS, share):
        options = {"rank_timeout": TIMEOUT} if fault in ("hang", "SIGSTOP") else {}
        running = torchrun(scene, scene.fresh("out"), (fault, rank, STEP), **options)
        report.count("rank_faults")
        judge(report, f"{fault} on rank {rank}", running, wanted, fault)
    return report


def judge(report: Report, case: str, running: Running, wanted: str, fault: str) -> None:
    """Note whether a job whose rank fails ends as promised."""
    workers: list[psutil.Process] = []

    def has_failed(running: Running) -> bool:
        workers.extend(set(running.process.children(recursive=True)) - set(workers))
        return "the fault happens" in running.said()

    running.waits_for(has_failed)
    begun = time.monotonic()
    ended = running.ended(PATIENCE)
    seconds = time.monotonic() - begun
    allowed = WITHIN + TIMEOUT * (fault == "hang") + KILLED_BY_TORCHRUN * (fault == "SIGSTOP")
    crowd = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    report.expect(
        seconds < allowed * crowd, f"{case}: it took {seconds:.0f} s until all had ended, {crowd:.1f} to a core"
    )
    report.figures.setdefault("seconds until a job with a failed rank had ended", {})[case] = round(seconds, 1)
    report.expect(bool(re.search(wanted, ended.said, re.MULTILINE)), f"{case}: not named: {lines(ended.said)}")
    report.expect(ended.code == 1, f"{case}: torchrun ended with {ended.code}")
    left = [process.pid for process in workers if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for pid in left:
        psutil.Process(pid).send_signal(signal.SIGKILL)
    report.expect(not left, f"{case}: {len(left)} processes were left")
    done = last_step(ended.phases)
    newest = max(steps(running.out), default=0)
    lives = "error: rank 0: rank" in ended.said  # the rank that writes
    report.expect(
        newest == done or not lives, f"{case}: step {done} was finished, and the newest checkpoint is {newest}"
    )
    damage = checkpoint.verify(running.out / f"checkpoint-{newest}") if newest else ""
    report.expect(not damage, f"{case}: checkpoint-{newest}: {damage}")


def lines(said: str) -> list[str]:
    """Return what was said in lines of ours."""
    return [line for line in said.splitlines() if line.startswith(("error: ", "rank "))]
