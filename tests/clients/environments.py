"""Environments of their own for programs that nobody here wrote: python tests/clients/environments.py [NAME ...]

Each is made once, from a pinned list, outside the clone: in $LORA_ALPACA_CLIENTS or ~/.cache/lora_alpaca_clients. The
tests that are marked `clients` are skipped where the environment that they need is not there. `llama_cpp` is built from
source, which takes five minutes on two cores and a C++ compiler.

    environment("llama_cpp") -> Path of its python, or the test is skipped
    answer("llama_cpp", PROGRAM, {"gguf": path}) -> what the program, which reads one JSON object, prints as another
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(os.environ.get("LORA_ALPACA_CLIENTS") or Path.home() / ".cache/lora_alpaca_clients")
LLAMA_CPP = "llama-cpp-python==0.3.36"
TORCH = "torch==2.13.0"

REQUIREMENTS = {
    "llama_cpp": [LLAMA_CPP.replace("==", "[server]=="), "gguf==0.19.0"],
    # what convert_hf_to_gguf.py of that version names, and its own gguf package, which lies beside it
    "convert": [
        TORCH,
        "transformers==4.57.6",
        "numpy~=2.2.6",
        "sentencepiece==0.2.*",
        "protobuf<5",
        "pyyaml",
        "requests",
    ],
    "transformers4": [TORCH, "transformers==4.57.6", "sentencepiece==0.2.*", "protobuf", "jinja2", "peft==0.17.*"],
    "serve": [
        "openai==2.*",
        TORCH,
        "transformers[serving]==5.23.0",
        "peft==0.21.2",
        "sentencepiece==0.2.*",
        "protobuf",
    ],
    "lm_eval": ["lm_eval[api]==0.4.13", "transformers==5.23.0"],  # of transformers, the tokenizers alone
    "litellm": ["litellm==1.110.2", "langchain-openai==1.7.4"],
    "mlx": ["mlx[cpu]==0.32.4", "mlx-lm==0.32.2"],
}
FROM_SOURCE = {"llama_cpp": "llama-cpp-python"}  # no wheel: it is built for the machine


def python_of(name: str) -> Path:
    """Return where the python of an environment is, or will be."""
    return ROOT / name / "bin" / "python"


def is_there(name: str) -> bool:
    """Return whether an environment has been made, to the end, of the list that stands here."""
    mark = ROOT / name / "requirements.txt"
    return mark.is_file() and mark.read_text(encoding="utf-8").split("\n") == REQUIREMENTS[name]


def missing(name: str) -> str:
    """Return why a test of an environment is skipped."""
    return f"the environment {name} has not been made; make clients makes it"


def environment(name: str) -> Path:
    """Return the python of an environment; the test that asks is skipped where it is not there."""
    import pytest

    if not is_there(name):
        pytest.skip(missing(name))
    return python_of(name)


def answer(name: str, program: str, given: dict[str, Any], seconds: int = 600) -> Any:
    """Return the JSON that a program prints last, run in an environment with an object of JSON as its input."""
    done = subprocess.run(
        [str(environment(name)), "-c", program],
        input=json.dumps(given, default=str),
        capture_output=True,
        text=True,
        timeout=seconds,
        env=own_environment(),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def own_environment() -> dict[str, str]:
    """Return the variables of a program that shall find nothing of the clone, and fetch nothing from the hub."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return kept | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}


def llama_cpp_source() -> Path:
    """Return the folder of llama.cpp's sources, with its own converters."""
    environment("convert")
    return ROOT / "convert" / "llama.cpp"


def make(name: str) -> None:
    """Make an environment; what an attempt that failed left of it is made anew."""
    folder = ROOT / name
    if is_there(name):
        return
    ROOT.mkdir(parents=True, exist_ok=True)
    if not python_of(name).exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python_of(name)), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    own = ["--no-binary", FROM_SOURCE[name]] if name in FROM_SOURCE else []
    subprocess.run([*pip, *own, *REQUIREMENTS[name]], check=True, env=own_environment())
    if name == "convert":
        fetch_llama_cpp(folder / "llama.cpp")
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS[name]), encoding="utf-8")


def fetch_llama_cpp(folder: Path) -> None:
    """Unpack llama.cpp's converters out of the source distribution of llama-cpp-python into a folder."""
    if folder.exists():
        return
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        stage = Path(temporary)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        subprocess.run([*pip, "--dest", str(stage), LLAMA_CPP], check=True)
        with tarfile.open(next(stage.glob("*.tar.gz"))) as archive:
            archive.extractall(stage, filter="data")
        source = next(stage.glob("*/vendor/llama.cpp"))
        (stage / "kept").mkdir()
        for part in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py", "conversion", "gguf-py", "LICENSE"):
            shutil.move(source / part, stage / "kept" / part)
        shutil.move(stage / "kept", folder)


def main(names: list[str]) -> None:
    """Make environments, all of them unless some are named; one that cannot be made does not hold up the others."""
    for name in names or REQUIREMENTS:
        try:
            make(name)
        except subprocess.CalledProcessError as error:
            print(f"{name}: not made ({' '.join(map(str, error.cmd[:4]))} ... exited with {error.returncode})")
        else:
            print(f"{name}: {python_of(name)}")


if __name__ == "__main__":
    main(sys.argv[1:])
