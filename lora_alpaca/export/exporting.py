"""The export: adapters merged into their base, one tensor after another, written in every format that is asked for.

Cheap failures come first, and nothing stands at the target before all of it is written, proven and flushed.
"""

from pathlib import Path
from typing import Any

from lora_alpaca.artifacts import adapter_folder, companions, privacy, prompt_contract, run_record
from lora_alpaca.artifacts.source import FINETUNED
from lora_alpaca.config import ExportConfig
from lora_alpaca.errors import AdapterError
from lora_alpaca.export import hub
from lora_alpaca.export.disk import require_space
from lora_alpaca.export.job import Job, open_job
from lora_alpaca.export.merge.merged_model import MergedModel, open_model
from lora_alpaca.export.progress import counting_bytes, log
from lora_alpaca.export.proof import merge_receipt
from lora_alpaca.export.proof.proof import Proof
from lora_alpaca.export.tensors import ModelFacts, Writer
from lora_alpaca.export.verify import served_receipt
from lora_alpaca.export.writers import model_card
from lora_alpaca.export.writers.formats import OF_ADAPTERS, WRITERS
from lora_alpaca.models.memory import gigabytes
from lora_alpaca.models.shards import as_bytes
from lora_alpaca.storage import atomic, output_folder
from lora_alpaca.storage.hashing import Hashing
from lora_alpaca.storage.output_folder import RECORD, OutputFolder
from lora_alpaca.storage.paths import files_below


def export_hf(config: ExportConfig) -> Path:
    """Merge adapters into their base and return the folder of what was written.

    Raises AdapterError for an adapter that does not fit or changes nothing, and ExportError if what was written does
    not answer as base + adapter does; in both cases nothing stands at the target.
    """
    # 1. What is merged into what: adapters, base, tokenizer, prompt
    job = open_job(config)
    log(job.notes)
    if config.push_to_hub:
        hub.require_login(config.push_to_hub, config.private)
    folder = OutputFolder(job.output_dir)
    with folder.staging() as stage:
        formats = {name: stage / name if len(config.format) > 1 else stage for name in config.format}
        for path in formats.values():
            path.mkdir(exist_ok=True)
        # 2. The adapters alone, which is soon done
        for name in (name for name in formats if name in OF_ADAPTERS):
            log(OF_ADAPTERS[name](formats[name], job))
        # 3. The merged model, written in one pass and proven
        receipt, weights = _merge(job, formats, stage) if formats.keys() & WRITERS.keys() else ({}, {})
        # 4. The records, and the rename
        for name, path in formats.items():
            _record(job, receipt, name, path, weights, whole=path == stage)
        if len(formats) > 1:
            _record(job, receipt, "export", stage, weights, whole=True)
        atomic.fsync_tree(stage)
        notes = folder.publish(stage, config.overwrite)
    log(
        [
            *notes,
            *(merge_receipt.summary(receipt) if receipt else []),
            f"{', '.join(formats)} saved in {job.output_dir}",
        ]
    )
    if config.push_to_hub:
        files = [RECORD, *folder.record["files"]]
        log([hub.push(job.output_dir, config.push_to_hub, config.private, files)])
    return job.output_dir


def _merge(job: Job, formats: dict[str, Path], stage: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Write the merged model in its formats, with its receipts, and return the receipt, and file -> sha256 of `hf`.

    Raises AdapterError for a merge that changes nothing, ExportError for one that is not base + adapter.
    """
    model = open_model(job)
    log(model.notes)
    facts = _facts(job, model, formats, scratch=stage.parent / "companions")
    writers = {name: WRITERS[name](path, facts, job.config) for name, path in formats.items() if name in WRITERS}
    needed = sum(writer.bytes_needed() for writer in writers.values())
    what = f"the merged model, as {', '.join(writers)},"
    require_space(f"--output_dir {job.output_dir}", job.output_dir, what, needed)
    merged = " + ".join(str(path) for path, _ in job.adapters)
    what = f"merging {merged} into" if job.adapters else "writing"
    log([f"{what} {job.source.base.name}: {gigabytes(needed)} are written, {model.memory}"])
    hashes = _write(model, writers)
    if not job.adapters:  # nothing is merged, so there is nothing to prove
        return {}, getattr(writers.get("hf"), "file_hashes", {})
    if not model.tensors.changed:
        raise AdapterError(f"{job.adapters[0][0]}: merging it changes no tensor; it is empty")
    receipt = merge_receipt.begin(job, model, hashes)
    if job.config.receipt:
        proof = Proof(job, model, facts)
        receipt |= proof.receipt(writers)
        if proof.served:
            atomic.write(stage / served_receipt.FILE, atomic.as_json(proof.served))
    merge_receipt.write(stage, receipt)
    if "hf" in formats and len(job.adapters) == 1:
        atomic.write(formats["hf"] / model_card.FILE, _card(job, receipt).encode())
    return receipt, getattr(writers.get("hf"), "file_hashes", {})


def _card(job: Job, receipt: dict[str, Any]) -> str:
    """Return the card of a merged model."""
    adapter = job.adapters[0][0]
    settings = adapter_folder.read_config(adapter, any_kind=True)
    record = privacy.published(output_folder.read_record(adapter))
    figures = merge_receipt.in_words(receipt, "hf")
    return model_card.card("merged", job.name, job.source.base, record, settings, job.template, figures=figures)


def _facts(job: Job, model: MergedModel, formats: dict[str, Path], scratch: Path) -> ModelFacts:
    """Write the small files, into the folder of `hf` or else beside what is written, and return what writers know."""
    folder = formats.get("hf", scratch)
    folder.mkdir(exist_ok=True)
    written = (job.source, job.tokenizer, job.template, job.stop_ids, job.dtype, model.tied, model.vocabulary)
    log(companions.write(folder, *written))
    return ModelFacts(
        job.source.base, job.tokenizer, job.template, job.stop_ids, folder, model.tensors.infos, model.tied
    )


def _write(model: MergedModel, writers: dict[str, Writer]) -> dict[str, str]:
    """Write every tensor in every format, and return name -> sha256 of its bytes."""
    hashing = Hashing()
    infos = model.tensors.infos
    with counting_bytes(sum(info.nbytes for info in infos.values()), "merging") as advance:
        for name in infos:
            tensor = model.tensors.read(name)
            hashing.add(name, as_bytes(tensor))
            for writer in writers.values():
                writer.write(name, tensor)
            advance(tensor.nbytes)
    for writer in writers.values():
        writer.finish()
        log(writer.notes)
    return hashing.finish()


def _record(job: Job, receipt: dict[str, Any], name: str, folder: Path, weights: dict[str, str], whole: bool) -> None:
    """Write the prompt contract and the record of a format; that of the `whole` lists all files there are.

    `weights` are file -> sha256 of the format `hf`.
    """
    base = job.source.base
    if name != "adapter" and (whole or name == "hf"):
        record: dict[str, Any] = {
            "kind": name if name != "hf" else "merged model" if job.adapters else FINETUNED,
            "status": "finished",
            "base_model": base.name,
            "base_revision": base.revision,
            "adapter": str(job.adapters[0][0].resolve()) if job.adapters else None,
            "stop_ids": job.stop_ids,
            "receipt": merge_receipt.figures(receipt) if receipt else None,
            "versions": run_record.versions(),
        }
        if name == "hf":
            atomic.write(folder / prompt_contract.FILE, atomic.as_json(job.contract))
            record["weights"] = weights
        record["files"] = files_below(folder)
        atomic.write(folder / RECORD, atomic.as_json(privacy.published(record)))
