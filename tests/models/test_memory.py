"""How much memory there is: of the machine, and within the limit of a container or batch job."""

import psutil
import pytest
import torch

from lora_alpaca.models import memory

CPU = torch.device("cpu")
GB = 10**9


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Return `groups(of_this_process, {folder: {file: text}})`, which stands for the kernel's files."""

    class Machine:
        available, total = 20 * GB, 24 * GB

    monkeypatch.setattr(psutil, "virtual_memory", Machine)
    monkeypatch.setattr(memory, "GROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")

    def write(own, files):
        (tmp_path / "own").write_text(own)
        for folder, contents in files.items():
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            for name, text in contents.items():
                (tmp_path / folder / name).write_text(f"{text}\n")

    return write


def limits(limit, used, cached=0):
    return {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 1\ninactive_file {cached}"}


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("0::/\n", {"": limits(8 * GB, 3 * GB)}, (5 * GB, 8 * GB)),  # a container
        ("0::/\n", {"": limits(8 * GB, 3 * GB, cached=GB)}, (6 * GB, 8 * GB)),
        ("0::/job/1\n", {"job/1": limits("max", GB), "job": limits(4 * GB, GB)}, (3 * GB, 4 * GB)),
        ("0::/\n", {"": limits("max", 3 * GB)}, (20 * GB, 24 * GB)),
        ("9:cpu:/\n4:memory:/abc\n0::/\n", {"": limits(8 * GB, 3 * GB)}, (5 * GB, 8 * GB)),  # the two versions at once
        ("0::/\n", {}, (20 * GB, 24 * GB)),
        ("0::/\n", {"": limits(23 * GB, GB)}, (20 * GB, 23 * GB)),  # others on the machine hold the rest
    ],
)
def test_a_limit_is_what_there_is(groups, own, files, left):
    groups(own, files)
    assert memory.free_and_total(CPU) == left


def test_another_system_has_no_groups(groups):
    assert memory.free_and_total(CPU) == (20 * GB, 24 * GB)


def test_the_sentence_of_a_run_that_is_out_of_memory(groups):
    groups("0::/\n", {"": limits(8 * GB, 3 * GB)})
    assert memory.describe_free(CPU) == "5.0 of 8.0 GB are free"
