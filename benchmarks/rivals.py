"""One optimizer step of what else there is, on the same model and rows: each as its own users run it."""

import tempfile
import time
from typing import Any

import torch
import torch.nn.functional as F
from peft import prepare_model_for_kbit_training
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from lora_alpaca.data.examples import IGNORED, Example


def clock() -> float:
    """Return the processor's seconds on one thread, which other work does not change; on more, those on the wall.

    Those on the wall, too, of a card, when it has computed all that it was given.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def prepared(model: Any, name: str) -> Any:
    """Return a base model as a rival's users prepare it before PEFT."""
    if name == "alpaca-lora":  # gradient checkpointing, norms and head in fp32
        return prepare_model_for_kbit_training(model)
    return model


def step(
    name: str,
    model: Any,
    examples: list[Example],
    dtype: torch.dtype,
    by_length: bool = False,
    as_shipped: bool = False,
) -> tuple[float, float | None]:
    """Return seconds and loss of one step over all examples, the adapter as it was before."""
    before = {key: value.clone() for key, value in model.state_dict().items() if "lora_" in key}
    watch = Clock()
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder, "max_steps": 1, "learning_rate": 3e-4, "bf16": dtype == torch.bfloat16,
            "fp16": dtype == torch.float16, "use_cpu": model.device.type == "cpu", "optim": "adamw_torch",
            "save_strategy": "no", "logging_steps": 1, "report_to": "none", "disable_tqdm": True,
            "dataloader_pin_memory": False,
        }  # fmt: skip
        if name == "TRL":
            options |= {} if as_shipped else {"gradient_checkpointing": False}
            trainer = _trl(model, examples, watch, options)
        else:
            size = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": len(examples) // 4}
            if by_length:
                examples = sorted(examples, key=lambda example: len(example.ids))
            arguments = TrainingArguments(**options, **size, remove_unused_columns=False)
            data = [vars_of(example) for example in examples]
            trainer = _InOrder(model, arguments, padded, data, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.load_state_dict(before, strict=False)
    return watch.seconds, next((entry["loss"] for entry in trainer.state.log_history if "loss" in entry), None)


def vars_of(example: Example) -> dict[str, list[int]]:
    """Return an example as trainers take it."""
    return {"input_ids": example.ids.tolist(), "labels": example.labels}


class _InOrder(Trainer):
    """A Trainer that takes the rows in their order: at random, and sorted for like lengths."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Clock(TrainerCallback):
    """Measures training alone, without the making of a trainer."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.begun = clock()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = clock() - self.begun


def padded(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Return rows padded on the left to a multiple of 8, as alpaca-lora's collator does."""
    longest = -(-max(len(row["input_ids"]) for row in rows) // 8) * 8

    def filled(key: str, value: int) -> torch.Tensor:
        return torch.stack([F.pad(torch.tensor(row[key]), (longest - len(row[key]), 0), value=value) for row in rows])

    ids = filled("input_ids", 0)
    mask = torch.stack([(torch.arange(longest) >= longest - len(row["input_ids"])).long() for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": filled("labels", IGNORED)}


def _trl(model: Any, examples: list[Example], watch: TrainerCallback, options: dict[str, Any]) -> Any:
    """Return TRL's SFTTrainer: best-fit packing into rows of 2048 tokens, all in one step."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list([vars_of(example) for example in examples])
    rows = max(1, -(-sum(len(example.ids) for example in examples) // 2048))
    arguments = SFTConfig(
        **options, packing=True, packing_strategy="bfd", padding_free=True, max_length=2048,
        per_device_train_batch_size=1, gradient_accumulation_steps=rows,
    )  # fmt: skip
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))  # asked for, and not used
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    return SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[watch])
