"""The controller: how many nodes every request gets in this step.

One step, as the engine calls it::

    step_took     the last step's shape and duration correct the cost model
    watches       is the step to be looked at? Else nothing of what follows happens
    prepare       the texts label the last trees; who may draft, and the acceptance
                  tables by which a proposer grows its trees best first
    (propose)     trees up to that limit, every node with its source
    choose        the nodes to verify, by the policy
    looked        what all that took

Grown but unverified nodes cost little with methods that look drafts up, so such methods
keep growing while speculation is off, in as many steps as that may cost (``watch.py``): the
text labels their trees, and drafting resumes when it pays. A method whose drafting itself
costs time is only probed, ever more rarely up to ``PROBE_INTERVALS``.

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
from dataclasses import replace

import numpy as np

from vllm_specplus.control.acceptance import (
    AcceptanceEstimator,
    expected_tokens,
    look_up,
    survivals,
)
from vllm_specplus.control.budget import keep_nodes
from vllm_specplus.control.cost import DraftingCost, Prices, StepCost, StepShape
from vllm_specplus.control.ledger import Ledger
from vllm_specplus.control.levels import Levels, tree_depths
from vllm_specplus.control.outcomes import Calibration, DraftedTrees
from vllm_specplus.control.policies import Candidates, make_policy
from vllm_specplus.control.settings import (
    ControlChange,
    ControlConfig,
    GoodputControl,
    Mode,
)
from vllm_specplus.control.shadow import Shadow
from vllm_specplus.control.watch import Watch
from vllm_specplus.metrics import STEP_ERRORS, Counters
from vllm_specplus.step import Source, StepContext
from vllm_specplus.tree import DraftBatch

#: Share of the newest step that read prompts in the average of what these take.
PROMPT_NEWEST = 0.1


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
        self.config = config
        self.max_nodes, self.max_rows = max_nodes, max_rows
        self.counters = counters
        self.acceptance = AcceptanceEstimator(sources)
        self.prices = Prices(DraftingCost())
        self._levels = None if levels is None else Levels(levels)
        self._ledger = Ledger()
        self._policy = make_policy(config, self.prices, self._ledger, draws, counters)
        self._calibration = Calibration()
        self._drafted: DraftedTrees | None = None
        self._shadow = Shadow(counters)
        self._looks, self._watched = Watch(), True
        # Nodes that the luckiest request of each salt got in the last step.
        self._most: dict[str, int] = {}

    @property
    def cost(self) -> StepCost | None:
        """Set by the engine once the step is profiled; goodput drafts nothing before."""
        return self.prices.step

    @cost.setter
    def cost(self, cost: StepCost | None) -> None:
        self.prices.step = cost

    @property
    def mode(self) -> Mode:
        """Are drafts verified, made at all, or made and only watched?"""
        return self.config.mode if isinstance(self.config, GoodputControl) else "on"

    def change(self, change: ControlChange) -> None:
        """From the next step on; ValueError with one sentence where that cannot be."""
        self.config = config = change.of(self.config)
        self._policy.pursue(config)
        self._drafted, self._shadow = None, Shadow(self.counters)

    # -- what happened ------------------------------------------------------------

    def step_took(self, shape: StepShape, seconds: float, drafting: float = 0.0) -> None:
        """The last step had this shape and took ``seconds``, and ``drafting`` seconds more."""
        if self.cost is None:
            return
        self._looks.step_took(seconds + drafting)
        if not (self._watched or shape.prompt_rows):
            self._ledger.took(seconds + drafting, seconds, 0.0)
            return
        predicted = self._book(shape, seconds, drafting, self.cost)
        if predicted is not None and not shape.prompt_rows:
            self.counters.add("timed_steps")
            self.counters.add("predicted_step_seconds", predicted)
            self.counters.add("measured_step_seconds", seconds)
            error = abs(predicted - seconds) / seconds
            name = next((f"{most}%" for most in STEP_ERRORS if error <= most / 100), "more")
            self.counters.add(f"step_errors:{name}")

    def _book(
        self, shape: StepShape, seconds: float, drafting: float, cost: StepCost
    ) -> float | None:
        """Enter the step into the requests' accounts and let ``cost`` learn from it; returns what
        it had predicted, as ``StepCost.observe``."""
        undrafted = replace(shape, rows=shape.requests, tree=False)
        plain = cost.predict_step(replace(undrafted, prompt_rows=0))
        prompts = cost.predict_step(undrafted) - plain if shape.prompt_rows else 0.0
        as_it_was = cost.predict_step(shape) if shape.rows > shape.requests else plain + prompts
        # A step that took longer than it should (a neighbour on the machine, a long prompt) would
        # have done so undrafted too.
        scale = seconds / as_it_was
        if shape.prompt_rows:
            self.prices.prompt += PROMPT_NEWEST * (scale * prompts - self.prices.prompt)
        self._ledger.took(seconds + drafting, scale * plain, scale * prompts)
        return cost.observe(shape, seconds)

    def drafting_took(self, max_nodes: np.ndarray, seconds: float) -> None:
        """Growing the last trees, of up to ``max_nodes`` int32 [R], took this long."""
        depths = None if self._levels is None else self._levels.depths(max_nodes)
        self.prices.drafting.observe(max_nodes, depths, seconds)

    def forget(self, request_id: str) -> None:
        """The request is gone, and what was drafted for it: its id may come again."""
        self.acceptance.forget(request_id)
        self._policy.ended(request_id)
        self._ledger.forget(request_id)
        self._shadow.forget(request_id)
        if self._drafted is not None:
            self._drafted.forget(request_id)

    # -- before drafting ------------------------------------------------------------

    def watches(self, drafted: bool) -> bool:
        """Is the step that runs, in which some node is verified if it is ``drafted``, to be looked
        at: ``prepare`` and ``choose`` called for it?"""
        rests = isinstance(self.config, GoodputControl) and self.mode != "shadow"
        self._watched = not rests or drafted or self._policy.probe_is_due or self._looks.due()
        if not self._watched:
            self._policy.passed_over()
            self.counters.add("unwatched_steps")
        return self._watched

    def looked(self, seconds: float, nodes: int) -> None:
        """Looking at the step took ``seconds``, in which ``nodes`` were chosen."""
        self._looks.looked(seconds, nodes)

    def prepare(self, step: StepContext) -> None:
        """Learn from the texts; set ``step.acceptance`` and lower ``step.max_nodes``."""
        self._learn(step)
        self._ledger.produced(step.request_ids, step.num_tokens, step.num_prompt_tokens)
        step.acceptance = self.acceptance.tables(step.request_ids, step.cache_salts)
        if self.mode == "off":
            step.max_nodes[:] = 0
            return
        if self._levels is None:
            most = [self._most.get(salt, self.max_nodes) for salt in _salts(step)]
            self._policy.limit(step, np.array(most, np.int32))
        else:
            self._plan(step, self._levels)

    def _learn(self, step: StepContext) -> None:
        trees, self._drafted = self._drafted, None
        if self.mode == "shadow":
            trees = self._shadow.due()
        if trees is None:
            return
        rows = trees.rows_in(step.request_ids)
        here = rows >= 0
        if not here.any():
            return
        gained = trees.gained(rows, step.token_ids, step.num_tokens)
        if self.mode == "shadow":
            self._shadow.compared(gained[here])
        salts = step.cache_salts and [step.cache_salts[row] for row in rows[here]]
        self._calibration.observe(trees.expected[here], gained[here], salts)
        if self._levels is not None:
            trees = self._levels.as_chains(trees, rows, gained, step)
            self._policy.gained(int(gained[here].sum()))
        labelled = self.acceptance.learn(
            trees.tokens, trees.parents, trees.sources, trees.starts, trees.drafted_at,
            trees.request_ids, rows, step.token_ids, step.num_tokens, step.cache_salts,
        )  # fmt: skip
        self.counters.add("nodes_labelled", labelled)

    def _plan(self, step: StepContext, levels: Levels) -> None:
        """Lower ``step.max_nodes`` to the levels that are worth drafting."""
        survival = levels.survival(step.acceptance, levels.depths(step.max_nodes))
        planned = levels.nodes(self._policy.depths(step, levels, survival))
        np.minimum(step.max_nodes, planned, out=step.max_nodes)
        # The step's rows are bounded: the batch's last requests yield.
        before = np.cumsum(step.max_nodes) - step.max_nodes
        room = np.maximum(self.max_rows - len(step.request_ids) - before, 0)
        np.minimum(step.max_nodes, room, out=step.max_nodes)

    # -- after drafting -------------------------------------------------------------

    def choose(self, step: StepContext, drafts: DraftBatch) -> DraftBatch:
        """The nodes to verify: subtrees of ``drafts``, one tree per request."""
        starts = np.zeros(len(drafts.counts) + 1, np.int32)
        np.cumsum(drafts.counts, out=starts[1:])
        self.counters.add("control_steps")
        self.counters.add("nodes_grown", len(drafts.tokens))
        if self._levels is None:
            return self._choose(step, drafts, starts)
        # All that was planned is verified.
        depths = tree_depths(np.ascontiguousarray(drafts.parents, np.int32), starts)
        expected = self._levels.survival(step.acceptance, depths).sum(1)
        sources = np.zeros(len(drafts.tokens), np.int32)
        everything = np.ones(len(drafts.tokens), bool)
        return self._verified(step, drafts, everything, sources, starts, expected, expected.sum())

    def _choose(self, step: StepContext, drafts: DraftBatch, starts: np.ndarray) -> DraftBatch:
        """The nodes that the policy chooses, which compete by survival."""
        sources = drafts.sources
        if sources is None:
            sources = np.zeros(len(drafts.tokens), np.int32)
        acceptance, _ = look_up(drafts.parents, sources, starts, step.acceptance)
        estimated = survivals(drafts.parents, starts, acceptance)
        calibration = self._calibration.factors(len(drafts.counts), step.cache_salts)
        drawn = np.zeros(len(estimated), bool)
        if drafts.drawn_from is not None:
            drawn = drafts.drawn_from >= 0
        kept = np.zeros(len(estimated), bool)
        if len(kept):
            survival = np.repeat(calibration.astype(np.float32), drafts.counts) * estimated
            candidates = Candidates(drafts.parents, starts, survival, drawn)
            ranked = candidates.ranked(self.max_rows - len(step.request_ids))
            kept[self._policy.choose(step, candidates, ranked)] = True
        expected = expected_tokens(estimated, kept, starts)
        calibrated = float(calibration @ expected)
        return self._verified(step, drafts, kept, sources, starts, expected, calibrated)

    def _verified(
        self, step: StepContext, drafts: DraftBatch, kept: np.ndarray, sources: np.ndarray,
        starts: np.ndarray, expected: np.ndarray, calibrated: float,
    ) -> DraftBatch:  # fmt: skip
        """The ``kept`` bool [N] nodes of ``drafts``, to be verified; in shadow mode, none. What was
        drafted is kept until the text has labelled it; a proposer reuses its arrays."""
        shadow = self.mode == "shadow"
        trees = DraftedTrees(
            list(step.request_ids), step.num_tokens.copy(), drafts.tokens.copy(),
            drafts.parents.copy(), sources.copy(), starts, expected, kept if shadow else None,
        )  # fmt: skip
        chosen = _subtrees(drafts, kept)
        self._most = {}
        for salt, count in zip(_salts(step), chosen.counts.tolist(), strict=True):
            self._most[salt] = max(count, self._most.get(salt, 0))
        if shadow:
            self._watch(step, trees, chosen)
            chosen = DraftBatch.empty(len(drafts.counts))
        else:
            self._drafted = trees
        self.counters.add("expected_tokens", 0.0 if shadow else calibrated)
        self.counters.add("undrafted_steps", not len(chosen.tokens))
        return chosen

    def _watch(self, step: StepContext, trees: DraftedTrees, chosen: DraftBatch) -> None:
        if self.cost is None:
            return
        requests, context = len(step.request_ids), int(step.num_tokens.sum())
        rows = requests + len(chosen.tokens)
        seconds, plain = (
            self.cost.predict_step(StepShape(requests, n, context, tree=chosen.has_trees))
            for n in (rows, requests)
        )
        if self._levels is None:
            seconds += self.prices.drafting.of_requests(requests)
        else:
            depths = self._levels.depths(chosen.counts)
            seconds += float(self.prices.drafting.of_levels(depths.max(initial=0)))
        self._shadow.keep(trees, seconds, plain)


def _salts(step: StepContext) -> Sequence[str]:
    """Each request's cache salt, "" if it has none."""
    return step.cache_salts or [""] * len(step.request_ids)


def _subtrees(drafts: DraftBatch, kept: np.ndarray) -> DraftBatch:
    """The ``kept`` bool [N] nodes of ``drafts``, with what they were drawn from."""
    if kept.all():
        return drafts
    if not kept.any():
        return DraftBatch.empty(len(drafts.counts))
    chosen = DraftBatch(*keep_nodes(drafts.tokens, drafts.parents, drafts.counts, kept))
    if drafts.drawn_from is not None and (drafts.drawn_from >= 0).any():
        chosen.draft_probs, chosen.drawn_from = drafts.draft_probs, drafts.drawn_from[kept]
    return chosen
