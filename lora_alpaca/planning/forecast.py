"""What a run would take, all of it: memory by part, steps, tokens, time with its basis, money and disk."""

from dataclasses import asdict, dataclass, field
from typing import Any

from lora_alpaca.planning.estimate import Free, Memory, Parts


@dataclass(frozen=True)
class Remedy:
    """Options with which a run fits, what a device then takes at least, and how many times as long the run is."""

    options: str
    memory: int
    times: float


@dataclass(frozen=True)
class Forecast:
    """What a run would take on each device. `overhead` are the bytes of libraries, `workspace` those of buffers."""

    base: str
    device: str
    devices: int
    precision: str
    rows: str
    plan: str
    memory: Memory
    overhead: int
    workspace: int
    memory_basis: str
    is_mapped: bool  # whether the weights stay in their file, which processes of a machine share
    free: Free
    free_is: str
    steps: int
    tokens: int  # of all rows that are trained on, over all epochs
    seconds: dict[str, float]  # by what the time goes into
    time_basis: str
    disk: int
    price_per_hour: float | None = None
    remedies: tuple[Remedy, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def parts(self) -> Parts:
        """Return what tensors take of a device, by part."""
        return self.memory.device

    @property
    def peak(self) -> int:
        """Return the most bytes that a process takes of its device."""
        return self.parts.total + self.workspace + self.overhead

    @property
    def fits(self) -> bool:
        """Return whether what is free is enough."""
        return self.peak <= self.free.device and self.memory.host.total <= self.free.host

    @property
    def total_seconds(self) -> float:
        """Return the time from the command to the saved result."""
        return sum(self.seconds.values())

    @property
    def money(self) -> float | None:
        """Return what the run costs, None without a price."""
        return None if self.price_per_hour is None else self.price_per_hour * self.total_seconds / 3600

    def to_json(self) -> dict[str, Any]:
        """Return the forecast as values that JSON has: bytes, seconds and tokens."""
        return {
            "base_model": self.base,
            "device": self.device,
            "devices": self.devices,
            "precision": self.precision,
            "rows": self.rows,
            "plan": self.plan,
            "memory": {
                **asdict(self.parts),
                "workspace": self.workspace,
                "libraries": self.overhead,
                "peak": self.peak,
                "host": self.memory.host.total,
                "mapped": self.is_mapped,
                "basis": self.memory_basis,
            },
            "free": self.free.device,
            "fits": self.fits,
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds": {**self.seconds, "total": self.total_seconds, "basis": self.time_basis},
            "money": self.money,
            "disk": self.disk,
            "remedies": [asdict(one) for one in self.remedies],
            "notes": list(self.notes),
        }
