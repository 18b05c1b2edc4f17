"""One training by the alpaca-lora recipe on transformers' Trainer, with the rows, rates and first adapter of ours.

What the benchmarks of whole trainings share: examples as `finetune` makes them, the adapter that it starts from, the
recipe's training, and the loss of adapters by our own validation.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import rivals
import torch
import transformers

from lora_alpaca import FinetuneConfig
from lora_alpaca.data import Rows
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.examples import Examples
from lora_alpaca.data.preparation import prepare
from lora_alpaca.data.sampler import Sampler
from lora_alpaca.distributed.strategy import Replicated
from lora_alpaca.distributed.world import World
from lora_alpaca.engine import EngineChoices, fitted
from lora_alpaca.models import lora
from lora_alpaca.models.base import load_base, locate_base
from lora_alpaca.models.device import choose_device
from lora_alpaca.models.lora import LoraAdapter
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.models.trainable import State
from lora_alpaca.planning.plan import CPU_TOKENS, resolve_steps
from lora_alpaca.prompts import fitting_template
from lora_alpaca.training.step import Stepper

MICRO_BATCH = 4  # of the alpaca-lora recipe

States = dict[int, State]  # adapters by the number of steps taken
Curve = dict[int, float]  # losses likewise


def encoded(path: Path, config: FinetuneConfig) -> Examples:
    """Return the rows of a file as `finetune` encodes them."""
    rows, (tokenizer, _) = Rows(str(path)), load_tokenizer(locate_base(config.base_model))
    template = fitting_template(rows.formats, tokenizer).bound(tokenizer)
    encoder = Encoder.from_options(tokenizer, template, config)
    return prepare(rows, encoder, set(), lambda _: None).train


def first_adapter(config: FinetuneConfig) -> State:
    """Return the adapter that `finetune` starts from with a seed."""
    base = locate_base(config.base_model)
    torch.manual_seed(config.seed)
    return lora.state(lora.attach(load_base(base, choose_device(config)[0])[0], config, base))


def recipe(
    train: Examples, config: FinetuneConfig, first: State, folder: Path, watch: rivals.Clock | None = None
) -> tuple[States, Curve]:
    """Train by the alpaca-lora recipe; return its adapters, and the training losses between them.

    `folder` is the Trainer's own; `watch` takes the time of the training.
    """
    plan = resolve_steps(config, len(train), 1)
    base, spec = locate_base(config.base_model), choose_device(config)[0]
    model = lora.attach(rivals.prepared(load_base(base, spec)[0], "alpaca-lora"), config, base)
    lora.set_state(model, first, "the first adapter")
    optimizer = torch.optim.AdamW(
        lora.trainable_parameters(model), lr=config.peak_rate, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: plan.learning_rate(step, config) / config.peak_rate
    )
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=config.num_epochs, max_grad_norm=config.max_grad_norm,
        per_device_train_batch_size=MICRO_BATCH, gradient_accumulation_steps=config.batch_size // MICRO_BATCH,
        bf16=spec.dtype == torch.bfloat16, use_cpu=True, seed=config.seed, logging_steps=config.logging_steps,
        logging_strategy="steps", save_strategy="no", report_to="none", disable_tqdm=True, remove_unused_columns=False,
        dataloader_pin_memory=False,
    )  # fmt: skip
    order, taken = _Order(train, config), _Taken(plan.save_steps)
    trainer = _Trainer(
        model,
        arguments,
        rivals.padded,
        [rivals.vars_of(example) for example in train],
        optimizers=(optimizer, schedule),
        callbacks=[taken, *([watch] if watch else [])],
    )
    trainer.order = order
    trainer.train()
    steps = range(plan.total_steps)
    expected = [row for step in steps for row in order.sampler.rows(step)]
    assert order.drawn == expected and trainer.state.global_step == len(steps), "other rows, or in another order"
    taken.states[len(steps)] = lora.state(model)
    return taken.states, {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


class _Trainer(transformers.Trainer):
    """A Trainer that takes the rows in a given order."""

    order: "_Order"

    def _get_train_sampler(self, *_: Any) -> Any:
        return self.order


class _Order(torch.utils.data.Sampler):
    """The row numbers of an epoch, one optimizer step after another, as `finetune` takes them."""

    def __init__(self, train: Examples, config: FinetuneConfig):
        self.sampler, self.epoch = Sampler(train.lengths, config.batch_size, config.seed), 0
        self.drawn: list[int] = []

    def __len__(self) -> int:
        return len(self.sampler.lengths)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch  # called by the Trainer before every epoch

    def __iter__(self) -> Iterator[int]:
        steps = self.sampler.steps_per_epoch
        for step in range(self.epoch * steps, (self.epoch + 1) * steps):
            for row in self.sampler.rows(step):
                self.drawn.append(row)
                yield row


class _Taken(transformers.TrainerCallback):
    """The adapter as it is after every so many steps."""

    def __init__(self, every: int):
        self.every, self.states = every, States()

    def on_step_end(self, _: Any, state: Any, __: Any, model: Any = None, **___: Any) -> None:
        if state.global_step % self.every == 0:
            self.states[state.global_step] = lora.state(model)


def losses(config: FinetuneConfig, states: States, examples: Examples) -> Curve:
    """Return the loss of adapters by step on some rows, each put on one base and measured by our own validation."""
    with World(config) as world:
        base = locate_base(config.base_model)
        model = lora.attach(load_base(base, world.spec)[0], config, base)
        choices = EngineChoices(engine="packed", token_budget=CPU_TOKENS, micro_batch_size=1)
        with fitted(model, choices, world.spec, 0, examples, world.autocast) as (engine, _):
            stepper = Stepper(engine, LoraAdapter(model), Replicated(world), world, config, print)
            found = {}
            for step in sorted(states):
                lora.set_state(model, states[step], f"step {step}")
                found[step] = stepper.evaluate(examples).loss
            return found
