"""What checks share, each made once, when it is first needed: rows, short runs, their gradients, an export."""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.artifacts import checkpoint as checkpoints
from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.config import ExportConfig, FinetuneConfig
from lora_alpaca.data import Rows, demo_file
from lora_alpaca.data.encoding import Encoder
from lora_alpaca.data.examples import Example
from lora_alpaca.export.exporting import export_hf
from lora_alpaca.inference.codec import Codec
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import DTYPES, DeviceSpec
from lora_alpaca.models.tokenizer import load_tokenizer
from lora_alpaca.prompts import AnyTemplate, Conversation, load_template
from lora_alpaca.selftest import judge
from lora_alpaca.selftest.surroundings import quiet
from lora_alpaca.selftest.two_ranks import TwoRanks
from lora_alpaca.training import finetune

ROWS, HELD_OUT = 12, 6  # of the demo data
TEMPLATE = "alpaca"
SEVERAL_PACKS = 160  # tokens; all rows together have about 500
MOMENT = 0.1  # of the gradient: what AdamW's first moment is after one step


class Bench:
    """Rows of the demo data, and runs on them on a base, in a folder.

    The runs of one step begin with an adapter that has learned for some steps, since the gradient of a fresh one is
    zero by half; and they have no dropout.
    """

    def __init__(self, base: Base, spec: DeviceSpec, folder: Path):
        self.base, self.spec, self.folder = base, spec, folder
        rows = json.loads(demo_file("train").read_text(encoding="utf-8"))
        self.data_path = self._write("rows.json", rows[:ROWS])
        self.val_data_path = self._write("held_out.json", rows[ROWS : ROWS + HELD_OUT])
        self._options: dict[str, Any] = {
            "base_model": base.name, "revision": base.revision, "trust_remote_code": base.trust_remote_code,
            "device": spec.device.type, "dtype": next(name for name, dtype in DTYPES.items() if dtype == spec.dtype),
            "load_8bit": False, "data_path": self.data_path, "prompt_template_name": TEMPLATE, "cache_dir": "none",
            "compile": "false", "gradient_checkpointing": "false", "warmup_steps": 0, "lr_scheduler": "constant",
            "learning_rate": 2e-3,
        }  # fmt: skip
        self._ranks: TwoRanks | None = None

    def _write(self, name: str, rows: list[Any]) -> str:
        (self.folder / name).write_text(json.dumps(rows), encoding="utf-8")
        return str(self.folder / name)

    def close(self) -> None:
        """End the processes that are still at work."""
        if self._ranks is not None:
            self._ranks.close()

    @property
    def is_exact(self) -> bool:
        """Return whether runs compute in fp32."""
        return self.spec.dtype == torch.float32

    # ------------------------------------------------------------------------------------------------------- rows

    @cached_property
    def tokenizer(self) -> Any:
        """Return the tokenizer of the base."""
        return load_tokenizer(self.base)[0]

    @cached_property
    def conversations(self) -> list[Conversation]:
        """Return the rows that are trained on."""
        return list(Rows(self.data_path))

    @cached_property
    def examples(self) -> list[Example]:
        """Return the rows that are trained on, as training encodes them."""
        return self.encoder.encode(self.conversations)

    @cached_property
    def held_out(self) -> list[Example]:
        """Return the rows that are validated on, as training encodes them."""
        return self.encoder.encode(list(Rows(self.val_data_path)))

    @cached_property
    def encoder(self) -> Encoder:
        """Return what makes the examples of training."""
        config = FinetuneConfig(**self._options)
        return Encoder.from_options(self.tokenizer, self._template, config, self.base.vocabulary)

    @cached_property
    def codec(self) -> Codec:
        """Return what makes the prompts of generation."""
        return Codec(self.tokenizer, self._template, None, self.base.vocabulary)

    @cached_property
    def _template(self) -> AnyTemplate:
        return load_template(TEMPLATE).bound(self.tokenizer)

    # ------------------------------------------------------------------------------------------------------- runs

    @cached_property
    def trained(self) -> RunResult:
        """Return the result of a run of four steps, with dropout, a checkpoint in its middle, and a validation."""
        return self.run("trained")

    def run(self, name: str, **changes: Any) -> RunResult:
        """Return the result of that run; `changes` are options of training."""
        options = self._options | {
            "output_dir": str(self.folder / name), "val_data_path": self.val_data_path, "batch_size": 4,
            "max_steps": 4, "save_steps": 2, "eval_steps": 4, "lora_dropout": 0.1,
        }  # fmt: skip
        with quiet():
            return finetune(FinetuneConfig(**options | changes))

    def gradient(self, name: str, **changes: Any) -> torch.Tensor:
        """Return the gradient that the optimizer gets of one step over all rows, as one vector, fp64."""
        options = self._one_step(name) | changes
        with quiet():
            finetune(FinetuneConfig(**options))
        return self._received(Path(options["output_dir"]))

    def _one_step(self, name: str) -> dict[str, Any]:
        return self._options | {
            "output_dir": str(self.folder / name), "init_adapter": str(self.trained.output_dir), "batch_size": ROWS,
            "max_steps": 2, "save_steps": 1, "val_set_size": 0, "lora_dropout": 0.0, "max_grad_norm": 0.0,
        }  # fmt: skip

    def _received(self, output_dir: Path) -> torch.Tensor:
        """Return the gradient of a run's first step: AdamW's first moment is a tenth of it then."""
        state = checkpoints.load(output_dir / "checkpoint-1").optimizer
        moments = {int(name.partition(".")[0]): part for name, part in state.items() if name.endswith(".exp_avg")}
        return torch.cat([moments[number].flatten().double() for number in sorted(moments)]) / MOMENT

    # -------------------------------------------------------------------------------------------------- two ranks

    def start_ranks(self) -> None:
        """Start two processes that compute one step over all rows, with the base whole, and with the base sharded."""
        if self._ranks is None:
            several = {"token_budget": SEVERAL_PACKS}
            on_gpus = self.spec.device.type == "cuda" and torch.cuda.device_count() > 1
            where = {} if on_gpus else {"device": "cpu", "dtype": "fp32"}
            runs = [
                self._one_step(name) | several | where | {"shard": shard}
                for name, shard in (("ranks", "none"), ("sharding", "full"))
            ]
            self._ranks = TwoRanks(self.folder, runs, "two GPUs, over NCCL" if on_gpus else "the CPU, over gloo")

    def gradient_of_ranks(self, name: str) -> tuple[torch.Tensor, str]:
        """Return the gradient that the optimizer gets in two processes, and where they were."""
        self.start_ranks()
        assert self._ranks is not None
        self._ranks.wait(name)
        return self._received(self.folder / name), self._ranks.where

    # -------------------------------------------------------------------------------------------------- the judge

    @cached_property
    def expected(self) -> torch.Tensor:
        """Return the gradient of all rows by the judge, as one vector, fp64."""
        return judge.loss_and_gradient(judge.load(self.base, self.trained.output_dir), self.examples)[1]

    @cached_property
    def merged(self) -> Path:
        """Return the folder of the merged model, in fp32; the proof of the export is left to the checks."""
        config = ExportConfig(
            lora_weights=str(self.trained.output_dir),
            output_dir=str(self.folder / "merged"),
            base_model=self.base.name,
            revision=self.base.revision,
            trust_remote_code=self.base.trust_remote_code,
            dtype="fp32",
            receipt=False,
        )
        with quiet():
            return export_hf(config)
