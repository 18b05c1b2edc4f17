"""A folder is uploaded to the hub: what its record lists, private unless said otherwise, and no token is told."""

import json

import fake_hub
import huggingface_hub
import pytest
from fake_hub import TOKEN

from lora_alpaca.errors import ConfigError, ExportError, LoraAlpacaError
from lora_alpaca.export import hub

# of huggingface_hub's own way of sending a large file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def the_hub(monkeypatch, tmp_path):
    """Return a hub on this machine, at which somebody is logged in; LFS files go there without xet."""
    with fake_hub.running() as found:
        constants = {"ENDPOINT": found.endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True}
        for name, value in constants.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
            found.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield found
    huggingface_hub.close_session()


@pytest.fixture
def folder(tmp_path):
    """Return a folder as an export leaves it, with more in it than belongs to the export."""
    folder = tmp_path / "out"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "original").mkdir()
    contents = {
        "README.md": "---\nlibrary_name: peft\n---\n# A model\n",
        "lora_alpaca.json": json.dumps({"status": "finished"}),
        "adapter_model.safetensors": "tensors",
        "original/tokenizer.model": "pieces",
        "lora_alpaca.private.json": "rows",
        "checkpoint-2/adapter_model.safetensors": "a step",
        "diary.txt": "mine",
        ".env": "HF_TOKEN=x",
    }
    for name, content in contents.items():
        (folder / name).write_text(content)
    (tmp_path / "secret").write_text("elsewhere")
    (folder / "linked.json").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    return folder


LISTED = ["README.md", "adapter_model.safetensors", "original/tokenizer.model"]


def test_what_is_sent(the_hub, folder, capfd):
    hub.require_login("me/model")
    assert not the_hub.repositories, "the check has made a repository"
    greedy = ["lora_alpaca.private.json", "checkpoint-2/adapter_model.safetensors", ".env", "linked.json", "gone.json"]
    url = hub.push(folder, "me/model", True, [*LISTED, *greedy, "linked/secret", "../secret"])
    assert url == f"{the_hub.endpoint}/me/model"
    assert the_hub.repositories == {"me/model": True}
    names = [*LISTED, "lora_alpaca.json"]
    assert the_hub.files == {name: (folder / name).read_bytes() for name in names}
    out, err = capfd.readouterr()
    assert TOKEN not in out + err
    assert not any(TOKEN.encode() in content for content in the_hub.files.values())
    told = {path.partition("/upload/")[0] for _, path, token in the_hub.requests if token}
    assert "" not in told, "the token was sent to where large files go"


def test_public_if_asked_for(the_hub, folder):
    hub.require_login("team/model", private=False)
    hub.push(folder, "team/model", False, LISTED)
    assert the_hub.repositories == {"team/model": False}
    hub.push(folder, "team/model", False, LISTED)  # once more into the same one
    assert len(the_hub.files) == 4


def test_a_public_repository_is_not_taken_for_private(the_hub, folder):
    the_hub.repositories["me/model"] = False
    with pytest.raises(ConfigError, match="everybody can read it; pass --private false if that is meant"):
        hub.require_login("me/model")
    with pytest.raises(ConfigError, match=r"everybody can read it.* stands, but was not uploaded"):
        hub.push(folder, "me/model", True, LISTED)
    assert not the_hub.files


def test_who_is_logged_in(the_hub, monkeypatch):
    for wrong in ("model", "me/model/part", "me/", "", "me/a b", "https://me/model"):
        with pytest.raises(ConfigError, match="write NAME/REPOSITORY"):
            hub.require_login(wrong)
    with pytest.raises(ExportError, match="the hub knows you as me, team, and not as others; name your repository"):
        hub.require_login("others/model")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ExportError, match=r"nothing was written .*Invalid user token") as error:
        hub.require_login("me/model")
    assert "hf_wrong" not in str(error.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ExportError, match="nobody is logged in to the hub; run hf auth login, or set HF_TOKEN"):
        hub.require_login("me/model")
    assert not the_hub.repositories


FAILURES = {
    "at the repository": ("/api/repos/create", 500, f"no room for {TOKEN}"),
    "at a large file": ("/upload/", 403, "forbidden"),
    "at the commit": ("/api/models/me/model/commit", 403, f"the token {TOKEN} may not write"),
}


@pytest.mark.parametrize("where", FAILURES)
def test_an_upload_that_fails(where, the_hub, folder, capfd):
    the_hub.fails = FAILURES[where]
    with pytest.raises(LoraAlpacaError) as error:
        hub.push(folder, "me/model", True, LISTED)
    line = str(error.value)
    assert line.startswith(f"--push_to_hub me/model: {folder} stands, but was not uploaded (")
    included = " ".join(f"--include {name}" for name in sorted([*LISTED, "lora_alpaca.json"]))
    assert line.endswith(f"); try hf upload me/model {folder} . --private {included}")
    out, err = capfd.readouterr()
    assert TOKEN not in line + out + err
    assert "\n" not in line
    assert not the_hub.files
    assert (folder / "README.md").is_file()


def test_without_a_network(monkeypatch, folder):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ExportError, match=r"nothing was written \(.*HF_HUB_OFFLINE"):
        hub.require_login("me/model")
    with pytest.raises(ExportError, match="stands, but was not uploaded"):
        hub.push(folder, "me/model", True, LISTED)
