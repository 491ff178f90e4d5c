"""Drafts by their names on the Hugging Face hub. Nothing is fetched: a cache is made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.block_heads import save_block
from tests.drafting.test_drafting import VOCAB, save_draft
from tests.eagle_heads import save_head
from vllm_specplus.config import parse
from vllm_specplus.drafting.hub import FILES, model_folder
from vllm_specplus.drafting.model import DraftModelError

NAME, COMMIT = "somebody/a-draft", "0123456789" * 4


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def snapshot(cache: Path) -> Path:
    """The folder of the model in the cache, empty."""
    model = cache / ("models--" + NAME.replace("/", "--"))
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(COMMIT)
    (model / "snapshots" / COMMIT).mkdir(parents=True)
    return model / "snapshots" / COMMIT


def online(monkeypatch, answer) -> list[str]:
    """Let the hub be asked, and ``answer``; returns the names that it is asked for."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    asked, local = [], huggingface_hub.snapshot_download

    def download(name, local_files_only=False, **patterns):
        if local_files_only:
            return local(name, local_files_only=True, **patterns)
        assert patterns["allow_patterns"] == FILES
        asked.append(name)
        return answer()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def refuse():
    raise OSError("404 Client Error.\n\nRepository Not Found\nfor url: https://...")


def test_a_folder_is_itself(cache):
    Path(NAME).mkdir(parents=True)  # beside a model of that name, as for vLLM
    save_draft(snapshot(cache))
    assert model_folder(NAME, "draft model") == NAME


@pytest.mark.parametrize(
    ("method", "save"),
    [
        ("draft_tree", lambda path: save_draft(path)),
        ("easyspec", lambda path: save_draft(path)),
        ("eagle_tree", lambda path: save_head(path, 3, VOCAB)),
        ("block_tree", lambda path: save_block(path, "dflash", VOCAB)),
    ],
)
def test_all_methods_take_what_is_cached(cache, method, save):
    folder = snapshot(cache)
    save(folder)
    config = parse({"method": method, "model": NAME})
    assert config.folder == str(folder)
    assert config.model == NAME  # what travels to the workers, who may be elsewhere


def test_checks_read_what_is_cached(cache):
    folder = snapshot(cache)
    save_draft(folder)
    described = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(described | {"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="is of type 'gpt2'"):
        parse({"method": "draft_tree", "model": NAME})


def test_a_cached_model_is_not_asked_for(cache, monkeypatch):
    folder = snapshot(cache)
    save_draft(folder)
    asked = online(monkeypatch, refuse)
    assert model_folder(NAME, "draft model") == str(folder)
    assert asked == []


def test_what_is_cached_in_part_is_fetched(cache, monkeypatch):
    """As where somebody has asked for the config, or a download broke off."""
    folder = snapshot(cache)
    asked = online(monkeypatch, lambda: "fetched")
    assert model_folder(NAME, "draft model") == "fetched"
    (folder / "config.json").write_text("{}")
    assert model_folder(NAME, "draft model") == "fetched"
    weights = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(weights))
    (folder / "model-1.safetensors").touch()
    assert model_folder(NAME, "draft model") == "fetched"
    assert asked == [NAME] * 3
    (folder / "model-2.safetensors").touch()
    assert model_folder(NAME, "draft model") == str(folder)
    assert asked == [NAME] * 3


def test_offline_it_has_to_be_there(cache):
    with pytest.raises(DraftModelError) as told:
        model_folder(NAME, "EAGLE head")
    assert str(told.value) == (
        "EAGLE head 'somebody/a-draft' is neither a folder nor in the Hugging Face cache, and "
        "HF_HUB_OFFLINE is set: name a folder, or download the model first"
    )


def test_what_the_hub_says_is_one_sentence(cache, monkeypatch):
    online(monkeypatch, refuse)
    with pytest.raises(DraftModelError) as told:
        model_folder(NAME, "EAGLE head")
    assert str(told.value) == (
        "EAGLE head 'somebody/a-draft' is no folder, and fetching it from the Hugging Face hub "
        "failed (OSError: 404 Client Error. Repository Not Found for url: https://...): name a "
        "folder, or a model that can be reached"
    )


@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "x" * 5000, "a\nb", "a\0b", "a--b"])
def test_what_can_be_no_name_of_the_hub_is_not_asked_for(cache, monkeypatch, name):
    asked = online(monkeypatch, refuse)
    assert model_folder(name, "draft model") == name
    assert asked == []
