"""What an adapter's folder may do, and what it tells: its settings are recorded, it runs no code, it tells no path."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command import error_line, run
from conftest import ROOT
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lora_alpaca import FinetuneConfig, finetune
from lora_alpaca.artifacts import adapter_folder, adapter_settings, privacy
from lora_alpaca.artifacts.adapter_folder import read_info
from lora_alpaca.errors import ModelError
from lora_alpaca.models.base import locate_base
from lora_alpaca.models.lora import CONFIG, WEIGHTS
from lora_alpaca.storage.output_folder import RECORD, read_record
from lora_alpaca.storage.paths import files_below

SECRETS = ("Where does Ada keep the key?", "Under the third stone.", "Who is <unk> to whom?", "It is <s> my cousin.")
COMMANDS = ("finetune", "generate", "export")


@pytest.fixture(scope="module")
def project(tiny_llama, tmp_path_factory):
    """Return a folder of somebody's with a base, rows and the adapter that was trained on them."""
    folder = tmp_path_factory.mktemp("somebodys-home")
    shutil.copytree(tiny_llama, folder / "tiny-llama")
    pairs = zip(SECRETS[::2], SECRETS[1::2], strict=True)
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in pairs]
    broken = {"instruction": SECRETS[0], "input": "", "output": 7}
    (folder / "rows.json").write_text(json.dumps([*rows, broken, *rows, {**rows[0], "output": ""}]))
    config = FinetuneConfig(
        base_model=str(folder / "tiny-llama"), data_path=str(folder / "rows.json"), output_dir=str(folder / "adapter"),
        skip_bad_rows=True, batch_size=2, max_steps=2, val_set_size=1, learning_rate=2e-2, load_8bit=False,
        cache_dir=str(folder / "cache"), dtype="fp32", device="cpu", lora_alpha=16,
    )  # fmt: skip
    finetune(config)
    return folder


@pytest.fixture
def there(project, tmp_path):
    """Return a copy of the adapter, to be changed."""
    return shutil.copytree(project / "adapter", tmp_path / "adapter")


def words(command, adapter, project, tmp_path, *more):
    out = ["--output_dir", tmp_path / "new", *more]
    if command == "finetune":
        data = ["--data_path", project / "rows.json", "--skip_bad_rows", "--max_steps", 1, "--load_8bit", "False"]
        return ["--base_model", project / "tiny-llama", "--init_adapter", adapter, *data, *out]
    if command == "generate":
        return ["--lora_weights", adapter, "--instruction", "Hi.", "--max_new_tokens", 2, *more]
    return ["--lora_weights", adapter, *out]


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --------------------------------------------------------------------------------------------------------- settings

CHANGED = {
    "lora_alpha": (160, "lora_alpha is 160, and was 16 in training"),
    "use_rslora": (True, "use_rslora is True, and was False in training"),
    "r": (4, "r is 4, and was 8 in training"),
    "use_dora": (True, "use_dora is True, and was False"),
    "alpha_pattern": ({"q_proj": 64}, "alpha_pattern is {'q_proj': 64}, and was {}"),
    "rank_pattern": ({"q_proj": 4}, "rank_pattern is {'q_proj': 4}, and was {}"),
    "target_modules": (["q_proj"], "target_modules is ['q_proj'], and was ['q_proj', 'v_proj']"),
    "layers_to_transform": ([0, 1], "layers_to_transform is [0, 1], and was None"),
    "modules_to_save": (["lm_head"], "modules_to_save is ['lm_head'], and was None"),
    "bias": ("all", "bias is 'all', and was 'none'"),
    "fan_in_fan_out": (True, "fan_in_fan_out is True, and was False"),
    "init_lora_weights": ("pissa", "init_lora_weights is 'pissa', and was True"),
    "trainable_token_indices": ([5], "trainable_token_indices is [5], and was None"),
    "lora_bias": (True, "lora_bias is True, and was False"),
}


@pytest.mark.parametrize("key", CHANGED)
def test_a_setting_that_was_changed_is_named(key, there, project, tmp_path, no_model_loads):
    value, said = CHANGED[key]
    change(there / CONFIG, **{key: value})
    for command in COMMANDS if key == "lora_alpha" else ("generate",):
        line = error_line(run(command, *words(command, there, project, tmp_path)), 1)
        assert f"{there / CONFIG}: {said}" in line


