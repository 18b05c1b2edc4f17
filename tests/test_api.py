"""What people's programs and scripts rely on: a name or a flag is added or removed here, on purpose, or not at all."""

import re

import pytest
from command import run

import lora_alpaca

NAMES = """
    AdapterError CheckpointError ConfigError ContractError DataError ExportConfig ExportError FinetuneConfig FolderError
    GenerateConfig Generator LoraAlpacaError ModelError RankError ReproductionError RunResult SelfTestError
    Template TemplateError TrainingError __version__ export_hf finetune load_template
"""

MODEL = "base_model revision trust_remote_code device dtype config"
FLAGS = {
    "finetune.py": f"""
        {MODEL} load_4bit load_8bit data_path columns skip_bad_rows output_dir prompt_template_name cutoff_len
        overlong val_data_path val_set_size max_truncated max_dropped max_duplicates cache_dir train_on_inputs train_on
        train_on_reasoning ignore_fields add_eos_token recipe batch_size micro_batch_size num_epochs max_steps
        max_minutes max_cost price_per_hour
        learning_rate find_lr_minutes
        lr_scheduler warmup_steps warmup_ratio tune layers layer_parts optimizer shard shard_size offload
        cache_hidden cache_gb processes threads recheck weight_decay max_grad_norm neftune_alpha group_by_length
        engine token_budget
        share_prefix compile
        gradient_checkpointing seed lora_r lora_alpha lora_dropout
        lora_target_modules lora_target_parameters lora_plus_ratio use_rslora use_dora init_adapter
        eval_steps save_steps logging_steps
        save_total_limit early_stopping_patience resume resume_from_checkpoint allow_change overwrite
        export_dir on_nonfinite on_oom rank_timeout report report_rows report_answers report_to wandb_project
        wandb_run_name wandb_watch wandb_log_model
    """,
    "generate.py": f"""
        {MODEL} load_4bit load_8bit merge_adapter lora_weights prompt_template instruction input system data_path
        output_file columns ignore_fields chat serve server_name server_port api_key_file max_batch max_waiting
        share_gradio temperature top_p top_k min_p repetition_penalty num_beams max_new_tokens stop seed
    """,
    "export_hf_checkpoint.py": f"{MODEL} lora_weights output_dir prompt_template overwrite adapter_weights "
    "format gguf_type max_shard_size merge_into private push_to_hub receipt",
}

SHOW = """
    data_path columns skip_bad_rows prompt_template_name cutoff_len overlong train_on_inputs train_on
    train_on_reasoning ignore_fields add_eos_token base_model revision trust_remote_code row html worst run config
"""
EVALUATE = f"""
    {MODEL} load_4bit load_8bit merge_adapter lora_weights prompt_template data_path columns ignore_fields max_rows
    output_dir overwrite max_batch system temperature top_p top_k min_p repetition_penalty num_beams max_new_tokens
    stop seed
"""


def test_the_names_of_the_library():
    assert sorted(lora_alpaca.__all__) == sorted(NAMES.split())


@pytest.mark.parametrize("name", NAMES.split())
def test_every_name_is_there(name):
    assert getattr(lora_alpaca, name) is not None
    assert name in dir(lora_alpaca)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'finetuen'"):
        lora_alpaca.finetuen  # noqa: B018  the access is the test


@pytest.mark.parametrize("script", FLAGS)
def test_the_flags_of_the_scripts(script, run_script, tmp_path):
    helped = run_script(script, "--help", cwd=tmp_path, check=True).stdout
    assert sorted(re.findall(r"^  --(\w+) ", helped, re.MULTILINE)) == sorted(FLAGS[script].split())


@pytest.mark.parametrize(
    ("verb", "flags"),
    [
        ("show", SHOW),
        ("find_lr", f"{FLAGS['finetune.py']} svg"),
        ("evaluate", EVALUATE),
        ("estimate", f"{FLAGS['finetune.py']} on devices rows mean_tokens probe json"),
        ("report", "run"),
        ("compare", "run_a run_b html"),
        ("convert_adapter", "old new"),
        ("convert_base", "old new revision"),
        ("verify", "endpoint model receipt api_key_file timeout"),
        ("import_meta", "old new context_length max_shard_size"),
        ("weight_diff", "action base source target max_shard_size"),
        ("selftest", f"{MODEL} only json"),
        (
            "reproduce",
            "adapter output_dir overwrite base_model data_path val_data_path init_adapter trust_remote_code device "
            "tolerance json",
        ),
    ],
)
def test_the_flags_of_the_other_commands(verb, flags):
    helped = run(verb, "--help").out
    assert sorted(re.findall(r"^  --(\w+) ", helped, re.MULTILINE)) == sorted(flags.split())
