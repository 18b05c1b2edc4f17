"""NaN and infinity in loss, gradient, weight, moments and validation: seen in the same step, before anything moves.

They are put into a real run in a forked process. An fp16 run is one with a loss scaler that is told when to overflow.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from faults.report import Report, chosen
from faults.scene import Ended, Scene, losses, same, steps, tensors
from lora_alpaca import checkpoints
from lora_alpaca.engine import Engine, Packed
from lora_alpaca.loop import MOST_OVERFLOWS, MOST_SKIPPED, Loop
from lora_alpaca.ranks import Ranks
from lora_alpaca.step import Learner

STEPS = 5
VALUES = (math.nan, math.inf, -math.inf)
EXPLICIT = ("loss", "row", "gradient", "base weight", "adapter weight")  # the error names the training rows


def in_step(numbers: set[int], put: Callable[[Learner], Any]) -> None:
    """Let `put` be called with the learner at the beginning of some steps, counted from 1."""
    own = Loop._step

    def step(loop: Loop) -> None:
        undo = put(loop.learner) if loop.progress.step + 1 in numbers else None
        state = [parameter.detach().clone() for parameter in loop.learner.parameters]
        try:
            own(loop)
        finally:
            if undo is not None:
                undo()
                moved = any(map(_differ, state, loop.learner.parameters))
                print(f"moved by the fault: {moved}", flush=True)

    Loop._step = step  # type: ignore[method-assign]


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.equal(one.view(torch.int32), other.detach().view(torch.int32))  # NaN is like NaN


def put_in(kind: str, value: float, numbers: set[int]) -> Callable[[], None]:
    """Return what puts a value into the loss, the gradient, ... of some steps of the run of this process."""

    def patched(owner: Any, name: str, function: Any) -> Callable[[], None]:
        own = getattr(owner, name)
        setattr(owner, name, function(own))
        return lambda: setattr(owner, name, own)

    def loss(learner: Learner) -> Callable[[], None]:
        return patched(Engine, "loss", lambda own: lambda engine, batch: own(engine, batch) * value)

    def row(learner: Learner) -> Callable[[], None]:
        """One row alone: the first that is computed in the step."""
        held, poisoned = [False], []

        def batches(own: Any) -> Any:
            def changed(engine: Engine, examples: Any, *more: Any) -> Any:
                rows = [list(example.input_ids) for example in examples]
                poisoned.append(rows[0]) if not poisoned else None
                held[0] = poisoned[0] in rows
                return own(engine, examples, *more)

            return changed

        undo = patched(Packed, "batches", batches)
        undo_loss = patched(
            Engine, "loss", lambda own: lambda engine, batch: own(engine, batch) * (value if held[0] else 1.0)
        )
        return lambda: (undo(), undo_loss())  # type: ignore[return-value]

    def gradient(learner: Learner) -> Callable[[], None]:
        def changed(own: Any) -> Any:
            def backward(ranks: Ranks, part: torch.Tensor) -> None:
                own(ranks, part)
                learner.parameters[0].grad.view(-1)[0] = value  # type: ignore[union-attr]

            return backward

        return patched(Ranks, "backward", changed)

    def weight(parameter: torch.Tensor) -> Callable[[], None]:
        flat = parameter.data.view(-1)
        before = flat[0].item()
        flat[0] = value
        return lambda: flat.__setitem__(0, before if kind == "base weight" else value)

    def base_weight(learner: Learner) -> Callable[[], None]:
        frozen = [parameter for parameter in learner.model.parameters() if not parameter.requires_grad]
        return weight(frozen[-1])

    def adapter_weight(learner: Learner) -> Callable[[], None]:
        return weight(learner.parameters[0])

    def moment(learner: Learner) -> Callable[[], None]:
        for state in learner.optimizer.state.values():
            state["exp_avg"].view(-1)[0] = value
        return lambda: None

    puts = {
        "loss": loss, "row": row, "gradient": gradient, "base weight": base_weight, "adapter weight": adapter_weight,
        "moment": moment,
    }  # fmt: skip
    return lambda: in_step(numbers, puts[kind])


def validation(value: float, number: int) -> Callable[[], None]:
    """Return what puts a value into the validation after a step."""

    def begin() -> None:
        own = Loop._validate

        def validate(loop: Loop) -> None:
            if loop.progress.step == number:
                compute = Engine.loss
                Engine.loss = lambda engine, batch: compute(engine, batch) * value  # type: ignore
            own(loop)

        Loop._validate = validate  # type: ignore[method-assign]

    return begin


class Scaler:
    """A loss scaler as torch's, whose gradients overflow in some of its steps."""

    def __init__(self, overflows: set[int]):
        self.overflows, self.scale, self.calls = overflows, 65536.0, 0

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        self.calls += 1
        if self.calls in self.overflows:
            optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = math.inf

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.calls not in self.overflows:
            optimizer.step()

    def update(self) -> None:
        self.scale *= 0.5 if self.calls in self.overflows else 1.0

    def state_dict(self) -> dict[str, float]:
        return {"scale": self.scale, "calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale, self.calls = state["scale"], state["calls"]


def overflowing(numbers: set[int]) -> Callable[[], None]:
    """Return what gives the run of this process a scaler that overflows in some steps."""

    def begin() -> None:
        own = Ranks.__init__

        def init(ranks: Ranks, *more: Any) -> None:
            own(ranks, *more)
            ranks.scaler = Scaler(numbers)

        Ranks.__init__ = init  # type: ignore[method-assign]

    return begin


def programme(share: float, folder: Path) -> Report:
    """Put NaN and infinity everywhere, at the first, a middle and the last step."""
    report = Report()
    scene = Scene(folder, {"max_steps": STEPS, "eval_steps": 1, "save_steps": 2})
    right, out = folder / "right", folder / "out"
    every = folder / "every step"
    for path, options in ((right, {}), (every, {"save_steps": 1, "save_total_limit": STEPS})):
        ended = scene.finetune(path, **options)
        assert ended.code == 0, ended.said

    def newest(what: str) -> tuple[int, Path | None]:
        folder = checkpoints.newest(out)[0] if out.exists() else None
        for name in (checkpoints.WEIGHTS, checkpoints.OPTIMIZER, checkpoints.BEST) if folder else ():
            finite = all(torch.isfinite(tensor).all() for tensor in tensors(folder, name).values())
            report.expect(finite, f"{what}: {name} of {folder.name} is not finite")
        return (int(folder.name.removeprefix("checkpoint-")) if folder else 0), folder

    kinds = [*EXPLICIT, "moment", "validation"]
    cases = [
        (kind, value, number)
        for kind in kinds
        for value in VALUES
        for number in (1, 3, STEPS)
        if (kind, number) != ("moment", 1)
    ]  # fmt: skip  there are none yet
    for kind, value, number in chosen(cases, share):
        what = f"{value} in the {kind} of step {number}"
        report.count("nonfinite")
        report.count(f"nonfinite {kind}")
        before = validation(value, number) if kind == "validation" else put_in(kind, value, {number})
        ended = scene.finetune(scene.fresh(), before)
        step, folder_there = newest(what)
        report.expect(ended.code == 1 and bool(ended.error()), f"{what}: ended with {ended.code}: {ended.last()}")
        taken = [line for line in ended.said.splitlines() if line.startswith(f"step {number + 1}/")]
        report.expect(not taken, f"{what}: not stopped within one step: {taken}")
        if kind in EXPLICIT:
            report.expect(f"step {number}: the " in ended.error(), f"{what}: {ended.error()}")
            report.expect("training rows " in ended.error(), f"{what}: {ended.error()}")
            report.expect("moved by the fault: False" in ended.said, f"{what}: something moved")
        if kind == "row":
            named = re.search(r"training rows \d+, each alone", ended.error())
            report.expect(named is not None, f"{what}: {ended.error()}")
        saved = {"loss": number - 1, "row": number - 1, "gradient": number - 1, "base weight": number - 1,
                 "validation": number}.get(kind)  # fmt: skip
        if saved is not None:
            report.expect(step == saved, f"{what}: step {step} is saved, and {saved} were good")
        if folder_there and step < STEPS:
            good = same(folder_there, every / f"checkpoint-{step}")
            report.expect(good, f"{what}: checkpoint {step} is not that of a sound run")
        again = scene.finetune(out, resume=True)
        good = again.code == 0 and same(out, right) and losses(out) == losses(right)
        report.expect(good, f"{what}: gone on, it comes to something else: {again.last()}")
    _skipped(scene, report, out, right, newest)
    _overflows(scene, report, out, newest)
    return report


def _skipped(scene: Scene, report: Report, out: Path, right: Path, newest: Any) -> None:
    """One bad step is skipped, and more than the limit are not."""
    skip = {"on_nonfinite": "skip"}
    for value in (math.nan, math.inf):
        for kind in ("loss", "gradient"):
            what = f"one step with {value} in the {kind}, skipped"
            report.count("nonfinite skipped")
            ended = scene.finetune(scene.fresh(), put_in(kind, value, {3}), **skip)
            report.expect(ended.code == 0 and "step 3: the loss is" in ended.said, f"{what}: {ended.last()}")
            found = tensors(out)
            report.expect(bool(found) and all(torch.isfinite(tensor).all() for tensor in found.values()), what)
            report.expect(not same(out, right), f"{what}: as if nothing had been")
    what = "more steps than the limit are not finite"
    report.count("nonfinite skipped")
    many = set(range(3, 3 + MOST_SKIPPED + 1))
    ended = scene.finetune(scene.fresh(), put_in("loss", math.nan, many), **skip, max_steps=20)
    last = max(many)
    report.expect(ended.code == 1 and f"step {last}: " in ended.error(), f"{what}: {ended.last()}")
    step, _ = newest(what)
    report.expect(step == last - 1, f"{what}: step {step} is saved")


def _overflows(scene: Scene, report: Report, out: Path, newest: Any) -> None:
    """An overflow that lowers the loss scale is no event; too many in a row are, also in two runs."""
    long = {"max_steps": 60, "save_steps": 20, "eval_steps": 60}
    one = {"one": {2}, "all but one too many": set(range(3, 2 + MOST_OVERFLOWS)), "the last": {60}}
    for name, numbers in one.items():
        report.count("nonfinite overflows")
        ended = scene.finetune(scene.fresh(), overflowing(numbers), **long)
        said = ended.said.count("the gradients overflow fp16")
        report.expect(ended.code == 0 and said == len(numbers), f"overflows, {name}: {said} said: {ended.last()}")
    report.count("nonfinite overflows")
    many = overflowing(set(range(3, 3 + MOST_OVERFLOWS)))
    ended = scene.finetune(scene.fresh(), many, **long)
    last = 2 + MOST_OVERFLOWS
    _stopped(report, ended, last, "too many overflows in a row")
    newest("overflows")

    def killed() -> None:
        many()
        in_step({30}, lambda *_: torch.tensor([]).item())  # raises

    report.count("nonfinite overflows")
    scene.finetune(scene.fresh(), killed, **long)
    report.expect(steps(out) == [20], f"overflows: {steps(out)} are there after an error in step 30")
    _stopped(report, scene.finetune(out, many, **long, resume=True), last, "too many overflows, in two runs")


def _stopped(report: Report, ended: Ended, step: int, what: str) -> None:
    line = f"step {step}: the gradients overflowed fp16 {MOST_OVERFLOWS} times in a row"
    report.expect(ended.code == 1 and line in ended.error(), f"{what}: {ended.last()}")
