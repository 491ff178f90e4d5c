"""The policies: fixed, threshold and goodput, each an answer to the same three questions.

    limit    how many nodes may a method grow that looks them up?   before drafting
    depths   how many levels does a draft model draft?              before drafting
    choose   which of the grown nodes are verified?                 after drafting

A draft model's trees are verified as they were planned, so it is asked one of the last two.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vllm_specplus.control.budget import best_chains, best_goodput, leading_chains
from vllm_specplus.control.cost import Prices, StepCost
from vllm_specplus.control.levels import Levels
from vllm_specplus.control.settings import ControlConfig, FixedControl, ThresholdControl
from vllm_specplus.control.switch import Switch
from vllm_specplus.metrics import Counters
from vllm_specplus.step import StepContext

#: A method is cheap while drafting takes less than this share of an undrafted step.
CHEAP_DRAFT = 0.02
#: A request grows at most GROWTH[0] nodes plus GROWTH[1] times the most any request
#: got in the last step: more would be grown only to be cut.
GROWTH = (6, 2)


@dataclass(frozen=True, slots=True)
class Candidates:
    """The grown nodes of R requests, back to back, of which a policy chooses."""

    parents: np.ndarray
    """int32 [N] parent within the request's nodes, -1 = root."""
    starts: np.ndarray
    """int32 [R + 1] first node of each request."""
    survival: np.ndarray
    """float32 [N] probability that the node becomes text."""
    drawn: np.ndarray
    """bool [N] nodes that were drawn from a draft model: all of them are verified, whatever
    they are worth, since the choice must not depend on what was drawn."""

    def ranked(self, most: int) -> np.ndarray:
        """The best ``most`` nodes int64, the drawn ones first, then by survival."""
        # Stable: among equals a parent stays before its child.
        order = np.argsort(-np.where(self.drawn, 2.0, self.survival), kind="stable")
        return order[: max(most, 0)]

    def on_best_chain(self) -> np.ndarray:
        """Bool [N]: is the node on its request's best path?"""
        return best_chains(self.survival, self.parents, self.starts)


class Policy:
    """The policy "fixed": all that may be drafted is, and is verified. The others do less."""

    def limit(self, step: StepContext, most: np.ndarray) -> None:
        """Lower ``step.max_nodes``; ``most`` int32 [R] nodes went to the luckiest request of the
        same salt in the last step."""

    def depths(self, step: StepContext, levels: Levels, survival: np.ndarray) -> np.ndarray:
        """Levels to draft for each request, int64 [R]; ``survival`` float64 [R, D] is the
        probability that the text follows to each level, 0 where none may be drafted."""
        return levels.depths(step.max_nodes)

    def choose(self, step: StepContext, candidates: Candidates, ranked: np.ndarray) -> np.ndarray:
        """The nodes to verify, of ``ranked`` int64 [K], the best ones first."""
        return ranked

    def gained(self, tokens: int) -> None:
        """The levels drafted last gained so many tokens, of all requests."""


class Threshold(Policy):
    """Nodes whose path holds a rejection with less than some probability."""

    def __init__(self, config: ThresholdControl):
        self._least = 1.0 - config.threshold

    def depths(self, step: StepContext, levels: Levels, survival: np.ndarray) -> np.ndarray:
        return (survival >= self._least).sum(1)

    def choose(self, step: StepContext, candidates: Candidates, ranked: np.ndarray) -> np.ndarray:
        probable = candidates.survival[ranked] >= self._least
        return ranked[candidates.drawn[ranked] | probable]


