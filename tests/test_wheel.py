"""The wheel holds the library, its templates and the demo, and templates are found however the package is installed."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT

TEMPLATES = sorted(path.stem for path in (ROOT / "templates").glob("*.json"))


def build(*words: str) -> None:
    """Build something in the clone, with what is installed here and no network."""
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def templates_seen_from(folder: Path, search_path: Path) -> tuple[list[str], Path]:
    """Return the templates that load in another working directory, and where the package was found."""
    program = (
        "import lora_alpaca, lora_alpaca.prompts as prompts\n"
        "print(lora_alpaca.__file__)\n"
        "print(*(prompts.load_template(name).name for name in prompts.template_names()))"
    )
    variables = os.environ | {"PYTHONPATH": str(search_path)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=folder, env=variables, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    package, names = done.stdout.splitlines()
    return names.split(), Path(package).parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build("-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder))
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_what_it_should_and_nothing_else(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "lora_alpaca"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    ours = set(listed.stdout.split()) or {name for name in held if name.startswith("lora_alpaca/")}
    assert "lora_alpaca/training/finetuning.py" in ours
    assert {f"lora_alpaca/templates/{name}.json" for name in TEMPLATES} <= held
    assert ours <= held
    beyond = {name for name in held - ours if not name.startswith(("lora_alpaca/templates/", "lora_alpaca-"))}
    assert not beyond


@pytest.mark.parametrize(
    "asset",
    [
        "base/config.json",
        "base/model.safetensors",
        "base/tokenizer.json",
        "recipe.json",
        "recipe_full.json",
        "instructions/",
        "tables/",
    ],
)
def test_the_wheel_holds_the_demo(wheel, asset):
    assert [name for name in zipfile.ZipFile(wheel).namelist() if name.startswith(f"lora_alpaca/demo/{asset}")]


def test_what_the_wheel_says_of_itself(wheel):
    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        said = archive.read(info).decode()
        scripts = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
        assert info.replace("METADATA", "licenses/LICENSE") in archive.namelist()
    version = re.search(r'__version__ = "(.+)"', (ROOT / "lora_alpaca" / "_version.py").read_text())
    assert f"Version: {version[1]}\n" in said
    assert "License-Expression: Apache-2.0\n" in said
    assert "lora-alpaca = lora_alpaca.cli:main" in scripts


def test_templates_are_found_from_the_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    names, package = templates_seen_from(tmp_path, search_path=tmp_path / "site")
    assert package == tmp_path / "site" / "lora_alpaca"
    assert names == sorted([*TEMPLATES, "chat"])


def test_templates_are_found_from_an_editable_installation(tmp_path):
    site = tmp_path / "site"
    build(
        *("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", "--no-build-isolation"),
        *("--no-index", "--target", str(site), "--editable", "."),
    )
    assert list(site.glob("*.pth"))
    assert not (site / "lora_alpaca").exists()
    [link] = site.glob("*.pth")
    names, package = templates_seen_from(tmp_path, search_path=Path(link.read_text().strip()))
    assert package == ROOT / "lora_alpaca"
    assert names == sorted([*TEMPLATES, "chat"])


def test_templates_are_found_from_the_clone(tmp_path):
    names, package = templates_seen_from(tmp_path, search_path=ROOT)
    assert package == ROOT / "lora_alpaca"
    assert names == sorted([*TEMPLATES, "chat"])


def test_the_pinned_set_is_within_the_ranges():
    """requirements.txt pins every dependency of pyproject.toml, at a version that its range admits."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [
        Requirement(text) for text in [*project["dependencies"], *extras["web"], *extras["verify"], *extras["dev"]]
    ]
    for requirement in wanted:
        if requirement.name in ("lora-alpaca", "pre-commit"):  # itself; and what only a committer needs
            continue
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
        assert "<" in str(requirement.specifier) or requirement.name == "hatchling", requirement
