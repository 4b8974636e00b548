"""Models of the hub are fetched as files and read by our own readers; a fake of the hub's client stands in for the network."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from mergekit_vl.checkpoints.reader import open_checkpoint
from mergekit_vl.errors import UserError


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A repository in `hub/`, and a cache into which its files are copied; `fetched` lists them."""
    source, cache, fetched = tmp_path / "hub", tmp_path / "cache", []
    source.mkdir()

    class Api:
        def list_repo_files(self, repository, revision=None):
            if repository != "org/name":
                raise RuntimeError("404: no such repository\nmore")
            return [str(p.relative_to(source)) for p in source.rglob("*") if p.is_file()]

    def download(repository, name, revision=None):
        fetched.append((name, revision))
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(source / name, cache / name))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *a, **k: None)
    return source, fetched


def test_safetensors_before_pickles_and_the_config_beside_them(hub):
    source, fetched = hub
    save_file({"w": torch.ones(2)}, source / "model.safetensors")
    torch.save({"w": torch.zeros(2)}, source / "pytorch_model.bin")
    (source / "config.json").write_text("{}")
    found = open_checkpoint("hf-hub:org/name@v2")
    assert fetched == [("model.safetensors", "v2"), ("config.json", "v2")]
    assert found.label == "org-name-v2" and set(found.tensors) == {"w"} and found.config is not None


def test_an_index_brings_its_shards(hub):
    source, fetched = hub
    save_file({"a": torch.ones(2)}, source / "1.safetensors")
    save_file({"b": torch.ones(2)}, source / "2.safetensors")
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}})
    )
    assert set(open_checkpoint("hf-hub:org/name").tensors) == {"a", "b"}
    assert [name for name, _ in fetched] == ["model.safetensors.index.json", "1.safetensors", "2.safetensors"]


def test_an_index_that_leaves_its_folder_fetches_nothing_more(hub):
    source, fetched = hub
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../key.safetensors"}}))
    with pytest.raises(UserError, match="no file beside its index"):
        open_checkpoint("hf-hub:org/name")
    assert len(fetched) == 1


class Runs:
    def __reduce__(self):
        return Path.touch, (Path("owned"),)


def test_a_pickle_of_the_hub_runs_nothing(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2), "x": Runs()}, hub[0] / "pytorch_model.bin")
    assert set(open_checkpoint("hf-hub:org/name").tensors) == {"w"}
    assert not Path("owned").exists()


def test_what_cannot_be_fetched_is_told_in_one_line(hub):
    with pytest.raises(UserError) as told:
        open_checkpoint("hf-hub:org/other")
    assert "cannot be fetched: 404: no such repository" in str(told.value) and "\n" not in str(told.value)
    (hub[0] / "flax_model.msgpack").write_bytes(b"")
    with pytest.raises(UserError, match="no weights that are known here"):
        open_checkpoint("hf-hub:org/name")