@pytest.mark.parametrize(
    "passive",
    [
        {"peft_version": "0.9.0"}, {"inference_mode": False}, {"base_model_name_or_path": "another"},
        {"lora_dropout": 0.5}, {"revision": "main"}, {"target_modules": ["v_proj", "q_proj"]}, {"lora_alpha": 16.0},
    ],
    ids=str,
)  # fmt: skip
def test_what_has_no_effect_may_differ(passive, there, project):
    change(there / CONFIG, **passive)
    info = read_info(there)
    assert adapter_folder.verify(there, info, locate_base(info.base_model)) == []


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT looks for the base by its name
def test_a_folder_that_peft_wrote_anew_is_the_same(there, project):
    base = AutoModelForCausalLM.from_pretrained(project / "tiny-llama")
    PeftModel.from_pretrained(base, there).save_pretrained(there)
    assert (there / CONFIG).read_bytes() != (project / "adapter" / CONFIG).read_bytes()
    info = read_info(there)
    assert adapter_folder.verify(there, info, locate_base(info.base_model)) == []


def test_a_setting_of_a_later_peft_is_warned_of_in_one_line(there, project, tmp_path):
    change(there / CONFIG, use_magic=True, magic_config=None)
    result = run("generate", *words("generate", there, project, tmp_path))
    assert result.code == 0, result.err
    said = f"warning: {there / CONFIG}: use_magic is not known to the PEFT that is installed, and ignored"
    assert result.err.splitlines().count(said) == 1
    assert "Unexpected keyword" not in result.err


def test_a_base_on_the_hub_that_is_not_there_is_told_as_the_adapters(there, project, tmp_path):
    record = read_record(there)
    (there / privacy.FILE).unlink()
    (there / RECORD).write_text(json.dumps(record | {"base_model": "org/none", "base_is_local": False}))
    line = error_line(run("generate", *words("generate", there, project, tmp_path)), 1)
    assert f"{there}: its base org/none: no folder of this name here, and the hub gives none" in line


def test_a_folder_of_an_earlier_version_is_read_as_before(there, project, tmp_path):
    """It has no settings in its record, and the path of its base, which is where it says."""
    record = read_record(there)
    for name in ("adapter_settings", "adapter_settings_sha256", "base_is_local", "tokenizer_notes"):
        del record[name]
    record["base_model"] = str(project / "tiny-llama")
    (there / RECORD).write_text(json.dumps(record))
    (there / privacy.FILE).unlink()
    change(there / CONFIG, base_model_name_or_path=record["base_model"])
    result = run("generate", *words("generate", there, project, tmp_path))
    assert result.code == 0, result.err
    record["base_model"] = str(tmp_path / "gone")
    (there / RECORD).write_text(json.dumps(record))
    line = error_line(run("generate", *words("generate", there, project, tmp_path)), 1)
    assert f"records the base model {tmp_path / 'gone'}, and nothing is there; name where it is now with" in line


