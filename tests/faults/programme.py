"""The whole programme of faults, or an even share of it, on all cores: `python tests/faults stress` or `stress-long`.

Every part runs in a copy of this process, so that none can disturb another, and leaves its report in the folder of
`--state`; what is there already is not tried again, so a long programme that was stopped goes on. The figures go to
benchmarks/results, and the last line is one JSON object of counts.
"""

import argparse
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import psutil

from . import kills
from .report import Report, chosen

ROOT = Path(__file__).resolve().parent.parent.parent
SHARES = {  # of each part's cases, in a `stress` of at most half an hour on two cores
    "crash_points": 0.1,
    "power_loss": 0.1,
    "disk": 0.25,
    "nonfinite": 0.5,
    "changed_settings": 0.25,
    "memory_faults": 0.25,
    "exactness": 0.15,
    "signals": 0.15,
    "baseline": 0.25,
    "rank_faults": 0.25,
    "sharded": 0.2,
    "cost": 1.0,
}
ALONE = ("rank_faults", "sharded", "cost")  # they take times
KILLS, CHUNK = {"stress": 0.2, "stress-long": 1.0}, 50


@dataclass
class Job:
    """A part of the programme, or a chunk of it, that leaves its report in a file."""

    name: str
    work: Callable[[Path], Report]
    alone: bool = False
    pid: int = 0
    begun: float = 0.0

    def begin(self, state: Path) -> None:
        """Do the work in a copy of this process."""
        self.begun = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        folder = Path(tempfile.mkdtemp(prefix=f"lora-alpaca-{self.name}-"))
        try:
            try:
                report = self.work(folder)
            except Exception:
                report = Report(failures=[f"{self.name} broke off: {traceback.format_exc()}"])
            shutil.rmtree(folder, ignore_errors=True)
            found = asdict(report) | {"seconds": round(time.monotonic() - self.begun)}
            beside = state / f"{self.name}.partial"
            beside.write_text(json.dumps(found))
            beside.rename(state / f"{self.name}.json")
        finally:
            os._exit(0)


def main(words: list[str]) -> None:
    """Run what was asked for; exit 1 where something did not end as promised."""
    parser = argparse.ArgumentParser(prog="python tests/faults", description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=tuple(KILLS))
    parser.add_argument("--state", type=Path, help="folder of the reports; by default one in the system's own")
    parser.add_argument("--only", nargs="*", help="names of parts; the figures are printed and not kept")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    said = parser.parse_args(words)
    state = said.state or Path(tempfile.gettempdir()) / f"lora-alpaca-{said.size}-{code()}"
    state.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    jobs = [job for job in planned(said.size) if not said.only or job.name.partition(" ")[0] in said.only]
    run([job for job in jobs if not job.alone], said.jobs, state)
    run([job for job in jobs if job.alone], 1, state)
    reports = {job.name: json.loads((state / f"{job.name}.json").read_text()) for job in jobs}
    figures = summary(reports, said.size) | {"minutes of this call": round((time.monotonic() - begun) / 60, 1)}
    if not said.only:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        results_file = importlib.import_module("results_file")
        print(f"written: {results_file.write('reliability_' + said.size.replace('-', '_'), figures)}")
        shutil.rmtree(state)
    for failure in figures["failures"]:
        print(f"FAILED {failure}")
    print(json.dumps(counted(figures)))
    sys.exit(bool(figures["failures"]))


