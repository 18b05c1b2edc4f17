"""Flags of other trainers are answered by ours, all at once; the answers are a command that we take."""

import json
import re

import pytest
from command import refused
from conftest import ROOT
from tutorials import STANFORD_ALPACA, ours_of

from lora_alpaca.cli.flags import parse
from lora_alpaca.cli.help import type_name
from lora_alpaca.cli.verbs import VERBS
from lora_alpaca.config import FinetuneConfig
from lora_alpaca.config.other_trainers import ACCUMULATION, PER_DEVICE, translate
from lora_alpaca.config.trainer_flags import ANY, TABLE, Missing, Omit
from lora_alpaca.errors import ConfigError

OURS = FinetuneConfig.model_fields

COLOSSALAI = """
    --pretrain /path/to/7b --model llama --strategy colossalai_zero2 --save_path out --dataset rows.json
    --batch_size 4 --accimulation_steps 8 --lr 2e-5 --max_datasets_size 512 --max_epochs 1 --lora_rank 8
"""
TRL = """
    --model_name_or_path org/7b --dataset_name org/rows --learning_rate 2.0e-4 --num_train_epochs 1 --packing
    --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --gradient_checkpointing --eval_strategy steps
    --max_seq_length 1024 --logging_steps 25 --eval_steps 100 --use_peft --lora_r 32 --lora_alpha 16
    --lora_target_modules all-linear --torch_dtype bfloat16 --load_in_4bit --push_to_hub
"""
LLAMA_FACTORY = """
    --stage sft --do_train --model_name_or_path org/7b --dataset rows.json --dataset_dir data --template alpaca
    --finetuning_type lora --lora_target q_proj,v_proj --output_dir out --overwrite_cache --overwrite_output_dir
    --cutoff_len 1024 --preprocessing_num_workers 16 --per_device_train_batch_size 2 --gradient_accumulation_steps 8
    --lr_scheduler_type cosine --logging_steps 50 --warmup_steps 20 --save_steps 100 --eval_steps 50 --val_size 0.1
    --evaluation_strategy steps --load_best_model_at_end --learning_rate 5e-5 --num_train_epochs 5.0 --plot_loss
    --fp16 --quantization_bit 8 --flash_attn auto --lora_dropout 0.1 --deepspeed ds.json
"""
AXOLOTL = """
    --base_model org/7b --adapter qlora --sequence_len 2048 --sample_packing True --lora_r 16 --lora_target_linear true
    --gradient_accumulation_steps 4 --micro_batch_size 2 --num_epochs 3 --optimizer adamw_torch --lr_scheduler cosine
    --bf16 auto --flash_attention true
"""


@pytest.mark.parametrize("command", [STANFORD_ALPACA, COLOSSALAI, TRL, LLAMA_FACTORY])
def test_a_tutorial_is_answered_in_one_line_by_a_command_that_we_take(command):
    line = refused("finetune", *command.split())
    found, words = ours_of(command)
    assert not found.unknown
    assert line == f"error: flags of other trainers: {'; '.join(found.sentences)}"
    config = parse(FinetuneConfig, words)
    assert config.base_model
    assert config.num_epochs == 3 or command != STANFORD_ALPACA


def test_what_a_tutorial_means_is_what_we_are_told():
    config = parse(FinetuneConfig, ours_of(STANFORD_ALPACA)[1])
    assert (config.batch_size, config.micro_batch_size, config.learning_rate) == (32, 4, 2e-5)
    assert (config.dtype, config.val_set_size, config.lr_scheduler) == ("bf16", 0, "cosine")
    config = parse(FinetuneConfig, ours_of(COLOSSALAI)[1])
    assert (config.base_model, config.data_path, config.num_epochs) == ("/path/to/7b", "rows.json", 1)
    assert (config.batch_size, config.micro_batch_size, config.lora_r, config.output_dir) == (32, 4, 8, "out")
    config = parse(FinetuneConfig, ours_of(LLAMA_FACTORY)[1])
    assert (config.load_8bit, config.overwrite, config.dtype, config.val_set_size) == (True, True, "fp16", 0.1)


def test_what_there_is_none_of_is_said():
    assert "--tf32 True: none yet (" in refused("finetune", "--tf32", "True")


def test_sharding_by_other_names_is_ours():
    line = refused("finetune", "--fsdp", "full_shard auto_wrap offload", "--fsdp_transformer_layer_cls_to_wrap", "X")
    assert "--fsdp full_shard auto_wrap offload is --shard full --offload cpu; " in line
    assert "cls_to_wrap X: leave it out (the layers are found in the model; no name is needed); " in line
    assert line.endswith("where all weights are to be trained and no adapter, add --tune full")
    assert "--fsdp full_shard nonsense" not in refused("finetune", "--fsdp", "full_shard nonsense")


