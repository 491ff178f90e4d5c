"""How long a step of the target takes, by what is in it.

The curve "seconds of a forward pass and output layer over n rows" is profiled when the
engine starts (or read from a file), by kind of step: plain, with chains, with trees, since
trees take other kernels. Host work, attention over the context, prompts in
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
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from vllm_specplus.files import read_json
from vllm_specplus.strict import quoted

FORMAT_NAME = "vllm-specplus step cost"
FORMAT = f"{FORMAT_NAME} 2"

#: Row counts profiled. All of the small ones: matrix kernels work in tiles, so that on a CPU
#: without matrix instructions rows 1 to 6 take the same time and the 7th takes 12 % more, and
#: CUDA graphs are padded to their sizes. Then the counts at which GPUs begin another tile.
PROFILE_ROWS = (*range(1, 34), 40, 48, 64, 65, 96, 128, 129, 192, 256)
PROFILE_ROUNDS = 5
#: A row count that took so many times what a larger one did was not merely disturbed.
REAL_FALL = 1.1


@dataclass(frozen=True, slots=True)
class CostCurve:
    """Seconds of a forward pass over ``rows`` rows, each with its logits, of one kind."""

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


#: No step is predicted to take less, in units of a step of one row.
LEAST_UNITS = 0.05


class StepKind(IntEnum):
    """What a step runs, by the most demanding of its requests."""

    PLAIN = 0
    """One row per request."""
    CHAIN = 1
    """Some request verifies several rows, one after the other: causal attention."""
    TREE = 2
    """Some request verifies a tree: attention with a mask, and cache slots to move."""


@dataclass(frozen=True, slots=True)
class CostProfile:
    """What was measured before the first request: a curve by kind of step."""

    plain: CostCurve
    chain: CostCurve | None = None
    """None: as plain steps of as many rows."""
    tree: CostCurve | None = None
    """None: as chains."""

    def curve(self, kind: StepKind) -> CostCurve:
        """The curve of this kind, or of the next simpler one that was measured."""
        curves = (self.plain, self.chain, self.tree)
        return next(curve for curve in reversed(curves[: kind + 1]) if curve is not None)

    def save(self, path: str | Path, key: dict[str, Any]) -> None:
        """Write the curves (JSON), atomically; ``key`` says what they were measured on."""
        part = Path(f"{path}.part")
        curves = {}
        for kind in StepKind:
            curve = getattr(self, kind.name.lower())
            if curve is not None:
                curves[kind.name.lower()] = {
                    "rows": [int(n) for n in curve.rows],
                    "seconds": [float(s) for s in curve.seconds],
                }
        content = {"format": FORMAT, "key": key, "curves": curves}
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    @classmethod
    def load(cls, path: str | Path, key: dict[str, Any]) -> CostProfile:
        """Read what :meth:`save` wrote; ValueError if it was measured on anything else."""
        profile, measured = cls.read(path)
        differing = [
            f"{name}: {measured.get(name)!r}, here {value!r}"
            for name, value in key.items()
            if measured.get(name) != value
        ]
        if differing:
            raise ValueError(
                f"cost_file {quoted(path)} was measured on something else "
                f"({'; '.join(differing)}): delete it to measure again, or name another file"
            )
        return profile

    @classmethod
    def read(cls, path: str | Path) -> tuple[CostProfile, dict[str, Any]]:
        """Read what :meth:`save` wrote, and its key; ValueError if it is anything else."""
        name = f"cost_file {quoted(path)}"
        content = read_json(Path(path), name)
        found = content.get("format")
        if found != FORMAT and str(found).startswith(FORMAT_NAME):
            raise ValueError(
                f"{name} was written by another version of vllm-specplus, which measured other "
                f"kinds of steps: delete it to measure again, or name another file"
            )
        key = content.get("key")
        if found != FORMAT or not isinstance(key, dict):
            raise ValueError(
                f"{name} is not a cost file of vllm-specplus: name another, or one that does not "
                f"exist yet"
            )
        try:
            curves = {
                kind: CostCurve(
                    np.array(curve["rows"], np.int64), np.array(curve["seconds"], np.float64)
                )
                for kind, curve in content["curves"].items()
            }
            return cls(**curves), key
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise ValueError(
                f"{name} is damaged ({str(error)[:80]}): delete it to measure again"
            ) from error


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
    tree: bool = False
    """Does some request verify a tree, and not a chain?"""

    @property
    def kind(self) -> StepKind:
        if self.rows == self.requests:
            return StepKind.PLAIN
        return StepKind.TREE if self.tree else StepKind.CHAIN


class StepCost:
    """Predicts seconds per step; corrected by every step that was timed.

    The newest ``WINDOW`` undrafted, drafted and prompt-reading steps count equally, however
    rare one sort has become: what an undrafted step costs is still known after hundreds of
    drafted ones.
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

    def __init__(self, profile: CostProfile):
        self.profile = profile
        # All times in units of a one-row step, so that one prior serves any machine.
        self.unit = float(profile.plain.seconds[0])
        self._units = np.empty((len(StepKind), 0))  # each kind's curve, at 0, 1, ... rows
        self._tabulate(512)
        tail = profile.curve(StepKind.CHAIN).slope / self.unit
        # Coefficients of: the curve, a constant, each request, 1000 tokens of context,
        # drafts present at all, each drafted request, each drafted node and 1000 tokens of
        # context it attends to, each prompt row. None is of trees: what they cost beside chains
        # is the profile's to say, or trees that seem dear would never be tried again.
        self._mean = np.array([1.0, 0.2, 0.01, 0.01, 0.02, 0.0, 0.0, tail])
        deviation = np.array([0.3, 0.3, 0.05, 0.03, 0.1, 0.01, 0.07, tail + 0.002])
        self._prior = np.diag(deviation**-2.0)
        size = len(self._mean)
        self._information = np.zeros((size, size))
        self._evidence = np.zeros(size)
        # Rings of weighted samples, so that the oldest can be taken back.
        self._x = np.zeros((3, self.WINDOW, size))
        self._y = np.zeros((3, self.WINDOW))
        self._seen = np.zeros(3, np.int64)
        self.theta = self._mean.copy()

    def predict(
        self,
        rows: np.ndarray | int,
        requests: int,
        context: float,
        prompt_rows: int = 0,
        tree: np.ndarray | bool = False,
    ) -> np.ndarray:
        """Seconds, float64 [...], of steps with ``rows`` int [...] verified rows.

        ``context``: tokens, summed over the requests. Of ``n`` drafted nodes the best
        belong to ``min(n, requests)`` requests at most; their contexts are taken for average.
        ``tree`` bool [...]: some request verifies a tree.
        """
        rows = np.asarray(rows)
        last = int(rows.max())
        if last >= self._units.shape[1]:
            self._tabulate(2 * last)
        a, constant, request, kilo_token, drafts, drafted, attended, prompt = self.theta.tolist()
        nodes = rows - requests
        kind = np.where(nodes == 0, StepKind.PLAIN, np.where(tree, StepKind.TREE, StepKind.CHAIN))
        units = a * self._units[kind, rows]
        units += constant + request * requests + kilo_token * context / 1000 + prompt * prompt_rows
        units += drafts * (nodes > 0)
        units += drafted * np.minimum(nodes, requests)
        units += attended * nodes * (context / requests / 1000)
        return np.maximum(units, LEAST_UNITS) * self.unit

    def _tabulate(self, rows: int) -> None:
        counts = np.arange(rows + 1)
        curves = [self.profile.curve(kind)(counts) for kind in StepKind]
        self._units = np.stack(curves) / self.unit

    def predict_step(self, shape: StepShape) -> float:
        """:meth:`predict` of one step: without arrays, which take longer than the sum."""
        if shape.rows >= self._units.shape[1]:
            self._tabulate(2 * shape.rows)
        a, constant, request, kilo_token, drafts, drafted, attended, prompt = self.theta.tolist()
        requests, nodes = shape.requests, shape.rows - shape.requests
        units = a * self._units[shape.kind, shape.rows] + constant + request * requests
        units += kilo_token * shape.context / 1000 + prompt * shape.prompt_rows
        if nodes:
            units += drafts + drafted * min(nodes, requests)
            units += attended * nodes * (shape.context / requests / 1000)
        return max(float(units), LEAST_UNITS) * self.unit

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
                self._units[shape.kind, shape.rows],
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
        ring = 2 if shape.prompt_rows else int(nodes > 0)
        slot = self._seen[ring] % self.WINDOW
        old_x, old_y = self._x[ring, slot], self._y[ring, slot]
        self._information += x[:, None] * x - old_x[:, None] * old_x
        self._evidence += x * y - old_x * old_y
        self._x[ring, slot], self._y[ring, slot] = x, y
        self._seen[ring] += 1
        if self._seen[ring] <= self.WINDOW or self._seen[ring] % self.REFIT == 0:
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
    prompt: float = 0.0
    """Seconds that reading prompts adds to a step that does, a moving average."""
