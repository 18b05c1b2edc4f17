"""What tests of short runs share: their flags, the adapter they make, and a folder as a killed run leaves it."""

import torch
from safetensors.torch import load_file

from lora_alpaca.storage.output_folder import OutputFolder, remove_checkpoint


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
