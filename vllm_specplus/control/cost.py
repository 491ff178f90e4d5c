"""How long a step of the target takes, by what is in it.

The curve "seconds of a forward pass and output layer over n rows" is profiled when the
engine starts (or read from a file). Host work, attention over the context, prompts in
the same step and whatever else the curve does not know is learnt from the steps that
are actually run: a linear correction, fitted by least squares to recent steps with the
profile as prior, so that directions the traffic does not excite stay where the profile
put them. SmartSpec (arXiv 2406.14066, sec. 4) fits the same kind of features offline.

Times are loop times, from one step's start to the next one's, so that scheduling and
output processing count too; the time a method takes to draft is kept apart.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "vllm-specplus step cost 1"

#: Row counts profiled. All of the small ones: matrix kernels work in tiles, so that on a CPU
#: without matrix instructions rows 1 to 6 take the same time and the 7th takes 12 % more, and
#: CUDA graphs are padded to their sizes. Then the counts at which GPUs begin another tile.
PROFILE_ROWS = (*range(1, 34), 40, 48, 64, 65, 96, 128, 129, 192, 256)
PROFILE_ROUNDS = 5
#: A row count that took so many times what a larger one did was not merely disturbed.
REAL_FALL = 1.1


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Seconds of a forward pass over ``rows`` rows, each with its logits."""

    rows: np.ndarray
    """int64 [G] ascending."""
    seconds: np.ndarray
    """float64 [G]."""

    def __post_init__(self):
        ascending = (np.diff(self.rows) > 0).all()
        if len(self.rows) != len(self.seconds) or len(self.rows) < 2 or not ascending:
            raise ValueError("a cost curve needs at least two ascending row counts and their times")
        if not (np.isfinite(self.seconds).all() and (np.asarray(self.seconds) > 0).all()):
            raise ValueError("a cost curve needs positive times")

    @classmethod
    def fit(cls, rows: np.ndarray, rounds: np.ndarray) -> CostCurve:
        """From repeated timings, float64 [rounds, G]: the fastest of each row count.

        What disturbs a timing only adds to it, so a count that took a little longer than a
        larger one gets that one's time. One that took much longer does so: one or two rows go
        to other matrix kernels, and on some CPUs six rows are faster.
        """
        fastest = np.asarray(rounds).min(axis=0)
        later = np.minimum.accumulate(fastest[::-1])[::-1]
        return cls(rows, np.where(fastest > REAL_FALL * later, fastest, later))

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Linear between the profiled points and, with ``slope``, beyond them."""
        inside = np.interp(rows, self.rows, self.seconds)
        return inside + self.slope * np.maximum(np.asarray(rows) - self.rows[-1], 0)

    @property
    def slope(self) -> float:
        """Seconds per row from a quarter of the most rows on: the price of many rows."""
        first = min(int(np.searchsorted(self.rows, self.rows[-1] / 4)), len(self.rows) - 2)
        rise = self.seconds[-1] - self.seconds[first]
        return max(float(rise / (self.rows[-1] - self.rows[first])), 0.0)

    def save(self, path: str | Path, key: dict[str, Any]) -> None:
        """Write the curve (JSON), atomically; ``key`` says what it was measured on."""
        part = Path(f"{path}.part")
        content = {
            "format": FORMAT,
            "key": key,
            "rows": [int(n) for n in self.rows],
            "seconds": [float(s) for s in self.seconds],
        }
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path, key: dict[str, Any]) -> CostCurve:
        """Read what :meth:`save` wrote; ValueError if it was measured on anything else."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"cost_file {str(path)!r} is not readable: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"cost_file {str(path)!r} is not a cost file of vllm-specplus")
        measured = content.get("key", {})
        differing = [
            f"{name}: {measured.get(name)!r}, here {value!r}"
            for name, value in key.items()
            if measured.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"cost_file {str(path)!r} was measured on something else "
                f"({'; '.join(differing)}): delete it to measure again, or name another file"
            )
        try:
            rows = np.array(content["rows"], np.int64)
            return cls(rows, np.array(content["seconds"], np.float64))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"cost_file {str(path)!r} is damaged: {error}") from error


@dataclass(frozen=True, slots=True)
class StepShape:
    """What was in a step."""

    requests: int
    rows: int
    """Verified rows: the requests' newest tokens and their drafted nodes."""
    context: int
    """Tokens of context, summed over the requests."""
    prompt_rows: int = 0
    """Rows of prompts read in the same step."""


