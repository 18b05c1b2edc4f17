"""Files of tensors, written as they come: any reader of safetensors reads them, and sha256sum gives their hashes."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lora_alpaca.export.merge.merged_tensors import MergedTensors
from lora_alpaca.models.shards import Shards, ShardWriter, header_of, sharded
from lora_alpaca.models.weights import TensorInfo

TENSORS = {
    "long": torch.arange(7),
    "a": torch.randn(3, 5),
    "b": torch.randn(4, 4).to(torch.bfloat16),
    "scalar": torch.tensor(2.5).half(),
    "none": torch.empty(0, 3),
    "flags": torch.tensor([True, False, True]),
}
INFOS = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("most", [10**9, 100, 1])
def test_what_is_written_is_read_by_safetensors(tmp_path, most):
    writer = ShardWriter(tmp_path, INFOS, most)
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.finish()
    found = {}
    for file in writer.files:
        found |= load_file(tmp_path / file)
    assert found.keys() == TENSORS.keys()
    assert all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) for name, tensor in TENSORS.items()
    )
    assert writer.file_hashes == {
        file: hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() for file in writer.files
    }
    assert (len(writer.files) == 1) == (most == 10**9)
    if len(writer.files) > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for file, names in writer.files.items() for name in names}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in TENSORS.values())


def test_what_is_read_is_what_lies_there_in_order(tmp_path):
    writer = ShardWriter(tmp_path, INFOS, 100)
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.finish()
    shards = Shards([tmp_path / file for file in writer.files])
    assert shards.infos == INFOS and list(shards.infos) == list(INFOS)
    assert all(torch.equal(shards.read(name), tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("length", range(1, 10))
def test_the_tensors_begin_where_every_dtype_can(length):
    header = header_of({"x" * length: TensorInfo(torch.float64, (2,))})
    assert len(header) % 8 == 0


def test_wide_tensors_come_first_so_that_each_begins_where_its_dtype_can(tmp_path):
    tensors = {"half": torch.ones(3).half(), "wide": torch.ones(5).double(), "single": torch.ones(1)}
    base = SimpleNamespace(infos={k: TensorInfo(t.dtype, tuple(t.shape)) for k, t in tensors.items()}, read=tensors.get)
    nothing = SimpleNamespace(resized={}, added={}, changed=set())
    merged = MergedTensors(base, nothing)
    assert list(merged.infos) == ["wide", "single", "half"]
    assert set(merged.kinds.values()) == {"copied"}
    assert set(MergedTensors(base, nothing, torch.float32).kinds.values()) == {"copied", "converted"}


def test_no_file_is_larger_than_was_asked_for():
    infos = {str(number): TensorInfo(torch.float32, (number,)) for number in range(1, 40)}
    files = sharded(infos, 400)
    assert [name for names in files.values() for name in names] == list(infos)
    assert all(sum(infos[name].nbytes for name in names) <= 400 for names in files.values())
    assert next(iter(files)) == f"model-00001-of-{len(files):05}.safetensors"
    assert sharded({"large": TensorInfo(torch.float32, (1000,))}, 400) == {"model.safetensors": ["large"]}


def test_a_tensor_out_of_turn_is_a_mistake(tmp_path):
    writer = ShardWriter(tmp_path, INFOS, 10**9)
    with pytest.raises(AssertionError, match="a is written where long belongs"):
        writer.write("a", TENSORS["a"])
