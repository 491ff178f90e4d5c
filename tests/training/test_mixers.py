"""What a head's inputs are mixed with."""

from __future__ import annotations

import pytest
import torch

from vllm_specplus.training.mixers import glance_share, glanced, noise, reveal


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_noise_is_uniform_and_repeats():
    states = torch.randn(50, 40)
    added = noise(states, 0.2, rng()) - states
    assert added.abs().max() <= 0.2 + 1e-6
    assert float(added.mean()) == pytest.approx(0, abs=0.01)
    assert float(added.var()) == pytest.approx(0.2**2 / 3, rel=0.05)
    assert noise(states, 0.2, rng()).equal(noise(states, 0.2, rng()))
    assert not noise(states, 0.2, rng(1)).equal(noise(states, 0.2, rng()))


def test_less_is_shown_as_the_run_goes_on():
    """Of 20 epochs, at the first and behind the last."""
    assert glance_share(0 / 20) == pytest.approx(0.45)
    assert glance_share(20 / 20) == pytest.approx(0.10)
    assert glance_share(10 / 20) == pytest.approx(0.275)


@pytest.mark.parametrize("done", [0.0, 0.5, 1.0])
def test_the_second_pass_differs_where_it_is_shown_and_nowhere_else(done):
    torch.manual_seed(0)
    learn = torch.rand(60) < 0.7
    right = torch.rand(60) < 0.4
    shown = glanced(right, learn, glance_share(done), rng())
    wrong = int((learn & ~right).sum())
    count = int(glance_share(done) * wrong)
    assert count > 0
    assert int(shown.sum()) == count
    assert not (shown & ~learn).any()
    inputs, truth = torch.zeros(60, 8), torch.ones(60, 8)
    second = reveal(inputs, truth, shown)
    assert (second != inputs).any(1).equal(shown)
    tokens = reveal(torch.zeros(60, dtype=torch.long), torch.ones(60, dtype=torch.long), shown)
    assert tokens.bool().equal(shown)


def test_nothing_is_shown_to_a_draft_that_is_right():
    everywhere = torch.ones(20, dtype=torch.bool)
    assert not glanced(everywhere, everywhere, 0.45, rng()).any()


def test_all_positions_have_the_same_chance():
    learn = torch.tensor([True] * 8 + [False] * 2)
    right = torch.tensor([True, False] * 5)
    shown = sum(glanced(right, learn, 0.5, rng(seed)).long() for seed in range(2000))
    assert shown[8:].tolist() == [0, 0]
    # Two of eight each time.
    torch.testing.assert_close(shown[:8] / 2000, torch.full((8,), 0.25), atol=0.04, rtol=0)
