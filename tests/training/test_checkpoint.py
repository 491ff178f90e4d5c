"""Checkpoints: whole or not there, whatever happens while one is written."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import torch

from tests.training.toy import killed_at, status
from vllm_specplus.training import checkpoint
from vllm_specplus.training.checkpoint import (
    Checkpoints,
    Progress,
    load_optimiser,
    optimiser_state,
)
from vllm_specplus.training.errors import TrainingError

#: Calls of ``os.fsync`` that writing a checkpoint makes.
CALLS = 4


def save_three(folder: Path, call: str, number: int) -> None:
    """Saves steps 1 and 2, and may be killed while it saves the third."""
    checkpoints = Checkpoints(folder)
    for step in (1, 2):
        checkpoints.save(Progress(step=step), {"x": torch.full((1000,), float(step))})
    killed_at(call, number)
    checkpoints.save(Progress(step=3), {"x": torch.full((1000,), 3.0)})


def state(step: float) -> dict[str, torch.Tensor]:
    return {"x": torch.full((5,), step)}


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_the_newest_is_loaded_and_two_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoint")
    assert checkpoints.load() is None
    for step in (1, 5, 30):
        checkpoints.save(Progress(1, 2, step, 3.5), state(step))
    progress, found = Checkpoints(tmp_path / "checkpoint").load()
    assert progress == Progress(1, 2, 30, 3.5)
    assert torch.equal(found["x"], state(30)["x"])
    assert names(tmp_path / "checkpoint") == ["000000005", "000000030"]


def test_a_damaged_one_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(Progress(step=step), state(step))
    newest = tmp_path / "000000002" / checkpoint.STATE
    newest.write_bytes(newest.read_bytes()[:-3])
    assert checkpoints.load()[0].step == 1
    (tmp_path / "000000001" / checkpoint.PROGRESS).write_text("{")
    with pytest.raises(TrainingError, match=r"no checkpoint in .* can be read: remove the folder"):
        checkpoints.load()
    # The step is made again, and its place is taken.
    checkpoints.save(Progress(step=2), state(2))
    assert checkpoints.load()[0].step == 2


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_killed_while_writing_leaves_one_that_is_whole(tmp_path, call):
    """At every call that makes something last."""
    survived = 0
    for number in range(1, CALLS + 2):
        folder = tmp_path / str(number)
        ended = status(save_three, folder, call, number)
        progress, found = Checkpoints(folder).load()
        assert torch.equal(found["x"], torch.full((1000,), float(progress.step)))
        assert progress.step in (2, 3)
        survived += progress.step == 3 and ended == 0
        if ended == 0:
            break
    # The calls were reached, and at last there were no more of them.
    assert survived == 1
    assert number > 1


@pytest.mark.parametrize("at", ["save_file", "sync"])
def test_a_full_disk_is_told_and_leaves_the_one_before(tmp_path, monkeypatch, at):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(Progress(step=1), state(1))
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **keys):
        raise full

    from vllm_specplus.training import folder

    monkeypatch.setattr(checkpoint if at == "save_file" else folder, at, fail)
    with pytest.raises(TrainingError) as told:
        checkpoints.save(Progress(step=2), state(2))
    assert "cannot be written (No space left on device): make room" in str(told.value)
    monkeypatch.undo()
    assert checkpoints.load()[0].step == 1
    assert names(tmp_path) == ["000000001"]  # nothing half-written takes up room


def test_what_safetensors_says_of_a_full_disk_is_told_too(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def fail(*args, **keys):
        raise SafetensorError("Error while serializing: I/O error: No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(TrainingError, match="No space left on device"):
        Checkpoints(tmp_path).save(Progress(step=1), state(1))


def test_the_optimiser_goes_on_as_it_would_have():
    def steps(optimiser, weights, count):
        for _ in range(count):
            optimiser.zero_grad()
            sum((w**2).sum() for w in weights).backward()
            optimiser.step()

    def fresh():
        weights = [torch.nn.Parameter(torch.arange(1.0, n + 1)) for n in (2, 3)]
        return weights, torch.optim.AdamW(weights, lr=0.1)

    straight, optimiser = fresh()
    steps(optimiser, straight, 5)
    weights, optimiser = fresh()
    steps(optimiser, weights, 3)
    kept = {name: tensor.clone() for name, tensor in optimiser_state(optimiser).items()}
    resumed, other = fresh()
    for new, old in zip(resumed, weights, strict=True):
        new.data.copy_(old.data)
    load_optimiser(other, kept | {"recipe.x": torch.zeros(1)})
    steps(other, resumed, 2)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed, strict=True))
    # Without what it remembers it does not.
    forgetful, other = fresh()
    for new, old in zip(forgetful, weights, strict=True):
        new.data.copy_(old.data)
    steps(other, forgetful, 2)
    assert not torch.equal(straight[0], forgetful[0])
