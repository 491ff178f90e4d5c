"""Batches of texts, in an order that a resumed run repeats."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from vllm_specplus.training.texts import UNKNOWN, Text


@dataclass(frozen=True)
class Batch:
    """Texts side by side, padded on the right."""

    tokens: Tensor
    """int64 [B, n], 0 where there is no text."""
    mask: Tensor
    """bool [B, n]: here is text."""
    learn: Tensor
    """bool [B, n]: the prediction at this position, of the token behind it, counts: a model wrote
    that token."""
    labels: Tensor
    """int64 [B, n] of :attr:`Text.labels`, -1 where there are none."""
    texts: tuple[Text, ...]
    """Its rows."""

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        tensors = (each.to(device) for each in (self.tokens, self.mask, self.learn, self.labels))
        return Batch(*tensors, self.texts)

    def part(self, rank: int, ranks: int) -> Batch | None:
        """Every ``ranks``-th text from the ``rank``-th on; None if there is none."""
        return collate(self.texts[rank::ranks]) if rank < len(self.texts) else None


def collate(texts: Sequence[Text]) -> Batch:
    """The batch of some texts, at least one, in their order."""
    width = max(len(text.tokens) for text in texts)
    tokens = torch.zeros(len(texts), width, dtype=torch.long)
    mask, learn = (torch.zeros(len(texts), width, dtype=torch.bool) for _ in range(2))
    labels = torch.full((len(texts), width), UNKNOWN)
    for row, text in enumerate(texts):
        length = len(text.tokens)
        tokens[row, :length] = torch.tensor(text.tokens)
        mask[row, :length] = True
        learn[row, max(text.start - 1, 0) : length - 1] = True
        labels[row, : len(text.labels)] = torch.tensor(text.labels, dtype=torch.long)
    return Batch(tokens, mask, learn, labels, tuple(texts))


class Batches:
    """Texts in batches of at most ``batch_tokens`` positions, padding included; a longer text is a
    batch of its own. Texts of similar length are together; which ones, and in which order batches
    come, depends on the seed and the epoch alone."""

    def __init__(self, texts: Sequence[Text], batch_tokens: int, seed: int):
        self._texts, self._seed = texts, seed
        # Where groups end depends on lengths alone, so that every epoch has as many.
        self._ends: list[int] = []
        lengths = sorted(len(text.tokens) for text in texts)
        start = 0
        for i, length in enumerate(lengths):
            if i > start and (i + 1 - start) * length > batch_tokens:
                self._ends.append(i)
                start = i
        if lengths:
            self._ends.append(len(lengths))

    def __len__(self) -> int:
        """Batches of an epoch."""
        return len(self._ends)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of an epoch, without its first ``skip``."""
        rng = random.Random(f"{self._seed} {epoch}")
        order = list(range(len(self._texts)))
        rng.shuffle(order)
        order.sort(key=lambda i: len(self._texts[i].tokens))  # keeps the order of equal ones
        groups = [order[a:b] for a, b in pairwise([0, *self._ends])]
        rng.shuffle(groups)
        for group in groups[skip:]:
            yield collate([self._texts[i] for i in group])
