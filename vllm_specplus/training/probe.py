"""Positions of held-out texts behind which drafts are tried, as they are when they are served.

Behind each of them a draft proposes, *from its own tokens on*, the chain or tree that it would be
served with. Depth d is accepted if the target, writing greedily, writes the first d tokens of one
of its paths.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_specplus.training.batch import collate
from vllm_specplus.training.decoding import greedy_chains
from vllm_specplus.training.language_model import LanguageModel
from vllm_specplus.training.texts import Text

#: Levels of the chains, positions in all, and positions computed side by side.
DEPTH, POSITIONS, SIDE_BY_SIDE = 6, 512, 32
#: Standard deviations on either side of a 95 % interval.
Z = 1.959964


@dataclass(frozen=True)
class Depth:
    """How often a draft was right up to a depth."""

    depth: int
    """From 1 on."""
    count: int
    """Positions behind which the target wrote so many tokens."""
    rate: float
    low: float
    high: float
    """Wilson's interval of the rate, 95 %."""


def wilson(right: int, count: int) -> tuple[float, float]:
    """Bounds of the 95 % interval of a share (Wilson's score interval); all of [0, 1] if nothing
    was counted."""
    if count == 0:
        return 0.0, 1.0
    share, spread = right / count, Z * Z / count
    middle = share + spread / 2
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max((middle - half) / (1 + spread), 0.0), min((middle + half) / (1 + spread), 1.0)


class Group(NamedTuple):
    """Texts, and positions behind which they are continued."""

    tokens: Tensor
    """int64 [B, n], padded on the right."""
    mask: Tensor
    """bool [B, n]."""
    rows: Tensor
    places: Tensor
    """int64 [R]: continuation r goes on behind position ``places[r]`` of text ``rows[r]``."""


@dataclass(frozen=True)
class Probe:
    """Positions of held-out texts, and what the target writes behind them."""

    groups: tuple[Group, ...]
    truth: Tensor
    """int64 [S, D]: greedily, of the continuations of all groups in their order; -1 behind a token
    that ends a text."""

    @property
    def depth(self) -> int:
        return self.truth.shape[1]

    @classmethod
    def of(
        cls, target: LanguageModel, ends: Iterable[int], texts: Sequence[Text], depth: int = DEPTH,
        positions: int = POSITIONS, seed: int = 0,
    ) -> Probe:  # fmt: skip
        """At most so many of the positions whose next token a model has written, drawn by the
        seed."""
        groups = tuple(groups_of(texts, positions, seed, target.device))
        chains = [greedy_chains(target, *group, depth) for group in groups]
        truth = torch.cat(chains) if chains else torch.zeros(0, depth, dtype=torch.long)
        stops = torch.isin(truth, torch.tensor(sorted(ends), dtype=torch.long, device=truth.device))
        behind = stops.cumsum(1) - stops.long() > 0
        return cls(groups, truth.masked_fill(behind, -1))

    def chains(self, draft: LanguageModel) -> Tensor:
        """The greedy chains int64 [S, 1, D] of a draft that is a language model of its own."""
        chains = [greedy_chains(draft, *group, self.depth) for group in self.groups]
        return (torch.cat(chains) if chains else self.truth)[:, None]

    def by_depth(self, paths: Tensor) -> tuple[Depth, ...]:
        """The rates of ``paths`` int64 [S, K, D]: K paths from the root for each continuation, -1
        where one is shorter. Depths that the target never reached are left out."""
        agree = (paths == self.truth[:, None]) & (paths >= 0)
        right = agree.long().cumprod(2).amax(1)
        counted = self.truth >= 0
        found = []
        for depth in range(self.depth):
            count = int(counted[:, depth].sum())
            hits = int((right[:, depth].bool() & counted[:, depth]).sum())
            if count:
                found.append(Depth(depth + 1, count, hits / count, *wilson(hits, count)))
        return tuple(found)


def groups_of(
    texts: Sequence[Text], positions: int, seed: int, device: torch.device
) -> Iterator[Group]:
    """Groups of some of the texts' positions."""
    everywhere = [
        (number, place)
        for number, text in enumerate(texts)
        for place in range(max(text.start - 1, 0), len(text.tokens) - 1)
    ]
    drawn = random.Random(seed).sample(everywhere, min(positions, len(everywhere)))
    drawn.sort(key=lambda chosen: (len(texts[chosen[0]].tokens), *chosen))
    for at in range(0, len(drawn), SIDE_BY_SIDE):
        chosen = drawn[at : at + SIDE_BY_SIDE]
        numbers = sorted({number for number, _ in chosen})
        batch = collate([texts[number] for number in numbers]).to(device)
        rows = torch.tensor([numbers.index(number) for number, _ in chosen], device=device)
        places = torch.tensor([place for _, place in chosen], device=device)
        yield Group(batch.tokens, batch.mask, rows, places)
