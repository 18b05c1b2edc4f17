"""Command lines of other trainers' tutorials, and what our answers make of one."""

from lora_alpaca.config import FinetuneConfig
from lora_alpaca.config.other_trainers import translate

STANFORD_ALPACA = """
    --model_name_or_path org/7b --data_path rows.json --bf16 True --output_dir out --num_train_epochs 3
    --per_device_train_batch_size 4 --per_device_eval_batch_size 4 --gradient_accumulation_steps 8
    --evaluation_strategy no --save_strategy steps --save_steps 2000 --save_total_limit 1 --learning_rate 2e-5
    --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine --logging_steps 1 --fsdp full_shard auto_wrap
    --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --tf32 True
"""


def ours_of(command):
    """Return the words that the answer to a command line of another trainer proposes, with those it has from us."""
    flags, words = {}, command.split()
    while words:
        name = words.pop(0).removeprefix("--")
        value = []
        while words and not words[0].startswith("--"):
            value.append(words.pop(0))
        flags[name] = " ".join(value) or "True"
    found = translate(flags, FinetuneConfig.model_fields, 1)
    proposed = dict(zip(found.words[::2], found.words[1::2], strict=True))
    kept = {f"--{name}": value for name, value in flags.items() if name in FinetuneConfig.model_fields}
    return found, [word for pair in (kept | proposed).items() for word in pair]
