"""The architecture, read from the imports: rooms import from earlier rooms, and each library has few homes.

docs/architecture.md explains the rooms. The message of a test that fails says what to change.
"""

import ast
import re
import resource
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "lora_alpaca"

ALLOWED = {  # the rooms in order, and the earlier ones that each imports from
    "errors": set(),
    "signals": set(),
    "storage": {"errors"},
    "config": {"errors", "storage"},
    "prompts": {"errors", "storage"},
    "models": {"errors", "storage", "config"},
    "data": {"errors", "storage", "config", "prompts", "models"},
    "artifacts": {"errors", "storage", "config", "prompts", "models", "data"},
    "engine": {"errors", "models", "data"},
    "distributed": {"errors", "signals", "storage", "config", "models", "engine"},
    "planning": {"errors", "storage", "config", "models", "data", "artifacts", "engine", "distributed"},
    "training": {"errors", "signals", "storage", "config", "prompts", "models", "data", "artifacts"}
    | {"engine", "distributed", "planning"},
    "inference": {"errors", "signals", "storage", "config", "prompts", "models", "data", "artifacts", "planning"},
    "evaluation": {"errors", "storage", "config", "prompts", "models", "data", "artifacts", "inference"},
    "export": {"errors", "storage", "config", "prompts", "models", "data", "artifacts"},
    "selftest": {"errors", "config", "prompts", "models", "data", "artifacts", "engine", "training"}
    | {"inference", "export"},
    "cli": {"errors", "signals", "config"},  # imports the room behind a verb when its options are known to be good
}
NO_ROOM = {"__init__", "__main__", "_version", "demo"}  # public names, command, version; data and scripts

HOMES = {  # the rooms or files that may import a library; of torch see WITHOUT_TORCH
    "accelerate": {"export/proof/streamed_model.py", "distributed/world.py", "training/trackers.py"},
    "bitsandbytes": {
        "training/optimizers.py",
        "models/quantised_linear.py",
        "models/quantization.py",
        "models/quick_import.py",
    },
    "datasets": {"data/readers/files.py"},
    "fastapi": {"inference/server/app.py"},
    "filelock": {"storage/atomic.py"},
    "fire": {"cli/flags.py"},
    "gguf": {"export/writers/gguf"},
    "gradio": {"inference/page"},
    "h11": {"inference/server/listening.py"},
    "huggingface_hub": {"artifacts/adapter_folder.py", "export/hub.py"},
    "llama_cpp": {"export/writers/gguf/writer.py"},
    "llguidance": {"inference/server/constraints.py"},
    "matplotlib": {"training/report/plots.py"},
    "numpy": {"data", "engine", "planning", "training/report/run_report.py", "export/writers/gguf/writer.py"},
    "openai": {"export/verify/endpoint.py"},
    "peft": {
        "export/proof/adapted_model.py",
        "models/lora.py",
        "models/adapter_layers.py",
        "artifacts/adapter_folder.py",
        "selftest/judge.py",
    },
    "prometheus_client": {"inference/server/metrics.py"},
    "psutil": {"models/memory.py", "planning/budget.py"},
    "pyarrow": {"data/readers/arrow_rows.py", "data/row_losses.py", "evaluation/table.py"},
    "rouge_score": {"evaluation/scores.py"},
    "pydantic": {"config", "storage/json_files.py", "export/verify/served_receipt.py", "inference/server/bodies.py"},
    "safetensors": {"models/weights.py"},
    "starlette": {"inference/page/launch.py", "inference/server"},
    "sentencepiece": {"models/special_tokens.py", "models/meta_tokenizer.py"},
    "tokenizers": {"data/tokenization.py", "models/meta_tokenizer.py"},
    "tqdm": {"export/progress.py", "inference/progress.py", "training/progress.py"},
    "transformers": {"models", "engine/attention.py", "inference", "export", "selftest"},
    "uvicorn": {"inference/server/listening.py"},
    "wandb": {"training/trackers.py"},
    "yaml": {"config/option_file.py"},
}

WITHOUT_TORCH = ("errors", "signals", "storage", "config", "prompts", "data", "cli")
WITH_TOKENIZER = {"data/visualization.py"}  # loads one with transformers


def sources(name: str = "") -> list[Path]:
    """Return the Python files of a room, of a file in it, or of all rooms."""
    if not name:
        return [path for room in ALLOWED for path in sources(room)]
    paths = (PACKAGE / name, PACKAGE / f"{name}.py", *sorted((PACKAGE / name).rglob("*.py")))
    return [path for path in paths if path.is_file()]


def where(path: Path) -> str:
    """Return the path of a file below the package."""
    return path.relative_to(PACKAGE).as_posix()


@cache
def imports(path: Path) -> list[tuple[str, int]]:
    """Return everything that a file imports, wherever in the file, as full names with line numbers."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = "." * node.level + (node.module or "")
            found += [(f"{source}.{alias.name}", node.lineno) for alias in node.names]
    return found


def own_imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield what a file imports of this package, as names below it, but for the version, which any may."""
    for name, line in imports(path):
        if name.startswith("lora_alpaca") and name != "lora_alpaca._version.__version__":
            yield name.removeprefix("lora_alpaca").removeprefix("."), line


