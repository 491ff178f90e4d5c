"""When a chain ends before its last level.

A stop is asked behind every level, which is then in the draft: it decides whether there is another
one, and by that depends on the tokens drawn so far, as the next draws do anyway. A rule that judges
a chain token by token, or as a block from its last token on, is lossless with it; one that dropped
the token it had looked at would not be (a draft of the tokens that are kept follows another
distribution than the one it is tested with).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from vllm_specplus.drafting.stop_config import (
    AcceptanceHeadStop,
    AdaptiveConfidenceStop,
    ConfidenceStop,
    NoStop,
    StopConfig,
)

#: Draft & Verify's memory of the acceptance, and of the threshold.
ACCEPTANCE_MEMORY, THRESHOLD_MEMORY = 0.5, 0.9


class Stop(ABC):
    """Ends the chains of one engine; R requests draft in a round."""

    def begin(self, requests: Sequence[str], most: np.ndarray) -> None:  # noqa: B027
        """A round begins; ``most`` int64 [R] levels it may have."""

    def verified(self, request: str, drafted: int, accepted: int) -> None:  # noqa: B027
        """Of the last ``drafted`` tokens of a request so many were accepted."""

    @abstractmethod
    def goes_on(self, depth: int, alive: np.ndarray, confidence: np.ndarray) -> np.ndarray:
        """Bool [A]: which of the chains ``alive`` int64 [A], numbers of the round's requests, have
        another level behind that of ``depth``, from 0 on. ``confidence`` float32 [A]: what the
        draft gave the token of this level."""

    def forget(self, request: str) -> None:  # noqa: B027
        """The request is gone."""


class Confidence(Stop):
    """SWIFT's: behind a token below a fixed threshold."""

    def __init__(self, threshold: float):
        self._threshold = threshold

    def goes_on(self, depth, alive, confidence):
        return confidence >= self._threshold


def adapted(
    threshold: float, acceptance: float, wanted: float, step: float, drafted: int, most: int
) -> float:
    """Draft & Verify's next threshold (section 3.3), of a request whose ``acceptance`` is that
    after a round which ``drafted`` so many of at ``most`` so many tokens."""
    if acceptance < wanted:
        moved = threshold + step
    else:
        moved = threshold if drafted == most else threshold - step
    return THRESHOLD_MEMORY * threshold + (1 - THRESHOLD_MEMORY) * moved


class AdaptiveConfidence(Stop):
    """Draft & Verify's: a request that accepts less than it should drafts what it is surer of."""

    def __init__(self, threshold: float, wanted: float, step: float):
        self._first, self._wanted, self._step = threshold, wanted, step
        # Of each request: threshold, acceptance, levels that its last round might have.
        self._of: dict[str, tuple[float, float, int]] = {}
        self._thresholds = np.empty(0)

    def begin(self, requests, most):
        for name, levels in zip(requests, most.tolist(), strict=True):
            threshold, acceptance, _ = self._of.get(name, (self._first, self._wanted, 0))
            self._of[name] = threshold, acceptance, levels
        self._thresholds = np.array([self._of[name][0] for name in requests])

    def verified(self, request, drafted, accepted):
        if request not in self._of or not drafted:
            return
        threshold, acceptance, most = self._of[request]
        acceptance += (1 - ACCEPTANCE_MEMORY) * (accepted / drafted - acceptance)
        threshold = adapted(threshold, acceptance, self._wanted, self._step, drafted, most)
        self._of[request] = min(max(threshold, 0.0), 1.0), acceptance, most

    def goes_on(self, depth, alive, confidence):
        return confidence >= self._thresholds[alive]

    def forget(self, request):
        self._of.pop(request, None)


class Tau(Stop):
    """DEL's: behind a token below the threshold of the exit that its request drafts from."""

    def __init__(self, threshold_of: Callable[[str], float]):
        """``threshold_of`` a request, by its exit's statistics; NaN: they know of none."""
        self._threshold_of = threshold_of
        self._thresholds = np.empty(0)

    def begin(self, requests, most):
        self._thresholds = np.array([self._threshold_of(name) for name in requests])

    def goes_on(self, depth, alive, confidence):
        return ~(confidence < self._thresholds[alive])  # a comparison with NaN is false


class Rejection(Stop):
    """SpecDec++'s: where some rejection has become probable.

    The pass that draws the first token reads a verified one. Each later one reads a drafted token,
    which the head then rates, and draws another: behind it, ``cum`` is the probability that all
    tokens which have been read are accepted. The token that is drawn last was not rated; it has
    cost nothing, and stays.
    """

    def __init__(self, threshold: float, rate: Callable[[], np.ndarray]):
        """``rate`` returns P(accept), float32 [A], of the tokens read in the last pass."""
        self._threshold, self._rate = threshold, rate
        self._all_accepted = np.empty(0)

    def begin(self, requests, most):
        self._all_accepted = np.ones(len(requests))

    def goes_on(self, depth, alive, confidence):
        if depth:
            self._all_accepted[alive] *= self._rate()
        return 1 - self._all_accepted[alive] <= self._threshold


def make_stop(
    config: StopConfig,
    rate: Callable[[], np.ndarray] | None = None,
    threshold_of: Callable[[str], float] | None = None,
) -> Stop | None:
    """The stop that is configured, None for "none"; ``rate``, ``threshold_of``: see
    :class:`Rejection`, :class:`Tau`."""
    if isinstance(config, NoStop):
        return None
    if isinstance(config, ConfidenceStop):
        return Confidence(config.threshold)
    if isinstance(config, AdaptiveConfidenceStop):
        return AdaptiveConfidence(config.threshold, config.acceptance, config.step)
    if isinstance(config, AcceptanceHeadStop):
        return Rejection(config.threshold, _needed(rate))
    return Tau(_needed(threshold_of))


def _needed(given: Any) -> Any:
    assert given is not None, "the method's configuration lets no other stop pass"
    return given