class Goodput(Policy):
    """As many nodes as make the most expected tokens per second; none while none pay."""

    def __init__(self, prices: Prices, draws: bool, counters: Counters):
        """``draws``: nodes may be draws, which are verified once they are made."""
        self._prices, self._draws = prices, draws
        self._switch = Switch(counters)
        self._rest = False  # the next step is not drafted, to keep the step cost honest
        self._break_even = 0.0  # tokens with which the levels drafted last have paid

    def limit(self, step: StepContext, most: np.ndarray) -> None:
        switch = self._switch
        if not (switch.speculating or switch.probe_is_due or self._drafting_is_cheap(step)):
            step.max_nodes[:] = 0
            switch.idle()
        elif self._rest:
            step.max_nodes[:] = 0
            self._rest = False
        else:
            np.minimum(step.max_nodes, GROWTH[0] + GROWTH[1] * most, out=step.max_nodes)

    def _drafting_is_cheap(self, step: StepContext) -> bool:
        if self._draws:
            return False
        if self._prices.step is None:
            return True
        requests = len(step.request_ids)
        plain = float(self._prices.step.predict(requests, requests, _context(step)))
        return self._prices.drafting.of_requests(requests) < CHEAP_DRAFT * plain

    def depths(self, step: StepContext, levels: Levels, survival: np.ndarray) -> np.ndarray:
        """All levels of all requests compete, by tokens per row; the deepest one chosen decides
        how many passes the draft makes."""
        requests = len(survival)
        if self._prices.step is None:
            return np.zeros(requests, np.int64)
        request, level, ranked = levels.ranked(survival)
        rows = requests + np.concatenate(([0], np.cumsum(levels.sizes[level])))
        deepest = np.concatenate(([0], 1 + np.maximum.accumulate(level)))
        tree = np.concatenate(([False], np.maximum.accumulate(levels.sizes[level] > 1)))
        seconds = self._prices.step.predict(rows, requests, _context(step), tree=tree)
        seconds = seconds + self._prices.drafting.of_levels(deepest)
        best, gain = best_goodput(ranked, requests, seconds)
        best = self._switch.decide(best, gain)
        if best < len(seconds):
            self._break_even = requests * float(seconds[best] / seconds[0] - 1)
        return np.bincount(request[:best], minlength=requests)

    def gained(self, tokens: int) -> None:
        # Only probes teach while speculation is off.
        if tokens > self._break_even:
            self._switch.probe_soon()

    def choose(self, step: StepContext, candidates: Candidates, ranked: np.ndarray) -> np.ndarray:
        drawn = int(candidates.drawn[ranked].sum())
        cost = self._prices.step
        if cost is None:
            return ranked[:drawn]
        best, gain, seconds = _best(cost, step, candidates, ranked, drawn)
        if not drawn:
            chains = ranked[candidates.on_best_chain()[ranked]]
            if len(chains) < len(ranked):  # there are trees, which may cost more
                alternative = _best(cost, step, candidates, chains, 0)
                if alternative[1] > gain:
                    ranked, (best, gain, seconds) = chains, alternative
        # The time for these drafts is spent, but the next ones will cost it again.
        drafting = self._prices.drafting.of_requests(len(step.request_ids))
        decided = self._switch.decide(best, gain * seconds / (seconds + drafting))
        if not drawn:
            return ranked[:decided]
        self._rest = self._switch.speculating and not decided
        return ranked[:best]


def make_policy(config: ControlConfig, prices: Prices, draws: bool, counters: Counters) -> Policy:
    """The policy that the user configured."""
    if isinstance(config, FixedControl):
        return Policy()
    if isinstance(config, ThresholdControl):
        return Threshold(config)
    return Goodput(prices, draws, counters)


def _best(
    cost: StepCost, step: StepContext, candidates: Candidates, ranked: np.ndarray, least: int
) -> tuple[int, float, float]:
    """Of ``ranked`` int64 [K], the most productive number of nodes, at ``least`` so many;
    its goodput over that of none; and the seconds of its step."""
    requests = len(step.request_ids)
    count = np.arange(len(ranked) + 1)
    chains = leading_chains(ranked, candidates.parents, candidates.starts)
    seconds = cost.predict(requests + count, requests, _context(step), tree=count > chains)
    best, gain = best_goodput(candidates.survival[ranked], requests, seconds, least)
    return best, gain, float(seconds[best])


def _context(step: StepContext) -> float:
    """Tokens of context, summed over the requests."""
    return float(step.num_tokens.sum())
