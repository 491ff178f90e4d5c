"""What changes in the course of a run, by the share of it that is over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vllm_specplus.training.losses import Loss, loss_of

#: Share of the run in which the learning rate rises, and its least factor.
WARM_UP, LEAST_RATE = 0.05, 0.01


def learning_rate(done: float) -> float:
    """Factor of the learning rate: up in a line, then down by half a cosine, never below 0.01."""
    rate = min(done / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * min(done, 1.0)))
    return max(rate, LEAST_RATE)


@dataclass(frozen=True)
class Phases:
    """Losses one after another."""

    parts: tuple[tuple[float, Loss], ...]
    """From which share of the run on, ascending from 0.0; and which."""

    @classmethod
    def of(
        cls, first: str | Mapping[str, float], last: str | Mapping[str, float], share: float
    ) -> Phases:
        """``last`` in the last ``share`` of the run, ``first`` before; TrainingError for what is no
        loss. Forward KL leads to the target from afar, and what is served is total variation."""
        parts = [(0.0, loss_of(first)), (1.0 - share, loss_of(last))]
        return cls(tuple(parts[1:] if share >= 1 else parts[:1] if share <= 0 else parts))

    def at(self, done: float) -> Loss:
        """The loss when ``done`` of the run is over."""
        return [loss for start, loss in self.parts if start <= done][-1]
