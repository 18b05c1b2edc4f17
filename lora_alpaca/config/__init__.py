"""Every option, once: its name, type, unit, default, check and meaning.

The command line, `--help`, the record in the adapter folder and the documentation are all read from these classes.
This module imports neither torch nor any other heavy library, so a wrong flag is answered at once.
"""

from lora_alpaca.config.estimating import EstimateConfig
from lora_alpaca.config.evaluation import EvaluateConfig
from lora_alpaca.config.export import (
    ConvertBaseConfig,
    ConvertConfig,
    ExportConfig,
    ImportMetaConfig,
    WeightDiffConfig,
)
from lora_alpaca.config.finding import FindConfig
from lora_alpaca.config.inference import GenerateConfig
from lora_alpaca.config.reporting import CompareConfig, ReportConfig
from lora_alpaca.config.reproducing import ReproduceConfig
from lora_alpaca.config.selftest import SelftestConfig
from lora_alpaca.config.training import FinetuneConfig
from lora_alpaca.config.verification import VerifyConfig
from lora_alpaca.config.visualization import ShowConfig

__all__ = [
    "CompareConfig",
    "ConvertBaseConfig",
    "ConvertConfig",
    "EstimateConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FindConfig",
    "FinetuneConfig",
    "GenerateConfig",
    "ImportMetaConfig",
    "ReportConfig",
    "ReproduceConfig",
    "SelftestConfig",
    "ShowConfig",
    "VerifyConfig",
    "WeightDiffConfig",
]
