"""The environment, checked before anything heavy is imported: the libraries, and a launcher's variables."""

import importlib.metadata
import os
import re

from lora_alpaca.errors import ConfigError, LoraAlpacaError

LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MISSING = "not installed"
OPTIONAL = {"bitsandbytes"}  # an unquantised base works without it; where it is needed, an error names it


def check_libraries() -> None:
    """Raise LoraAlpacaError, in one line, for every library that is missing or of a version outside its range."""
    try:
        requirements = importlib.metadata.requires("lora-alpaca") or []
    except importlib.metadata.PackageNotFoundError:  # run from a folder, never installed
        return
    wrong = [trouble for line in requirements if "extra ==" not in line and (trouble := _trouble(line))]
    if wrong:
        raise LoraAlpacaError(f"{'; '.join(wrong)}: pip install -r requirements.txt puts in what was tested")


def version_of(library: str) -> str:
    """Return the version of a library that is installed, or MISSING."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def require_folder() -> None:
    """Raise ConfigError where the working directory was removed: paths mean nothing there."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(f"the working directory cannot be used ({error.strerror}); cd to another one") from None


def _trouble(requirement: str) -> str:
    """Return what is wrong with a library that is required as in `torch<3,>=2.13`, or nothing."""
    name = re.match(r"[\w.-]+", requirement)[0]  # type: ignore[index]  # every requirement begins with a name
    limits = re.findall(r"(>=|<)([\d.]+)", requirement)
    if (there := version_of(name)) == MISSING:
        return "" if name in OPTIONAL else f"{name} is {MISSING}"
    fits = all(
        _release(there) >= _release(limit) if sign == ">=" else _release(there) < _release(limit)
        for sign, limit in limits
    )
    needed = ",".join(sign + limit for sign, limit in sorted(limits, reverse=True))
    return "" if fits else f"{name} {there} is installed, and {name}{needed} is needed"


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers of a version, as of 2.13.0+cpu or 3.0rc1, up to what is not a number."""
    return tuple(int(number) for number in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))  # type: ignore[index]


def world_size() -> int:
    """Return how many processes were launched together.

    Raises ConfigError where variables name several processes and others are missing: each would wait for ever.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if not size.isdecimal() or int(size) == 0:
        raise ConfigError(f"the variable WORLD_SIZE is {size!r}, no number of processes; unset it, or use torchrun")
    missing = [name for name in LAUNCHED if name not in os.environ]
    if missing and (int(size) > 1 or "LOCAL_RANK" in os.environ):
        raise ConfigError(
            f"the variables say that {size} processes were launched, but {', '.join(missing)} not set; "
            f"start with torchrun --nproc_per_node={size} finetune.py, or unset WORLD_SIZE and LOCAL_RANK"
        )
    rank = os.environ.get("RANK", "0")
    if int(size) > 1 and not (rank.isdecimal() and int(rank) < int(size)):
        raise ConfigError(f"the variable RANK is {rank!r}, and WORLD_SIZE is {size}; start with torchrun")
    return int(size)


def is_launched() -> bool:
    """Return whether a launcher, such as torchrun, has started this process, be it one of several or alone."""
    return "RANK" in os.environ


def ranks_per_machine() -> int:
    """Return how many of the launched processes are on this machine; all of them, where the launcher does not say."""
    size = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(size) if size.isdecimal() and int(size) > 0 else world_size()
