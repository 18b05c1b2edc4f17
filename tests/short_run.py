"""What tests of short runs share: their flags, the adapter they make, and a folder as a killed run leaves it."""

import torch
from safetensors.torch import load_file

from lora_alpaca.storage import atomic, output_folder


def flags(options):
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def tensors(folder):
    return load_file(f"{folder}/adapter_model.safetensors")


def same(one, other):
    one, other = tensors(one), tensors(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def interrupt(folder, last_checkpoint):
    """Leave a finished folder as a run killed after a checkpoint leaves it."""
    record = output_folder.read_record(folder)
    for name in [*record.pop("files"), *(f"checkpoint-{n}" for n in range(10) if n > last_checkpoint)]:
        if (folder / name).is_dir():
            output_folder.remove_checkpoint(folder / name)
        elif (folder / name).is_file():
            (folder / name).unlink()
    atomic.replace(folder / output_folder.RECORD, atomic.as_json(record | {"status": "running"}))
