"""The embedded models of emoji's latents: the exact rule keeps the target's law, others do not."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from vllm_specplus.cli.model import EMOJI_LATENTS_MODEL
from vllm_specplus.image.continuous.decoding import (
    Settings,
    Speculation,
    decode,
    decode_speculative,
)
from vllm_specplus.image.continuous.folder import LatentsFolder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not EMOJI_LATENTS_MODEL.is_dir(), reason="trained by vllm_specplus.training.emoji_latents"
    ),
]

#: Of the beginning of pictures of one class.
LATENTS, PICTURES, LABEL = 4, 3000, 5


@pytest.fixture(scope="module")
def folder() -> LatentsFolder:
    return LatentsFolder.load(EMOJI_LATENTS_MODEL)


def made(folder: LatentsFolder, first: int, rule: str | None, model=None) -> torch.Tensor:
    """[PICTURES, LATENTS, size] by the seeds from ``first`` on; ``rule`` None: by ``model``
    alone."""
    how = Settings(LATENTS, folder.size, folder.schedule)
    labels = torch.full((PICTURES,), LABEL)
    seeds = list(range(first, first + PICTURES))
    if rule is None:
        return decode(model or folder.target, labels, seeds, how)
    speculation = Speculation(window=3, rule=rule)
    out, counts = decode_speculative(
        folder.target, folder.draft, labels, seeds, how, speculation
    )  # fmt: skip
    assert counts.acceptance > 0.05
    return out


def least_p(one: torch.Tensor, other: torch.Tensor) -> float:
    """Over the channels of all latents, and over what neighbours share; times their number
    (Bonferroni)."""
    pairs = ((one, other), (one.diff(dim=1), other.diff(dim=1)))
    pairs = [(a.flatten(1), b.flatten(1)) for a, b in pairs]
    values = [
        stats.ks_2samp(a[:, i].numpy(), b[:, i].numpy()).pvalue
        for a, b in pairs
        for i in range(a.shape[1])
    ]  # fmt: skip
    return min(values) * len(values)


def test_exact_keeps_the_law_and_the_others_are_seen(folder):
    plain = made(folder, 0, None)
    assert least_p(plain, made(folder, 10_000, None)) > 1e-2
    assert least_p(plain, made(folder, 20_000, "exact")) > 1e-2
    assert least_p(plain, made(folder, 30_000, "reference")) < 1e-6
    assert least_p(plain, made(folder, 40_000, None, folder.draft)) < 1e-6