class StepCost:
    """Predicts seconds per step; corrected by every step that was timed.

    The newest ``WINDOW`` steps of each kind (undrafted, drafted, with prompts) count
    equally, however rare a kind has become: what an undrafted step costs is still known
    after hundreds of drafted ones.
    """

    WINDOW = 64
    #: Standard deviation of a single step's time, relative.
    NOISE = 0.1
    #: A step that took so many times what was predicted was no step: the process was stopped.
    PAUSE = 20
    #: Rows, requests, context and prompts never make a step shorter.
    FLOOR = np.array([0.1, -np.inf, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
    #: Once the windows have filled, the fit follows every so many steps.
    REFIT = 4

    def __init__(self, curve: CostCurve):
        self.curve = curve
        # All times in units of a one-row step, so that one prior serves any machine.
        self.unit = float(curve.seconds[0])
        self._units = np.empty(0)  # the curve in units, at 0, 1, ... rows
        self._tabulate(512)
        tail = curve.slope / self.unit
        # Coefficients of: the curve, a constant, each request, 1000 tokens of context,
        # drafts present at all, each drafted request, each drafted node and 1000 tokens of
        # context it looks at, each prompt row.
        self._mean = np.array([1.0, 0.2, 0.01, 0.01, 0.02, 0.0, 0.0, tail])
        deviation = np.array([0.3, 0.3, 0.05, 0.03, 0.1, 0.01, 0.07, tail + 0.002])
        self._prior = np.diag(deviation**-2.0)
        self._information = np.zeros((8, 8))
        self._evidence = np.zeros(8)
        # Rings of weighted samples, by kind, so that the oldest can be taken back.
        self._x = np.zeros((3, self.WINDOW, 8))
        self._y = np.zeros((3, self.WINDOW))
        self._seen = np.zeros(3, np.int64)
        self.theta = self._mean.copy()

    def predict(
        self, rows: np.ndarray, requests: int, context: float, prompt_rows: int = 0
    ) -> np.ndarray:
        """Seconds, float64 [...], of steps with ``rows`` int [...] verified rows.

        ``context``: tokens, summed over the requests. Of ``n`` drafted nodes the best
        belong to ``min(n, requests)`` requests at most; their contexts are taken for average.
        """
        rows = np.asarray(rows)
        last = int(rows.max())
        if last >= len(self._units):
            self._tabulate(2 * last)
        a, constant, request, kilo_token, drafts, drafted, look, prompt = self.theta.tolist()
        nodes = rows - requests
        units = a * self._units[rows]
        units += constant + request * requests + kilo_token * context / 1000 + prompt * prompt_rows
        units += drafts * (nodes > 0)
        units += drafted * np.minimum(nodes, requests)
        units += look * nodes * (context / requests / 1000)
        return np.maximum(units, 0.05) * self.unit

    def _tabulate(self, rows: int) -> None:
        self._units = self.curve(np.arange(rows + 1)) / self.unit

    def predict_step(self, shape: StepShape) -> float:
        """Seconds of a step of this shape."""
        return float(self.predict(shape.rows, shape.requests, shape.context, shape.prompt_rows))

    def observe(self, shape: StepShape, seconds: float) -> float | None:
        """A step of this shape took ``seconds``; returns what was predicted, or None if it was
        a pause, from which nothing is learnt."""
        predicted = self.predict_step(shape)
        if seconds > self.PAUSE * predicted:
            return None
        # A disturbance is not a price: one step moves the model at most so far.
        seconds = min(max(seconds, predicted / 2), 2 * predicted)
        nodes = shape.rows - shape.requests
        x = np.array(
            [
                self._units[shape.rows],
                1.0,
                shape.requests,
                shape.context / 1000,
                nodes > 0,
                min(nodes, shape.requests),
                nodes * shape.context / shape.requests / 1000,
                shape.prompt_rows,
            ]
        )
        weight = self.unit / (self.NOISE * predicted)
        x *= weight
        y = weight * seconds / self.unit - x @ self._mean
        kind = 2 if shape.prompt_rows else int(nodes > 0)
        place = self._seen[kind] % self.WINDOW
        old_x, old_y = self._x[kind, place], self._y[kind, place]
        self._information += x[:, None] * x - old_x[:, None] * old_x
        self._evidence += x * y - old_x * old_y
        self._x[kind, place], self._y[kind, place] = x, y
        self._seen[kind] += 1
        if self._seen[kind] <= self.WINDOW or self._seen[kind] % self.REFIT == 0:
            self.theta = self._fit()
        return predicted

    def _fit(self) -> np.ndarray:
        """The coefficients, float64 [8], by least squares above the floor.

        One that would fall below stays on the floor while the others are fitted anew:
        merely raising it would leave every prediction too high.
        """
        information = self._prior + self._information
        theta, free = self._mean.copy(), np.ones(len(self._mean), bool)
        while True:
            given = self._evidence - information[:, ~free] @ (theta - self._mean)[~free]
            fit = np.linalg.solve(information[np.ix_(free, free)], given[free])
            theta[free] = self._mean[free] + fit
            below = free & (theta < self.FLOOR)
            if not below.any():
                return theta
            theta[below], free = self.FLOOR[below], free & ~below


class DraftingCost:
    """Seconds that drafting takes, a moving average: per drafted request, or per forward pass of
    a draft model, which costs the same for a few requests as for one."""

    #: Share of the newest time in the average.
    NEWEST = 0.1
    #: Drafting that took so many times what it does is a pause, if it stays alone: something is
    #: compiled, or recorded as a CUDA graph.
    PAUSE = 4

    def __init__(self) -> None:
        self.seconds = 0.0
        self._paused = False  # did the last drafting take far longer than that?

    def observe(self, max_nodes: np.ndarray, depths: np.ndarray | None, seconds: float) -> None:
        """Growing trees of up to ``max_nodes`` int32 [R] took ``seconds``; ``depths`` int64 [R]:
        they are of a draft model, and have so many levels."""
        units = int((max_nodes > 0).sum())
        if not units:
            return
        if depths is not None:
            units = _passes(int(depths.max()))
        pause = 0 < self.PAUSE * self.seconds < seconds / units and not self._paused
        self._paused = pause
        if not pause:
            self.seconds += self.NEWEST * (seconds / units - self.seconds)

    def of_requests(self, requests: int) -> float:
        """Seconds of drafting for so many requests."""
        return self.seconds * requests

    def of_levels(self, deepest: np.ndarray) -> np.ndarray:
        """Seconds, float64 [...], of drafting trees whose deepest level is ``deepest`` int [...],
        from 1; 0: none is drafted."""
        return self.seconds * np.where(deepest > 0, _passes(deepest), 0)


def _passes(deepest):
    """Forward passes of a draft model: one per level, and the one that reads the newest token."""
    return deepest + 1


@dataclass(slots=True)
class Prices:
    """What is known about the cost of a step and of drafting for it."""

    drafting: DraftingCost
    step: StepCost | None = None
    """None: it is not profiled."""
