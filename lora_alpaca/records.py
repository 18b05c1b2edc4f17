"""What an adapter folder remembers, so that nothing has to be said twice: base, template, options, versions.

`lora_alpaca.json` holds it all. Generation and export read it; resuming compares it.
"""

import hashlib
import importlib.metadata
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lora_alpaca import __version__, adapters, checkpoints, contracts
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.contracts import Contract
from lora_alpaca.data.statistics import Statistics
from lora_alpaca.errors import AdapterError, TemplateError
from lora_alpaca.models import lora
from lora_alpaca.models.base import Base
from lora_alpaca.models.device import DeviceSpec
from lora_alpaca.models.fingerprint import hash_base
from lora_alpaca.models.lora import State
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.weights import as_safetensors
from lora_alpaca.prompts import AnyTemplate, load_template
from lora_alpaca.storage import atomic, output_folder
from lora_alpaca.storage.paths import files_below, read_json, sha256

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers")
NOT_THE_RUN = {  # options that change what is shown or where, but no weight
    "output_dir", "resume", "resume_from_checkpoint", "overwrite", "logging_steps", "save_steps", "save_total_limit",
    "cache_dir", "max_truncated", "max_dropped", "max_duplicates", "report_to", "wandb_project", "wandb_run_name",
    "wandb_watch", "wandb_log_model",
    "allow_change", "on_nonfinite", "on_oom", "rank_timeout",
}  # fmt: skip

PLACES = {  # where files are, which does not matter as long as they are the same files
    "base_sha256": ("base_model", "base_revision", "revision"),
    "data_sha256": ("data_path",),
}
THE_RUN = ("base_model", "base_revision", "base_sha256", "tokenizer_sha256", "precision", "ranks", "data_sha256")


@dataclass
class Run:
    """What a finished training run gives back.

    `validation_loss` (of the adapter that was kept) and `first_validation_loss` (before the first step) are means per
    learned token, None without a validation split. `history` has a dict per logging interval and per validation.
    """

    output_dir: Path
    steps: int
    validation_loss: float | None
    first_validation_loss: float | None
    best_step: int | None
    seconds: float
    history: list[dict[str, float]]


def describe(
    config: FinetuneConfig,
    base: Base,
    base_sha256: str,
    template: AnyTemplate,
    tokenizer_sha256: str,
    spec: DeviceSpec,
    world_size: int,
    data_sha256: str,
    ledger: Statistics,
) -> dict[str, Any]:
    """Return the record of a run that begins: everything that decides its result."""
    return {
        "kind": "adapter",
        "status": "running",
        "run": secrets.token_hex(8),
        "base_model": base.name,
        "base_revision": base.revision,
        "base_sha256": base_sha256,
        "template": template.to_json(),
        "tokenizer_sha256": tokenizer_sha256,
        "precision": str(spec),
        "ranks": world_size,
        "data_sha256": data_sha256,
        "ledger": ledger.to_json(),
        "options": config.model_dump(),
        "said": sorted(config.model_fields_set),
        "versions": versions(),
    }


