"""The processes of a run, on Accelerate: which one this is, its device and precision, and what all of them agree on.

The model is never wrapped here. The one message of a training step is a `strategy`'s; who failed is found by the
`heartbeat`.
"""

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState, GradientState

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.config.accelerate_launch import take_out
from lora_alpaca.config.environment import ranks_per_machine
from lora_alpaca.distributed.agreement import Facts, own_facts, require_same
from lora_alpaca.distributed.heartbeat import TIMEOUT, Heartbeat
from lora_alpaca.distributed.rendezvous import connect, rendezvous, run_prefix
from lora_alpaca.errors import ConfigError, LoraAlpacaError, RankError
from lora_alpaca.models import cards
from lora_alpaca.models.device import choose_device, pick_device
from lora_alpaca.signals import Stop

Result = TypeVar("Result")
BACKEND = "cpu:gloo,cuda:nccl"  # of ranks with cards: what decides and agrees is small, and its failures must be seen
POLL = 0.001  # seconds between two looks at whether a sum over cards is done
LAST_MESSAGE = 0.1  # seconds for gloo's threads to let go of it


class World:
    """This process among `world_size`, as a context that leaves no process group behind.

    `spec` is where and in what precision the model computes, `notes` what could not be had as asked for.
    """

    def __init__(self, config: FinetuneConfig, stop: Stop | None = None):
        self.stop = Stop() if stop is None else stop  # a stop that no signal has asked for is false
        self.notes = take_out(config, os.environ)
        device = pick_device(config.device)
        self.notes += _own_device(config, device)
        bits = 8 if config.tune == "lora" else 16
        spec, notes = choose_device(config, device, default_bits=bits)
        self.notes += notes
        if device.type == "cuda":
            cards.expand_segments()
        self._settings = ExitStack()
        if cards.multiplies_in_tf32(device, spec.dtype):
            self._settings.enter_context(cards.fp32_products(in_tf32=True))
            self.notes.append(f"fp32 products are rounded to tf32 on this card; {cards.OVERRIDE}=0 keeps them exact")
        on_cpu, timeout = device.type == "cpu", timedelta(seconds=config.rank_timeout)
        meeting = rendezvous(timeout, lambda: own_facts(config, str(spec)))
        backend = {"backend": BACKEND} if device.type == "cuda" and "store" in meeting else {}
        processes = PartialState(cpu=on_cpu, **meeting, **backend)
        self.spec = replace(spec, device=processes.device)
        self.rank: int = processes.process_index
        self.world_size: int = processes.num_processes
        self.per_machine = ranks_per_machine()
        self.is_main = self.rank == 0
        self._seed = 0
        self.step_seed = ""  # of the present step, the same on all ranks
        self._heartbeat: Heartbeat | None = None
        if self.world_size > 1:
            self._heartbeat = Heartbeat(self.rank, self.world_size, self.stop, connect(), run_prefix())
        self._accelerator = Accelerator(
            cpu=on_cpu, mixed_precision={torch.bfloat16: "bf16", torch.float16: "fp16"}.get(self.spec.dtype, "no")
        )
        self.device: torch.device = self._accelerator.device
        self.scaler: Any = self._accelerator.scaler  # of fp16 on CUDA; None otherwise

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        verdict: BaseException | None = None
        self._settings.close()
        if self._heartbeat is not None:
            if isinstance(error, RuntimeError) and (found := self.failed_rank(error)):
                error = verdict = RankError(*found)
            verdict = self._heartbeat.verdict(error) or verdict
        if error is None or self._heartbeat is None:
            PartialState().destroy_process_group()
        if self._heartbeat is not None:
            # A sharded model keeps the group's threads alive, and one that frees a tensor while Python ends aborts.
            time.sleep(LAST_MESSAGE)
        AcceleratorState._reset_state(reset_partial_state=True)  # the next run may choose another precision
        GradientState._reset_state()
        if verdict is not None:
            raise verdict from None

    # ------------------------------------------------------------------------------------------------- precision

    def autocast(self) -> Any:
        """Return the context in which a forward pass computes in the run's precision."""
        return self._accelerator.autocast()

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss, scaled if the precision is fp16."""
        self._accelerator.backward(loss)

    def seed(self, seed: int, step: int) -> None:
        """Set the random state of a step on this rank: dropout differs from rank to rank and step to step.

        The state follows from the three numbers alone, so a resumed run, or a step that is retried, needs no saved one.
        """
        self.step_seed = f"{seed} {step}"
        digest = hashlib.sha256(f"{self.step_seed} {self.rank}".encode()).digest()
        self._seed = int.from_bytes(digest[:7])
        self.reseed()

    def reseed(self) -> None:
        """Set the random state with which the current step began."""
        torch.manual_seed(self._seed)

    # ----------------------------------------------------------------------------------------------- collectives

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place, and return it: on the host by gloo, on a card by NCCL."""
        if self.world_size == 1:
            return tensor
        if tensor.is_cuda:
            self.collective(lambda: self._finish(torch.distributed.all_reduce(tensor, async_op=True)))
        else:
            self.collective(lambda: torch.distributed.all_reduce(tensor))
        return tensor

    def _finish(self, work: Any) -> None:
        """Wait for a call of NCCL's, which returns at once, and whose kernel waits for a dead rank without end.

        All ranks have met before, so it takes no longer than its message. Raises RuntimeError where another rank has
        failed meanwhile, or is silent.
        """
        looked = time.monotonic()
        while not work.is_completed():
            time.sleep(POLL)
            if self._heartbeat is not None and time.monotonic() - looked > TIMEOUT:
                if self._heartbeat.dead_rank():
                    raise RuntimeError("a rank is gone")
                looked = time.monotonic()
        work.wait()

    def least(self, number: int) -> int:
        """Return the least of the numbers of all ranks."""
        return min(self.gather(number))

    def largest(self, number: float) -> float:
        """Return the largest of the numbers of all ranks, NaN if one of them is NaN."""
        numbers = self.gather(number)
        return math.nan if any(map(math.isnan, numbers)) else max(numbers)

    def require_same(self, facts: Facts, remedy: str, error: type[LoraAlpacaError] = ConfigError) -> None:
        """Raise an error, on every rank, that names a rank whose facts, name -> value, are not those of the others."""
        require_same(self.gather(facts), remedy, error)

    def broadcast(self, value: Callable[[], Result]) -> Result:
        """Return on every rank what `value` returns on the main rank, where alone it is called."""
        found = [value() if self.is_main else None]
        if self.world_size > 1:
            self.collective(lambda: torch.distributed.broadcast_object_list(found))
        return found[0]  # type: ignore[return-value]

    def together(self, work: Callable[[], Result]) -> list[Result]:
        """Do some work on every rank and return what came of it on each.

        Raises OSError on all ranks, naming one of those where the work raised it.
        """
        found: Result | None = None
        failure: tuple[int, str] | None = None
        try:
            found = work()
        except OSError as error:
            failure = error.errno or 0, error.strerror or str(error)
        outcomes = self.gather((found, failure))
        for rank, (_, failed) in enumerate(outcomes):
            if failed is not None:
                raise OSError(failed[0], self.named(rank, failed[1]))
        return [one for one, _ in outcomes]  # type: ignore[misc]

    def named(self, rank: int, what: str) -> str:
        """Return what happened to a rank with its number, where there are several."""
        return f"rank {rank}: {what}" if self.world_size > 1 else what

    def send(self, tensor: torch.Tensor) -> None:
        """Send a tensor to the main rank, which calls `receive` for it."""
        on_device = tensor.to(self.device)
        self.collective(lambda: torch.distributed.send(on_device, 0))

    def receive(self, tensor: torch.Tensor, rank: int) -> None:
        """Fill a contiguous tensor of the main rank with what another rank sends."""
        on_device = tensor if tensor.device == self.device else torch.empty_like(tensor, device=self.device)
        self.collective(lambda: torch.distributed.recv(on_device, rank))
        if on_device is not tensor:
            tensor.copy_(on_device)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            self.collective(torch.distributed.barrier)

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Give a context that the main process of each machine leaves before the others enter it."""
        is_first = self._accelerator.is_local_main_process
        if not is_first:
            self.barrier()
        yield
        if is_first:
            self.barrier()

    def gather(self, value: Result) -> list[Result]:
        """Return the values of all ranks."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            self.collective(lambda: torch.distributed.all_gather_object(values, value))
        return values

    def failed_rank(self, error: RuntimeError) -> tuple[int, str] | None:
        """Return the rank for which a call that is not made by `collective` failed, as those of FSDP2, and the cause.

        None where no other rank is known to be the reason. It takes three seconds to know that.
        """
        if self._heartbeat is None or isinstance(error, LoraAlpacaError):
            return None
        text = str(error).partition("\n")[0]
        if isinstance(error, torch.distributed.DistError) or "gloo" in text:
            return self._heartbeat.failed_rank(text)
        return self._heartbeat.dead_rank()

    def collective(self, call: Callable[[], Any]) -> None:
        """Make a collective call. Raises RankError naming the rank that does not take part."""
        if self._heartbeat is None:
            call()
        else:
            self._heartbeat.guard(call)


def _own_device(config: FinetuneConfig, device: torch.device) -> list[str]:
    """Make a card this process's own, and return a note where others are left without one.

    Raises ConfigError where more processes were started than there are cards, or others than --processes says.
    """
    started, count = ranks_per_machine(), torch.cuda.device_count() if device.type == "cuda" else 0
    if config.processes not in (None, started):
        raise ConfigError(
            f"--processes {config.processes}: the command starts that many, and here {started} run on this machine; "
            f"leave it out, or start with torchrun --nproc_per_node={config.processes}"
        )
    if not count:
        return []
    number = int(os.environ.get("LOCAL_RANK", "0"))
    if number >= count:
        raise ConfigError(
            f"{started} processes were started on this machine, which has {count} {device.type} devices; one process "
            f"needs one: start with --nproc_per_node={count}"
        )
    torch.cuda.set_device(number)
    if number:
        cards.require_able(device)  # the first is looked at when the device is picked
    if count == 1 or started > 1 or "RANK" in os.environ:
        return []
    return [
        f"one of {count} devices is used; all of them by torchrun --nproc_per_node={count} finetune.py ... (or "
        f"--processes {count})"
    ]