def code() -> str:
    """Return what tells the code that is tried from that of another time."""
    files = sorted([*(ROOT / "lora_alpaca").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def planned(size: str) -> list[Job]:
    """Return what there is to do, the longest first."""
    jobs = []
    numbers = chosen(kills.NUMBERS, KILLS[size])
    for start in range(0, len(numbers), CHUNK):
        work = partial(kills.some, numbers[start : start + CHUNK])
        jobs.append(Job(f"kills {start + 1}-{min(start + CHUNK, len(numbers))}", work))
    jobs.append(Job("chaos", partial(kills.chaos, kills.CHAOS)))
    here = [name for name in SHARES if (Path(__file__).parent / f"{name}.py").exists()]
    for name in here:
        share = SHARES[name] if size == "stress" else 1.0
        jobs.append(
            Job(name, partial(importlib.import_module(f".{name}", __package__).programme, share), name in ALONE)
        )
    jobs.append(Job("catalogue", catalogue, alone=True))
    return jobs


def run(jobs: list[Job], at_once: int, state: Path) -> None:
    """Do all jobs that have left no report yet, some of them at once."""
    waiting = [job for job in jobs if not (state / f"{job.name}.json").exists()]
    for job in jobs:
        if job not in waiting:
            print(f"{job.name}: done before", flush=True)
    working: list[Job] = []
    done, all_ = 0, len(waiting)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        while waiting or working:
            while waiting and len(working) < at_once:
                working.append(waiting.pop(0))
                working[-1].begin(state)
            pid, _ = os.waitpid(-1, 0)
            for job in [job for job in working if job.pid == pid]:
                working.remove(job)
                done += 1
                print(f"[{done}/{all_}] {told(job, state / f'{job.name}.json')}", flush=True)
    finally:
        for job in working:
            for process in [*psutil.Process(job.pid).children(recursive=True), psutil.Process(job.pid)]:
                process.kill()


def told(job: Job, path: Path) -> str:
    """Return what a job that has ended found, in a line; one that left no report has failed."""
    if not path.exists():
        path.write_text(json.dumps(asdict(Report(failures=[f"{job.name} died"])) | {"seconds": 0}))
    report = json.loads(path.read_text())
    bad = f", {len(report['failures'])} FAILED" if report["failures"] else ""
    counts = ", ".join(f"{number} {name}" for name, number in report["counts"].items() if ":" not in name)
    return f"{job.name}: {counts}{bad}, {report['seconds']} s"


def catalogue(folder: Path) -> Report:
    """Run the tests of the catalogue of bad inputs, whose ids begin with an entry, and count what they found."""
    tests = {str(path) for path in (ROOT / "tests" / "catalogue").glob("test_*.py")}
    found = folder / "found.xml"
    command = [sys.executable, "-m", "pytest", "-q", "--numprocesses=2", "--dist=loadfile", f"--junit-xml={found}"]
    done = subprocess.run([*command, *sorted(tests)], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    report = Report()
    if not found.exists():
        return Report(failures=[f"the catalogue was not tried: {done.stdout[-500:]}"])
    for case in ElementTree.parse(found).iter("testcase"):
        said = " ".join(f"{child.get('message')} {child.text}" for child in case if child.tag in ("failure", "error"))
        report.expect(not said, f"{case.get('name')}: {said[:300]}")
        if entry := re.search(r"\[(?:[^\]]*-)?([A-F]\d+)", case.get("name", "")):
            report.count("bad_inputs")
            report.count(f"entry: {entry[1]}")
            report.count("tracebacks", "Traceback" in said)
            report.count("silent", bool(said) and "Traceback" not in said)
    return report


# --------------------------------------------------------------------------------------------------------- figures

ENTRIES = {  # of the catalogue, that parts of the programme try
    "kills": ("E101", "E106"),
    "signals": ("E98", "E99", "E100", "E103", "E104"),
    "power_loss": ("E102", "D96"),
    "disk": ("D87",),
    "memory_faults": ("D84",),
    "rank_faults": ("E105",),
}


def summary(reports: dict[str, dict[str, Any]], size: str) -> dict[str, Any]:
    """Return the reports as one: what each part counted, the moments of kills, seconds, and all failures."""
    parts: dict[str, dict[str, Any]] = {}
    for name, report in reports.items():
        part = parts.setdefault(name.partition(" ")[0], {"counts": {}, "failures": 0, "seconds": 0})
        add(part["counts"], report["counts"])
        part["failures"] += len(report["failures"])
        part["seconds"] += report["seconds"]
    counts: dict[str, int] = {}
    for name, part in parts.items():
        add(counts, part["counts"] | {f"entry: {entry}": 1 for entry in ENTRIES.get(name, ())})
        part["counts"] = plain(part["counts"])
    return {
        "size": size,
        "counts": plain(counts),
        "moments of kills": of_kind(counts, "killed in"),
        "moments of signals": of_kind(counts, "signals in"),
        "catalogue": of_kind(counts, "entry"),
        "parts": parts,
        "figures": {name: report["figures"] for name, report in reports.items() if report["figures"]},
        "failures": [f"{name}: {failure}" for name, report in reports.items() for failure in report["failures"]],
    }


def add(counts: dict[str, int], more: dict[str, int]) -> None:
    """Add counts to counts."""
    for name, number in more.items():
        counts[name] = counts.get(name, 0) + number


def plain(counts: dict[str, int]) -> dict[str, int]:
    """Return the counts that are not of some kind."""
    return {name: number for name, number in counts.items() if ": " not in name}


def of_kind(counts: dict[str, int], kind: str) -> dict[str, int]:
    """Return the counts named `KIND: what`, by what."""
    return {name.partition(": ")[2]: counts[name] for name in sorted(counts) if name.startswith(f"{kind}: ")}


def counted(figures: dict[str, Any]) -> dict[str, Any]:
    """Return what the last line says."""
    zero = dict.fromkeys(("kills", "unresumable", "different", "bad_inputs", "tracebacks", "silent"), 0)
    whole = zero | figures["counts"] | {"catalogue": list(figures["catalogue"])}
    return whole | {"moments": figures["moments of kills"], "failures": len(figures["failures"])}
