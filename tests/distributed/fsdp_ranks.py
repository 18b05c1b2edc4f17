"""What each rank of tests/distributed/test_fsdp.py does: the same steps on a sharded model, and on one held whole.

    torchrun fsdp_ranks.py FOLDER CASES

CASES is JSON; the first rank writes how far the sharded model is off into FOLDER/found.json.
"""

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.data.examples import Example
from lora_alpaca.distributed.fsdp import Sharded
from lora_alpaca.distributed.strategy import Replicated
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import EngineChoices, attention, fitted
from lora_alpaca.models import full, lora
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.signals import Stop
from lora_alpaca.training.step import Stepper

CPU, VOCABULARY, STEPS = torch.device("cpu"), 301, 10  # rows that do not divide evenly


def save_base(folder: Path, architecture: str, sizes: dict) -> None:
    """Save a random model, its norms and biases random too, which drops nothing out."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{architecture}Config")(vocab_size=VOCABULARY, **sizes | ids)
    for name in ("dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.dim() == 1 else 0.02)
    model.save_pretrained(folder)


def rows(count: int) -> list[Example]:
    """Return rows of many lengths that share a beginning."""
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(VOCABULARY, (length,), generator=draw).tolist()

    preamble, found = ids(20), []
    for number in range(count):
        prompt, answer = preamble + ids(3 + number % 7), ids(2 + number % 9)
        found.append(Example(prompt + answer, [(len(prompt), len(prompt + answer))]))
    return found


class Alone(SimpleNamespace):
    """The world of a process that is alone; it has no process group to ask."""

    rank, world_size, device, scaler = 0, 1, CPU, None

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def seed(self, seed: int, step: int) -> None:
        torch.manual_seed(step)


def start(case: dict, folder: Path, strategy, world):
    """Return a stepper on a fresh model, and the context of its engine."""
    base, dtype = locate_base(str(folder / case["family"])), getattr(torch, case.get("dtype", "float32"))
    tune = case.get("tune", "lora")
    options = {"lora_target_modules": ["all-linear"], "lora_r": 4, "lora_dropout": 0.0} if tune == "lora" else {}
    config = FinetuneConfig(tune=tune, layers=case.get("layers", "all"), weight_decay=0.0, **options)

    def prepare(model):
        if tune == "full":
            model = full.mark_learning(model, config, dtype)
        else:
            model = lora.attach(model, config, base)
            draw = torch.Generator().manual_seed(1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
        if case.get("recomputes"):
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        return model

    torch.manual_seed(0)
    spec = DeviceSpec(CPU, torch.float32 if tune == "full" else dtype, case.get("bits", 16))
    model, _ = strategy.load(base, spec, prepare)
    trainable = full.FullWeights(model) if tune == "full" else lora.LoraAdapter(model)
    choices = EngineChoices(engine=case["engine"], token_budget=80, micro_batch_size=2)
    world.autocast = nullcontext if dtype == torch.float32 else partial(torch.autocast, "cpu", dtype)
    spec = DeviceSpec(CPU, dtype, spec.bits)
    context = fitted(model, choices, spec, 0, rows(4), world.autocast, not case.get("checked"), strategy)
    engine, notes = context.__enter__()
    stepper = Stepper(engine, trainable, strategy, world, config, print)
    if case.get("optimizer") == "sgd":
        stepper.optimizer = torch.optim.SGD([{"params": stepper.parameters, "ratio": 1.0}], lr=0.0)
    return stepper, notes, context


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor, gathered if it is sharded."""
    found = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found.detach().flatten().double()


def measured(case: dict, folder: Path, strategy, world) -> dict[str, torch.Tensor]:
    """Return loss and gradient of the first step, and the parameters before and after some steps."""
    stepper, notes, context = start(case, folder, strategy, world)
    examples = rows(7)
    labels = sum(example.num_labels() for example in examples)
    before = torch.cat([whole(parameter) for parameter in stepper.parameters])
    loss = stepper._gradient(examples, labels)
    gradient = torch.cat([whole(parameter.grad) for parameter in stepper.parameters])
    norm = stepper.strategy.clip(stepper.parameters, 1e-3)
    clipped = torch.cat([whole(parameter.grad) for parameter in stepper.parameters])
    for _ in range(STEPS if case.get("optimizer") else 0):
        stepper.step(examples, case["rate"])
    after = torch.cat([whole(parameter) for parameter in stepper.parameters])
    context.__exit__(None, None, None)
    is_plain = not any(hasattr(tensor, "to_local") for tensor in stepper.weights().values())
    sums = {"loss": torch.tensor([loss]), "norm": torch.tensor([norm])}
    return (
        sums
        | {"gradient": gradient, "clipped": clipped, "before": before, "after": after}
        | {
            "notes": notes,
            "is_plain": is_plain,
        }
    )


def compared(case: dict, folder: Path, world: World, alone: Alone) -> dict:
    """Return relative errors of the sharded model, and which share of the parameters is where it should be."""
    world.spec = replace(world.spec, dtype=getattr(torch, case.get("dtype", "float32")))
    sharded = Sharded(
        world, case.get("shard") == "grads", case.get("shard_size"), case.get("offload", False), "tune" in case
    )
    if case.get("fault"):
        return {"notes": faulty(case, folder, sharded, world)}
    found = measured(case, folder, sharded, world)
    if case.get("against") == "ranks":
        expected = measured(case, folder, Replicated(world), world)
    elif not world.is_main:
        return {}
    else:
        expected = measured(case, folder, Replicated(alone), alone)
    result = {
        name: ((found[name] - expected[name]).norm() / expected[name].norm()).item()
        for name in ("loss", "norm", "gradient", "clipped", "before", "after")
    }
    moved = (expected["after"] - expected["before"]).abs()
    near = (found["after"] - expected["after"]).abs() <= 0.01 * moved
    shares = {"near": near.double().mean().item(), "moved": moved.max().item()}
    return result | shares | {"notes": found["notes"], "is_plain": found["is_plain"]}


def faulty(case: dict, folder: Path, sharded: Sharded, world: World) -> list[str]:
    """Return what the check at start says of packs whose attention is 2 % off."""
    right = attention._by_segment

    def mixed(query, key, value, pack, dropout, scale):
        wrong = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return 0.98 * right(query, key, value, pack, dropout, scale) + 0.02 * wrong

    attention._by_segment = mixed
    try:
        _, notes, context = start(case | {"engine": "auto", "checked": True}, folder, sharded, world)
        context.__exit__(None, None, None)
    finally:
        attention._by_segment = right
    return notes


def main(folder: Path, cases: list[dict], sizes: dict[str, dict]) -> None:
    config = FinetuneConfig(device="cpu", load_8bit=False, dtype="fp32", rank_timeout=60)
    with World(config, Stop()) as world:
        if world.is_main:
            for family in {case["family"] for case in cases}:
                save_base(folder / family, family, sizes[family])
        world.barrier()
        alone = Alone(stop=world.stop)
        found = [compared(case, folder, world, alone) for case in cases]
        if world.is_main:
            (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))
