"""Too little memory, for more than so many tokens at once: one line, or smaller packs and the same rows and bits.

The engine of a forked run raises what torch raises, after the backward pass of what fits: a real shortage leaves parts
of a gradient and a moved random state behind too.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from faults.library import LOSS, STEP, steps_done, tokens, wrap
from faults.report import Report, chosen
from faults.scene import Scene, losses, same
from lora_alpaca.artifacts.checkpoint import STATE
from lora_alpaca.storage.json_files import read_json

ERRORS: dict[str, Exception] = {
    "CUDA": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.69 GiB\nmore lines"
    ),
    "CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:128] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 2147483648 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "Python": MemoryError(),
}
STEPS = 6
PACKED = {"token_budget": 256, "share_prefix": False}
PADDED = {"engine": "padded", "micro_batch_size": 4}
# A batch of eight rows of about thirty tokens: a pack of 256, halved to 128 and 64, or four padded rows, two, and one.
FITS = {"packed": (130, "token_budget", 128), "padded": (70, "micro_batch_size", 2)}


def short_above(most: int, error: Exception, first_step: int = 1, training: bool = True) -> Callable[[], None]:
    """Return what lets this process have memory for so many tokens at once, from a step on or in validation."""

    def begin() -> None:
        number = 0

        def short(compute: Any) -> Any:
            def loss(engine: Any, batch: Any) -> torch.Tensor:
                now = torch.is_grad_enabled() == training and number >= first_step
                if now and tokens(batch) > most:
                    raise error
                return compute(engine, batch)

            return loss

        def counted(step: Any) -> Any:
            def call(loop: Any) -> None:
                nonlocal number
                number = steps_done(loop) + 1
                step(loop)

            return call

        wrap(LOSS, short)
        wrap(STEP, counted)

    return begin


def programme(share: float, folder: Path) -> Report:
    """Run short of memory at every step, in packs and padded rows, in training and validation."""
    report = Report()
    scene = Scene(
        folder, {"max_steps": STEPS, "batch_size": 8, "save_steps": 2, "save_total_limit": 9, "val_set_size": 4}
    )
    out = folder / "out"
    cases = [
        (engine, name, step, training)
        for engine in FITS for name in ERRORS for step in (1, 3, STEPS) for training in (True, False)
        if training or step == 3
    ]  # fmt: skip
    for engine, name, step, training in chosen(cases, share):
        options = PACKED if engine == "packed" else PADDED
        fits, size, left = FITS[engine]
        what = f"{name}, {engine}, from step {step}{'' if training else ', in validation'}"
        fault = short_above(fits if training else 70, ERRORS[name], step, training)

        report.count("memory")
        ended = scene.finetune(scene.fresh(), fault, **options)
        line = ended.error()
        report.expect(ended.code == 1 and "out of memory (" in line, f"{what}: {ended.last()}")
        report.expect("say --on_oom shrink" in line, f"{what}: the way on is not said: {line}")
        report.expect(" GB are free" in line and f"--{size}" in line, f"{what}: {line}")
        if name != "Python":
            report.expect("allocate" in line, f"{what}: not said what was needed: {line}")
        saved = step - 1 if training else 4  # the first validation from step 3 on is that after step 4
        expected = f"step {saved} of {STEPS} is saved" if saved else "there is no checkpoint yet"
        report.expect(expected in line, f"{what}: {line}")

        report.count("memory shrunk")
        ended = scene.finetune(scene.fresh(), fault, **options, on_oom="shrink")
        report.expect(ended.code == 0, f"{what}, shrunk: {ended.last()}")
        report.expect("out of memory: going on with " in ended.said, f"{what}, shrunk: not said")
        if not training:
            continue
        plan = read_json(out / "checkpoint-4" / STATE)["plan"][size]
        report.expect(step > 4 or plan == left, f"{what}, shrunk: {size} is {plan} in the checkpoint")
        if step == 1:  # as if it had been of that size from the beginning
            right = folder / "right"
            whole = scene.finetune(scene.fresh("right"), **options | {size: left})
            report.expect(whole.code == 0 and same(out, right), f"{what}, shrunk: not what the smaller size gives")
        _goes_on(scene, report, what, fault, options, shrunk_before=step <= 4)
    _too_small(scene, report)
    return report


def _goes_on(
    scene: Scene, report: Report, what: str, fault: Callable[[], None], options: dict[str, object], shrunk_before: bool
) -> None:
    """A resume from the checkpoint of step 4, on the same machine or on a larger one, gives the same bits."""
    out, whole = scene.folder / "out", scene.fresh("whole")
    out.rename(whole)
    for before in (fault, None) if shrunk_before else (fault,):
        report.count("memory resumed")
        ended = scene.finetune(
            scene.fresh(), before, **options, resume_from_checkpoint=whole / "checkpoint-4", on_oom="shrink"
        )
        again = "going on with" in ended.said
        report.expect(again != shrunk_before, f"{what}, shrunk and resumed: shrunk {again and 'again'}")
        right = ended.code == 0 and same(out, whole) and losses(out) == losses(whole)
        report.expect(right, f"{what}, shrunk and resumed: it comes to something else: {ended.last()}")


def _too_small(scene: Scene, report: Report) -> None:
    """Where not even one row fits, the run ends and says so, also with leave to shrink."""
    for options in (PACKED, PADDED):
        report.count("memory too small")
        ended = scene.finetune(scene.fresh(), short_above(1, ERRORS["CPU"]), **options, on_oom="shrink")
        report.expect(ended.code == 1 and "out of memory (" in ended.error(), f"too small: {ended.last()}")
        report.expect("--on_oom" not in ended.error(), f"too small: told to do what is done: {ended.error()}")
