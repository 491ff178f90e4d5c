"""The tokens that a head predicts: the most frequent ones of what it learns from.

A head's output layer costs as much as the rest of it where the vocabulary is large, and most tokens
are rare. Ids are written as EAGLE-3's authors and ``speculators`` do: ``d2t`` int64 [k], to be
added to a row's number, and ``t2d`` bool [vocabulary], which tokens are among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_specplus.training.texts import Text

#: What a loss ignores; PyTorch's own.
OUTSIDE = -100


@dataclass(frozen=True)
class DraftVocabulary:
    """Some of a target's tokens."""

    ids: Tensor
    """int64 [k], ascending."""
    size: int
    """Tokens of the target."""

    @classmethod
    def of(cls, texts: Iterable[Text], size: int, k: int) -> DraftVocabulary:
        """The ``k`` most frequent tokens of those that models wrote in ``texts``; among equally
        frequent ones those with the smaller ids, so that what never occurs fills up the rest."""
        counts = token_counts(texts, size)
        ids = counts.sort(descending=True, stable=True).indices[:k].sort().values
        return cls(ids, size)

    @property
    def d2t(self) -> Tensor:
        return self.ids - torch.arange(len(self.ids), device=self.ids.device)

    @property
    def t2d(self) -> Tensor:
        known = torch.zeros(self.size, dtype=torch.bool, device=self.ids.device)
        known[self.ids] = True
        return known

    def rows(self, tokens: Tensor) -> Tensor:
        """int64, the shape of ``tokens``: the number of each in the subset, or OUTSIDE."""
        numbers = torch.full((self.size,), OUTSIDE, device=self.ids.device)
        numbers[self.ids] = torch.arange(len(self.ids), device=self.ids.device)
        return numbers[tokens]

    def coverage(self, texts: Iterable[Text]) -> float:
        """The share of the tokens that models wrote in ``texts`` that are among these: what no head
        of this vocabulary exceeds on them, accepting token by token."""
        counts = token_counts(texts, self.size)
        return int(counts[self.ids].sum()) / max(int(counts.sum()), 1)


def token_counts(texts: Iterable[Text], size: int) -> Tensor:
    """int64 [size]: how often models wrote each token in ``texts``; prompts do not count."""
    written = [token for text in texts for token in text.tokens[text.start :]]
    return torch.bincount(torch.tensor(written, dtype=torch.long), minlength=size)
