"""Train two versions of the library and compare what they leave, byte for byte: compare_versions.py OLD [NEW].

OLD and NEW are commits, or folders of checkouts; NEW is this clone, as it is, unless given. Compared are

- adapters, optimizer moments and losses of short runs: three precisions, packed and padded, on one and two processes
- a run of OLD that is killed after a checkpoint and resumed by NEW, with OLD's uninterrupted run
- greedy answers and merged weights, which both make of OLD's adapters

Adapters, moments, answers and merged weights must be equal; of losses the largest relative difference is told. Prints
a table, then a line of JSON. Exits with 1 where something differs that must be equal, or a command fails.
"""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import psutil
from conftest import ANIMALS, LLAMA_SIZES, OFFLINE, OPPOSITES, ROOT, _save_sentencepiece
from safetensors.torch import load_file
from torch import equal

PRECISIONS = {"8-bit": ["--load_8bit"], "4-bit": ["--load_4bit"], "unquantised": ["--load_8bit", "False"]}
ENGINES = {"packed": ["--engine", "packed"], "padded": ["--engine", "padded", "--micro_batch_size", "2"]}
RANKS = (1, 2)
STEPS, SAVED = 10, 4  # steps of a run, and after how many a checkpoint is written
WEIGHTS, MOMENTS, RECORD = "adapter_model.safetensors", "optimizer.safetensors", "lora_alpaca.json"
KILLS = 5  # attempts at killing a run between its checkpoint and its end
QUESTION = "Where does the owl live?"

PROGRAM = """
import os, sys
from pathlib import Path
import lora_alpaca
found, asked = Path(lora_alpaca.__file__).resolve().parent.parent, Path(os.environ["CHECKOUT"])
if found != asked:
    sys.exit(f"error: the library of {found} is imported, not that of {asked}")
from lora_alpaca.cli import main
main(sys.argv[1:])
"""


class Failed(Exception):
    """A command of one of the versions failed; the text is its last line of error."""


@dataclass(frozen=True)
class Version:
    """A checkout of the library, and a folder for what it makes."""

    name: str
    checkout: Path
    work: Path

    def command(self, *words: object, ranks: int = 1) -> list[str]:
        """Return the words of a command of this version; with two ranks under torchrun, as users start it."""
        program = self.work / "program.py"
        program.write_text(PROGRAM)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        return [sys.executable, *launcher, str(program), *map(str, words)]

    def start(self, *words: object, ranks: int = 1) -> subprocess.Popen[str]:
        """Start a command of this version: its own checkout first on the path, offline, one thread a process."""
        environment = os.environ | {
            "CHECKOUT": str(self.checkout),
            "PYTHONPATH": os.pathsep.join([str(OFFLINE), str(self.checkout)]),
            "OMP_NUM_THREADS": "1",
            "XDG_CACHE_HOME": str(self.work / "cache"),
        }
        return subprocess.Popen(
            self.command(*words, ranks=ranks),
            cwd=self.work,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: object, ranks: int = 1) -> str:
        """Return the stdout of a command of this version; Failed with its last words if it fails."""
        out, err = (process := self.start(*words, ranks=ranks)).communicate(timeout=900)
        if process.returncode:
            errors = [line for line in err.splitlines() if "error: " in line] or err.strip().splitlines()[-3:]
            raise Failed(f"{self.name}: {words[0]} exited {process.returncode}: {' | '.join(errors)[-400:]}")
        return out


@dataclass(frozen=True)
class Case:
    """One combination, and the flags of its run."""

    precision: str
    engine: str
    ranks: int
    flags: list[str]

    @property
    def folder(self) -> str:
        """Return the name of its output folder."""
        return f"{self.precision}-{self.engine}-{self.ranks}"

    def train(self, version: Version) -> Path:
        """Train from the beginning and return the output folder."""
        version.run("finetune", *self.flags, "--output_dir", self.folder, ranks=self.ranks)
        return version.work / self.folder

    def kill(self, version: Version) -> Path:
        """Train until the first checkpoint is there, kill every process of the run, and return the output folder."""
        for attempt in range(KILLS):
            folder = version.work / f"killed-{attempt}-{self.folder}"
            process = version.start("finetune", *self.flags, "--output_dir", folder, ranks=self.ranks)
            while process.poll() is None and not (folder / f"checkpoint-{SAVED}").is_dir():
                time.sleep(0.001)
            kill_tree(process)
            if not (folder / f"checkpoint-{SAVED}").is_dir():
                raise Failed(f"{version.name}: a run to be killed ended without a checkpoint")
            if json.loads((folder / RECORD).read_text())["status"] != "finished":
                return folder
        raise Failed(f"{version.name}: the run ended before it could be killed, {KILLS} times")


