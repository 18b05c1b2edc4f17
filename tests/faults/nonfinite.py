"""NaN and infinity in loss, gradient, weight, moments and validation: seen in the same step, before anything moves.

They are put into a real run in a forked process. An fp16 run is one with a loss scaler that is told when to overflow.
"""

import math
import os
import re
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from faults.library import BACKWARD, BATCHES, LOSS, MAKE_WORLD, STEP, VALIDATE, stepper, steps_done, wrap
from faults.phases import last_step
from faults.report import Report, chosen
from faults.scene import Ended, Scene, losses, same, steps, tensors
from lora_alpaca.artifacts import checkpoint
from lora_alpaca.training.loop import MOST_OVERFLOWS, MOST_SKIPPED

STEPS = 5
VALUES = (math.nan, math.inf, -math.inf)
OF_STEP = ("loss", "row", "gradient", "base weight", "adapter weight")  # the error names step and rows
KINDS = (*OF_STEP, "moment", "validation")


def in_step(numbers: set[int], put: Callable[[Any], Any]) -> None:
    """Let `put` be called with the stepper at the beginning of some steps, counted from 1."""

    def around(own: Any) -> Any:
        def step(loop: Any) -> None:
            undo = put(stepper(loop)) if steps_done(loop) + 1 in numbers else None
            state = [parameter.detach().clone() for parameter in stepper(loop).parameters]
            try:
                own(loop)
            finally:
                if undo is not None:
                    undo()
                    moved = any(map(_differ, state, stepper(loop).parameters))
                    print(f"moved by the fault: {moved}", flush=True)

        return step

    wrap(STEP, around)


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return not torch.equal(one.view(torch.int32), other.detach().view(torch.int32))  # NaN is like NaN


def put_in(kind: str, value: float, numbers: set[int]) -> Callable[[], None]:
    """Return what puts a value into the loss, the gradient, ... of some steps of the run of this process."""

    def loss(stepper: Any) -> Callable[[], None]:
        return wrap(LOSS, lambda own: lambda engine, batch: own(engine, batch) * value)

    def row(stepper: Any) -> Callable[[], None]:
        """One row alone: the first that is computed in the step."""
        held, poisoned = [False], []

        def batches(own: Any) -> Any:
            def changed(engine: Any, examples: Any, *more: Any) -> Any:
                rows = [example.ids.tolist() for example in examples]
                poisoned.append(rows[0]) if not poisoned else None
                held[0] = poisoned[0] in rows
                return own(engine, examples, *more)

            return changed

        undo = wrap(BATCHES, batches)
        undo_loss = wrap(LOSS, lambda own: lambda engine, batch: own(engine, batch) * (value if held[0] else 1.0))
        return lambda: (undo(), undo_loss())  # type: ignore[return-value]

    def gradient(stepper: Any) -> Callable[[], None]:
        def changed(own: Any) -> Any:
            def backward(world: Any, part: torch.Tensor) -> None:
                own(world, part)
                stepper.parameters[0].grad.view(-1)[0] = value

            return backward

        return wrap(BACKWARD, changed)

    def weight(parameter: torch.Tensor) -> Callable[[], None]:
        flat = parameter.data.view(-1)
        before = flat[0].item()
        flat[0] = value
        return lambda: flat.__setitem__(0, before if kind == "base weight" else value)

    def base_weight(stepper: Any) -> Callable[[], None]:
        frozen = [parameter for parameter in stepper.model.parameters() if not parameter.requires_grad]
        return weight(frozen[-1])

    def adapter_weight(stepper: Any) -> Callable[[], None]:
        return weight(stepper.parameters[0])

    def moment(stepper: Any) -> Callable[[], None]:
        for state in stepper.optimizer.state.values():
            state["exp_avg"].view(-1)[0] = value
        return lambda: None

    puts = {
        "loss": loss, "row": row, "gradient": gradient, "base weight": base_weight, "adapter weight": adapter_weight,
        "moment": moment,
    }  # fmt: skip
    return lambda: in_step(numbers, puts[kind])


def validation(value: float, number: int) -> Callable[[], Any]:
    """Return what puts a value into the validation after a step."""

    def around(own: Any) -> Any:
        def validate(loop: Any) -> None:
            if steps_done(loop) == number:
                wrap(LOSS, lambda compute: lambda engine, batch: compute(engine, batch) * value)
            own(loop)

        return validate

    return partial(wrap, VALIDATE, around)


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


def overflowing(numbers: set[int]) -> Callable[[], Any]:
    """Return what gives the run of this process a scaler that overflows in some steps."""

    def around(own: Any) -> Any:
        def init(world: Any, *more: Any) -> None:
            own(world, *more)
            world.scaler = Scaler(numbers)

        return init

    return partial(wrap, MAKE_WORLD, around)


def programme(share: float, folder: Path) -> Report:
    """Put NaN and infinity everywhere, at the first, a middle and the last step; skip some; let fp16 overflow."""
    trials = _Trials(Scene(folder, {"max_steps": STEPS, "eval_steps": 1, "save_steps": 2}))
    cases = [(kind, value, step) for kind in KINDS for value in VALUES for step in (1, 3, STEPS)]
    cases = [case for case in cases if (case[0], case[2]) != ("moment", 1)]  # at the first step there are none yet
    for case in chosen(cases, share):
        trials.stops(*case)
    for kind, value in product(("loss", "gradient"), (math.nan, math.inf)):
        trials.skips_one(kind, value)
    trials.skips_too_many()
    trials.overflows()
    return trials.report