def module_file(name: str) -> Path | None:
    """Return the file that a name below the package is imported from: `data.Rows` from data/__init__.py."""
    parts = name.split(".")
    for length in (len(parts), len(parts) - 1):
        path = PACKAGE.joinpath(*parts[:length])
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if length and candidate.is_file():
                return candidate
    return None


# ------------------------------------------------------------------------------------------------------------ rooms


def test_every_room_is_in_the_table():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - NO_ROOM == set(ALLOWED), "a room is new or gone: change its line in ALLOWED"


def test_the_table_is_in_order():
    rooms = list(ALLOWED)
    late = {name: sorted(ALLOWED[name] - set(rooms[: rooms.index(name)])) for name in rooms}
    assert not any(late.values()), f"rooms may import only from rooms above their line in ALLOWED: {late}"


@pytest.mark.parametrize("name", ALLOWED)
def test_a_room_imports_what_its_line_allows(name):
    used: dict[str, list[str]] = {}
    for path in sources(name):
        for module, line in own_imports(path):
            used.setdefault(module.partition(".")[0], []).append(f"{where(path)}:{line}")
    used.pop(name, None)
    wrong = {other: used[other] for other in sorted(used.keys() - ALLOWED[name])}
    assert not wrong, f"{name} may not import from {wrong}; move what is shared into an earlier room"
    unused = sorted(ALLOWED[name] - used.keys())
    assert not unused, f"{name} no longer imports from {', '.join(unused)}: take it out of its line in ALLOWED"


@pytest.mark.parametrize("name", ALLOWED)
def test_nothing_imports_the_public_names(name):
    """Inside the library each name comes from its own module; `lora_alpaca` imports from all."""
    wrong = [f"{where(path)}:{line}" for path in sources(name) for module, line in own_imports(path) if not module]
    wrong += [
        f"{where(path)}:{line}: {module}"
        for path in sources(name)
        for module, line in own_imports(path)
        if module and module_file(module) is None
    ]
    assert not wrong, f"import these from the modules that define them: {wrong}"


def test_no_import_is_relative():
    relative = [f"{where(path)}:{line}" for path in sources() for name, line in imports(path) if name.startswith(".")]
    assert not relative


def test_modules_import_each_other_in_no_circle():
    """Counts imports inside functions too: putting one off hides a circle, it does not open it."""
    graph = {
        where(path): {where(file) for name, _ in own_imports(path) if (file := module_file(name)) not in (None, path)}
        for path in sources()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import each other: {' <- '.join(error.args[1])}")


# -------------------------------------------------------------------------------------------------------- libraries


def test_each_library_has_its_homes():
    homeless, used = [], set()
    for path in sources():
        for name, line in imports(path):
            library = name.partition(".")[0]
            if library in sys.stdlib_module_names or library in ("lora_alpaca", "torch", ""):
                continue
            homes = {home for home in HOMES.get(library, ()) if f"{where(path)}/".startswith(f"{home}/")}
            homeless += [f"{where(path)}:{line}: {library}"] * (not homes)
            used |= {(library, home) for home in homes}
    assert not homeless, f"call the module that has this library already, or add a home to HOMES: {homeless}"
    empty = sorted({(library, home) for library in HOMES for home in HOMES[library]} - used)
    assert not empty, f"these homes no longer import their library, take them out of HOMES: {empty}"


def test_rooms_without_torch():
    """What finds a wrong flag, row or template imports no torch, not even through others: it answers in a second."""
    paths = [path for name in WITHOUT_TORCH for path in sources(name) if where(path) not in WITH_TOKENIZER]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    program = "import sys, importlib\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    program += "    assert not {'torch', 'transformers', 'peft'} & set(sys.modules), f'{name} imports torch'"
    done = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("module", ["lora_alpaca", "lora_alpaca.cli"])
def test_importing_costs_nothing(module):
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'gradio', 'numpy'}"
    program = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


@pytest.mark.parametrize("script", ["finetune.py", "generate.py", "export_hf_checkpoint.py"])
def test_help_is_instant(script, run_script, tmp_path):
    """Under half a second of processor time, which is the time it takes on a machine that does nothing else."""
    seconds: list[float] = []
    while len(seconds) < 5 and min(seconds, default=1) >= 0.5:  # on a busy machine a process takes longer
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_script(script, "--help", cwd=tmp_path).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


# -------------------------------------------------------------------------------------------- picture and documents


def test_the_picture_is_drawn_from_the_imports():
    drawing = runpy.run_path(str(ROOT / "docs" / "draw_architecture.py"))
    assert drawing["ROOMS"] == list(ALLOWED)
    drawn = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
    assert drawn == drawing["draw"](), "the imports have changed: python docs/draw_architecture.py"


@pytest.mark.parametrize("document", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_a_document_names_files_that_are_there(document):
    named = set(re.findall(r"`([\w./-]+/[\w.-]+\.py)`", (ROOT / document).read_text(encoding="utf-8")))
    missing = sorted(name for name in named if not (PACKAGE / name).is_file() and not (ROOT / name).is_file())
    assert len(named) > 10
    assert not missing, f"{document} names files that are not there: {missing}"
