"""Pictures that are asked for one by one and made together."""

from __future__ import annotations

import threading

import pytest
import torch

from vllm_specplus.cli.model import LATENTS_MODEL
from vllm_specplus.image.continuous.batches import Batches, Wish
from vllm_specplus.image.continuous.folder import LatentsFolder
from vllm_specplus.image.continuous.generation import Cspd, Recipe

FAST = Recipe(iterations=3)


class Held(Batches):
    """Makes its first batch, and any behind it, when it is let go; says what was in each."""

    def __init__(self, *args, **kwargs):
        self.go, self.begun, self.seen = threading.Event(), threading.Event(), []
        super().__init__(*args, **kwargs)

    def _make(self, wanted):
        self.begun.set()
        self.seen.append([wish.seed for wish in wanted])
        assert self.go.wait(30)
        if wanted[0].seed == 666:
            raise RuntimeError("the device is gone")
        if wanted[0].seed == 777:
            return torch.full((len(wanted), 64, 4), torch.nan)
        return super()._make(wanted)


@pytest.fixture(scope="module")
def folder():
    return LatentsFolder.load(LATENTS_MODEL / "masked")


@pytest.fixture
def batches(folder):
    made = Held(folder, FAST, most=3)
    yield made
    made.go.set()
    made.close()


def wish(seed: int, guidance: float = 1.0) -> Wish:
    return Wish(label=seed % 10, seed=seed, temperature=1.0, guidance_scale=guidance)


def test_a_batch_is_what_waits_and_goes_together(batches, folder):
    first = wish(0)
    batches.ask(first)
    assert batches.begun.wait(30)
    left = wish(9)
    others = [wish(1), wish(2, 2.0), left, wish(3), wish(4), wish(5), wish(6, 2.0)]
    for each in others:
        batches.ask(each)
    left.made.cancel()
    batches.go.set()
    kept = [each for each in (first, *others) if each is not left]
    for each in kept:
        recipe = FAST.model_copy(update={"guidance_scale": each.guidance_scale})
        expected, _ = recipe.way(folder)(torch.tensor([each.label]), [each.seed])
        torch.testing.assert_close(each.made.result(30), expected[0], atol=1e-3, rtol=1e-3)
    # At most three, of one recipe; who has left takes a place until its batch begins.
    assert batches.seen == [[0], [1, 3], [2, 6], [4, 5]]


def test_a_batch_that_fails_is_told_to_its_askers_alone(batches):
    batches.go.set()
    for seed, error in ((666, "the device is gone"), (777, "left the range of a float")):
        failed, fine = wish(seed), wish(1, 3.0)
        batches.ask(failed)
        batches.ask(fine)
        with pytest.raises((RuntimeError, ValueError), match=error):
            failed.made.result(30)
        assert fine.made.result(30).shape == (64, 4)


def test_who_waits_when_it_closes_is_cancelled(folder):
    batches = Held(folder, FAST, most=1)
    first, second = wish(0), wish(1)
    batches.ask(first)
    assert batches.begun.wait(30)
    batches.ask(second)
    batches._closed = True
    batches.go.set()
    batches.close()
    assert first.made.result(30).shape == (64, 4)
    assert second.made.cancelled()


def test_a_recipe_that_does_not_fit_is_refused(folder):
    with pytest.raises(ValueError, match="aligned is for causal models"):
        Batches(folder, Recipe(cspd=Cspd(aligned=True)), 4)