def differences(stored: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return name -> (before, now) of everything that makes a resumed run another run."""

    def decisive(record: dict[str, Any]) -> dict[str, Any]:
        facts = {key: record.get(key) for key in THE_RUN}
        template = {key: value for key, value in record["template"].items() if key not in ("name", "description")}
        options = {key: value for key, value in record["options"].items() if key not in NOT_THE_RUN}
        return options | facts | {"prompt_template": template}

    before, after = decisive(stored), decisive(now)
    moved = {place for contents, places in PLACES.items() if before[contents] == after[contents] for place in places}
    changed = {key: (value, after.get(key)) for key, value in before.items() if value != after.get(key)}
    return {key: values for key, values in changed.items() if key not in moved}


@dataclass(frozen=True)
class Adapter:
    """A trained adapter with all that belongs to it: what its folder holds."""

    state: State
    settings: dict[str, Any]
    tokenizer: Any
    contract: dict[str, Any]
    record: dict[str, Any]

    def save(self, output_dir: Path, run: Run) -> None:
        """Write PEFT's two files, tokenizer, prompt contract, and the record last, now finished. Raises OSError.

        All is written and flushed elsewhere first: files appear one by one, each whole, and count with the record.
        """
        with atomic.rust_errors_as_oserror(), atomic.staging_folder(output_dir / "final") as stage:
            self.tokenizer.save_pretrained(stage)
            atomic.write(stage / lora.CONFIG, atomic.as_json(self.settings))
            atomic.write(stage / contracts.FILE, atomic.as_json(self.contract))
            weights = as_safetensors(self.state)
            atomic.write(stage / lora.WEIGHTS, weights)
            atomic.fsync_tree(stage)
            files = files_below(stage)
            for name in files:
                (output_dir / name).parent.mkdir(exist_ok=True)
                atomic.rename(stage / name, output_dir / name)
        result = {key: value for key, value in asdict(run).items() if key != "output_dir"}
        finished = {"status": "finished", "adapter_sha256": hashlib.sha256(weights).hexdigest(), "files": files}
        atomic.replace(output_dir / output_folder.RECORD, atomic.as_json(self.record | finished | {"result": result}))


def finished_run(output_dir: Path) -> Run:
    """Return the result that a finished folder remembers."""
    return Run(output_dir, **output_folder.read_record(output_dir)["result"])


@dataclass(frozen=True)
class Origin:
    """What an adapter, or a merged model, says about itself. `contract` is None where nothing was recorded.

    So are the hashes: of the base's files (see `fingerprints.py`), and of the adapter's own file.
    """

    base_model: str
    base_revision: str | None
    contract: Contract | None
    base_sha256: str | None = None
    adapter_sha256: str | None = None
    checkpoint: bool = False  # of a run of ours, every file of it as it was written


def read_origin(folder: Path) -> Origin:
    """Return what a folder of ours records, or what PEFT's own file says of a foreign adapter.

    Raises AdapterError for an adapter that was never finished, and for one that is damaged.
    """
    if checkpoint := (folder / output_folder.MANIFEST).is_file() and (folder / checkpoints.STATE).is_file():
        if reason := checkpoints.damage(folder):
            raise AdapterError(f"{folder}: {reason}; take another checkpoint")
        record = read_json(folder / checkpoints.STATE)["record"]
    elif (folder / output_folder.RECORD).is_file():
        record = output_folder.read_record(folder)
        if not record:
            raise AdapterError(f"{folder / output_folder.RECORD}: damaged; copy the folder again")
    else:
        settings = adapters.read_settings(folder)
        return Origin(settings.get("base_model_name_or_path") or "", settings.get("revision"), contracts.read(folder))
    if record["status"] != "finished" and not checkpoint:
        raise AdapterError(
            f"{folder}: this run was never finished; go on with it: python finetune.py --resume --output_dir {folder}"
        )
    hashes = (record.get("base_sha256"), record.get("adapter_sha256"))
    return Origin(record["base_model"], record["base_revision"], contracts.read(folder), *hashes, checkpoint)


UNKNOWN_BASE = "warning: nothing records which base this adapter was trained on; only names and shapes are checked"


def check_adapter(folder: Path, origin: Origin, base: Base) -> list[str]:
    """Return what could not be checked, in sentences. Raises AdapterError unless an adapter can be put on a base.

    It is whole, finite, as it was saved and not a no-op, which only a checkpoint may be; and made for these weights.
    """
    tensors = adapters.read(folder, may_do_nothing=origin.checkpoint)
    if origin.adapter_sha256 not in (None, sha256(folder / lora.WEIGHTS)):
        raise AdapterError(f"{folder / lora.WEIGHTS}: not as it was saved (its sha256 is another); copy it again")
    if (bare := meta_model(base)) is not None:
        adapters.check_fit(bare, folder, tensors, f"{folder}, made for {origin.base_model}, on {base.name}")
    if origin.base_sha256 is None:
        return [UNKNOWN_BASE]
    if origin.base_sha256 != hash_base(base):
        raise AdapterError(
            f"{folder} was trained on {origin.base_model}, and the weights of {base.name} are others; name that base"
        )
    return []


UNCHECKED = "warning: nothing records which prompt template this model was trained with; it cannot be checked"


def agreed_template(asked: str, contract: Contract | None, where: str) -> AnyTemplate:
    """Return the template to use with a model: that of its contract, or the one asked for by --prompt_template.

    Raises TemplateError if they differ, or if there is neither.
    """
    if contract is not None:
        return contract.template_asked(asked)
    if not asked:
        raise TemplateError(
            f"{where} records no prompt template; name the one it was trained with: --prompt_template alpaca"
        )
    return load_template(asked)


def versions() -> dict[str, str]:
    """Return the versions of this library and of those that decide its results."""
    return {"lora_alpaca": __version__} | {name: _version(name) for name in LIBRARIES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
