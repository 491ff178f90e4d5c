"""Two processes learn what one learns from the same batches."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch

from tests.training.test_trainer import PLAN, losses
from tests.training.toy import apart, status, train
from vllm_specplus.training.checkpoint import Checkpoints
from vllm_specplus.training.ranks import Ranks

#: Drawn noise is each rank's own: without it the losses must be the same.
SAME = PLAN | {"settings": {"noise": 0.0}}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def together(count: int, out: Path, plan: dict, **keys) -> None:
    """As torchrun starts them."""
    every = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    started = [
        apart(
            train, out, plan, environment=every | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            **keys,
        )
        for rank in range(count)
    ]  # fmt: skip
    for process in started:
        process.join(120)
    assert {process.exitcode for process in started} <= {0, -9}


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("alone")
    assert status(train, out, SAME) == 0
    return out


def weight(out: Path) -> torch.Tensor:
    return Checkpoints(out / "checkpoint").load()[1]["recipe.weight"]


@pytest.mark.parametrize("batch_tokens", [64, 20])
def test_two_learn_what_one_does(tmp_path, alone, batch_tokens):
    """In batches of 20 tokens some are of one text: the second process has no share of them."""
    plan = SAME | {"batch_tokens": batch_tokens}
    if batch_tokens != SAME["batch_tokens"]:
        alone = tmp_path / "alone"
        assert status(train, alone, plan) == 0
    together(2, tmp_path / "two", plan)
    assert len(losses(alone)) > 20
    assert losses(tmp_path / "two") == pytest.approx(losses(alone), abs=2e-6)
    assert torch.allclose(weight(tmp_path / "two"), weight(alone), atol=1e-5)


def test_a_mean_of_means_would_be_seen(tmp_path, alone):
    """Shares of a batch have unequal numbers of tokens, and may not count alike."""
    together(2, tmp_path, SAME, alike=True)
    assert losses(tmp_path) != pytest.approx(losses(alone), abs=2e-5)


def test_two_that_were_killed_go_on(tmp_path, alone):
    plan = SAME | {"checkpoint_seconds": 0.0}
    together(2, tmp_path, plan, kill_step=12)
    assert len(losses(tmp_path)) < len(losses(alone))
    together(2, tmp_path, plan)
    assert losses(tmp_path) == pytest.approx(losses(alone), abs=2e-6)


def test_ranks_draw_their_own_noise(tmp_path):
    """A rank that drew what another draws would see each text with the same noise."""
    noisy = PLAN | {"epochs": 1}
    together(2, tmp_path / "two", noisy)
    assert status(train, tmp_path / "one", noisy) == 0
    assert losses(tmp_path / "two")[3] != pytest.approx(losses(tmp_path / "one")[3], abs=1e-6)


def test_alone_nothing_is_sent():
    ranks = Ranks()
    parameter = torch.nn.Parameter(torch.ones(1))
    ranks.sum_gradients([parameter], 0.5)
    assert parameter.grad is None
    assert ranks.first
    assert ranks.shared("x") == "x"
    assert ranks.mean({"loss": 1.0}, 1.0) == {"loss": 1.0}
