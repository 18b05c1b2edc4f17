"""What docs/install.md tells people to type works without a network, from a folder that holds our wheel."""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^<!-- test -->\s*\n```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with `wheels`, and with an environment that has what the wheel needs, and not the wheel."""
    folder = tmp_path_factory.mktemp("install")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "wheels")]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder / "venv")], check=True)
    own = Path(subprocess.check_output([folder / "venv" / "bin" / "python", "-c", WHERE], text=True).strip())
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        if not (own / path.name).exists() and not path.name.strip("_").startswith(("lora_alpaca", "editable", "pip")):
            (own / path.name).symlink_to(path)
    return folder


WHERE = "import sysconfig; print(sysconfig.get_path('purelib'))"


def test_there_are_blocks_to_run():
    assert len(BLOCKS) == PAGE.count("<!-- test -->") == 2


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS, ids=["installed", "from a folder"])
def test_the_marked_blocks_run(place, block):
    variables = os.environ | {"PATH": os.pathsep.join([str(place / "venv" / "bin"), os.environ["PATH"]])}
    variables["PYTHONPATH"] = str(ROOT / "tests" / "offline")
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", block],
        cwd=place, env=variables, stdin=subprocess.DEVNULL, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    version = re.search(r'__version__ = "(.+)"', (ROOT / "lora_alpaca" / "_version.py").read_text())
    assert version and done.stdout.splitlines()[-1] == version[1]
