"""`--push_to_hub` of a whole export: checked before the merge, and uploaded once it stands."""

import json

import pytest
from fake_hub import TOKEN
from faults.scene import Scene
from test_hub import pytestmark, the_hub  # noqa: F401  its filter of warnings, and a fixture

from lora_alpaca import ExportConfig, export_hf
from lora_alpaca.errors import ExportError
from lora_alpaca.storage.paths import files_below


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Return the folder of an adapter of a short run."""
    scene = Scene(tmp_path_factory.mktemp("hub"))
    ended = scene.finetune(scene.folder / "adapter")
    assert ended.code == 0, ended.last()
    return scene.folder / "adapter"


def test_what_was_exported_is_on_the_hub(the_hub, adapter, tmp_path, capfd):  # noqa: F811
    out = export_hf(
        ExportConfig(
            lora_weights=str(adapter), output_dir=str(tmp_path / "out"), push_to_hub="me/alpaca", receipt=False
        )
    )
    assert the_hub.repositories == {"me/alpaca": True}
    assert the_hub.files == {name: (out / name).read_bytes() for name in files_below(out)}
    assert {"model.safetensors", "README.md", "merge_receipt.json", "prompt_contract.json"} <= the_hub.files.keys()
    assert "# alpaca" in (out / "README.md").read_text()
    out_text, err = capfd.readouterr()
    assert "me/alpaca" in out_text
    assert TOKEN not in out_text + err + json.dumps({name: str(content) for name, content in the_hub.files.items()})


def test_who_is_not_logged_in_waits_for_no_merge(the_hub, adapter, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ExportError, match="push_to_hub"):
        export_hf(ExportConfig(lora_weights=str(adapter), output_dir=str(tmp_path / "out"), push_to_hub="me/alpaca"))
    assert list(tmp_path.iterdir()) == []
