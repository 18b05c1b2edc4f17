"""An export that is killed leaves its target absent or whole, and the next one removes what it had staged."""

import os
import random
import shutil
import signal
import time

import pytest
from faults.scene import Scene, copied, hidden, same, whole

from lora_alpaca.cli import main

KILLS = 50


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="exports run in forked processes")
def test_fifty_kills(tmp_path):
    scene = Scene(tmp_path / "scene")
    adapter, out = tmp_path / "adapter", tmp_path / "exports" / "out"
    assert scene.finetune(adapter).code == 0
    options = {"lora_weights": adapter, "format": "hf,adapter"}
    assert scene.command("export", **options, output_dir=tmp_path / "right").code == 0
    began = time.monotonic()  # the first export also imports what the next ones find imported
    assert scene.command("export", **options, output_dir=tmp_path / "again").code == 0
    seconds = time.monotonic() - began
    words = [f"--{name}={value}" for name, value in {**options, "output_dir": out}.items()]
    chance, killed = random.Random(0), 0
    for _ in range(KILLS):
        process = copied(lambda: main(["export", *words]), scene.log)
        time.sleep(chance.uniform(0, seconds))
        os.kill(process, signal.SIGKILL)
        killed += os.waitpid(process, 0)[1] == signal.SIGKILL
        assert not out.exists() or whole(out)
        if out.exists():
            assert same(out / "hf", tmp_path / "right" / "hf", "model.safetensors")
            shutil.rmtree(out)
    assert killed > KILLS / 4
    assert scene.command("export", **options, output_dir=out, overwrite=True).code == 0
    assert hidden(out.parent) == [] and sorted(path.name for path in out.parent.iterdir()) == ["out"]
