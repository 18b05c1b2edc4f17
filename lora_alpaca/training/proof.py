"""The proof that the check at start has passed, kept on the disk, so that the same run does not check again.

What is proven are facts, all of them: options, files by their hash, plan, libraries, code and machine. Where one of
them differs, or the proof is damaged, the check is made. A proof is kept beside the prepared rows (`--cache_dir`).
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from lora_alpaca.artifacts import run_record
from lora_alpaca.config.environment import version_of
from lora_alpaca.data import cache
from lora_alpaca.distributed.agreement import LIBRARIES, code_sha256
from lora_alpaca.distributed.world import World
from lora_alpaca.models import hardware
from lora_alpaca.models.lora import WEIGHTS
from lora_alpaca.planning.plan import Plan
from lora_alpaca.storage import atomic
from lora_alpaca.storage.json_files import read_json
from lora_alpaca.storage.paths import sha256, user_path
from lora_alpaca.training.job import Job

FILE = "start_checks.json"
KEPT = 200  # proofs; the oldest are forgotten first


class Proof:
    """The proof of a run that is about to begin. Every rank has its own, and it holds where all ranks have one."""

    def __init__(self, job: Job, plan: Plan, world: World):
        self._folder, self._world = None, world
        if not job.config.trust_remote_code:  # the code of such a base has no hash
            self._folder, _ = cache.cache_folder(job.config.cache_dir)
        facts = {
            "run": run_record.identity(job.record),
            "init_adapter": sha256(user_path(job.config.init_adapter) / WEIGHTS) if job.config.init_adapter else None,
            "plan": asdict(plan),
            "versions": {name: version_of(name) for name in LIBRARIES},
            "code": code_sha256(),
            "machine": hardware.in_detail(world.device),
        }
        self._key = _sha256(facts)
        self._recheck = job.config.recheck
        self.notes: list[str] = []  # of the check that passed, and that it is not made again

    def holds(self) -> bool:
        """Return whether the check has passed with the same facts; every rank calls it."""
        found = {} if self._folder is None or self._recheck else read_json(self._folder / FILE).get(self._key, {})
        notes = found.get("notes") if isinstance(found, dict) else None
        is_whole = notes is not None and found.get("sha256") == _sha256([self._key, notes])
        if not all(self._world.gather(is_whole)):
            return False
        self.notes = [*(notes or []), "the check at start passed before in this very setting (--recheck repeats it)"]
        return True

    def keep(self, notes: Sequence[str]) -> None:
        """Write down that the check passed, and what it noted. Where that cannot be written, only time is lost."""
        if self._folder is None:
            return
        path = self._folder / FILE
        said = [note for note in notes if not note.startswith("engine: ")]  # which has the time that it took
        proof = {"notes": said, "sha256": _sha256([self._key, said])}
        with suppress(OSError):
            atomic.remove_hidden(path.parent, of=FILE, locked=False)
            others = {key: value for key, value in read_json(path).items() if key != self._key}
            newest = dict([*others.items(), (self._key, proof)][-KEPT:])
            atomic.replace(path, json.dumps(newest).encode())


def _sha256(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
