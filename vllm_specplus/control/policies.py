"""The policies: fixed, threshold and goodput, each an answer to the same three questions.

    limit    how many nodes may a method grow that looks them up?   before drafting
    depths   how many levels does a draft model draft?              before drafting
    choose   which of the grown nodes are verified?                 after drafting

A draft model's trees are verified as they were planned, so it is asked one of the last two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np

from vllm_specplus.control.budget import (
    best_chains,
    best_goodput,
    most_productive,
    within_limits,
)
from vllm_specplus.control.cost import Prices, StepShape
from vllm_specplus.control.ledger import Ledger
from vllm_specplus.control.levels import Levels
from vllm_specplus.control.objectives import Limits, make_objective
from vllm_specplus.control.settings import (
    ControlConfig,
    FixedControl,
    GoodputControl,
    ThresholdControl,
)
from vllm_specplus.control.switch import Switch
from vllm_specplus.control.watch import MOST, SHARE
from vllm_specplus.metrics import Counters
from vllm_specplus.step import StepContext

#: A method is cheap while drafting takes less than this share of an undrafted step: so little that
#: steps may be passed over (``watch.py``) until looking takes no more time than it may.
CHEAP_DRAFT = SHARE * (1 + MOST)
#: A request grows at most GROWTH[0] nodes plus GROWTH[1] times the most any request
#: got in the last step: more would be grown only to be cut.
GROWTH = (6, 2)
#: As ``tree`` of ``StepCost.predict``: a row for either.
AS_CHAIN_OR_TREE = np.array([[False], [True]])
#: Of nobody.
NO_LIMITS = Limits(np.empty(0), np.empty(0))


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

    def owners(self, nodes: np.ndarray) -> np.ndarray:
        """The request int64 [K] of each of ``nodes`` int64 [K]."""
        return np.searchsorted(self.starts, nodes, side="right") - 1

    def on_best_chain(self) -> np.ndarray:
        """Bool [N]: is the node on its request's best path?"""
        return best_chains(self.survival, self.parents, self.starts)


@dataclass(frozen=True, slots=True)
class Choice:
    """The most productive nodes of those in some order."""

    ranked: np.ndarray
    """int64 [K] the nodes in that order."""
    best: int
    """So many of them, the first ones, are to be verified."""
    gain: float
    """Their goodput over that of none."""
    seconds: float
    """A step that verifies them takes."""
    limited: bool
    """Would more be productive, but for the limits?"""


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

    @property
    def probe_is_due(self) -> bool:
        """Is the next step drafted only to see whether drafts pay again?"""
        return False

    def passed_over(self) -> None:
        """A step went by that nobody looked at."""

    def pursue(self, config: GoodputControl) -> None:
        """From now on as ``config`` has it; of the policy goodput."""

    def gained(self, tokens: int) -> None:
        """The levels drafted last gained so many tokens, of all requests."""

    def ended(self, request_id: str) -> None:
        """The request is gone; its account is still there."""


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
    """As many nodes as make the most expected tokens per second, within the limits of an
    objective; none while none pay."""

    def __init__(
        self, config: GoodputControl, prices: Prices, ledger: Ledger, draws: bool,
        counters: Counters,
    ):  # fmt: skip
        """``draws``: nodes may be draws, which are verified once they are made."""
        self._prices, self._ledger, self._draws, self._counters = prices, ledger, draws, counters
        self.pursue(config)
        self._switch = Switch(counters)
        self._rest = False  # the next step is not drafted, to keep the step cost honest
        self._break_even = 0.0  # tokens with which the levels drafted last have paid

    def pursue(self, config: GoodputControl) -> None:
        self._objective = make_objective(config, self._ledger, self._counters)

    @property
    def probe_is_due(self) -> bool:
        return not self._switch.speculating and self._switch.probe_is_due

    def passed_over(self) -> None:
        if not self._switch.speculating:
            self._switch.idle()

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
        plain = StepShape(requests, requests, int(step.num_tokens.sum()))
        share = CHEAP_DRAFT * self._prices.step.predict_step(plain)
        return self._prices.drafting.of_requests(requests) < share

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
        limits = self._objective.limits(step, float(seconds[0]), self._prices.prompt)
        best, gain, limited = _best_allowed(limits, request, ranked, requests, seconds)
        best = self._decide(best, gain, limited)
        if best < len(seconds):
            self._break_even = requests * float(seconds[best] / seconds[0] - 1)
        return np.bincount(request[:best], minlength=requests)

    def gained(self, tokens: int) -> None:
        # Only probes teach while speculation is off.
        if tokens > self._break_even:
            self._switch.probe_soon()

    def choose(self, step: StepContext, candidates: Candidates, ranked: np.ndarray) -> np.ndarray:
        drawn = int(candidates.drawn[ranked].sum())
        cost, requests = self._prices.step, len(step.request_ids)
        if cost is None:
            return ranked[:drawn]
        rows = requests + np.arange(len(ranked) + 1)
        seconds = cost.predict(rows, requests, _context(step), tree=AS_CHAIN_OR_TREE)
        limits = self._objective.limits(step, float(seconds[0, 0]), self._prices.prompt)
        best = partial(_best, limits or NO_LIMITS, candidates, seconds)
        orders = [ranked]
        chains = ranked[candidates.on_best_chain()[ranked]]
        if not drawn and len(chains) < len(ranked):  # there are trees, which may cost more
            orders.append(chains)
        choices = [best(each, drawn) for each in orders]
        if limits is not None and not drawn and any(each.limited for each in choices):
            choices += [best(_fairly(each, candidates, limits), 0) for each in orders]
        choice = max(choices, key=lambda each: each.gain)
        # The time for these drafts is spent, but the next ones will cost it again.
        drafting = self._prices.drafting.of_requests(requests)
        gain = choice.gain * choice.seconds / (choice.seconds + drafting)
        decided = self._decide(choice.best, gain, choice.limited)
        if not drawn:
            return choice.ranked[:decided]
        self._rest = self._switch.speculating and not decided
        return choice.ranked[: choice.best]

    def _decide(self, best: int, gain: float, limited: bool) -> int:
        """What the switch makes of it. Who drafts nothing for another request's sake has not found
        that drafts do not pay."""
        self._counters.add("limited_steps", limited)
        return 0 if limited and not best else self._switch.decide(best, gain)

    def ended(self, request_id: str) -> None:
        self._objective.ended(request_id)


