"""The self-test finds every fault that is put into a copy of the library, and nothing in one without: make selftest.

The quick tests have those whose check takes the least (`test_selftest.py`).
"""

import json

import pytest
import torch
from injection import FAULTS, OTHERS, copy, inject, selftest


def test_without_a_fault(tmp_path):
    copy(tmp_path)
    done = selftest(tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    assert {check["status"] for check in json.loads(done.stdout)["checks"]} == {"ok"}


@pytest.mark.parametrize("name", FAULTS | OTHERS)
def test_a_fault_is_found(name, tmp_path):
    """By the whole self-test, as a user runs it."""
    fault = (FAULTS | OTHERS)[name]
    if fault.check == "quantised_save" and not torch.cpu.get_capabilities().get("avx512_bf16"):
        pytest.skip("bitsandbytes repacks nothing on this processor")
    inject(fault, tmp_path)
    done = selftest(tmp_path, "--json")
    assert done.returncode == 1, done.stdout + done.stderr
    found = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert found[fault.check]["status"] == "failed", found
