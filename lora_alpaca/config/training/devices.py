"""The options of a run on the devices that it takes."""

from typing import Literal

from lora_alpaca.config.options import Options, option


class DeviceOptions(Options):
    """How a run is spread over devices and processes."""

    shard: Literal["auto", "none", "grads", "full"] = option(
        "auto",
        "devices",
        "Spread the weights over the devices (FSDP2): full gathers a layer when it computes, grads keeps it gathered "
        "until its backward; auto is full where the base does not fit on one device.",
        decides="engine",
    )
    shard_size: int | None = option(
        None,
        "devices",
        "Devices that share one copy of the weights; further ones hold copies of their own.",
        unit="devices",
        auto="all devices",
        ge=1,
        decides="engine",
    )
    offload: Literal["none", "cpu"] = option(
        "none", "devices", "With --shard, keep the shards in the host's memory: cpu.", decides="engine"
    )

    processes: int | None = option(
        None,
        "devices",
        "Processes that this command starts on this machine, one for each device.",
        unit="processes",
        auto="one for each card with --shard full or grads, else one",
        ge=1,
        decides="nothing",
    )
    threads: int | None = option(
        None,
        "devices",
        "Threads of each process on a CPU. A resumed run has those that it began with: other ones round otherwise.",
        unit="threads",
        auto="one for each core, or one in all where that is clearly faster at the start; or OMP_NUM_THREADS",
        ge=1,
        le=1024,
        decides="nothing",
    )
    recheck: bool = option(
        False,
        "devices",
        "Compare the engine's gradients with plain transformers again, also where that has passed before with the same "
        "base, rows, plan, versions and machine.",
        decides="nothing",
    )
