"""The stock Trainer of transformers, and ours, killed and resumed in the same way: figures to compare.

Both save after every step, and are killed at times drawn evenly over training. Whoever starts the stock Trainer again
says `resume_from_checkpoint=True` if there is a checkpoint folder, as its documentation says.
"""

import json
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import transformers

from .report import Report, chosen
from .running import Running, copied, forked
from .scene import Scene, same

NUMBERS = list(range(40))
STEPS = 8


def programme(share: float, folder: Path) -> Report:
    """Kill and resume the stock Trainer forty times, and ours as often."""
    report, numbers = Report(), chosen(NUMBERS, share)
    report.count("baseline_kills", len(numbers))
    stock, ours = Scene(folder / "stock"), Scene(folder / "ours", {"max_steps": STEPS, "save_steps": 1, "lora_r": 8})
    report.figures = {
        f"stock Trainer, transformers {transformers.__version__}": compared(stock, numbers, begun, "end"),
        "lora_alpaca": compared(ours, numbers, lambda scene, out: forked(scene, out, resume=True), ""),
    }
    return report


def compared(scene: Scene, numbers: list[int], begin: Callable[[Scene, Path], Running], end: str) -> dict[str, Any]:
    """Return how many of so many killed runs could not be resumed, or ended in another adapter."""
    whole = scene.fresh("whole")
    measured = begin(scene, whole)
    measured.waits_for(trains)
    first = time.monotonic()
    if (ended := measured.ended()).code != 0:
        raise RuntimeError(ended.last())
    seconds = time.monotonic() - first
    found: dict[str, Any] = dict.fromkeys(("kills", "unresumable", "different"), 0) | {"causes": {}}
    for number in numbers:
        chance, code = random.Random(number), 0
        while code != -signal.SIGKILL:
            running = begin(scene, scene.fresh("killed"))
            running.waits_for(trains)
            time.sleep(chance.uniform(0, seconds))
            running.send(signal.SIGKILL)
            code = running.ended().code
        found["kills"] += 1
        ended = begin(scene, running.out).ended()
        if ended.code != 0:
            found["unresumable"] += 1
            cause = ended.said.strip().splitlines()[-1].partition(":")[0][:60]
            found["causes"][cause] = found["causes"].get(cause, 0) + 1
        elif not same(whole / end, running.out / end):
            found["different"] += 1
    return found


def trains(running: Running) -> bool:
    """Return whether the first checkpoint has begun."""
    return any(running.out.glob("*checkpoint-1*"))


def begun(scene: Scene, out: Path) -> Running:
    """Begin a run of the stock Trainer in a copy of this process."""
    return copied(lambda: train(scene, out), scene, out, {})


def train(scene: Scene, out: Path) -> None:
    """Train an adapter with the stock Trainer, from the last checkpoint if there is one."""
    transformers.set_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(scene.model)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], lora_dropout=0.1))
    tokenizer = transformers.AutoTokenizer.from_pretrained(scene.model)
    ids = [tokenizer(f"{row['input']} = {row['output']}")["input_ids"] for row in json.loads(scene.data.read_text())]
    rows = [{"input_ids": row[:8], "labels": row[:8]} for row in ids if len(row) >= 8]
    arguments = transformers.TrainingArguments(
        output_dir=str(out), max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
        save_steps=1, save_total_limit=1, report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=any(out.glob("checkpoint-*")) or None)
    trainer.save_model(str(out / "end"))