class _Trials:
    def __init__(self, scene: Scene):
        self.scene, self.report = scene, Report()
        self.out, self.right, self.every = (scene.folder / name for name in ("out", "right", "every step"))
        for path, options in ((self.right, {}), (self.every, {"save_steps": 1, "save_total_limit": STEPS})):
            ended = scene.finetune(path, **options)
            assert ended.code == 0, ended.said

    def newest(self, what: str) -> int:
        """Return the step of the newest checkpoint, 0 where there is none; it must be finite."""
        folder = checkpoint.newest(self.out)[0] if self.out.exists() else None
        if folder is None:
            return 0
        for name in (checkpoint.WEIGHTS, checkpoint.OPTIMIZER, checkpoint.BEST):
            finite = all(torch.isfinite(tensor).all() for tensor in tensors(folder, name).values())
            self.report.expect(finite, f"{what}: {name} of {folder.name} is not finite")
        return int(folder.name.removeprefix("checkpoint-"))

    def stops(self, kind: str, value: float, number: int) -> None:
        """The run ends in that step, says where, keeps what was good before it, and goes on from that."""
        expect, what = self.report.expect, f"{value} in the {kind} of step {number}"
        self.report.count("nonfinite")
        self.report.count(f"nonfinite {kind}")
        before = validation(value, number) if kind == "validation" else put_in(kind, value, {number})
        ended = self.scene.finetune(self.scene.fresh(), before)
        step, line = self.newest(what), ended.error()
        expect(ended.code == 1 and bool(line), f"{what}: ended with {ended.code}: {ended.last()}")
        expect(last_step(ended.phases) <= number, f"{what}: not stopped within one step")
        if kind in OF_STEP:
            expect(f"step {number}: the " in line and "training rows " in line, f"{what}: {line}")
            expect("moved by the fault: False" in ended.said, f"{what}: something moved")
        if kind == "row":
            expect(re.search(r"training rows \d+, each alone", line) is not None, f"{what}: {line}")
        good = {"validation": number, "adapter weight": step, "moment": step}.get(kind, number - 1)
        expect(step == good <= number, f"{what}: step {step} is saved, and {good} were good")
        sound = step in (0, STEPS) or same(self.out / f"checkpoint-{step}", self.every / f"checkpoint-{step}")
        expect(sound, f"{what}: checkpoint {step} is not that of a sound run")
        again = self.scene.finetune(self.out, resume=True)
        right = again.code == 0 and same(self.out, self.right) and losses(self.out) == losses(self.right)
        expect(right, f"{what}: gone on, it comes to something else: {again.last()}")

    def skips_one(self, kind: str, value: float) -> None:
        """With leave to skip, one bad step ends nothing, and has no part in the adapter."""
        what = f"one step with {value} in the {kind}, skipped"
        self.report.count("nonfinite skipped")
        ended = self.scene.finetune(self.scene.fresh(), put_in(kind, value, {3}), on_nonfinite="skip")
        said = "step 3: the loss is" in ended.said and "(--on_nonfinite skip)" in ended.said
        self.report.expect(ended.code == 0 and said, f"{what}: {ended.last()}")
        found = tensors(self.out)
        finite = bool(found) and all(torch.isfinite(tensor).all() for tensor in found.values())
        self.report.expect(finite and not same(self.out, self.right), f"{what}: the adapter is not as it should be")

    def skips_too_many(self) -> None:
        """More bad steps than the limit end the run."""
        what, many = "more steps than the limit are not finite", range(3, 3 + MOST_SKIPPED + 1)
        self.report.count("nonfinite skipped")
        bad = put_in("loss", math.nan, set(many))
        ended = self.scene.finetune(self.scene.fresh(), bad, on_nonfinite="skip", max_steps=20)
        self.report.expect(ended.code == 1 and f"step {many[-1]}: " in ended.error(), f"{what}: {ended.last()}")
        self.report.expect(self.newest(what) == many[-1] - 1, f"{what}: another step is saved")

    def overflows(self) -> None:
        """An overflow that lowers the loss scale is no event; too many in a row are, also in two runs."""
        long = {"max_steps": 60, "save_steps": 20, "eval_steps": 60}
        few = {"one": {2}, "all but one too many": set(range(3, 2 + MOST_OVERFLOWS)), "the last": {60}}
        for name, numbers in few.items():
            self.report.count("nonfinite overflows")
            ended = self.scene.finetune(self.scene.fresh(), overflowing(numbers), **long)
            said = ended.said.count("the gradients overflow fp16")
            fine = ended.code == 0 and said == len(numbers)
            self.report.expect(fine, f"overflows, {name}: said {said} times: {ended.last()}")

        many, last = overflowing(set(range(3, 3 + MOST_OVERFLOWS))), 2 + MOST_OVERFLOWS
        self._too_many(self.scene.finetune(self.scene.fresh(), many, **long), last, "too many overflows in a row")

        def killed() -> None:
            many()
            in_step({30}, lambda stepper: os._exit(9))

        died = self.scene.finetune(self.scene.fresh(), killed, **long)
        self.report.expect(died.code == 9 and steps(self.out) == [20], f"overflows: not killed: {died.last()}")
        again = self.scene.finetune(self.out, many, **long, resume=True)
        self._too_many(again, last, "too many overflows, in two runs")

    def _too_many(self, ended: Ended, step: int, what: str) -> None:
        self.report.count("nonfinite overflows")
        line = f"step {step}: the gradients overflowed fp16 {MOST_OVERFLOWS} times in a row"
        self.report.expect(ended.code == 1 and line in ended.error(), f"{what}: {ended.last()}")
        self.newest(what)
