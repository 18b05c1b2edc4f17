"""What does a card do? Nine stages, each in a process and within a time of its own: python benchmarks/gpu.py

    --stages 1,3        some of them            --max_minutes 10    for all together
    --wheels FOLDER     wheels, unpacked or not, that go before what is installed; nothing is installed
    --device cpu --tiny the same stages on models of two layers, to try them where there is no card
    --out FILE          where the lines go, besides the screen: benchmarks/results/gpu-DATE.jsonl, with --tiny nowhere;
                        beside it, with the ending .json, all of them at the end

1 versions, the card, and its matrix products   2 rows in packs are rows alone, in every precision
3 a step at 1B: ours, the alpaca-lora recipe, Trainer, TRL   4 a step at 7B: tokens/s, peak memory and the estimate
5 kill and resume, to the bit   6 answers   7 a merge   8 two processes on one device, over gloo   9 a profile

A stage is a line of JSON as soon as it ends: `status` is `ok`, `failed` (with the `error`; the next stage goes on),
`out of time` (with the figures so far) or `left out`. The figures of a stage come in the order in which they tell most.
After the lines, the table that `python benchmarks/tables.py` puts into docs/benchmarks.md.
"""

import argparse
import contextlib
import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STAGES = {  # name, seconds at most
    1: ("device", 60), 2: ("gradients", 120), 3: ("step_1b", 150), 4: ("step_7b", 150), 5: ("resume", 90),
    6: ("generation", 60), 7: ("merge", 60), 8: ("two_processes", 60), 9: ("profile", 60),
}  # fmt: skip
UNSHOWN = {
    "versions",
    "missing",
    "kernels",
    "shape",
    "notes",
    "engine",
    "said",
    "reply",
    "answer",
    "python",
}  # in the table
PATIENCE = 3  # times these with --tiny: a CPU may have other work
LEAST = 5  # seconds: in less no stage tells anything


def paths(wheels: str | None, folder: Path) -> str:
    """Return PYTHONPATH: this library, then the wheels, each unpacked if it is a file."""
    found = [str(HERE.parent)]
    if wheels:
        for wheel in sorted(Path(wheels).glob("*.whl")):
            with zipfile.ZipFile(wheel) as file:
                file.extractall(folder)
        found += [str(folder), str(Path(wheels).resolve())]
    return os.pathsep.join([*found, *filter(None, [os.environ.get("PYTHONPATH")])])


def run(
    number: int, asked: argparse.Namespace, limit: float, folder: Path, variables: dict[str, str]
) -> dict[str, Any]:
    """Return what a stage found. Its process, and all that it started, is ended when its time is over."""
    name, begun = STAGES[number][0], time.perf_counter()
    output, errors = folder / f"{name}.out", folder / f"{name}.err"
    words = [sys.executable, str(HERE / "gpu_stages"), name, asked.device, str(int(asked.tiny)), str(folder)]
    with output.open("w") as out, errors.open("w") as err:
        process = subprocess.Popen(words, stdout=out, stderr=err, env=variables, start_new_session=True)
        try:
            status = "failed" if process.wait(timeout=limit) else "ok"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = [line for line in output.read_text().splitlines() if line.startswith("{")]
    figures = json.loads(lines[-1]) if lines else {}  # each line has all that was found so far
    found = {"stage": number, "name": name, "status": status, "seconds": round(time.perf_counter() - begun, 1)}
    if status == "failed":
        said = [line for line in errors.read_text(errors="replace").splitlines() if line.strip()]
        found["error"] = said[-1][:400] if said else f"exit code {process.returncode}"
    return found | {"figures": figures}


def table(lines: list[dict[str, Any]]) -> str:
    """Return the stages as a table of Markdown."""
    rows = ["| stage | status | seconds | found |", "|---|---|--:|---|"]
    for line in lines:
        found = "; ".join(_shown(line["figures"]))
        found = "; ".join(filter(None, [line.get("error", "").replace("|", "/"), found]))
        rows.append(f"| {line['stage']} {line['name']} | {line['status']} | {line['seconds']} | {found} |")
    return "\n".join(rows)


def _shown(figures: dict[str, Any]) -> list[str]:
    return [
        f"{name} {_short(value)}" for name, value in figures.items() if name not in UNSHOWN and value not in ({}, [])
    ]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(_shown(value)) + ")"
    if isinstance(value, list):
        return ", ".join(map(_short, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Run the stages, one after the other, and end with the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(map(str, STAGES)))
    parser.add_argument("--max_minutes", type=float, default=10)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--wheels")
    parser.add_argument("--out")
    asked = parser.parse_args()
    numbers = [int(number) for number in asked.stages.split(",")]
    if unknown := [number for number in numbers if number not in STAGES]:
        parser.error(f"--stages: there are stages 1 to {len(STAGES)}, and not {unknown[0]}")
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    out = asked.out or (None if asked.tiny else str(HERE / "results" / f"gpu-{date}.jsonl"))
    deadline, lines = time.perf_counter() + 60 * asked.max_minutes, []
    with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as files:
        file = files.enter_context(open(out, "a")) if out else None
        folder = Path(temporary)
        variables = os.environ | {"PYTHONPATH": paths(asked.wheels, folder / "wheels"), "PYTHONUNBUFFERED": "1"}
        variables |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        for number in numbers:
            left = deadline - time.perf_counter()
            if left < LEAST:
                line = {"stage": number, "name": STAGES[number][0], "status": "left out", "seconds": 0, "figures": {}}
            else:
                line = run(
                    number, asked, min(STAGES[number][1] * (PATIENCE if asked.tiny else 1), left), folder, variables
                )
            lines.append({"date": date, **line})
            for target in filter(None, (sys.stdout, file)):
                print(json.dumps(lines[-1]), file=target, flush=True)
    if out:
        Path(out).with_suffix(".json").write_text(json.dumps({"date": date, "stages": lines}, indent=2) + "\n")
    print(f"\n{table(lines)}")
    sys.exit(any(line["status"] == "failed" for line in lines))


if __name__ == "__main__":
    main()
