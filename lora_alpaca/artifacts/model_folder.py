"""The folder of a model that was finetuned whole: an ordinary folder of transformers, with contract and record.

Weights are written as they come, tensor by tensor, under the names and in the dtypes that the base's files have. What
did not learn is copied from there; the small files are the base's, byte for byte wherever nothing is to be changed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lora_alpaca.artifacts import companions, privacy, prompt_contract
from lora_alpaca.artifacts.run_record import RunResult
from lora_alpaca.artifacts.source import FINETUNED, ModelSource
from lora_alpaca.errors import TrainingError
from lora_alpaca.models.base import Base, weight_files
from lora_alpaca.models.meta import meta_model
from lora_alpaca.models.shards import Shards, ShardWriter
from lora_alpaca.models.tensor_names import TensorNames
from lora_alpaca.models.weights import TensorInfo, is_finite
from lora_alpaca.prompts import AnyTemplate
from lora_alpaca.storage import atomic
from lora_alpaca.storage.output_folder import OutputFolder
from lora_alpaca.storage.paths import files_below

MAX_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class TrainedModel:
    """What the folder of a finetuned model holds besides the tensors that learned, whose `names` are the model's own.

    `template` is bound to the tokenizer, `contract` is the prompt contract, `stop_ids` are the ids that end an answer.
    """

    names: Sequence[str]
    base: Base
    tokenizer: Any
    template: AnyTemplate
    stop_ids: list[int]
    contract: dict[str, Any]
    record: dict[str, Any]


def save(output_dir: Path, model: TrainedModel, tensors: Iterable[tuple[str, torch.Tensor]], run: RunResult) -> None:
    """Write a finetuned model into a folder, and the record, now that of a finished run, last.

    `tensors` are the trained ones by name, whole and on the CPU, in the order of `model.names`; each is let go of
    before the next is asked for. All files are written and flushed in a staging folder first, and then appear one by
    one, each whole. Raises OSError, and TrainingError for a tensor that is not finite in the dtype of the base.
    """
    record, base = privacy.published(model.record), model.base
    source = ModelSource(base, None, None, model.template, [])
    dtype = base.config.get_text_config().dtype or torch.float32
    tied = bool(base.config.get_text_config().tie_word_embeddings)
    with atomic.rust_errors_as_oserror(), atomic.staging_folder(output_dir / "final") as stage:
        companions.write(stage, source, model.tokenizer, model.template, model.stop_ids, dtype, tied)
        atomic.write(stage / privacy.FILE, atomic.as_json(privacy.private(model.record)))
        atomic.write(stage / prompt_contract.FILE, atomic.as_json(model.contract))
        weights = _write_weights(stage, base, model.names, tensors)
        atomic.fsync_tree(stage)
        files = files_below(stage)
        atomic.move_into(output_dir, stage, files)
    result = {key: value for key, value in asdict(run).items() if key != "output_dir"}
    finished = {"kind": FINETUNED, "status": "finished", "stop_ids": model.stop_ids, "weights": weights, "files": files}
    OutputFolder(output_dir).write_record(record | finished | {"result": result})


def _write_weights(
    folder: Path, base: Base, names: Sequence[str], tensors: Iterable[tuple[str, torch.Tensor]]
) -> dict[str, str]:
    """Write the trained tensors, then those of the base that did not learn, and return file -> sha256."""
    stored = Shards(weight_files(base))
    layout = _Layout(base, stored, names)
    writer = ShardWriter(folder, {**layout.trained, **layout.copied}, MAX_SHARD_BYTES)
    for name, tensor in tensors:
        for written, part in layout.as_stored(name, tensor).items():
            part = part.to(layout.trained[written].dtype)
            if not is_finite(part):
                raise TrainingError(
                    f"{written} holds NaN or infinity as {part.dtype}, so the model is not saved; --resume goes on "
                    "from the last checkpoint"
                )
            writer.write(written, part)
        del tensor, part
    for written in layout.copied:
        writer.write(written, stored.read(written))
    writer.finish()
    return writer.file_hashes


class _Layout:
    """Which tensors the files have: those that learned, in the order in which they come, and the copied ones."""

    def __init__(self, base: Base, stored: Shards, names: Sequence[str]):
        bare = meta_model(base)
        self._names = TensorNames(bare, {name: info.shape for name, info in stored.infos.items()})
        own = dict(bare.named_parameters(remove_duplicate=False))
        learned = {id(own[name]) for name in names}
        dtype = base.config.get_text_config().dtype or torch.float32
        self.trained: dict[str, TensorInfo] = {}
        for name in names:
            for written, part in self.as_stored(name, own[name].detach()).items():
                known = stored.infos.get(written)
                self.trained[written] = TensorInfo(known.dtype if known else dtype, tuple(part.shape))
        again = {file for name, file in self._names.stored.items() if name in own and id(own[name]) in learned}
        left: Mapping[str, TensorInfo] = stored.infos
        # a head that is the embeddings, and is stored beside them, is left out, as transformers does
        self.copied = {name: info for name, info in left.items() if name not in self.trained and name not in again}

    def as_stored(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what the files have of a tensor of the model, by their names."""
        if name in self._names.stored:
            return {self._names.stored[name]: tensor}
        return self._names.as_stored(name, tensor)
