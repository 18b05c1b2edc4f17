"""The stock Trainer of transformers, killed and resumed in the same way, to compare with: a figure, and no failure.

It saves after every step, and is killed at times drawn evenly over training. Whoever starts it again says
`resume_from_checkpoint=True` if there is a checkpoint folder, as its documentation says.
"""

import json
import random
import signal
import time
from pathlib import Path

import peft
import transformers

from .report import Report, chosen
from .running import Running, copied
from .scene import Scene, same

NUMBERS = list(range(40))
STEPS = 8


def programme(share: float, folder: Path) -> Report:
    """Kill and resume the stock Trainer forty times."""
    report, scene = Report(), Scene(folder / "baseline")
    measured = begun(scene, scene.fresh("whole"))
    measured.waits_for(trains)
    first = time.monotonic()
    ended = measured.ended()
    seconds, whole = time.monotonic() - first, scene.folder / "whole" / "end"
    report.expect(ended.code == 0, f"the stock Trainer does not run: {ended.last()}")
    found = dict.fromkeys(("kills", "unresumable", "different"), 0)
    causes: dict[str, int] = {}
    for number in chosen(NUMBERS, share):
        chance, out, code = random.Random(number), scene.fresh("killed"), 0
        while code != -signal.SIGKILL:
            running = begun(scene, scene.fresh("killed"))
            running.waits_for(trains)
            time.sleep(chance.uniform(0, seconds))
            running.send(signal.SIGKILL)
            code = running.ended().code
        found["kills"] += 1
        ended = begun(scene, out).ended()
        if ended.code != 0:
            found["unresumable"] += 1
            cause = ended.said.strip().splitlines()[-1].partition(":")[0][:60]
            causes[cause] = causes.get(cause, 0) + 1
        elif not same(whole, out / "end"):
            found["different"] += 1
    report.count("baseline_kills", found["kills"])
    report.figures = {f"stock Trainer, transformers {transformers.__version__}": found | {"causes": causes}}
    return report


def trains(running: Running) -> bool:
    """Return whether the first checkpoint has begun."""
    return (running.out / "checkpoint-1").exists()


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