def test_no_class_name_can_be_given():
    """`LLaMADecoderLayer` was an error, or a run that was many times slower; no flag of ours takes such a name."""
    assert not [name for name in OURS if "wrap" in name or "cls" in name or "class" in name]


STANFORD_ZERO = {
    "fp16": {"initial_scale_power": 32, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1},
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {
        "stage": 3, "contiguous_gradients": True, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0, "stage3_param_persistence_threshold": 100, "reduce_bucket_size": 100,
        "sub_group_size": 100000000, "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True}, "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (STANFORD_ZERO, "ds.json is --shard full --offload cpu"),
        ({"zero_optimization": {"stage": 2}}, "ds.json is --shard grads"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "none"}}}, "ds.json is --shard full"),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "ds.json is --shard none"),
        ({"zero_optimization": {"stage": 7}}, "ds.json: none yet (0, 1, 2 or 3)"),
        ({"fp16": {}}, "ds.json: leave it out (ZeRO stage 3 is --shard full, stage 2 --shard grads, offload to cpu "),
        (None, "ds.json: leave it out (ZeRO stage 3 is --shard full, stage 2 --shard grads, offload to cpu --offload "),
    ],
)
def test_a_file_of_deepspeed_is_read(settings, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if settings is not None:
        (tmp_path / "ds.json").write_text(json.dumps(settings))
    assert f"--deepspeed {said}" in refused("finetune", "--deepspeed", "ds.json", "--use_peft", "True")


def test_every_key_of_stanford_alpaca_has_its_line_in_the_documents():
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    keys = [*STANFORD_ZERO, *STANFORD_ZERO["zero_optimization"], *STANFORD_ZERO["fp16"]]
    assert not [key for key in (*keys, "pin_memory", "--fsdp_transformer_layer_cls_to_wrap") if key not in text]


def test_the_documents_name_flags_that_are_there():
    """Of the commands that are ours; those of torchrun stand before the script."""
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8").replace("\\\n", " ")
    named = [words for words in re.findall(r"finetune\.py (.*)", text) if "--" in words]
    assert len(named) >= 6
    assert {flag for words in named for flag in re.findall(r"--(\w+)", words)} <= OURS.keys()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"finetuning_type": "freeze"}, "--tune full --layers top:2"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": "3"}, "--tune full --layers top:3"),
        ({"freeze_trainable_layers": "-2"}, ""),
        ({"freeze_trainable_modules": "mlp"}, "--layer_parts mlp"),
        ({"full_finetune": "True"}, "--tune full"),
        ({"use_peft": "False"}, "--tune full"),
        ({"optim": "adamw_bnb_8bit"}, "--optimizer adamw_8bit"),
        ({"optim": "adafactor"}, "--optimizer adafactor"),
        ({"num_processes": "4"}, "--processes 4"),
        ({"max_time": "00:01:30:30"}, "--max_minutes 90.5"),
        ({"max_time": "soon"}, ""),
        ({"fsdp": "shard_grad_op auto_wrap", "use_peft": "True"}, "--shard grads"),
        ({"strategy": "colossalai_zero2_cpu"}, "--shard grads --offload cpu"),
        ({"dataset": "my rows.json"}, "--data_path|my rows.json"),
    ],
)
def test_what_is_trained_and_how(flags, words):
    assert translate(flags, OURS, 1).words == (words.split("|") if "|" in words else words.split())


@pytest.mark.parametrize("steps", ACCUMULATION)
@pytest.mark.parametrize("rows", PER_DEVICE)
def test_rows_per_device_and_accumulation_are_one_batch(rows, steps, monkeypatch):
    said = "is --micro_batch_size 4 --batch_size 32 (4 x 8 x 1 device: the rows of a step, over all devices)"
    assert f"--{rows} 4 --{steps} 8 {said}" in refused("finetune", f"--{rows}", 4, f"--{steps}", 8)
    found = translate({rows: "4", steps: "8"}, OURS, 3)
    assert found.words == ["--micro_batch_size", "4", "--batch_size", "96"]
    assert found.sentences == [found.sentences[0]] and "(4 x 8 x 3 devices: " in found.sentences[0]
    assert "--micro_batch_size 4 --batch_size 4 (4 x 1 device: " in refused("finetune", f"--{rows}", 4)
    assert f"--{steps} 8: leave it out (it is --batch_size by " in refused("finetune", f"--{steps}", 8)
    assert "--micro_batch_size is the rows of a forward pass" in refused("finetune", f"--{rows}", "auto")


def test_our_own_rows_of_a_pass_count_too():
    found = translate({"micro_batch_size": "2", "gradient_accumulation_steps": "4"}, OURS, 1)
    assert found.words == ["--micro_batch_size", "2", "--batch_size", "8"]


