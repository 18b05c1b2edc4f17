"""What tests of short runs share: flags, a clock, the adapter they make, and a folder as a killed run leaves it."""

import hashlib
import json

import torch
from conftest import as_row
from safetensors.torch import load_file

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.storage.output_folder import OutputFolder, remove_checkpoint


def adapter(folder, base, rows, **options):
    """Return the folder of an adapter that was trained for a few steps on rows, which are in a file beside it."""
    path = folder / "rows.json"
    path.write_text(json.dumps([as_row(conversation) for conversation in rows]))
    chosen = {
        "batch_size": 4, "max_steps": 8, "val_set_size": 4, "learning_rate": 2e-2, "cutoff_len": 128,
        "load_8bit": False, "dtype": "fp32", "device": "cpu",
    } | options  # fmt: skip
    places = {"base_model": str(base), "data_path": str(path), "output_dir": str(folder / "adapter")}
    return finetune(FinetuneConfig(**places | chosen)).output_dir


class Clock:
    """A clock that goes on by some seconds whenever it is looked at: time without waiting."""

    def __init__(self, tick=0.5, seconds=0.0):
        self.tick, self.seconds = tick, seconds

    def __call__(self):
        self.seconds += self.tick
        return self.seconds


def flags(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def tensors(folder):
    return load_file(f"{folder}/adapter_model.safetensors")


def same(one, other):
    one, other = tensors(one), tensors(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def interrupt(folder, last_checkpoint):
    """Leave a finished folder as a run killed after a checkpoint leaves it."""
    record = OutputFolder(folder).record
    for name in [*record.pop("files"), *(f"checkpoint-{n}" for n in range(10) if n > last_checkpoint)]:
        if (folder / name).is_dir():
            remove_checkpoint(folder / name)
        elif (folder / name).is_file():
            (folder / name).unlink()
    OutputFolder(folder).write_record(record | {"status": "running"})


def change_state(checkpoint, change):
    """Change the facts of a checkpoint as if it had been written so."""
    facts, manifest = (json.loads((checkpoint / name).read_text()) for name in ("state.json", "manifest.json"))
    change(facts)
    data = json.dumps(facts).encode()
    manifest["files"]["state.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (checkpoint / "state.json").write_bytes(data)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
