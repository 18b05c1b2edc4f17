"""A base comes from a mirror, the rest of it after a broken connection, and what the hub refuses is one line."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT
from mirror import COMMIT, mirror

HASH = (
    "from huggingface_hub import constants\nconstants.DOWNLOAD_CHUNK_SIZE = 2**16\n"  # what is kept of a download
    "from lora_alpaca.models.base import locate_base\nfrom lora_alpaca.models.fingerprint import hash_base\n"
)


@pytest.fixture
def fetch(tmp_path):
    """Return a function that has a new process find a base, and returns what it printed; `variables` are its own."""

    def fetched(name, address, **variables):
        own = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        hub = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": address, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        program = f"{HASH}base = locate_base({str(name)!r})\nprint(base.revision, hash_base(base))"
        done = subprocess.run(
            [sys.executable, "-c", program], env=own | hub | variables, cwd=ROOT, capture_output=True, text=True
        )
        return done.stdout.strip() or done.stderr.strip().splitlines()[-1]

    return fetched


@pytest.mark.slow
def test_a_base_comes_from_a_mirror_and_goes_on_where_the_connection_broke(fetch, tiny_llama):
    weights = "model.safetensors"
    expected = fetch(tiny_llama, "http://127.0.0.1:9").split()[-1]
    with mirror(tiny_llama, cuts=(weights,)) as served:
        assert fetch("someone/tiny", served.address) == f"{COMMIT} {expected}"
        went_on = [wanted for _, name, wanted in served.asked if name == weights and wanted]
        assert went_on and int(went_on[-1].removeprefix("bytes=").rstrip("-")) > 2**16, served.asked
    assert fetch("someone/tiny", "http://127.0.0.1:9", HF_HUB_OFFLINE="1") == f"{COMMIT} {expected}"


@pytest.mark.slow
@pytest.mark.parametrize(
    "status, variables, said",
    [
        (401, {}, "gated"),
        (200, {"HF_HUB_OFFLINE": "1"}, "hf_hub_offline"),
    ],
)
def test_what_the_hub_refuses_is_one_line(fetch, tiny_llama, status, variables, said):
    with mirror(tiny_llama, status=status) as served:
        line = fetch("someone/tiny", served.address, **variables)
    assert "ModelError" in line and "--base_model someone/tiny" in line and said in line.lower(), line