EXAMPLES = {"--learning_rate": "1e-4", "--max_grad_norm": "1.0", "--val_set_size": "0.1", "--data_path": "rows.json",
            "--lora_target_modules": "q_proj", "--columns": "text=body"}  # fmt: skip


NEEDS = {"--layer_parts": ["--tune", "full", "--layers", "top:2"], "--offload": ["--shard", "full"]}


def answers():
    for name, answer in TABLE.items():
        for value, one in answer.items() if isinstance(answer, dict) else [(ANY, answer)]:
            one = one("4") if callable(one) else one
            yield pytest.param(name, "4" if value == ANY else value, one, id=f"{name}={value}")


@pytest.mark.parametrize(("name", "value", "answer"), list(answers()))
def test_every_answer_of_the_table_is_true_of_our_flags(name, value, answer):
    """A flag that it names is one of a command's, and a value that it names is taken."""
    assert isinstance(answer, (str, Omit, Missing))
    text = answer if isinstance(answer, str) else answer[0]
    known = set().union(*(verb.config.model_fields for verb in VERBS.values()))
    assert {word.strip(",:;.").removeprefix("--") for word in text.split() if word.startswith("--")} <= known
    if not isinstance(answer, str):
        return
    flag, _, rest = answer.partition(" ")
    config_class = next(verb.config for verb in VERBS.values() if flag.removeprefix("--") in verb.config.model_fields)
    if name in config_class.model_fields:
        return  # answered where another command has it
    if rest == "{}" or "={}" in rest:
        is_switch = type_name(config_class, flag[2:]).startswith(("true", "auto"))
        value = EXAMPLES.get(flag) or ("True" if is_switch else "64")
    found, named = (
        translate({name: value}, config_class.model_fields, 1),
        [part.format(value) for part in answer.split()],
    )
    assert found.words[: len(named)] == named and not found.unknown
    missing = [word for word in NEEDS.get(flag, []) if flag not in found.words[2:]]
    assert parse(config_class, found.words + missing).is_set(flag.removeprefix("--"))


def test_no_flag_of_ours_is_in_the_table():
    assert set(TABLE) & set(OURS) == {"prompt_template_name"}  # which generate calls otherwise


def test_what_nobody_knows_is_said_beside_what_is_known():
    line = refused("finetune", "--num_train_epochs", "3", "--learnig_rate", "1", "--seed", "1")
    assert line == (
        "error: flags of other trainers: --num_train_epochs 3 is --num_epochs 3; "
        "unknown flag --learnig_rate; did you mean --learning_rate?"
    )
    assert "unknown flag --flash_attention" in refused("finetune", *AXOLOTL.split())


def test_a_program_gets_the_same_answer():
    with pytest.raises(ConfigError) as error:
        FinetuneConfig(num_train_epochs=3, learning_rate=7, gradient_accumulation_steps=2, micro_batch_size=4)
    assert str(error.value) == (
        "flags of other trainers: --micro_batch_size 4 --gradient_accumulation_steps 2 is --micro_batch_size 4 "
        "--batch_size 8 (4 x 2 x 1 device: the rows of a step, over all devices); --num_train_epochs 3 is "
        "--num_epochs 3; --learning_rate 7: input should be less than or equal to 1"
    )


@pytest.mark.parametrize(
    ("verb", "words", "said"),
    [
        ("export", ["--resume"], "--resume is a flag of finetune only"),
        ("generate", ["--resume"], "--resume is a flag of finetune only"),
        ("generate", ["--lora_r", "3"], "--lora_r is a flag of finetune only"),
        ("show", ["--temperature", "1"], "--temperature is a flag of generate and evaluate only"),
        ("finetune", ["--prompt_template", "alpaca"], "--prompt_template alpaca is --prompt_template_name alpaca"),
        ("generate", ["--prompt_template_name", "alpaca"], "--prompt_template_name alpaca is --prompt_template alpaca"),
        ("generate", ["--model_name_or_path", "x"], "--model_name_or_path x is --base_model x"),
        ("generate", ["--peft_model", "x"], "--peft_model x is --lora_weights x"),
        ("export", ["--save_path", "x"], "--save_path x is --output_dir x"),
        ("generate", ["--do_train"], "unknown flag --do_train"),
        ("finetune", ["--lora_target_modules", "q_proj", "v_proj"], "a list has commas: --lora_target_modules NAME"),
        ("finetune", ["--resume", "--resume"], "--resume is given twice"),
        ("finetune", ["--num-train-epochs", "1"], "--num_train_epochs 1 is --num_epochs 1"),
    ],
)  # fmt: skip
def test_flags_of_other_commands(verb, words, said):
    assert said in refused(verb, *words)
