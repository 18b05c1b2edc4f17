"""What the README tells people to type works: blocks under `<!-- test -->` are run, in order, in one fresh clone."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

BLOCK = re.compile(r"^<!-- test -->\s*\n```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
RUN = {"bash": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}


def blocks() -> list[tuple[int, str, str]]:
    """Return line number, language and text of the README's marked blocks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [(text.count("\n", 0, found.start(2)) + 1, found[1], found[2]) for found in BLOCK.finditer(text)]


def test_every_mark_stands_before_a_block():
    marks = (ROOT / "README.md").read_text(encoding="utf-8").count("<!-- test -->")
    assert len(blocks()) == marks > 0


@pytest.mark.slow
def test_the_marked_blocks_run(tmp_path: Path):
    clone = tmp_path / "lora_alpaca"
    shutil.copytree(ROOT, clone, ignore=shutil.ignore_patterns(".*", "__pycache__", "lora-alpaca*", "hf_ckpt*", "dist"))
    variables = os.environ | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(clone), os.environ["PYTHONPATH"]]),
    }
    for line, language, text in blocks():
        done = subprocess.run(
            [*RUN[language], text],
            cwd=clone, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, f"README.md:{line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_what_the_readme_links_to_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert not [target for target in targets if not (ROOT / target).exists()]
