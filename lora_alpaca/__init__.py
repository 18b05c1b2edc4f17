"""Low-cost instruction finetuning with LoRA: train, merge and answer with one prompt from data to deployment.

    from lora_alpaca import FinetuneConfig, Generator, GenerateConfig, finetune

    run = finetune(FinetuneConfig(output_dir="my-adapter"))
    print(Generator.load(GenerateConfig(lora_weights="my-adapter")).reply("Tell me about alpacas."))

Names are imported when they are first used, so that importing the package costs nothing.
"""

import logging
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from lora_alpaca._version import __version__

# Other libraries read these while they are imported, so they are set here.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # no line for every attempt to connect; the last error is reported
# Threads of torch that wait are awake for some microseconds, and then asleep, unless a user says otherwise: awake they
# take the time of one that another program holds up (decision 24). GNU's OpenMP reads the latter, others the former.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}
if not {*WAITING, "KMP_BLOCKTIME"} & os.environ.keys():
    os.environ |= WAITING
logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it urges to install `kernels`, which fetches code

_HOMES = {
    "AdapterError": "errors",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "ContractError": "errors",
    "DataError": "errors",
    "ExportConfig": "config",
    "ExportError": "errors",
    "FinetuneConfig": "config",
    "FolderError": "errors",
    "GenerateConfig": "config",
    "Generator": "inference.generator",
    "LoraAlpacaError": "errors",
    "ModelError": "errors",
    "RankError": "errors",
    "ReproductionError": "errors",
    "RunResult": "artifacts.run_record",
    "SelfTestError": "errors",
    "Template": "prompts",
    "TemplateError": "errors",
    "TrainingError": "errors",
    "export_hf": "export.exporting",
    "finetune": "training",
    "load_template": "prompts",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from lora_alpaca.artifacts.run_record import RunResult
    from lora_alpaca.config import ExportConfig, FinetuneConfig, GenerateConfig
    from lora_alpaca.errors import (
        AdapterError,
        CheckpointError,
        ConfigError,
        ContractError,
        DataError,
        ExportError,
        FolderError,
        LoraAlpacaError,
        ModelError,
        RankError,
        ReproductionError,
        SelfTestError,
        TemplateError,
        TrainingError,
    )
    from lora_alpaca.export.exporting import export_hf
    from lora_alpaca.inference.generator import Generator
    from lora_alpaca.prompts import Template, load_template
    from lora_alpaca.training import finetune


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
