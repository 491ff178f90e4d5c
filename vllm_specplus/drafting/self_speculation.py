"""Drafting with the target's own layers, some of them left out.

Draft & Verify (arXiv 2309.08168), SWIFT (arXiv 2410.06916) and DEL (arXiv 2504.05598): no
second model and no second set of weights. The draft's cache holds *copies* of the keys and
values the target computed, so a text is never read by the draft: only its newest token and
the nodes behind it pass through the layers that are kept. What those write is overwritten by
the next copy.

Which layers to leave out is found while serving, by *replay*: the last tokens of running
texts are predicted once more by a candidate, all in one pass, each from the exact keys and
values before it, as the first node of a draft would be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from vllm_specplus.drafting.cache import PAGE
from vllm_specplus.drafting.executor import DraftExecutor
from vllm_specplus.drafting.passes import Attend, PagedAttention, Rows
from vllm_specplus.step import ReadKV

#: Tokens of a text that a replay predicts (SWIFT's context_window).
WINDOW = 32

KeysValues = Iterable[tuple[torch.Tensor, torch.Tensor]]
"""Layer by layer, keys and values [n, kv_heads, head_dim]."""


@dataclass(frozen=True)
class Skips:
    """Blocks that a draft pass leaves out."""

    attention: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()

    @classmethod
    def of(cls, blocks: Iterable[tuple[str, int]]) -> Skips:
        """``blocks``: ("attention" or "mlp", layer)."""
        blocks = list(blocks)
        return cls(*(frozenset(n for kind, n in blocks if kind == k) for k in KINDS))

    @classmethod
    def above(cls, layers: int, num_layers: int) -> Skips:
        """Leave early: the first ``layers`` layers run."""
        rest = frozenset(range(layers, num_layers))
        return cls(rest, rest)

    def __str__(self) -> str:
        return f"attention {sorted(self.attention)}, MLP {sorted(self.mlp)}"


KINDS = ("attention", "mlp")


@dataclass(frozen=True, slots=True)
class Pass:
    """Which layers a pass runs."""

    skips: Skips
    exits: tuple[int, ...] = ()
    """After how many layers, ascending, logits are wanted; the pass ends behind the last. Empty:
    all layers run, and hidden states are all that is wanted."""


class SelfDraftExecutor(DraftExecutor):
    """A draft executor over the target's layers; ``skips`` may change between rounds."""

    def __init__(self, model, max_slots: int, max_nodes: int):
        super().__init__(model, max_slots, max_nodes)
        self.skips = Skips()

    def room(self, request: str, length: int) -> bool:
        # Nodes never go beyond the target's context, whose positions these are; a replay's
        # rows lie where the nodes do.
        return self.cache.reserve(request, length + max(self.max_nodes, WINDOW))

    @torch.inference_mode()
    def follow(
        self, requests: list[str], texts: list[np.ndarray], rows: np.ndarray, read: ReadKV,
        versions: list[int] | None = None,
    ) -> None:  # fmt: skip
        """Copy what the target computed of each text since the last call: all but its last
        token. ``rows`` int64 [R] are the requests' numbers for ``read``; ``versions`` [R] as in
        :meth:`begin`."""
        table = self.cache.table(requests)
        of_version = versions or [None] * len(texts)
        news = [
            np.arange(self.cache.cached(name, text[:-1], version), len(text) - 1)
            for name, text, version in zip(requests, texts, of_version, strict=True)
        ]
        slots = [
            pages[new // PAGE] * PAGE + new % PAGE for pages, new in zip(table, news, strict=True)
        ]
        positions = np.concatenate(news)
        if len(positions):
            origin = np.repeat(rows, [len(new) for new in news])
            self._copy(np.concatenate(slots), origin, positions, read)
        self._remember(requests, texts, of_version)

    def _copy(
        self, slots: np.ndarray, requests: np.ndarray, positions: np.ndarray, read: ReadKV
    ) -> None:
        """Copy what the target holds of ``requests`` at ``positions`` to ``slots`` of the cache,
        int64 [n] each."""
        self.cache.store(self._to_device(slots), read(requests, positions))

    def _remember(
        self, requests: list[str], texts: list[np.ndarray], of_version: Sequence[int | None]
    ) -> None:
        # The last token's keys and values are the draft's until the target has computed them.
        for name, text, version in zip(requests, texts, of_version, strict=True):
            self.cache.remember(name, text[:-1], version)

    @torch.inference_mode()
    def replay(
        self, requests: list[str], texts: list[np.ndarray], starts: np.ndarray,
        skips: Skips, exits: list[int],
    ) -> tuple[np.ndarray, int]:  # fmt: skip
        """Predict each text's last tokens once more, greedily.

        At most WINDOW tokens of each text that :meth:`follow` has seen, not before index
        ``starts`` int64 [R] (1 or more). Returns how many predictions after the first
        ``e`` layers were right, int64, for each ``e`` of ``exits``; and how many there were.
        """
        counts = np.minimum(WINDOW, [len(text) for text in texts] - starts).clip(0)
        request = np.repeat(np.arange(len(texts)), counts)
        lengths = np.array([len(text) for text in texts])[request]
        number = np.arange(len(request)) - np.repeat(np.cumsum(counts) - counts, counts)
        before = lengths - 1 - np.repeat(counts, counts) + number  # whose next tokens are predicted
        places = list(zip(request.tolist(), before.tolist(), strict=True))
        tokens = self._to_device(np.array([texts[r][i] for r, i in places], np.int64))
        targets = self._to_device(np.array([texts[r][i + 1] for r, i in places], np.int64))
        rows = self._apart(self.cache.table(requests)[request], before, lengths + number)
        right: list[torch.Tensor] = []

        def count(logits: torch.Tensor) -> None:
            right.append((logits.argmax(-1) == targets).sum())

        self._pass(Pass(skips, tuple(exits)), tokens, rows, count)
        return torch.stack(right).cpu().numpy(), len(request)

    def _apart(self, table: np.ndarray, positions: np.ndarray, cached_at: np.ndarray) -> Rows:
        """T rows at ``positions`` int64 [T] that see the text before them and themselves, each a
        request of its own with the pages ``table`` int32 [T, P]; ``cached_at`` int64 [T]: where, in
        the slots of these, their own keys and values go."""
        page, count = self.cache.page, len(positions)
        slots = table[np.arange(count), cached_at // page].astype(np.int64) * page
        each = np.arange(count + 1, dtype=np.int32)
        related = np.full(count, -1, np.int32) if self.cache.packed else np.ones((count, 1), bool)
        contexts, ends = cached_at.astype(np.int32), positions.astype(np.int32)
        tensors = (
            positions, slots + cached_at % page, each, contexts, ends, table, each,
            np.zeros(count, np.int32), related,
        )  # fmt: skip
        return Rows(*map(self._to_device, tensors), 1, int(cached_at.max()))

    @torch.inference_mode()
    def begin(
        self, requests: list[str], texts: list[np.ndarray], versions: list[int] | None = None
    ) -> torch.Tensor:
        logits = super().begin(requests, texts, versions)
        self._remember(requests, texts, versions or [None] * len(texts))
        return logits

    def _forward(self, tokens, rows, exact):
        return self._pass(Pass(self.skips), tokens, rows)

    def _pass(
        self, which: Pass, tokens: torch.Tensor, rows: Rows,
        look: Callable[[torch.Tensor], None] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Hidden states [T, d] behind the last layer of a pass over ``tokens`` int64 [T]; ``look``
        is called with the logits [T, V] behind each of its exits."""
        return self._run(which, tokens, rows, PagedAttention(self.cache, rows), look)

    def _run(
        self, which: Pass, tokens: torch.Tensor, rows: Rows, attend: Attend,
        look: Callable[[torch.Tensor], None] | None,
    ) -> torch.Tensor:  # fmt: skip
        """As :meth:`_pass`, by the attention ``attend``."""
        model, skips = self.model, which.skips
        hidden, rotary = model.embed(tokens), model.rotary(rows.positions)
        for layer in range(which.exits[-1] if which.exits else model.num_layers):
            if layer not in skips.attention:
                hidden = hidden + model.attention(layer, hidden, rotary, attend)
            if layer not in skips.mlp:
                hidden = hidden + model.mlp(layer, hidden)
            if look is not None and layer + 1 in which.exits:
                look(model.logits(hidden))
        return hidden


class SkipSearch:
    """Which blocks to leave out (SWIFT, section 4.2).

    Blocks of the first and the last layer always run. Candidates of the same size compete with
    the best set so far *on the same replayed tokens*, so a change of traffic cannot leave a
    stale record unbeaten. SWIFT draws candidates at random and by Bayesian optimisation; here
    they are the best set with some blocks exchanged, and now and then a random set.
    """

    ENOUGH = 0.95
    """Share of right predictions at which the search rests."""
    PATIENCE, MOST = 300, 1000
    """It ends after so many trials without success, or in all."""
    WEIGHT = 0.95
    """Memory of the share of right predictions, per trial."""

    def __init__(self, num_layers: int, share: float):
        odd_first = [*range(1, num_layers - 1, 2), *range(2, num_layers - 1, 2)]
        self._blocks = [(kind, layer) for layer in odd_first for kind in KINDS]
        self._size = max(1, int(len(self._blocks) * share))
        self._rng = np.random.default_rng(0)
        self.best = set(self._blocks[: self._size])
        self.trials = self._since_success = 0
        self._right = self._seen = 0.0

    @property
    def accuracy(self) -> float:
        """Of the best set, lately; 0 before the first trial."""
        return self._right / self._seen if self._seen else 0.0

    @property
    def resting(self) -> bool:
        ended = self._since_success >= self.PATIENCE or self.trials >= self.MOST
        return self._size == len(self._blocks) or ended or self.accuracy > self.ENOUGH

    def candidate(self) -> set[tuple[str, int]]:
        """Another set of the same size."""
        if self._rng.random() < 0.125:
            chosen = self._rng.permutation(len(self._blocks))[: self._size]
            return {self._blocks[i] for i in chosen}
        inside = sorted(self.best)
        outside = sorted(set(self._blocks) - self.best)
        most = min(3, len(inside), len(outside))
        swaps = int(self._rng.integers(1, most + 1))
        leave = self._rng.permutation(len(inside))[:swaps]
        enter = self._rng.permutation(len(outside))[:swaps]
        return self.best - {inside[i] for i in leave} | {outside[i] for i in enter}

    def judge(self, candidate: set[tuple[str, int]], right: int, best_right: int, seen: int):
        """Take a candidate that predicted more of ``seen`` tokens than the best did."""
        self.trials += 1
        self._since_success += 1
        if right > best_right:
            self.best, best_right = candidate, right
            self._since_success = 0
            self._right = self._seen = 0.0  # of another set
        self._right = self.WEIGHT * self._right + best_right
        self._seen = self.WEIGHT * self._seen + seen


def tokens_per_layer(right: float, layers: int, num_layers: int, drafted: int) -> float:
    """Expected tokens per layer run (DEL, section 3), ``sum_{j <= g} a^j / (L + g l)``.

    ``right``: a, share of right predictions after ``layers`` l of ``num_layers`` L;
    ``drafted``: g, tokens per round.
    """
    return sum(right**j for j in range(drafted + 1)) / (num_layers + drafted * layers)


class ExitChoice:
    """After how many layers to leave: where most tokens per layer run are expected (DEL)."""

    WEIGHT = 0.95
    """Memory of right and wrong predictions, per replay."""

    def __init__(self, exits: list[int], num_layers: int, max_depth: int):
        self.exits = sorted(exits)
        self._num_layers, self._max_depth = num_layers, max_depth
        self._right = np.zeros(len(exits))
        self._seen = 0.0

    def observe(self, right: np.ndarray, seen: int) -> None:
        """``right`` int64 [exits] of ``seen`` tokens were predicted after each exit."""
        self._right = self.WEIGHT * self._right + right
        self._seen = self.WEIGHT * self._seen + seen

    @property
    def best(self) -> int:
        """Layers to run, each exit judged at its best number of drafted tokens."""
        share = self._right / max(self._seen, 1)
        return max(
            (tokens_per_layer(right, layers, self._num_layers, drafted), layers)
            for right, layers in zip(share.tolist(), self.exits, strict=True)
            for drafted in range(self._max_depth + 1)
        )[1]
