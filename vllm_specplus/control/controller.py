"""The controller: how many nodes every request gets in this step.

One step, as the engine calls it::

    step_took     the last step's shape and duration correct the cost model
    prepare       the texts label the last trees; who may draft, and the acceptance
                  tables by which a proposer grows its trees best first
    (propose)     trees up to that limit, every node with its source
    choose        the nodes to verify, by the policy

Grown but unverified nodes cost microseconds with methods that look drafts up, so such
methods keep growing while speculation is off: the text labels their trees, and drafting
resumes in the step in which it pays. A method whose drafting itself costs time is
only probed, ever more rarely up to ``PROBE_INTERVALS``.

A draft model (a proposer with ``levels``) pays a forward pass per level, and draws. Its
trees are therefore planned before they are drafted, by how often earlier texts followed a
tree to each level, and verified whole. Cutting them afterwards by what was drawn would
also be wrong: nodes dropped for a low probability of the token that was drawn leave tokens
that follow another distribution than the one they are tested with. Where drawn nodes are
fused with others (RASD), they stay, and only the others compete; what that says about
drafting counts from the next step on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_specplus.control.acceptance import (
    AcceptanceEstimator,
    expected_tokens,
    look_up,
    survivals,
)
from vllm_specplus.control.budget import best_goodput, keep_nodes
from vllm_specplus.control.cost import StepCost, StepShape
from vllm_specplus.control.settings import ControlConfig
from vllm_specplus.metrics import Counters
from vllm_specplus.step import Source, StepContext
from vllm_specplus.tree import DraftBatch

#: Speculation that is off comes back when it promises this much more goodput.
HYSTERESIS = 0.02
#: While off, one step in so many is speculated, to keep the step cost honest.
PROBE_INTERVALS = (16, 256)
#: While on, some steps are not speculated either, for the same reason: as many as cost
#: this share of the tokens, and at most one in EXPLORE_INTERVAL: where speculation barely
#: pays, undrafted steps cost nothing, but nor do they teach what drafts are worth.
EXPLORE_LOSS, EXPLORE_INTERVAL = 0.004, 4
#: A method is cheap while drafting takes less than this share of an undrafted step.
CHEAP_DRAFT = 0.02
#: Expected tokens are scaled by how earlier expectations came true: memory per step, and
#: tokens that the prior "exactly" counts for.
CALIBRATION_MEMORY, CALIBRATION_PRIOR = 0.9, 3.0
#: A request grows at most GROWTH[0] nodes plus GROWTH[1] times the most any request
#: got in the last step: more would be grown only to be cut.
GROWTH = (6, 2)


@dataclass(slots=True)
class _Pending:
    """Trees as grown, until the text tells which nodes were right."""

    request_ids: list[str]
    drafted_at: np.ndarray
    tokens: np.ndarray
    parents: np.ndarray
    sources: np.ndarray
    starts: np.ndarray
    expected: np.ndarray
    """float64 [R] tokens each request was expected to gain by its verified nodes, before
    calibration."""


class Controller:
    """Decides under one policy for one engine; see the module's docstring."""

    def __init__(
        self,
        config: ControlConfig,
        sources: Sequence[Source],
        max_nodes: int,
        max_rows: int,
        counters: Counters,
        levels: Sequence[int] | None = None,
        draws: bool = False,
    ):
        """``max_nodes`` per request; ``max_rows`` verified rows per step; ``levels``: of a
        draft model, nodes of each level of its trees; ``draws``: nodes may be draws."""
        self._draws = draws
        self._rest = False  # the next step is not drafted, to keep the step cost honest
        self._levels = None if levels is None else np.array(levels)
        self.config = config
        self.acceptance = AcceptanceEstimator(sources)
        self.cost: StepCost | None = None
        """Set by the engine once the step is profiled; goodput drafts nothing before."""
        self.max_nodes = max_nodes
        self.max_rows = max_rows
        self.counters = counters
        self.speculating = True
        self._pending: _Pending | None = None
        self._most = max_nodes  # nodes the luckiest request got in the last step
        self._idle_steps = 0  # since the last verified draft, while off
        self._interval = PROBE_INTERVALS[0]
        self._break_even = 0.0  # tokens with which the levels drafted last have paid
        self._draft_seconds = 0.0  # per drafted request (and level + 1), moving average
        self._paused = False  # did the last drafting take far longer than that?
        self._expected = self._gained = 0.0  # tokens of recent steps, decayed
        self._explore_credit = 0.0

    # -- what happened ------------------------------------------------------------

    def step_took(self, shape: StepShape, seconds: float) -> None:
        """The last step had this shape and took this long, drafting not included."""
        if self.cost is None:
            return
        predicted = self.cost.observe(shape, seconds)
        if predicted is not None and not shape.prompt_rows:
            self.counters.add("timed_steps")
            self.counters.add("predicted_step_seconds", predicted)
            self.counters.add("measured_step_seconds", seconds)

    def drafting_took(self, max_nodes: np.ndarray, seconds: float) -> None:
        """Growing the last trees, of up to ``max_nodes`` int32 [R], took this long."""
        units = int((max_nodes > 0).sum())
        if units and self._levels is not None:
            # A level of a few requests costs what a level of one does: it is one pass.
            units = 1 + int(self._depths(max_nodes).max())
        if units:
            # A lone pause (something is compiled or recorded) is no price.
            pause = 0 < 4 * self._draft_seconds < seconds / units and not self._paused
            self._paused = pause
            if not pause:
                self._draft_seconds += 0.1 * (seconds / units - self._draft_seconds)

    def forget(self, request_id: str) -> None:
        self.acceptance.forget(request_id)

    # -- before drafting ------------------------------------------------------------

    def prepare(self, step: StepContext) -> None:
        """Learn from the texts; set ``step.acceptance`` and lower ``step.max_nodes``."""
        self._learn(step)
        step.acceptance = self.acceptance.tables(step.request_ids)
        if self._levels is not None:
            self._plan(step)
            return
        if self.config.policy != "goodput":
            return
        if not self.speculating and not self._drafting_is_cheap(step) and not self._probe_is_due():
            step.max_nodes[:] = 0
            self._idle_steps += 1
        elif self._rest:
            step.max_nodes[:] = 0
            self._rest = False
        else:
            np.minimum(step.max_nodes, GROWTH[0] + GROWTH[1] * self._most, out=step.max_nodes)

    def _learn(self, step: StepContext) -> None:
        trees, self._pending = self._pending, None
        if trees is None:
            return
        places = {name: i for i, name in enumerate(step.request_ids)}
        rows = np.array([places.get(name, -1) for name in trees.request_ids], np.int32)
        here = rows >= 0
        if not here.any():
            return
        gained = step.num_tokens[rows] - trees.drafted_at - 1
        self._expected = CALIBRATION_MEMORY * self._expected + trees.expected[here].sum()
        self._gained = CALIBRATION_MEMORY * self._gained + gained[here & (trees.expected > 0)].sum()
        if self._levels is not None:
            trees = self._as_chains(trees, rows, gained, step)
            if not self.speculating and gained[here].sum() > self._break_even:
                # Only probes teach while off: one that has paid calls for the next.
                self._interval = 1
        labelled = self.acceptance.learn(
            trees.tokens, trees.parents, trees.sources, trees.starts, trees.drafted_at,
            trees.request_ids, rows, step.token_ids, step.num_tokens,
        )  # fmt: skip
        self.counters.add("nodes_labelled", labelled)

    def _as_chains(
        self, trees: _Pending, rows: np.ndarray, gained: np.ndarray, step: StepContext
    ) -> _Pending:
        """Every tree as the chain of its levels, right as far as the text followed it."""
        depths = self._depths(np.diff(trees.starts))
        starts = np.zeros(len(depths) + 1, np.int32)
        np.cumsum(depths, out=starts[1:])
        level = np.arange(starts[-1]) - np.repeat(starts[:-1], depths)
        request = np.repeat(rows, depths)
        # A request that is gone has row -1 and teaches nothing, whatever its tokens.
        place = np.repeat(trees.drafted_at, depths) + level
        tokens = step.token_ids[request, np.minimum(place, step.token_ids.shape[1] - 1)]
        wrong = level >= np.repeat(gained, depths)
        return replace(
            trees,
            tokens=np.where(wrong, -1, tokens).astype(np.int32),
            parents=(level - 1).astype(np.int32),
            sources=np.zeros(len(level), np.int32),
            starts=starts,
        )

    def _calibration(self) -> float:
        """Accepted over expected tokens. The nodes with the highest estimates are those
        that were overestimated most, so a choice by estimates expects too much."""
        return min((self._gained + CALIBRATION_PRIOR) / (self._expected + CALIBRATION_PRIOR), 1.0)

    def _drafting_is_cheap(self, step: StepContext) -> bool:
        if self._draws:
            return False  # draws are verified once they are made
        if self.cost is None:
            return True
        requests = len(step.request_ids)
        plain = float(self.cost.predict(requests, requests, float(step.num_tokens.sum())))
        return self._draft_seconds * requests < CHEAP_DRAFT * plain

    def _probe_is_due(self) -> bool:
        return self._idle_steps >= self._interval

    # -- planning levels --------------------------------------------------------------

    def _depths(self, nodes: np.ndarray) -> np.ndarray:
        """Levels, int64 [R], of trees with so many nodes."""
        above = np.cumsum(self._levels) - self._levels
        return (above < nodes[:, None]).sum(1)

    def _level_survival(self, step: StepContext, depths: np.ndarray) -> np.ndarray:
        """Probability that the text follows a tree to each level, float64 [R, D]; 0 below the
        ``depths`` int64 [R] of the trees."""
        levels = np.arange(len(self._levels))
        table = step.acceptance[:, np.minimum(levels, step.acceptance.shape[1] - 1), 0]
        survival = np.cumprod(table, axis=1, dtype=np.float64)
        survival[levels >= depths[:, None]] = 0.0
        return survival

    def _plan(self, step: StepContext) -> None:
        """Lower ``step.max_nodes`` to the levels that are worth drafting."""
        deepest = self._depths(step.max_nodes)
        survival = self._level_survival(step, deepest)
        requests = len(step.request_ids)
        rows = np.cumsum(np.broadcast_to(self._levels, survival.shape), axis=1)
        depths = deepest
        if self.config.policy == "threshold":
            depths = (survival >= 1.0 - self.config.threshold).sum(1)
        elif self.config.policy == "goodput":
            depths = self._best_depths(step, survival)
        nodes = np.where(depths > 0, rows[np.arange(requests), np.maximum(depths - 1, 0)], 0)
        np.minimum(step.max_nodes, nodes, out=step.max_nodes)
        # The step's rows are bounded: the batch's last requests yield.
        room = np.maximum(self.max_rows - requests - np.cumsum(step.max_nodes) + step.max_nodes, 0)
        np.minimum(step.max_nodes, room, out=step.max_nodes)

    def _best_depths(self, step: StepContext, survival: np.ndarray) -> np.ndarray:
        """Levels per request, int64 [R], with the most expected tokens per second.

        ``survival`` float64 [R, D]: probability that the text follows to each level. All
        levels of all requests compete, by tokens per row; the deepest one chosen decides
        how many passes the draft makes.
        """
        requests = len(survival)
        if self.cost is None:
            return np.zeros(requests, np.int64)
        density = np.minimum.accumulate(survival / self._levels, axis=1)
        order = np.argsort(-density.reshape(-1), kind="stable")
        order = order[survival.reshape(-1)[order] > 0]
        level = order % len(self._levels)
        rows = requests + np.concatenate(([0], np.cumsum(self._levels[level])))
        passes = np.concatenate(([-1], np.maximum.accumulate(level))) + 1
        context = float(step.num_tokens.sum())
        seconds = self.cost.predict(rows, requests, context)
        seconds = seconds + self._draft_seconds * np.where(passes > 0, passes + 1, 0)
        best, gain = best_goodput(survival.reshape(-1)[order], requests, seconds)
        best = self._switched(best, gain)
        if best < len(seconds):
            self._break_even = requests * float(seconds[best] / seconds[0] - 1)
        return np.bincount(order[:best] // len(self._levels), minlength=requests)

    # -- after drafting -------------------------------------------------------------

    def choose(self, step: StepContext, drafts: DraftBatch) -> DraftBatch:
        """The nodes to verify: subtrees of ``drafts``, one tree per request."""
        starts = np.zeros(len(drafts.counts) + 1, np.int32)
        np.cumsum(drafts.counts, out=starts[1:])
        if self._levels is not None:
            return self._take_all(step, drafts, starts)
        sources = drafts.sources
        if sources is None:
            sources = np.zeros(len(drafts.tokens), np.int32)
        acceptance, _ = look_up(drafts.parents, sources, starts, step.acceptance)
        raw = survivals(drafts.parents, starts, acceptance)
        calibration = self._calibration()
        survival = calibration * raw
        drawn = np.zeros(len(survival), bool)
        if drafts.drawn_from is not None:
            drawn = drafts.drawn_from >= 0
        kept = self._kept(step, drawn, survival)
        self.counters.add("control_steps")
        self.counters.add("nodes_grown", len(survival))
        expected = expected_tokens(raw, kept, starts)
        self._pending = _Pending(
            list(step.request_ids), step.num_tokens.copy(), drafts.tokens.copy(),
            drafts.parents.copy(), sources.copy(), starts,
            expected,
        )  # fmt: skip
        self.counters.add("expected_tokens", float(calibration * expected.sum()))
        if not kept.any():
            self.counters.add("undrafted_steps")
            self._most = 0
            return DraftBatch.empty(len(drafts.counts))
        if kept.all():
            chosen = drafts
        else:
            chosen = DraftBatch(*keep_nodes(drafts.tokens, drafts.parents, drafts.counts, kept))
            if drawn.any():
                chosen.draft_probs, chosen.drawn_from = drafts.draft_probs, drafts.drawn_from[kept]
        self._most = int(chosen.counts.max())
        return chosen

    def _take_all(self, step: StepContext, drafts: DraftBatch, starts: np.ndarray) -> DraftBatch:
        """Verify what was planned."""
        expected = self._level_survival(step, self._depths(drafts.counts)).sum(1)
        self._pending = _Pending(
            list(step.request_ids), step.num_tokens.copy(), drafts.tokens, drafts.parents,
            np.zeros(len(drafts.tokens), np.int32), starts, expected,
        )  # fmt: skip
        self.counters.add("control_steps")
        self.counters.add("nodes_grown", len(drafts.tokens))
        self.counters.add("expected_tokens", float(expected.sum()))
        self.counters.add("undrafted_steps", not len(drafts.tokens))
        return drafts

    def _kept(self, step: StepContext, drawn: np.ndarray, survival: np.ndarray) -> np.ndarray:
        """Bool [N]: which nodes the policy verifies; all that were ``drawn`` bool [N]."""
        kept = np.zeros(len(survival), bool)
        if not len(survival):
            return kept
        # Stable: among equals a parent stays before its child.
        order = np.argsort(-np.where(drawn, 2.0, survival), kind="stable")
        requests = len(step.request_ids)
        order = order[: max(self.max_rows - requests, 0)]
        if self.config.policy == "threshold":
            order = order[drawn[order] | (survival[order] >= 1.0 - self.config.threshold)]
        elif self.config.policy == "goodput":
            order = order[: self._budget(step, survival[order], int(drawn[order].sum()))]
        kept[order] = True
        return kept

    def _budget(self, step: StepContext, survival: np.ndarray, drawn: int) -> int:
        """Nodes of the whole batch, by goodput; ``survival`` in descending order behind the
        first ``drawn`` ones, which are drawn."""
        if self.cost is None:
            return drawn
        requests = len(step.request_ids)
        rows = requests + np.arange(len(survival) + 1)
        seconds = self.cost.predict(rows, requests, float(step.num_tokens.sum()))
        best, gain = best_goodput(survival, requests, seconds, drawn)
        # The time for these drafts is spent, but the next ones will cost it again.
        gain *= float(seconds[best] / (seconds[best] + self._draft_seconds * requests))
        switched = self._switched(best, gain)
        if not drawn:
            return switched
        self._rest = self.speculating and not switched
        return best

    def _switched(self, best: int, gain: float) -> int:
        """``best`` nodes (or levels) of relative goodput ``gain``, 0 while speculation is
        off; with the probes that keep both states honest."""
        if self.speculating:
            self.speculating = best > 0 and gain > 1.0
        else:
            self.speculating = best > 0 and gain > 1.0 + HYSTERESIS
        if self.speculating:
            self._idle_steps, self._interval = 0, PROBE_INTERVALS[0]
            self._explore_credit += EXPLORE_LOSS
            if self._explore_credit >= max(1.0 - 1.0 / gain, EXPLORE_INTERVAL * EXPLORE_LOSS):
                self._explore_credit = 0.0
                return 0
            return best
        if self._probe_is_due():
            self.counters.add("probe_steps")
            self._idle_steps = 0
            self._interval = min(2 * self._interval, PROBE_INTERVALS[1])
            return max(best, 1)
        self._idle_steps += 1
        return 0
