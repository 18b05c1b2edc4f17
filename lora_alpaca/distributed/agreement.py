"""What the ranks of a run must have in common: versions, options, the kind of device, rows and files.

Ranks on several nodes are started by as many commands, from as many installations. Where these differ the run would
hang, or train something that no command asked for; here the rank that differs is named.
"""

import hashlib
import platform
import socket
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from lora_alpaca._version import __version__
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.config.environment import version_of
from lora_alpaca.errors import ConfigError, LoraAlpacaError

Facts = dict[str, str]
LIBRARIES = (
    "torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers", "safetensors", "numpy", "datasets",
)  # fmt: skip
OF_A_NODE = {"cache_dir"}  # options that may differ from node to node
HOST = "host"  # the one fact that is told and not compared


def own_facts(config: FinetuneConfig, device: str) -> Facts:
    """Return what this rank has: name -> value.

    Options that name files are left out: what is in the files is compared, once it is read.
    """
    options = {
        f"--{name}": str(value)
        for name, value in config.model_dump().items()
        if name not in OF_A_NODE | FinetuneConfig.same_if().keys()
    }
    return {
        HOST: socket.gethostname(),
        "lora_alpaca": f"{__version__} (code {code_sha256()[:12]})",
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{name: version_of(name) for name in LIBRARIES},
        "device": device,
        **options,
    }


def require_same(ranks: Sequence[Facts], remedy: str, error: type[LoraAlpacaError] = ConfigError) -> None:
    """Raise an error naming every fact that is not the same on all ranks, with a rank that differs and both values.

    `ranks` are the facts of each rank; of two equally common values that of the lower rank counts as the common one.
    """
    sentences = []
    for name in dict.fromkeys(name for facts in ranks for name in facts if name != HOST):
        values = [facts.get(name, "unknown") for facts in ranks]
        common = Counter(values).most_common(1)[0][0]
        odd = next((rank for rank, value in enumerate(values) if value != common), None)
        if odd is None:
            continue
        others = f"rank {values.index(common)}" if odd else "the others"
        host = ranks[odd].get(HOST, "")
        sentences.append(f"{name} is {values[odd]} on rank {odd}{f' ({host})' * bool(host)} and {common} on {others}")
    if sentences:
        raise error(f"the ranks differ: {'; '.join(sentences)}; {remedy}")


@cache
def code_sha256() -> str:
    """Return a sha256 of this library's own modules: two clones of one version may differ."""
    folder, digest = Path(__file__).parent.parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
