"""Runs under way: begun as a copy of this process, from the command line or under torchrun; struck, and waited for."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from conftest import ROOT

from lora_alpaca.cli.verbs import main

from .phases import PHASES, TRACE, Entry, read
from .scene import Ended, Scene, trace_of
from .scene import copied as process_of

FAULTY = Path(__file__).with_name("faulty.py")
POLL = 0.0005  # seconds
PATIENCE = 300  # seconds; a machine may be busy with other things


@dataclass
class Running:
    """A process of ours that works into `out`; what it says goes to `log`. Of two ranks it is the first one."""

    process: psutil.Process
    log: Path
    out: Path
    options: dict[str, Any]
    code: int | None = None
    ranks: int = 1

    def said(self) -> str:
        """Return everything it has said so far."""
        return self.log.read_text(errors="replace")

    def phases(self) -> list[Entry]:
        """Return the phases that it has noted so far."""
        return read(trace_of(self.log))

    def over(self) -> bool:
        """Return whether it has ended."""
        if self.code is None:
            done, status = os.waitpid(self.process.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if done else None
        return self.code is not None

    def waits_for(self, sign: Callable[["Running"], bool], patience: float = PATIENCE) -> bool:
        """Return whether a sign was seen before the process ended."""
        until = time.monotonic() + patience
        while time.monotonic() < until:
            if sign(self):
                return True
            if self.over():
                return False
            time.sleep(POLL)
        return False

    def send(self, number: int, everyone: bool = False) -> bool:
        """Send a signal, to the whole group if `everyone`, or of ranks; return whether the process was there."""
        if self.over():
            return False
        os.killpg(self.process.pid, number) if everyone or self.ranks > 1 else os.kill(self.process.pid, number)
        return True

    def ended(self, patience: float = PATIENCE) -> Ended:
        """Wait, and return how it ended; -999 if it had to be killed, with all its children."""
        if not self.waits_for(Running.over, patience) and self.code is None:
            for process in [*self.process.children(recursive=True), self.process]:
                process.kill()
            os.waitpid(self.process.pid, 0)
            self.code = -999
        return Ended(self.code, self.said(), self.phases())


def forked(scene: Scene, out: Path, before: Callable[[], Any] | None = None, **options: Any) -> Running:
    """Begin `finetune` in a copy of this process, in which `before` is called first."""
    words = _words(scene, out, options)

    def work() -> None:
        if before is not None:
            before()
        main(["finetune", *words])

    return copied(work, scene, out, options)


def copied(work: Callable[[], None], scene: Scene, out: Path, options: dict[str, Any]) -> Running:
    """Begin some work in a copy of this process."""
    log = scene.folder / f"{out.name}.said"
    return Running(psutil.Process(process_of(work, log)), log, out, scene.options | options)


def other_rank(scene: Scene, out: Path) -> Path:
    """Return the file that has the number of the second rank's process."""
    return scene.folder / f"{out.name}.other"


def pair(scene: Scene, out: Path, before: Callable[[int], Any] | None = None, **options: Any) -> Running:
    """Begin `finetune` on two ranks, both copies of this process, in which `before` is called first with the rank."""
    words = _words(scene, out, options)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def work() -> None:
        os.setsid()
        os.environ |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        other = os.fork()
        rank = int(other == 0)
        if not rank:
            other_rank(scene, out).write_text(str(other))
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        code = 70
        try:
            if before is not None:
                before(rank)
            main(["finetune", *words])
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 70
        except BaseException:
            traceback.print_exc()
        if rank:
            sys.stdout.flush()
            os._exit(code)
        if code in (0, 128 + signal.SIGTERM):  # after an error its end is what the other rank must see
            os.waitpid(other, 0)
        sys.exit(code)

    running = copied(work, scene, out, options)
    running.ranks = 2
    return running


def typed(scene: Scene, out: Path, **options: Any) -> Running:
    """Begin `python finetune.py` as a user would."""
    return _begun(scene, out, [sys.executable, str(ROOT / "finetune.py")], options)


def torchrun(scene: Scene, out: Path, fault: tuple[str, int, int] | None = None, **options: Any) -> Running:
    """Begin `torchrun --nproc_per_node=2 finetune.py`; with a `fault` at a rank in a step."""
    script = [str(FAULTY), *map(str, fault)] if fault else [str(ROOT / "finetune.py")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    return _begun(scene, out, [*launcher, *script], options)


def _begun(scene: Scene, out: Path, command: list[str], options: dict[str, Any]) -> Running:
    command = [*command, *_words(scene, out, options)]
    log = scene.folder / f"{out.name}.said"
    trace_of(log).write_text("")
    with log.open("w") as told:
        environment = os.environ | {"OMP_NUM_THREADS": "1", TRACE: str(trace_of(log))}
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=told, stderr=told, env=environment, start_new_session=True
        )
    running = Running(psutil.Process(process.pid), log, out, scene.options | options)
    process.returncode = 0  # it is waited for here
    return running


def _words(scene: Scene, out: Path, options: dict[str, Any]) -> list[str]:
    chosen = scene.options | {"output_dir": out} | options
    return [f"--{name}={value}" for name, value in chosen.items() if value is not None]


# ---------------------------------------------------------------------------------------------------------- moments


@dataclass(frozen=True)
class Moment:
    """A phase of a run after so many finished steps, and how long it takes."""

    phase: str
    step: int = 0
    seconds: float = 0.0

    def has_come(self, running: Running) -> bool:
        """Return whether the phase has begun."""
        return any((entry.phase, entry.step) == (self.phase, self.step) for entry in running.phases())

    def strike(self, running: Running, chance: random.Random, number: int = signal.SIGKILL) -> bool:
        """Send a signal somewhere in this phase; return whether the process was still there."""
        if not running.waits_for(self.has_come):
            return False
        time.sleep(chance.uniform(0, self.seconds))
        return running.send(number)


def moments(running: Running) -> list[Moment]:
    """Return the phases of a run, which is let go on to its end."""
    noted = pairwise(running.ended().phases)
    return [Moment(entry.phase, entry.step, after.time - entry.time) for entry, after in noted if entry.phase in PHASES]
