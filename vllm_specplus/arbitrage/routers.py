"""Who decides whether the target writes a step anew."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Protocol

from vllm_specplus.arbitrage.engines import Classifier
from vllm_specplus.arbitrage.steps import Job, Step, Written, router_text


class Router(Protocol):
    """Says how likely the target would do better than the draft's step."""

    async def score(self, job: Job, steps: Sequence[Step], candidate: Written) -> float:
        """In [0, 1]; EngineError if it cannot say."""


class Learnt:
    """A classifier that was trained for it (``vllm-specplus train router``)."""

    def __init__(self, classifier: Classifier):
        self._classifier = classifier

    async def score(self, job: Job, steps: Sequence[Step], candidate: Written) -> float:
        told = [(step.writer, step.text) for step in steps]
        text = router_text(job.problem, told, candidate.text)
        return await self._classifier.probability(text, job.cache_salt)


class Drawn:
    """A uniform draw, for comparisons at the same budget: threshold ``1 - share`` escalates that
    share of the steps."""

    def __init__(self, seed: int):
        self._rng = random.Random(seed)

    async def score(self, job: Job, steps: Sequence[Step], candidate: Written) -> float:
        return self._rng.random()


class RewardThreshold:
    """Reward-guided speculation (RSD): a step is kept where a process reward model, which has not
    seen what the target would write, scores it high."""

    def __init__(self, reward: Callable[[Job, Sequence[str]], float]):
        """``reward`` scores a problem's steps, in [0, 1]."""
        self._reward = reward

    async def score(self, job: Job, steps: Sequence[Step], candidate: Written) -> float:
        return 1 - self._reward(job, [*(step.text for step in steps), candidate.text])
