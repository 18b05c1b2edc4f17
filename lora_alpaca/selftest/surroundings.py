"""One temporary folder for all that is written, nothing that is downloaded, and nothing printed but the results."""

import io
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

CACHES = ("XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR")


@contextmanager
def temporary() -> Iterator[Path]:
    """Give a folder, which is removed when the context ends; caches of ours and of torch are in it until then.

    The hub's cache stays where it is, and is only read.
    """
    with tempfile.TemporaryDirectory(prefix="lora-alpaca-selftest-") as name:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
        hub = os.environ.get("HF_HOME") or str(cache / "huggingface")
        changed = dict.fromkeys(CACHES, name) | {"HF_HOME": hub, "HF_HUB_OFFLINE": "1", "NVIDIA_TF32_OVERRIDE": "0"}
        before = {key: os.environ.get(key) for key in changed}
        os.environ.update(changed)
        try:
            yield Path(name)
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})


@contextmanager
def quiet() -> Iterator[None]:
    """Within this context, what runs and exports print is dropped."""
    with redirect_stdout(io.StringIO()):
        yield
