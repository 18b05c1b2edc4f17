"""The rules of the house, read from the imports: they point down, and each library has one home."""

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / "lora_alpaca"

LAYERS = [  # a module imports only from lines above its own
    "errors",
    "stopping",
    "storage",
    "environment",
    "options",
    "common_options",
    "config",
    "prompts",
    "data",
    "tokenization",
    "examples",
    "encoding",
    "ledger",
    "preparation",
    "batching",
    "packing",
    "memory",
    "quantization",
    "folders",
    "contracts",
    "models",
    "skeletons",
    "fingerprints",
    "adapters",
    "checkpoints",
    "records",
    "reports",
    "engine",
    "peers",
    "ranks",
    "planning",
    "step",
    "resuming",
    "loop",
    "training",
    "showing",
    "generation",
    "exporting",
    "converting",
    "webui",
    "cli",
]

HOMES = {  # the modules that may import a library
    "accelerate": {"ranks"},
    "bitsandbytes": {"quantization"},
    "datasets": {"data"},
    "filelock": {"storage"},
    "fire": {"cli"},
    "gradio": {"webui"},
    "huggingface_hub": {"adapters"},
    "numpy": {"examples", "preparation"},
    "peft": {"adapters"},
    "psutil": {"memory", "skeletons"},
    "pyarrow": {"data"},
    "pydantic": {"common_options", "config", "options"},
    "safetensors": {"adapters", "checkpoints", "models", "storage"},
    "tokenizers": {"tokenization"},
    "torch": {"adapters", "batching", "checkpoints", "converting", "engine", "exporting", "generation", "memory"}
    | {"models", "packing", "peers", "planning", "quantization", "ranks", "skeletons", "step", "storage", "training"}
    | {"webui"},
    "tqdm": {"reports"},
    "transformers": {"adapters", "engine", "generation", "models", "quantization", "skeletons"},
    "wandb": {"reports"},
}

MOST_LINES = 300


def sources(layer: str) -> list[Path]:
    """Return the files of a module, or of a package that has taken its place."""
    return [path for path in (PACKAGE / f"{layer}.py", *sorted((PACKAGE / layer).rglob("*.py"))) if path.is_file()]


def imports(path: Path) -> Iterator[str]:
    """Yield the full name of everything that a file imports, wherever in the file it does."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_layers(layer: str) -> set[str]:
    """Return the modules of this package that a module imports; the version in the package itself is no module."""
    names = {name for path in sources(layer) for name in imports(path)}
    ours = {name.split(".")[1] for name in names if name.startswith("lora_alpaca.")}
    return ours - {layer, "__version__"}


def imported_libraries(layer: str) -> set[str]:
    """Return the third-party libraries that a module imports."""
    tops = {name.partition(".")[0] for path in sources(layer) for name in imports(path)}
    return tops - set(sys.stdlib_module_names) - {"lora_alpaca"}


def test_every_module_has_its_line():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert found - {"__init__", "demo"} == set(LAYERS)


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_down(layer):
    below = set(LAYERS[: LAYERS.index(layer)])
    assert imported_layers(layer) <= below  # `demo` is no layer: data and scripts, which nothing imports


@pytest.mark.parametrize("layer", LAYERS)
def test_each_library_has_its_home(layer):
    homeless = sorted(name for name in imported_libraries(layer) if layer not in HOMES.get(name, ()))
    assert not homeless, f"{layer} imports {', '.join(homeless)}; see HOMES"


def test_no_home_is_empty():
    homes = {(layer, library) for library in HOMES.keys() - {"torch"} for layer in HOMES[library]}
    assert not {(layer, library) for layer, library in homes if library not in imported_libraries(layer)}


@pytest.mark.parametrize("layer", LAYERS)
def test_no_module_is_long(layer):
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in sources(layer)}
    assert not {name: lines for name, lines in lengths.items() if lines > MOST_LINES}


@pytest.mark.parametrize("module", ["lora_alpaca", "lora_alpaca.cli"])
def test_importing_costs_nothing(module):
    heavy = "{'torch', 'transformers', 'peft', 'datasets', 'gradio', 'numpy'}"
    program = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == []


@pytest.mark.parametrize("script", ["finetune.py", "generate.py", "export_hf_checkpoint.py"])
def test_help_is_instant(script, run_script, tmp_path):
    """Under half a second of processor time, which is the time it takes on a machine that does nothing else."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run_script(script, "--help", cwd=tmp_path).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5
