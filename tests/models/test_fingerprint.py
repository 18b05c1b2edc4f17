"""Which base it is: the same digest wherever its files lie, another for any other weight, and no file read twice."""

import hashlib
import json
import os
import shutil

import pytest
import transformers

from lora_alpaca.models.base import Base, locate_base, weight_files
from lora_alpaca.models.fingerprint import CACHE, hash_base
from lora_alpaca.storage.paths import sha256, user_cache


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Begin with an empty cache, and return its file."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lora_alpaca" / CACHE


@pytest.fixture
def folder(tiny_llama, tmp_path):
    """Return a copy of the tiny model whose files have lain there for an hour."""
    copy = shutil.copytree(tiny_llama, tmp_path / "base")
    for path in copy.iterdir():
        aged(path)
    return copy


def aged(path, seconds=3600):
    now = path.stat().st_mtime_ns
    os.utime(path, ns=(now, now - seconds * 10**9))


def of(folder):
    return hash_base(locate_base(str(folder)))


def turn_a_bit(path):
    data = path.read_bytes()
    path.write_bytes(data[:-4] + bytes([data[-4] ^ 1]) + data[-3:])


def test_it_is_a_sha256_that_a_copy_shares(folder, tmp_path):
    digest = of(folder)
    assert len(bytes.fromhex(digest)) == 32
    assert of(shutil.copytree(folder, tmp_path / "copy")) == digest


@pytest.mark.parametrize("stamp", ["transformers_version", "_name_or_path"])
def test_who_wrote_the_config_does_not_matter_and_what_it_says_does(folder, stamp):
    before, config = of(folder), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {stamp: "another"}))
    assert of(folder) == before
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert of(folder) != before


def test_a_single_bit_makes_it_another(folder):
    before = of(folder)
    turn_a_bit(folder / "model.safetensors")
    assert of(folder) != before


def test_every_shard_counts(folder):
    transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="100KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert weight_files(locate_base(str(folder))) == shards
    assert len(shards) > 2
    digests = {of(folder)}
    for shard in shards:
        turn_a_bit(shard)
        digests.add(of(folder))
    assert len(digests) == len(shards) + 1


def test_nothing_is_read_twice(folder, cache, monkeypatch):
    before = of(folder)
    assert [facts[-1] for facts in json.loads(cache.read_text()).values()] == [sha256(folder / "model.safetensors")]
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("a file was read again"))
    assert of(folder) == before


def test_a_file_of_the_same_size_and_another_time_is_read_again(folder):
    before = of(folder)
    turn_a_bit(folder / "model.safetensors")
    aged(folder / "model.safetensors", seconds=60)
    assert of(folder) != before


def test_a_file_that_was_put_in_the_place_of_another_is_read_again(folder, tmp_path):
    """As `cp --preserve` and a rename leave it: of the same size and the same time."""
    before, weights = of(folder), folder / "model.safetensors"
    copy = shutil.copy2(weights, tmp_path / "copy")
    found = weights.stat()
    turn_a_bit(copy)
    os.utime(copy, ns=(found.st_atime_ns, found.st_mtime_ns))
    os.replace(copy, weights)
    assert (weights.stat().st_size, weights.stat().st_mtime_ns) == (found.st_size, found.st_mtime_ns)
    assert of(folder) != before


def test_the_hash_of_a_file_that_was_only_just_written_is_not_kept(folder, cache):
    os.utime(folder / "model.safetensors")
    of(folder)
    assert not cache.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"x": 3}'])
def test_a_damaged_cache_is_none(folder, cache, content):
    before = of(folder)
    cache.write_text(content)
    assert of(folder) == before
    assert str(folder / "model.safetensors") in json.loads(cache.read_text())


def test_a_cache_that_cannot_be_written_to_is_none(folder, tmp_path, monkeypatch):
    before = of(folder)
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert of(folder) == before
    assert user_cache() == tmp_path / "file" / "lora_alpaca"


def test_files_from_the_hub_are_named_by_their_hash_and_not_read(folder, tmp_path, monkeypatch):
    """In a cache as huggingface_hub leaves it: links from the commit's folder to blobs."""
    before = of(folder)
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub" / "models--someone--tiny"
    snapshot = cached / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (cached / "blobs").mkdir()
    for path in folder.iterdir():
        content = path.read_bytes()
        large = path.name == "model.safetensors"
        blob = cached / "blobs" / (hashlib.sha256 if large else hashlib.sha1)(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / path.name).symlink_to(blob)
    base = Base("someone/tiny", "someone/tiny", commit, False, locate_base(str(folder)).config)
    monkeypatch.setattr(transformers.utils.hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("a file was read"))
    assert hash_base(base) == before


@pytest.mark.parametrize("kind", ["file", "dangling", "loop", "folder"])
def test_no_link_at_the_place_of_the_hashes_is_followed(folder, cache, tmp_path, kind):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "file").write_text("{}")
    cache.parent.mkdir(parents=True)
    cache.parent.chmod(0o700)
    leads_to = {"file": theirs / "file", "dangling": theirs / "new", "loop": cache, "folder": theirs}
    cache.symlink_to(leads_to[kind])
    digest = of(folder)
    assert {path.name: path.read_text() for path in theirs.iterdir()} == {"file": "{}"}
    assert cache.is_file()
    assert not cache.is_symlink()
    assert of(folder) == digest


def test_hashes_that_others_can_write_are_not_believed(folder, cache):
    digest = of(folder)
    kept = json.loads(cache.read_text())
    cache.write_text(json.dumps({path: [*facts[:-1], "0" * 64] for path, facts in kept.items()}))
    assert of(folder) != digest
    cache.parent.chmod(0o777)
    assert of(folder) == digest