def kill_tree(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to a process and all that it started, the youngest first, and wait for their end."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        if member.is_running():
            member.send_signal(signal.SIGKILL)
    process.kill()
    process.communicate()
    psutil.wait_procs(family, timeout=30)


# -------------------------------------------------------------------------------------------------------- comparing


@dataclass
class Findings:
    """One value for each comparison of a case: `equal`, what differs, or a figure."""

    case: str
    values: dict[str, str] = field(default_factory=dict)
    unequal: list[str] = field(default_factory=list)

    def expect(self, name: str, same: bool, otherwise: str = "DIFFERS") -> None:
        """Note a comparison that must be equal."""
        self.values[name] = "equal" if same else otherwise
        if not same:
            self.unequal.append(f"{self.case}: {name}: {otherwise}")

    @contextmanager
    def catching(self, name: str) -> Iterator[None]:
        """Turn a failed command within this context into a difference."""
        try:
            yield
        except (Failed, OSError, subprocess.TimeoutExpired) as error:
            self.expect(name, False, "FAILED")
            self.unequal[-1] += f": {error}"


def both(old: Version, new: Version, work: Callable[[Version], Any], together: bool = True) -> tuple[Any, Any]:
    """Return what work gives for the old and the new version, done at the same time or one after the other."""
    with ThreadPoolExecutor(max_workers=2 if together else 1) as pool:
        first, second = pool.submit(work, old), pool.submit(work, new)
        return first.result(), second.result()


def same_bytes(one: Path, other: Path) -> bool:
    """Return whether two files hold the same bytes."""
    return one.read_bytes() == other.read_bytes()


def same_tensors(one: Path, other: Path) -> bool:
    """Return whether two files hold the same tensors, to the bit; a missing file holds none."""
    if not one.is_file() or not other.is_file():
        return False
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() != set() and all(equal(first[key], second[key]) for key in first)


def losses(folder: Path) -> dict[tuple[int, str], float]:
    """Return the losses and gradient norms that a record holds, by step and name."""
    history = json.loads((folder / RECORD).read_text())["result"]["history"]
    return {
        (int(entry["step"]), name): value
        for entry in history
        for name, value in entry.items()
        if "loss" in name or "norm" in name
    }


def largest_difference(one: dict[Any, float], other: dict[Any, float]) -> float:
    """Return the largest relative difference of two sets of figures; infinity where the sets are not the same."""
    if one.keys() != other.keys() or not one:
        return float("inf")
    return max(abs(one[key] - other[key]) / max(abs(one[key]), 1e-30) for key in one)


def compare_runs(case: Case, old: Version, new: Version) -> Findings:
    """Train a case in both versions, and resume a killed run of the old version with the new one."""
    found = Findings(f"{case.precision} {case.engine} {case.ranks}")
    with found.catching("adapter"):
        one, other = both(old, new, case.train, together=case.ranks == 1)
        found.expect("adapter", same_bytes(one / WEIGHTS, other / WEIGHTS))
        saved = [f"checkpoint-{step}" for step in range(SAVED, STEPS, SAVED)]
        found.expect("moments", all(same_tensors(one / name / MOMENTS, other / name / MOMENTS) for name in saved))
        off = largest_difference(losses(one), losses(other))
        found.values["losses"] = "equal" if off == 0 else f"{off:.1e}"
    with found.catching("resumed"):
        killed = case.kill(old)
        new.run("finetune", *case.flags, "--output_dir", killed, "--resume", ranks=case.ranks)
        found.expect("resumed", same_bytes(old.work / case.folder / WEIGHTS, killed / WEIGHTS))
    return found


def compare_uses(case: Case, old: Version, new: Version) -> Findings:
    """Answer from the old version's adapter, and merge it, with both versions."""
    found, adapter = Findings(f"{case.precision} {case.engine} {case.ranks}"), old.work / case.folder
    chosen = ["--lora_weights", adapter, "--device", "cpu"]

    def answer(version: Version) -> str:
        sampling = [*PRECISIONS[case.precision], "--dtype", "fp32", "--temperature", 0, "--max_new_tokens", 48]
        return version.run("generate", *chosen, *sampling, "--instruction", QUESTION)

    def merge(version: Version) -> Path:
        version.run("export", *chosen, "--output_dir", merged := version.work / f"merged-{case.folder}")
        return merged

    with found.catching("answers"):
        one, other = both(old, new, answer)
        found.expect("answers", one == other and one.strip() != "")
    with found.catching("merged"):
        one, other = both(old, new, merge)
        names = sorted(path.name for path in one.glob("*.safetensors"))
        there = names == sorted(path.name for path in other.glob("*.safetensors")) != []
        found.expect("merged", there and all(same_bytes(one / name, other / name) for name in names))
    return found


# ------------------------------------------------------------------------------------------------- what is trained


def make_model(folder: Path) -> Path:
    """Write a random two-layer Llama with a tokenizer of its own, from seed 0, and return its folder."""
    import torch
    import transformers

    folder.mkdir()
    texts = [row[name] for row in make_rows() for name in ("instruction", "input", "output")] * 4
    _save_sentencepiece("Llama", [*texts, "### Instruction:", "### Input:", "### Response:"], folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **LLAMA_SIZES, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows() -> list[dict[str, str]]:
    """Return rows with and without an input, of one word and of several lines, some longer than is trained."""
    triples = []
    for animal, (home, food, voice) in ANIMALS.items():
        triples += [
            (f"Where does the {animal} live?", "", f"It lives in {home}."),
            ("What does this animal eat?", f"Animal: {animal}", food),
            (f"Describe the {animal}.", "", f"Home: {home}\nFood: {food}\n" + f"It {voice}. " * len(animal)),
        ]
    for word, opposite in OPPOSITES.items():
        triples += [("Name the opposite.", f"Word: {word}", opposite), (f"Use {opposite} in a sentence.", "", word * 3)]
    return [dict(zip(("instruction", "input", "output"), triple, strict=True)) for triple in triples]


def cases(work: Path, arguments: argparse.Namespace) -> list[Case]:
    """Return every combination with its flags."""
    base, data = arguments.base_model, arguments.data_path
    if not base:
        base = str(make_model(work / "model"))
    if not data:
        (work / "rows.json").write_text(json.dumps(make_rows()))
        data = str(work / "rows.json")
    shared = {
        "base_model": base, "data_path": data, "device": "cpu", "dtype": arguments.dtype, "seed": 7, "cutoff_len": 128,
        "prompt_template_name": "alpaca", "batch_size": 8, "max_steps": STEPS, "save_steps": SAVED, "eval_steps": 3,
        "val_set_size": 5, "logging_steps": 1, "learning_rate": 1e-2, "lora_dropout": 0.1, "lora_r": 4,
        "save_total_limit": STEPS,  # versions may save at other steps too
    }  # fmt: skip
    flags = [word for name, value in shared.items() for word in (f"--{name}", str(value))]
    every = [
        Case(precision, engine, ranks, [*flags, *PRECISIONS[precision], *ENGINES[engine]])
        for precision, engine, ranks in product(PRECISIONS, ENGINES, RANKS)
    ]
    return [case for case in every if arguments.only in case.folder]


def version(name: str, role: str, work: Path) -> Version:
    """Return a version named by a folder, or by a commit of this clone, which is unpacked into the work folder."""
    (own := work / role).mkdir()
    if (Path(name) / "lora_alpaca").is_dir():
        return Version(role, Path(name).resolve(), own)
    packed = subprocess.run(["git", "-C", str(ROOT), "archive", name], capture_output=True)
    if packed.returncode:
        sys.exit(f"error: {name} is neither a folder with lora_alpaca in it nor a commit of {ROOT}")
    with tarfile.open(fileobj=io.BytesIO(packed.stdout)) as archive:
        archive.extractall(checkout := (work / f"checkout-{role}").resolve(), filter="data")
    return Version(role, checkout, own)


def table(findings: list[Findings], columns: list[str]) -> Iterator[str]:
    """Yield the lines of a table with a row for each case."""
    yield "".join(f"{name:<24}" if not n else f"{name:<10}" for n, name in enumerate(["case", *columns]))
    for found in findings:
        yield f"{found.case:<24}" + "".join(f"{found.values.get(name, '-'):<10}" for name in columns)


def main() -> None:
    """Compare, print, and exit with 1 where something differs that must not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="commit, or folder of a checkout")
    parser.add_argument("new", nargs="?", default=str(ROOT), help="the same; this clone unless given")
    parser.add_argument("--only", default="", help="compare the combinations with this in their name: 8-bit-packed-1")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"), help="compute dtype of training")
    parser.add_argument("--base_model", default="", help="base model of the runs; a random Llama unless given")
    parser.add_argument("--data_path", default="", help="rows of the runs; 30 made ones unless given")
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="compare-versions-") as temporary:
        work = Path(temporary).resolve()
        old, new = version(arguments.old, "old", work), version(arguments.new, "new", work)
        chosen = cases(work, arguments)
        trained = []
        for case in chosen:
            trained.append(compare_runs(case, old, new))
            print(*list(table(trained, ["adapter", "moments", "losses", "resumed"]))[0 if len(trained) == 1 else -1 :],
                  sep="\n", flush=True)  # fmt: skip
        print()
        used = []
        for case in (case for case in chosen if (case.engine, case.ranks) == ("packed", 1)):
            used.append(compare_uses(case, old, new))
        print(*table(used, ["answers", "merged"]), sep="\n")
    unequal = [line for found in [*trained, *used] for line in found.unequal]
    print(*unequal, sep="\n", file=sys.stderr)
    report = {
        "equal": not unequal, "old": arguments.old, "new": arguments.new, "dtype": arguments.dtype,
        "cases": [{"case": found.case} | found.values for found in trained],
        "uses": [{"case": found.case} | found.values for found in used],
        "different": unequal, "seconds": round(time.monotonic() - begun),
    }  # fmt: skip
    print(json.dumps(report))
    sys.exit(1 if unequal or not trained else 0)


if __name__ == "__main__":
    main()
