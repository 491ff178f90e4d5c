"""A threshold that keeps a promise: of so many errors, at most a stated share is accepted.

A judge is asked of errors that it has not learnt. The threshold is lowered from "accept nothing" as
long as the upper 95 % bound of the share of accepted errors stays within the risk. The shares that
are looked at can only grow on the way, so the first one that is too much ends it, and the bound
holds although the threshold was chosen on the same errors (testing in a fixed sequence).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from torch import Tensor

from vllm_specplus.training.probe import wilson

#: Of the one-sided bound.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Calibration:
    """A threshold, and what is known of it."""

    threshold: float
    """Scores above it are accepted."""
    risk: float
    """The largest share of errors that was to be accepted."""
    errors: int
    """That were tried, one of a text: its first wrong token."""
    errors_accepted: float
    """Their share that the threshold accepts."""
    errors_accepted_high: float
    """Its upper bound, exact (Clopper and Pearson)."""
    right_accepted: float
    """Share of right tokens that it accepts: what is gained."""
    wrong_share: float
    """Share of errors among all that it accepts of these texts, with its 95 % interval. It depends
    on how many errors the texts have, which the others do not."""
    wrong_share_low: float
    wrong_share_high: float

    def to_figures(self) -> dict[str, float]:
        """As figures by name."""
        return asdict(self)


def upper_bound(hits: int, count: int, confidence: float = CONFIDENCE) -> float:
    """The largest share at which ``hits`` or fewer of ``count`` are not less likely than 1 -
    ``confidence`` (Clopper and Pearson's, one-sided)."""
    if hits >= count:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        if at_most(hits, count, share) > 1 - confidence:
            low = share
        else:
            high = share
    return high


def at_most(hits: int, count: int, share: float) -> float:
    """P(X <= hits) of a binomial X of ``count`` draws."""
    if not 0 < share < 1:
        return float(share <= 0)
    logs = (
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(share) + (count - k) * math.log1p(-share)
        for k in range(hits + 1)
    )  # fmt: skip
    return math.fsum(map(math.exp, logs))


def calibrate(errors: Tensor, right: Tensor, risk: float) -> Calibration | None:
    """The lowest threshold that keeps the promise, by scores in [0, 1] of errors [E] and of right
    tokens [R]; None: there are too few errors to promise it."""
    count = len(errors)
    if upper_bound(0, count) > risk:
        return None
    ordered = errors.sort(descending=True).values.tolist()
    threshold = ordered[0]
    # At each score, those above it are accepted: fewer than its place where some are equal.
    for score in ordered[1:]:
        accepted = sum(each > score for each in ordered)
        if upper_bound(accepted, count) > risk:
            break
        threshold = score
    wrong = int((errors > threshold).sum())
    good = int((right > threshold).sum())
    low, high = wilson(wrong, wrong + good)
    return Calibration(
        threshold, risk, count, wrong / count, upper_bound(wrong, count),
        good / max(len(right), 1), wrong / max(wrong + good, 1), low, high,
    )  # fmt: skip
