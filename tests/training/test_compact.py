"""A head in one file becomes the folder that it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.drafting.test_drafting import VOCAB, save_draft
from tests.training.test_export import IDS, written
from vllm_specplus.training.compact import compact, expand, output_layer
from vllm_specplus.training.errors import TrainingError


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return Path(save_draft(tmp_path_factory.mktemp("target"), layers=4))


def test_a_compact_head_becomes_the_same_folder(tmp_path, target):
    head = written(tmp_path / "head", target)
    file = tmp_path / "kept" / "head.safetensors"
    compact(head, target, file)
    assert not {"lm_head.weight", "t2d"} & load_file(file).keys()
    expand(file, target, tmp_path / "again")
    first, second = (load_file(f / "model.safetensors") for f in (head, tmp_path / "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (head / "config.json").read_text() == (tmp_path / "again" / "config.json").read_text()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["again", "head", "kept"]


def test_an_output_layer_of_its_own_cannot_be_left_out(tmp_path, target):
    changed = output_layer(target)[IDS].clone()
    changed[2, 5] += 1
    head = written(tmp_path / "head", target, changed)
    with pytest.raises(TrainingError, match="train with learn_output=false"):
        compact(head, target, tmp_path / "head.safetensors")
    assert not (tmp_path / "head.safetensors").exists()


def test_a_compact_head_wants_its_own_target(tmp_path, target):
    file = tmp_path / "head.safetensors"
    compact(written(tmp_path / "head", target), target, file)
    other = Path(save_draft(tmp_path / "other", vocab=VOCAB - 1))
    with pytest.raises(TrainingError, match=r"of 96 tokens and 64 units, and .* has 95 and 64"):
        expand(file, other, tmp_path / "again")
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(TrainingError, match="has no configuration in its metadata"):
        expand(tmp_path / "x.safetensors", target, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_folder_that_is_in_use_is_not_touched(tmp_path, target):
    head = written(tmp_path / "head", target)
    compact(head, target, tmp_path / "head.safetensors")
    before = (head / "config.json").stat().st_mtime_ns
    with pytest.raises(OSError, match="not empty"):
        expand(tmp_path / "head.safetensors", target, head)
    assert (head / "config.json").stat().st_mtime_ns == before
    assert sorted(each.name for each in tmp_path.iterdir()) == ["head", "head.safetensors"]
