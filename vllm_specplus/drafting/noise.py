"""The random numbers that drafts are drawn and judged with."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: Streams of :func:`stream`.
DRAFTS, VERDICTS = 1, 2


def stream(number: int, device: torch.device) -> torch.Generator:
    """One of several generators of the engine's seed.

    Their seeds differ, and differ from the engine's own: generators of one seed give the same
    numbers, so that what is drafted would decide what is accepted or drawn.
    """
    seed = torch.initial_seed() + number * 0x9E3779B97F4A7C15
    return torch.Generator(device).manual_seed(seed % 2**63)


class DraftNoise:
    """Uniforms apart from the engine's own: what the target draws must not depend on what is
    drafted. A seeded request's depend on its seed and key alone, whatever its batch."""

    def __init__(self, device: torch.device):
        self._device = device
        self._generator = stream(DRAFTS, device)

    def uniform(
        self, size: int, seeds: Sequence[int | None], keys: Sequence[tuple[int, ...]]
    ) -> torch.Tensor:
        """float64 [n, size] in [0, 1): a line for each of n requests, by its seed (None: it has
        none) and a key: where in its text it draws, and what for."""
        noise = torch.rand(
            (len(seeds), size), dtype=torch.float64, device=self._device,
            generator=self._generator,
        )  # fmt: skip
        for i, (seed, key) in enumerate(zip(seeds, keys, strict=True)):
            if size and seed is not None:
                # Of integers only: these hash alike in every process.
                own = torch.Generator(self._device).manual_seed(hash((seed, *key)) % 2**63)
                noise[i].uniform_(generator=own)
        return noise
