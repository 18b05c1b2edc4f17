"""One tiny random model of each family trains in the default precision, resumes, exports and generates.

docs/models.md has a line of each, made of what the run does. `make models` writes it anew.
"""

import json
import os
import re

import pytest
from command import run
from conftest import ROOT
from short_run import flags, interrupt, same

from lora_alpaca.artifacts.adapter_folder import read_weights
from lora_alpaca.storage import output_folder

FAMILIES = [
    "Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "OPT", "GPT2",
    "GPTNeoX", "GPTJ", "GPTNeo", "CodeGen", "Bloom", "Falcon", "Glm", "Glm4",
]  # fmt: skip
PAGE = ROOT / "docs" / "models.md"
ASK = ["--instruction", "Hello.", "--max_new_tokens", "8", "--temperature", "0", "--dtype", "fp32"]


@pytest.mark.parametrize("family", FAMILIES)
def test_family(family, tiny_model, data_path, tmp_path):
    options = {
        "base_model": tiny_model(family), "data_path": data_path, "output_dir": tmp_path / "adapter", "batch_size": 4,
        "max_steps": 6, "save_steps": 3, "val_set_size": 4, "learning_rate": 1e-2, "cutoff_len": 96,
    }  # fmt: skip
    trained = run("finetune", *flags(options))
    assert trained.code == 0, trained.err
    assert "8-bit (LLM.int8) base" in trained.out
    state = read_weights(tmp_path / "adapter")
    assert all(tensor.abs().max() > 0 for name, tensor in state.items() if "lora_B" in name)

    run("finetune", *flags(options | {"output_dir": tmp_path / "killed"}))
    interrupt(tmp_path / "killed", last_checkpoint=3)
    assert run("finetune", *flags(options | {"output_dir": tmp_path / "killed"}), "--resume").code == 0
    assert same(tmp_path / "adapter", tmp_path / "killed")

    result = run("export", "--lora_weights", tmp_path / "adapter", "--output_dir", tmp_path / "merged")
    assert result.code == 0, result.err
    receipt = output_folder.read_record(tmp_path / "merged")["receipt"]
    assert receipt["merge_error"] < 1e-4
    assert receipt["changed_tensors"] > 0
    answers = [
        run("generate", "--lora_weights", tmp_path / "adapter", *ASK),
        run("generate", "--base_model", tmp_path / "merged", "--lora_weights", "none", *ASK),
    ]
    assert [answer.code for answer in answers] == [0, 0], answers
    assert answers[0].out == answers[1].out
    assert run("generate", "--lora_weights", tmp_path / "adapter", *ASK, "--load_8bit").code == 0
    require_documented(family, line(family, trained.out, tmp_path))


def line(family, said, folder):
    """Return the line of a family in the page, of a run that got as far as this."""
    architecture = json.loads((folder / "merged" / "config.json").read_text())["architectures"][0]
    targets = json.loads((folder / "adapter" / "adapter_config.json").read_text())["target_modules"]
    reason = re.search(r"this model cannot take packs: ([^;\n]*)", said)
    rows = "packed"
    if reason:
        differs = reason[1].startswith("the gradient of a row in a pack")
        rows = "padded: " + ("a row has another gradient in a pack" if differs else reason[1])
    assert ("engine: packs of" in said) == (rows == "packed")
    names = ", ".join(f"`{name}`" for name in ([targets] if isinstance(targets, str) else targets))
    return f"| {family} | `{architecture}` | {names} | {rows} | as base + adapter | the same |"


def lines():
    """Return the lines of the page's table by their families."""
    return {text.split(" | ")[0][2:]: text for text in PAGE.read_text().splitlines() if re.match(r"\| \w+ \| `", text)}


def require_documented(family, found):
    if os.environ.get("MODELS") == "write":
        text, known = PAGE.read_text(), lines()
        last = known[list(known)[-1]] if known else text.splitlines()[-1]
        PAGE.write_text(
            text.replace(known[family], found) if family in known else text.replace(last, f"{last}\n{found}")
        )
    assert lines().get(family) == found, f"docs/models.md is not what the run does; make models\n{found}"


def test_the_page_has_the_families_that_are_tested():
    assert list(lines()) == FAMILIES