def test_the_settings_are_recorded(project):
    record = read_record(project / "adapter")
    assert record["adapter_settings"] == {"lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    assert record["adapter_settings_sha256"] == adapter_settings.digest(record["adapter_settings"])


def test_an_adapter_names_no_module_to_import(there, project, tmp_path):
    change(there / CONFIG, megatron_config={"a": 1}, megatron_core="antigravity")
    (there / RECORD).unlink()
    asked = words("generate", there, project, tmp_path, "--base_model", project / "tiny-llama")
    assert "for Megatron, which names a module to import" in error_line(run("generate", *asked), 1)


# ------------------------------------------------------------------------------------------------------------- code

EVIL = "from pathlib import Path\nPath({!r}).write_text('run')\nfrom transformers import LlamaTokenizer as Evil\n"
MAPS = {
    "of today": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
    "of old": ["evil.Evil", "evil.Evil"],
    "of the folder": {"AutoTokenizer": ["{folder}--evil.Evil", None]},
}


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("command", COMMANDS[1:])
def test_code_of_an_adapter_never_runs(kind, command, there, project, tmp_path):
    marker = tmp_path / "marker"
    (there / "evil.py").write_text(EVIL.format(str(marker)))
    auto_map = json.loads(json.dumps(MAPS[kind]).replace("{folder}", str(there)))
    change(there / "tokenizer_config.json", auto_map=auto_map, tokenizer_class="Evil")
    (there / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil"}}))
    trusted = ["--base_model", project / "tiny-llama", "--trust_remote_code"]
    result = run(command, *words(command, there, project, tmp_path, *trusted))
    assert result.code == 0, result.err
    assert not marker.exists()


def test_code_of_the_base_runs_where_it_is_trusted(project, tmp_path):
    """The test before this one would notice code that runs."""
    marker, base = tmp_path / "marker", shutil.copytree(project / "tiny-llama", tmp_path / "base")
    (base / "evil.py").write_text(EVIL.format(str(marker)))
    change(base / "tokenizer_config.json", auto_map=MAPS["of today"], tokenizer_class="Evil")
    asked = ["show", "--base_model", str(base), "--data_path", str(project / "rows.json"), "--skip_bad_rows"]
    for trusts in (False, True):
        command = [sys.executable, "-m", "lora_alpaca", *asked, *["--trust_remote_code"] * trusts]
        environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert (done.returncode, marker.exists()) == (int(not trusts), trusts), done.stderr


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("auto_map", [{"AutoConfig": "org/evil--x.X", "AutoTokenizer": [None, "org/evil--x.X"]}])
def test_a_trusted_base_brings_its_own_code_alone(name, auto_map, project, tmp_path, no_model_loads):
    base = shutil.copytree(project / "tiny-llama", tmp_path / "base")
    change(base / name, auto_map=auto_map)
    asked = ["--base_model", base, "--data_path", project / "rows.json", "--skip_bad_rows", "--trust_remote_code"]
    line = error_line(run("show", *asked), 1)
    assert f"its {name} names code of another repository, org/evil, and --trust_remote_code runs code of" in line


@pytest.mark.parametrize("command", COMMANDS[1:])
def test_a_base_that_an_adapter_names_is_not_trusted(command, there, project, tmp_path, no_model_loads):
    line = error_line(run(command, *words(command, there, project, tmp_path, "--trust_remote_code")), 2)
    assert "name the one that you trust with --base_model" in line


def test_code_is_not_saved_with_an_adapter(there, project, tmp_path, monkeypatch):
    """A tokenizer that brings code writes it beside itself when it is saved."""
    from transformers import LlamaTokenizer

    save = LlamaTokenizer.save_pretrained

    def save_with_code(self, folder, **options):
        (Path(folder) / "tokenization.py").write_text("")
        return save(self, folder, **options)

    monkeypatch.setattr(LlamaTokenizer, "save_pretrained", save_with_code)
    assert run("finetune", *words("finetune", there, project, tmp_path)).code == 0
    assert not list((tmp_path / "new").rglob("*.py"))
    assert "tokenizer.json" in files_below(tmp_path / "new")


# ---------------------------------------------------------------------------------------------------------- privacy


def told(folder, *secrets):
    """Return the files of a folder that are published, and hold one of several texts."""
    names = [name for name in files_below(folder) if name not in privacy.FILES and not name.startswith("checkpoint-")]
    assert RECORD in names
    contents = {name: (folder / name).read_bytes() for name in names}
    return [(name, secret) for name, data in contents.items() for secret in secrets if str(secret).encode() in data]


def test_an_adapter_tells_no_row_and_no_path(project):
    adapter = project / "adapter"
    assert told(adapter, *SECRETS, project, Path.home(), "rows.json:1", "somebodys-home") == []
    record = read_record(adapter)
    assert record["base_model"] == "tiny-llama"
    assert json.loads((adapter / CONFIG).read_text())["base_model_name_or_path"] == "tiny-llama"
    assert record["options"]["data_path"] == "rows.json"
    assert record["ledger"]["control_text"] == {"count": 2}
    assert record["ledger"]["bad"] == {"count": 1}


def test_a_merged_model_tells_no_row_and_no_path(project, tmp_path):
    asked = ["--lora_weights", project / "adapter", "--output_dir", tmp_path / "merged"]
    assert run("export", *asked).code == 0
    assert told(tmp_path / "merged", *SECRETS, project, tmp_path, Path.home(), "somebodys-home") == []
    assert not (tmp_path / "merged" / privacy.FILE).exists()
    assert (read_record(tmp_path / "merged")["adapter"], privacy.FILE) == ("adapter", "lora_alpaca.private.json")


def test_what_is_private_says_so_and_is_removed_with_the_rest(there, project, tmp_path):
    found = json.loads((there / privacy.FILE).read_text())
    assert "Not to be published" in found["about"]
    assert found["base_model"] == str(project / "tiny-llama")
    assert found["options"]["data_path"] == str(project / "rows.json")
    assert found["ledger"]["control_text"] == {"count": 2, "first": ["rows.json:2", "rows.json:5"], "example": "<unk>"}
    assert privacy.whole(there, read_record(there))["ledger"]["bad"]["first"] == ["rows.json:3"]
    assert privacy.FILE in read_record(there)["files"]


def test_a_run_that_was_killed_tells_nothing_either(project, tmp_path, monkeypatch):
    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_alpaca.training.loop.Loop.run", kill)
    config = ["--base_model", project / "tiny-llama", "--data_path", project / "rows.json", "--skip_bad_rows"]
    with pytest.raises(KeyboardInterrupt):
        run("finetune", *config, "--max_steps", 1, "--load_8bit", "False", "--output_dir", tmp_path / "out")
    assert read_record(tmp_path / "out")["status"] == "running"
    assert told(tmp_path / "out", *SECRETS, project, tmp_path) == []


def test_without_what_is_private_the_base_has_to_be_named(there, project, tmp_path):
    (there / privacy.FILE).unlink()
    for command in COMMANDS[1:]:
        line = error_line(run(command, *words(command, there, project, tmp_path)), 1)
        assert (
            f"{there} was trained on a local base model named tiny-llama, and does not record its path; name where"
            in line
        )
        assert "recognised by its hash" in line
        asked = words(command, there, project, tmp_path, "--base_model", project / "tiny-llama")
        assert run(command, *asked).code == 0


def test_a_finished_run_is_known_again_without_what_is_private(there, project):
    again = ["--resume", "--base_model", project / "tiny-llama", "--data_path", project / "rows.json"]
    same = ["--skip_bad_rows", "--batch_size", 2, "--max_steps", 2, "--val_set_size", 1, "--learning_rate", 2e-2]
    same += ["--load_8bit", "False", "--dtype", "fp32", "--device", "cpu", "--lora_alpha", 16]
    same += ["--cache_dir", project / "cache", "--output_dir", there]
    for _ in range(2):
        result = run("finetune", *again, *same)
        assert "this run is already finished" in result.out, result.err
        (there / privacy.FILE).unlink(missing_ok=True)


def test_a_base_that_is_gone_is_told_as_what_it_is(there, project, tmp_path):
    private = json.loads((there / privacy.FILE).read_text())
    moved = shutil.copytree(project / "tiny-llama", tmp_path / "tiny-llama")
    (there / privacy.FILE).write_text(json.dumps(private | {"base_model": str(moved)}))
    assert run("generate", *words("generate", there, project, tmp_path)).code == 0
    moved.rename(tmp_path / "elsewhere")
    for command in COMMANDS[1:]:
        line = error_line(run(command, *words(command, there, project, tmp_path)), 1)
        assert f"{there} records the base model {moved}, and nothing is there; name where it is now with" in line
        asked = words(command, there, project, tmp_path, "--base_model", tmp_path / "elsewhere")
        assert run(command, *asked).code == 0


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("/data/models/llama-7b/", "llama-7b"), ("~/rows.json", "rows.json"), ("../me/rows.json", "rows.json"),
        ("yahma/alpaca-cleaned", "yahma/alpaca-cleaned"), ("org/rows:en:train@main", "org/rows:en:train@main"),
        ("demo", "demo"), ("gpt2", "gpt2"), ("/a/one.json,org/two,./three.csv", "one.json,org/two,three.csv"),
        ("./lora-alpaca", "lora-alpaca"), ("a/b/c.jsonl", "c.jsonl"),
    ],
)  # fmt: skip
def test_a_name_is_the_last_of_a_path(value, name):
    assert privacy.published({"options": {"data_path": value}})["options"]["data_path"] == name


def test_publishing_twice_changes_nothing(project):
    record = read_record(project / "adapter")
    assert privacy.published(record) == record


def test_a_private_file_of_another_run_is_not_used(there, project):
    private = json.loads((there / privacy.FILE).read_text())
    (there / privacy.FILE).write_text(json.dumps(private | {"run": "another"}))
    assert read_info(there).base_model == "tiny-llama"
    with pytest.raises(ModelError, match="does not record its path"):
        from lora_alpaca.artifacts.source import open_adapter

        open_adapter(there)


def test_weights_and_settings_are_both_in_the_record(project):
    record = read_record(project / "adapter")
    assert {"adapter_sha256", "adapter_settings_sha256"} <= record.keys()
    assert WEIGHTS in record["files"]
