"""How the slow requests of a method compare with those of none.

Both methods answered the same questions, so questions are what is drawn with replacement, each with
its time under either method: what makes a question slow, a long prompt beside it, is in both.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from pydantic import BaseModel

#: Percentiles that are compared, and resamples of each.
PERCENTS, RESAMPLES = (50, 95, 99), 1000
#: Fewer requests have no p99 to speak of: it would be the slowest one.
FEWEST = 100


class Ratio(BaseModel):
    """A percentile's ratio to that of ``none``: as measured, and the median and the 95 % interval
    of the bootstrap."""

    ratio: float
    median: float
    low: float
    high: float


class Tails(BaseModel):
    """Ratios of percentiles over the requests."""

    requests: int
    p50: Ratio
    p95: Ratio
    p99: Ratio


def compare(
    values: Mapping[tuple[int, str], float], reference: Mapping[tuple[int, str], float]
) -> Tails | None:
    """Tails of ``values`` over those of ``reference``, both by repeat and question; None where
    fewer than ``FEWEST`` are in both."""
    both = sorted(values.keys() & reference.keys())
    if len(both) < FEWEST:
        return None
    pairs = np.array([[values[key], reference[key]] for key in both])
    drawn = np.random.default_rng(0).integers(len(both), size=(RESAMPLES, len(both)))
    measured = _ratios(pairs[None])[:, 0]
    resampled = _ratios(pairs[drawn])
    ratios: Sequence[Ratio] = [
        Ratio(ratio=ratio, median=middle, low=low, high=high)
        for ratio, (low, middle, high) in zip(
            measured.tolist(), np.percentile(resampled, [2.5, 50, 97.5], axis=1).T, strict=True
        )
    ]
    return Tails(requests=len(both), p50=ratios[0], p95=ratios[1], p99=ratios[2])


def _ratios(pairs: np.ndarray) -> np.ndarray:
    """float64 [3, B] of each percentile, of ``pairs`` float64 [B, requests, 2]."""
    ours, theirs = np.moveaxis(np.percentile(pairs, PERCENTS, axis=1), 2, 0)
    return ours / theirs
