"""Faults, each a change of one text in a copy of the library, and the check of the self-test that has to find it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from conftest import OFFLINE, ROOT


class Fault(NamedTuple):
    """What is changed in a file of the library, and the check that finds it."""

    check: str
    file: str
    old: str
    new: str


FAULTS = {
    "mask off by one": Fault(
        "labels", "data/encoding.py", "spans.append((first, len(ids)))", "spans.append((first + 1, len(ids)))"
    ),
    "missing end token": Fault(
        "end_token",
        "data/encoding.py",
        "return examples if self.choices.add_eos_token else [",
        "return [",
    ),
    "mean of means": Fault(
        "accumulation",
        "training/step.py",
        "self.engine.loss(batch) / labels",
        "self.engine.loss(batch) / batch.weights.sum() / len(self.engine.shares(examples, 1)[0])",
    ),
    "shifted positions": Fault(
        "packing",
        "engine/packing.py",
        "positions.append(count[start:stop])",
        "positions.append(count[start:stop] + (start > 0))",
    ),
    "leaked attention": Fault(
        "packing",
        "engine/packing.py",
        "Segment(begin, begin + stop - start, above)",
        "Segment(begin, begin + stop - start, tuple(range(len(segments))))",
    ),
    "prefix shared wrongly": Fault(
        "packing",
        "engine/packing.py",
        "return int(different.argmax()) if different.any() else length",
        "return min(int(different.argmax()) + 1, length - 1) if different.any() else length",
    ),
    "q and v swapped": Fault(
        "saved",
        "training/saving.py",
        "    generation = trainable.model.generation_config\n",
        "    generation = trainable.model.generation_config\n"
        "    swap = {'q_proj': 'v_proj', 'v_proj': 'q_proj'}\n"
        "    state = {'.'.join(swap.get(part, part) for part in name.split('.')): state[name] for name in state}\n",
    ),
    "wrong scale": Fault(
        "merge",
        "models/adapter_layers.py",
        "Product(left.float(), right.float(), layer.scaling[NAME])",
        "Product(left.float(), right.float(), layer.scaling[NAME] * 1.02)",
    ),
    "merged twice": Fault(
        "merge", "models/changes.py", "for change, weight in changes:", "for change, weight in [*changes, *changes]:"
    ),
    "un-restored random state": Fault(
        "resume",
        "training/loop.py",
        "self.world.seed(config.seed, state.step)",
        "self.world.seed(config.seed, state.step) if state.step == 0 else None",
    ),
    "template with one space more": Fault(
        "template", "prompts/jinja.py", "_written(announcing, values)", "_written([*announcing, ('text', ' ')], values)"
    ),
    "a rank's gradient counted twice": Fault(
        "ranks",
        "distributed/strategy.py",
        "self._sum_in_place([*last, totals])",
        "self._sum_in_place([*(grad.mul_(2 - min(self._world.rank, 1)) for grad in last), totals])",
    ),
}
OTHERS = {  # for each check that none of these is for
    "labels of another chunk": Fault(
        "chunked_loss",
        "engine/loss.py",
        "labels[part, None]).squeeze(1)  # before they are overwritten",
        "labels[: len(logits), None]).squeeze(1)",
    ),
    "a sharded run without its sum": Fault(
        "sharding",
        "distributed/fsdp.py",
        "super().reduce([one for one in parameters if not isinstance(one, DTensor)], scalars)",
        "super().reduce([], scalars)",
    ),
    "a base that is repacked": Fault(
        "quantised_save",
        "models/quantization.py",
        "module.support_avx512bf16_for_cpu = False",
        "module.support_avx512bf16_for_cpu = module.support_avx512bf16_for_cpu",
    ),
}


def copy(folder: Path) -> None:
    """Put a copy of the library into a folder."""
    shutil.copytree(ROOT / "lora_alpaca", folder / "lora_alpaca", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "templates", folder / "templates")


def inject(fault: Fault, folder: Path) -> None:
    """Put a copy of the library with a fault into a folder."""
    copy(folder)
    path = folder / "lora_alpaca" / fault.file
    text = path.read_text(encoding="utf-8")
    assert text.count(fault.old) == 1, f"{fault.file} has changed: write this fault anew"
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


def selftest(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Return the self-test of the library in a folder, run as a user would."""
    return subprocess.run(
        [sys.executable, "-m", "lora_alpaca", "selftest", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(OFFLINE)]), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )
