"""A round of the draft's process: trees for a step, then trees below what may come of it.

:func:`overlapped` makes of a proposer that drafts level by level (``draft_tree`` and those made of
it) one that goes on. Its forward passes, shapes, distributions and random numbers are that
proposer's own; a round is

    read      what is new of the texts
    draft     trees behind those whose outcome was not foreseen, if the step waits for them
    (answer)  before that, if all were foreseen or the step does not wait
    verify    the trees in flight, by the draft: what it thinks of every outcome
    guess     the most probable outcomes, as nodes of the same trees
    draft     trees below them, all together, each as if its outcome were a text

of which the last three happen while the target verifies.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from vllm_specplus.overlap.outcomes import DraftedTree, likely_outcomes
from vllm_specplus.overlap.steps import Asked
from vllm_specplus.proposers.draft_tree import DraftTree
from vllm_specplus.step import Observation, Sampling, StepContext
from vllm_specplus.tree import DraftBatch

#: Outcomes of a request below which trees are drafted. They are rows of the same passes, which a
#: small draft takes about as long for as for one.
GUESSES = 3
_NONE = np.empty(0, np.int32)


class Overtaken(Exception):
    """The text went on otherwise, and what is being drafted is of no use."""


class Undrafted(Exception):
    """The step did not wait for its drafts: what is verified are no trees."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """A tree that was drafted below an outcome."""

    length: int
    """Tokens of the text that it is an outcome of."""
    tokens: tuple[int, ...]
    """They follow, if the outcome comes."""
    tree: DraftedTree

    def came(self, text: np.ndarray) -> bool:
        """Is ``text`` int32 [n] what the outcome made of it?"""
        gained = text[self.length :]
        return len(gained) == len(self.tokens) and gained.tolist() == list(self.tokens)


@dataclass(slots=True)
class Round:
    """A step in the draft's process."""

    step: StepContext
    asked: Asked
    foreseen: list[DraftedTree | None]
    """[R] the tree of each request whose outcome came."""
    answer: Callable[[Round], None]
    """Sends ``trees``, which are complete."""
    look: Callable[[], None]
    """Between two passes: raises :class:`Overtaken` or :class:`Undrafted` if that has come."""
    trees: dict[int, DraftedTree] = field(default_factory=dict)
    """By request: what is verified in the step."""
    pass_seconds: list[float] = field(default_factory=list)
    """Seconds per pass of what was drafted in this round."""
    guesses: dict[int, list[tuple[int, tuple[int, ...]]]] = field(default_factory=dict)
    """By request, those that are being drafted below: length of the text, tokens that follow."""


class View(Protocol):
    """What a drafting round of the proposer's takes for its texts and their trees."""

    logits: torch.Tensor
    """float32 [A, V] behind its texts."""

    def grow(
        self, active: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor
    ) -> torch.Tensor:
        """As ``TreeExecutor.grow``."""


class Some:
    """Some requests of a round."""

    def __init__(self, grow: Callable[..., torch.Tensor], which: torch.Tensor, logits: Any):
        """``which`` int64 [A] of those that were read, with ``logits`` [., V] behind them."""
        self._grow, self._which, self.logits = grow, which, logits[which]

    def grow(self, active, tokens, parents):
        return self._grow(self._which[active], tokens, parents)


class Below:
    """Outcomes of the requests of a round, G of each; what is below them is a level of theirs."""

    def __init__(self, executor: Any, tokens: torch.Tensor, parents: torch.Tensor):
        """``tokens``, ``parents`` int64 [A, G]: the outcomes, nodes of the A requests' trees."""
        self._executor, self._guesses = executor, tokens.shape[1]
        # The level grown last: its first node in the requests' trees and in an outcome's own, and
        # its width there.
        self._above = (executor.trees.nodes, -1, 1)
        everyone = torch.arange(len(tokens), device=tokens.device)
        self.logits = executor.grow(everyone, tokens, parents).flatten(0, 1)

    def grow(self, active, tokens, parents):
        guesses, width = self._guesses, tokens.shape[1]
        first, own, above = self._above
        requests = len(active) // guesses
        number = torch.arange(guesses, device=tokens.device).repeat(requests)[:, None]
        parents = first + number * above + (parents - own)
        start = self._executor.trees.nodes
        logits = self._executor.grow(
            active[::guesses] // guesses,
            tokens.view(requests, guesses * width),
            parents.view(requests, guesses * width),
        )
        self._above = (start, own + above, width)
        return logits.view(requests * guesses, width, -1)


class GoesOn(DraftTree):
    """What :func:`overlapped` adds to a proposer; ``super()`` is that proposer."""

    round: Round
    """The one that is drafted for, set before ``propose``."""
    ahead: dict[str, list[Ahead]]
    """By request: the trees below the outcomes of its last step."""
    paper: bool
    """One outcome, behind the deepest node, as PEARL has it?"""
    _view: View

    def __init__(self, config: Any, services: Any):
        super().__init__(config, services)
        self.ahead, self.paper = {}, config.overlap == "paper"

    @property
    def guesses(self) -> int:
        """Outcomes of a request that are drafted for."""
        return 1 if self.paper else GUESSES

    @property
    def most_nodes(self) -> int:
        """Of a request in a round: a tree as it grows and as it is verified, and, twice if the step
        turns out not to wait, outcomes with their trees."""
        nodes = sum(self.levels)
        return 2 * nodes + 2 * self.guesses * (1 + nodes)

    def _is_beyond(self, length: int) -> bool:
        return length + self.most_nodes > self._executor.model.max_positions

    def share_pages(self, pages: int, page: int, max_requests: int) -> None:
        super().share_pages(pages, page, max_requests)
        if self._executor.graphs is not None:
            below = (self.guesses * width for width in self.levels[:-1])
            self._executor.warm_up({self.guesses, sum(self.levels), *below}, max_requests)

    def foreseen(self, step: StepContext) -> list[DraftedTree | None]:
        """[R] the tree below the outcome that came of each request's last step, None: another
        came."""
        found: list[DraftedTree | None] = []
        for r, name in enumerate(step.request_ids):
            text, most = step.token_ids[r, : step.num_tokens[r]], int(step.max_nodes[r])
            trees = (each.tree for each in self.ahead.get(name, ()) if each.came(text))
            tree = next(trees, None)
            found.append(None if tree is None or not most else tree.first(most))
        return found

    # -- the round, in the proposer's own ``propose`` ------------------------------------

    @torch.inference_mode()
    def _draft(self, step: StepContext, rows: np.ndarray) -> DraftBatch:
        """For the requests ``rows`` int [A]; nothing is returned, the answer is sent."""
        now, asked = self.round, self.round.asked
        nothing = DraftBatch.empty(len(step.request_ids))
        trees = [now.foreseen[r] for r in rows]
        now.trees = {int(r): tree for r, tree in zip(rows, trees, strict=True) if tree is not None}
        missed = np.array([a for a, tree in enumerate(trees) if tree is None], np.int64)
        worth = float(asked.worth[rows[missed]].sum())
        waits = asked.wanted and len(missed) > 0 and worth > asked.price
        if not waits:
            now.answer(now)
        try:
            names = [step.request_ids[r] for r in rows]
            logits = super()._begin(step, rows, names, [self._text(step, r) for r in rows])
            try:
                if waits:
                    self._draft_behind(step, rows, missed, logits)
                    now.answer(now)
                if not asked.wanted:
                    now.trees = {}
                self._go_on(step, rows, logits)
            except Undrafted:
                now.trees = {}
                self._go_on(step, rows, logits)
        except Overtaken:
            pass
        return nothing

    def _draft_behind(
        self, step: StepContext, rows: np.ndarray, missed: np.ndarray, logits: torch.Tensor
    ) -> None:
        """Trees behind the texts ``missed`` int64 [M] of those of ``rows``."""
        which, own = torch.from_numpy(missed).to(logits.device), rows[missed]
        passes = self._passes(step, own) - 1  # what is new of the texts was read in the first
        drafts = self._levels_of(
            lambda: Some(self._executor.grow, which, logits), step, own, passes
        )
        self.round.trees |= dict(zip(own.tolist(), split(drafts, own), strict=True))

    def _go_on(self, step: StepContext, rows: np.ndarray, logits: torch.Tensor) -> None:
        """Draft below the most probable outcomes of what is verified, of the requests ``rows`` int
        [A] with ``logits`` [A, V] behind their texts."""
        now, device = self.round, logits.device
        trees = [now.trees.get(int(r), DraftedTree()) for r in rows]
        at, ids, log_q = self._verify(step, rows, logits, trees)
        outcomes = []
        for a, (r, tree) in enumerate(zip(rows.tolist(), trees, strict=True)):
            here = slice(0, 1 + len(tree))
            chosen = likely_outcomes(
                tree, ids[a, here], log_q[a, here], now.asked.followed[r], self.guesses, self.paper
            )
            outcomes.append((chosen * self.guesses)[: self.guesses])
            length = int(step.num_tokens[r])
            now.guesses[r] = [
                (length, (*tree.path(each.node), each.token)) for each in outcomes[-1]
            ]
        now.look()
        if self._executor.trees.nodes + self.guesses * (1 + sum(self.levels)) > (
            self._executor.max_nodes
        ):
            raise Overtaken
        parents = [[int(at[a, 1 + each.node]) for each in own] for a, own in enumerate(outcomes)]
        tokens = [[each.token for each in own] for own in outcomes]
        pretended = self._pretended(step, rows)
        everyone = np.arange(len(pretended.request_ids))
        drafts = self._levels_of(
            lambda: Below(
                self._executor, torch.tensor(tokens, device=device),
                torch.tensor(parents, device=device),
            ),
            pretended, everyone, self._passes(step, rows),
        )  # fmt: skip
        found = split(drafts, everyone)
        for a, r in enumerate(rows.tolist()):
            own = found[a * self.guesses : (a + 1) * self.guesses]
            self.ahead[step.request_ids[r]] = [
                Ahead(*guess, tree) for guess, tree in zip(now.guesses[r], own, strict=True)
            ]

    def _pretended(self, step: StepContext, rows: np.ndarray) -> StepContext:
        """A step of A * G requests, whose texts are the outcomes of those of ``rows`` int [A]."""
        each = np.repeat(rows, self.guesses)
        lengths = [
            length + len(tokens) for r in rows.tolist() for length, tokens in self.round.guesses[r]
        ]
        sampling = step.sampling
        if sampling is not None:
            sampling = Sampling(
                sampling.temperature[each], sampling.top_k[each], sampling.top_p[each],
                [sampling.seeds[r] for r in each],
            )  # fmt: skip
        return StepContext(
            request_ids=[step.request_ids[r] for r in each],
            token_ids=np.zeros((len(each), 0), np.int32),  # nobody reads them
            num_tokens=np.array(lengths, np.int32), max_nodes=step.max_nodes[each],
            chain_only=step.chain_only[each], sampling=sampling,
            observation=Observation(_NONE, _NONE, _NONE.reshape(0, 0), _NONE > 0),
        )  # fmt: skip

    # -- passes ---------------------------------------------------------------------------

    def _begin(
        self, step: StepContext, rows: np.ndarray, names: list[str], texts: list[np.ndarray]
    ) -> torch.Tensor:
        return self._view.logits

    def _grow(
        self, active: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor
    ) -> torch.Tensor:
        self.round.look()
        return self._view.grow(active, tokens, parents)

    def _levels_of(
        self, make: Callable[[], View], step: StepContext, rows: np.ndarray, passes: int
    ) -> DraftBatch:
        """A drafting round of the proposer's, behind what the view that is made takes for texts; in
        ``passes``."""
        start = time.perf_counter()
        self._view = make()
        drafts = super()._draft(step, rows)
        if passes:
            self.round.pass_seconds.append((time.perf_counter() - start) / passes)
        return drafts

    def _passes(self, step: StepContext, rows: np.ndarray) -> int:
        """How many levels the deepest tree of ``rows`` int [A] has."""
        above = np.cumsum((0, *self.levels[:-1]))
        return int((above < step.max_nodes[rows].max()).sum())

    def _verify(
        self, step: StepContext, rows: np.ndarray, logits: torch.Tensor, trees: list[DraftedTree]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The draft's opinion of every place of the ``trees`` [A], of at most n nodes: (numbers
        int64 [A, 1 + n] of the places as nodes of the round, -1: the texts' ends; their most
        probable tokens int64 [A, 1 + n, k]; and log-probabilities float32 [A, 1 + n, k])."""
        scale = np.ones(len(rows), np.float32)
        if step.sampling is not None:
            own = step.sampling.temperature[rows]
            scale = np.where(own > 0, own, 1.0).astype(np.float32)
        heat = torch.from_numpy(scale).to(logits.device)[:, None, None]
        nodes = max(map(len, trees))
        children = max(int(np.bincount(1 + tree.parents).max(initial=0)) for tree in trees)
        best = min(self.guesses + children, logits.shape[-1])

        def opinion(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            values = values / heat
            top = values.topk(best, -1)
            return top.indices, top.values - values.logsumexp(-1, keepdim=True)

        at = np.full((len(rows), 1 + nodes), -1, np.int64)
        ids = np.zeros((len(rows), 1 + nodes, best), np.int64)
        log_q = np.zeros(ids.shape, np.float32)
        for places, found in self._places(logits, trees, at):
            for into, values in zip((ids, log_q), opinion(found), strict=True):
                values = values.cpu().numpy()
                for a, place in enumerate(places):
                    into[a, place] = values[a, : len(place)]
        return at, ids, log_q

    def _places(
        self, logits: torch.Tensor, trees: list[DraftedTree], at: np.ndarray
    ) -> Iterator[tuple[list[np.ndarray], torch.Tensor]]:
        """The trees' nodes as nodes of the round, whose numbers are written to ``at``: yields
        (places [A] of int64 [m_a], logits [A, >= m_a, V] there) of every pass."""
        yield [np.zeros(1, np.int64)] * len(trees), logits[:, None]
        depths = [tree.depths() for tree in trees]
        deepest = max(int(each.max(initial=0)) for each in depths)
        levels = [range(1, deepest + 1)] if deepest else []
        if self.reads_hidden:  # what a head computed above is its input below
            levels = [range(depth, depth + 1) for depth in range(1, deepest + 1)]
        everyone = torch.arange(len(trees), device=logits.device)
        for level in levels:
            places = [1 + np.flatnonzero(np.isin(each, level)) for each in depths]
            width = max(map(len, places))
            tokens, parents = np.zeros((2, len(trees), width), np.int64)
            parents -= 1
            first = self._executor.trees.nodes
            for a, (tree, place) in enumerate(zip(trees, places, strict=True)):
                at[a, place] = first + np.arange(len(place))
                tokens[a, : len(place)] = tree.tokens[place - 1]
                parents[a, : len(place)] = at[a, 1 + tree.parents[place - 1]]
            self.round.look()
            if first + width > self._executor.max_nodes:  # padding takes numbers, too
                raise Overtaken
            given = (torch.from_numpy(each).to(logits.device) for each in (tokens, parents))
            yield places, self._executor.grow(everyone, *given, generations=len(level))


def overlapped(proposer: type) -> type:
    """The class of proposers that do as ``proposer`` does, and go on."""
    return type(f"Overlapped{proposer.__name__}", (GoesOn, proposer), {})


def split(drafts: DraftBatch, rows: np.ndarray) -> list[DraftedTree]:
    """The trees of the requests ``rows`` int [A]; they share the batch's distributions."""
    ends = np.cumsum(drafts.counts)
    trees = []
    for r in rows.tolist():
        own = slice(int(ends[r] - drafts.counts[r]), int(ends[r]))
        drawn_from = np.full(int(drafts.counts[r]), -1, np.int32)
        if drafts.drawn_from is not None:
            drawn_from = drafts.drawn_from[own]
        sources = drawn_from * 0 if drafts.sources is None else drafts.sources[own]
        trees.append(
            DraftedTree(
                drafts.tokens[own], drafts.parents[own], sources, drawn_from, drafts.draft_probs
            )
        )
    return trees