def make_policy(
    config: ControlConfig, prices: Prices, ledger: Ledger, draws: bool, counters: Counters
) -> Policy:
    """The policy that the user configured; ``ledger``: what requests have paid so far."""
    if isinstance(config, FixedControl):
        return Policy()
    if isinstance(config, ThresholdControl):
        return Threshold(config)
    return Goodput(config, prices, ledger, draws, counters)


def _best(
    limits: Limits, candidates: Candidates, seconds: np.ndarray, ranked: np.ndarray, least: int
) -> Choice:
    """Of ``ranked`` int64 [K], the most productive number of nodes, at ``least`` so many;
    ``seconds``: see ``budget.most_productive``."""
    return Choice(
        ranked,
        *most_productive(
            ranked, candidates.survival, candidates.parents, candidates.starts, seconds, least,
            limits.seconds, limits.per_token, limits.ceiling,
        ),
    )  # fmt: skip


def _best_allowed(
    limits: Limits | None, owners: np.ndarray, survival: np.ndarray, requests: int,
    seconds: np.ndarray, least: int = 0,
) -> tuple[int, float, bool]:  # fmt: skip
    """``budget.best_goodput`` of the numbers of nodes that keep the limits; is it less than that
    of all?"""
    best, gain = best_goodput(survival, requests, seconds, least)
    if limits is None or best == least:
        return best, gain, False
    allowed = within_limits(owners, survival, seconds, limits.seconds, limits.per_token)
    allowed &= seconds <= limits.ceiling
    if allowed[best]:
        return best, gain, False
    return *best_goodput(survival, requests, seconds, least, allowed), True


def _fairly(ranked: np.ndarray, candidates: Candidates, limits: Limits) -> np.ndarray:
    """``ranked`` int64 [K] in another order: what a request admits is divided by, so that those
    who hold a step back come first. Of one request's nodes the order stays."""
    key = candidates.survival[ranked] / limits.seconds[candidates.owners(ranked)]
    return ranked[np.argsort(-key, kind="stable")]


def _context(step: StepContext) -> float:
    """Tokens of context, summed over the requests."""
    return float(step.num_tokens.sum())
