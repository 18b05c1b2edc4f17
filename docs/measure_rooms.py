"""Print files and lines of each room and of its tests, and which folders, files and functions are past the guide.

A guide, not a gate: python docs/measure_rooms.py.
"""

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = runpy.run_path(str(Path(__file__).with_name("draw_architecture.py")))["ROOMS"]
FILES, LINES, FUNCTION = range(3, 13), 300, 60  # files in a folder, lines in a file, lines in a function


def python_files(folder: Path) -> list[Path]:
    """Return the Python files of a folder, or of the module of that name."""
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


def lines(path: Path) -> int:
    """Return the lines of a file."""
    return len(path.read_text(encoding="utf-8").splitlines())


def long_functions(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines and the name of each function in a file that is longer than the guide."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > FUNCTION:
                yield length, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def main() -> None:
    """Print a table of the rooms, and then the long files and functions."""
    print(f"{'room':<13}{'files':>6}{'lines':>7}{'of tests':>10}")
    total = [0, 0, 0]
    for room in ROOMS:
        code = python_files(ROOT / "lora_alpaca" / room)
        tests = sorted((ROOT / "tests" / room).rglob("*.py"))
        counts = [len(code), sum(map(lines, code)), sum(map(lines, tests))]
        total = [one + more for one, more in zip(total, counts, strict=True)]
        print(f"{room:<13}{counts[0]:>6}{counts[1]:>7}{counts[2]:>10}")
    elsewhere = sum(map(lines, python_files(ROOT / "tests"))) - total[2]
    print(f"{'together':<13}{total[0]:>6}{total[1]:>7}{total[2]:>10}  and {elsewhere} lines of tests across rooms")
    folders = [path.parent for room in ROOMS for path in (ROOT / "lora_alpaca" / room).rglob("__init__.py")]
    for count, folder in sorted(((len([*folder.glob("[!_]*.py")]), folder) for folder in folders), reverse=True):
        if count not in FILES:
            print(f"{count} files: {folder.relative_to(ROOT)} (guide: {FILES.start} to {FILES.stop - 1})")
    everything = [path for room in ROOMS for path in python_files(ROOT / "lora_alpaca" / room)]
    for length, path in sorted(((lines(path), path) for path in everything), reverse=True):
        if length > LINES:
            print(f"{length} lines: {path.relative_to(ROOT)} (guide: {LINES})")
    for length, name in sorted((found for path in everything for found in long_functions(path)), reverse=True):
        print(f"{length} lines: {name} (guide: {FUNCTION})")


if __name__ == "__main__":
    main()
