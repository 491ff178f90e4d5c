"""How requests come: so many in flight, or so many per second whatever is in flight."""

from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from vllm_specplus.bench import InputError
from vllm_specplus.bench.methods import parse_concurrencies

#: Requests in flight while an engine warms up for a rate.
WARMUP_IN_FLIGHT = 8


class Load(BaseModel):
    """A closed loop of `in_flight` requests, each followed by the next one; or an open loop of
    `rate` requests per second.

    `burstiness` is the shape of the gamma distribution of the times between two requests, as of
    `vllm bench serve`: 1 is a Poisson process, and below it they come in bursts.
    """

    model_config = ConfigDict(frozen=True)

    in_flight: int | None = None
    rate: float | None = None
    burstiness: float = 1.0

    def __str__(self) -> str:
        return f"{self.short}{' in flight' if self.rate is None else ''}"

    @property
    def short(self) -> str:
        """For the cell of a table."""
        return f"{self.in_flight}" if self.rate is None else f"{self.rate:g}/s"

    @property
    def slots(self) -> int:
        """Requests in flight that a round and the warm-up are to fill."""
        return self.in_flight or WARMUP_IN_FLIGHT

    def arrivals(self, count: int, seed: int) -> list[float] | None:
        """Seconds from a round's start at which its `count` requests come; None: one follows the
        other. Their mean rate is `rate` exactly, and the same seed gives the same pattern at every
        rate."""
        if self.rate is None:
            return None
        times = np.random.default_rng(seed).gamma(self.burstiness, size=count).cumsum()
        return (times * (count / self.rate / times[-1])).tolist()


def parse_loads(concurrency: str | None, rate: str | None, burstiness: float) -> list[Load]:
    """Read `--concurrency` and `--rate`, lists separated by commas; by default one in flight."""
    if not burstiness > 0:
        raise InputError(f"--burstiness must be above 0, not {burstiness}")
    if concurrency is None:
        concurrency = "" if rate else "1"
    loads = [Load(in_flight=n) for n in parse_concurrencies(concurrency)] if concurrency else []
    return loads + [Load(rate=each, burstiness=burstiness) for each in _rates(rate)]


def _rates(text: str | None) -> Sequence[float]:
    if text is None:
        return []
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as exc:
        raise InputError(f"--rate needs numbers separated by commas, not {text!r}") from exc
    if not all(0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
        raise InputError(f"--rate needs different numbers above 0, not {text!r}")
    return rates
