"""How good a draft is on texts that it has not learnt from, measured the same way for all.

Three figures, of which the last is what serving counts: at every position of the texts, given them,
the probability that a token drawn from the draft is accepted, ``1 - TVD``, and the share of
positions whose best token is the target's; and, behind some of them, how deep the draft's own chain
or tree is right (``training/probe.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from vllm_specplus.training.batch import Batch, Batches
from vllm_specplus.training.frozen import Frozen
from vllm_specplus.training.probe import Depth, Probe
from vllm_specplus.training.texts import Text

#: Positions of a batch that is measured.
BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Measured:
    """What was found on held-out texts."""

    positions: int
    tvd_acceptance: float | None
    """Mean of sum min(p, q) at temperature 1; None: the recipe trains no draft."""
    greedy_acceptance: float | None
    by_depth: tuple[Depth, ...]
    others: dict[str, float] = field(default_factory=dict)
    """Figures of the recipe's own."""

    def to_json(self) -> dict:
        """As an object of JSON."""
        return asdict(self)


Pairs = Callable[[Batch], Iterable[tuple[Tensor, Tensor]]]
"""The target's and the draft's logits, float32 [n, V] each, by slices of the positions where a
batch is to be learnt."""


@dataclass
class Tally:
    """How target and draft have agreed so far."""

    count: int = 0
    mass: float = 0.0
    """Sum of sum min(p, q)."""
    right: int = 0
    """Positions whose best tokens are the same."""

    def add(self, target: Tensor, draft: Tensor) -> None:
        """Of logits float32 [n, V] each."""
        both = torch.minimum(target.softmax(-1), draft.softmax(-1))
        self.mass += float(both.sum())
        self.right += int((target.argmax(-1) == draft.argmax(-1)).sum())
        self.count += len(target)

    @property
    def tvd(self) -> float:
        """Mean of 1 - TVD; 0 of nothing."""
        return self.mass / max(self.count, 1)

    @property
    def greedy(self) -> float:
        """Share of equal best tokens; 0 of nothing."""
        return self.right / max(self.count, 1)


@torch.no_grad()
def measure(
    target: Frozen, texts: Sequence[Text], pairs: Pairs, paths: Callable[[Probe], Tensor]
) -> Measured:
    """All figures of a draft. ``paths(probe)``: what it would be served with behind the probe's
    positions, int64 [S, K, D]; see :meth:`Probe.by_depth`."""
    tally = Tally()
    for batch in Batches(texts, BATCH_TOKENS, 0).epoch(0):
        for pair in pairs(batch.to(target.device)):
            tally.add(*pair)
    probe = target.probe(texts)
    found = probe.by_depth(paths(probe))
    return Measured(tally.count, tally.tvd, tally.greedy, found)
