"""Which blocks of the target a draft leaves out, found while serving (SWIFT, arXiv 2410.06916).

Blocks are the attentions and the MLPs of all layers but the first and the last, which always run.
A trial predicts tokens that were generated already by a candidate set, and counts those that are
right. Every 25th candidate is proposed by Bayesian optimisation (``bayes.py``). Of the others there
are two forms:

* ``swift``, the paper's: a random set of the same size, adopted if its share of right predictions
  beats the best share that any set has had so far;
* ``paired``: the best set with up to three blocks exchanged, now and then a random one, adopted if
  it was right more often than the best set was on the *same* tokens. A share that was measured on
  easier text does not stand in the way, and neighbours of a good set are better than random ones.

The paper's search ends for ever: behind a share of 0.95, 300 trials without success or 1,000 in
all. So does this one, until the measured acceptance of drafts falls: other traffic, which wants
another set. Then what was learnt is forgotten, but for the set in use, and it begins anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vllm_specplus.drafting.bayes import Bayes

KINDS = ("attention", "mlp")

Block = tuple[str, int]
"""("attention" or "mlp", layer)"""

#: Share of right predictions at which a search rests.
ENOUGH = 0.95
#: It also does after so many trials without success, or in all.
PATIENCE, MOST = 300, 1000
#: One candidate in so many is Bayesian.
BAYES_EVERY = 25
#: Of the others of the form ``paired``, so many are random.
RANDOM_SHARE = 0.125
#: Memory of the share of right predictions, per trial, of the form ``paired``.
MEMORY = 0.95


@dataclass(frozen=True)
class Skips:
    """Blocks that a draft pass leaves out."""

    attention: frozenset[int] = frozenset()
    mlp: frozenset[int] = frozenset()

    @classmethod
    def of(cls, blocks: Iterable[Block]) -> Skips:
        """The set of some blocks."""
        blocks = list(blocks)
        return cls(*(frozenset(n for kind, n in blocks if kind == k) for k in KINDS))

    @classmethod
    def above(cls, layers: int, num_layers: int) -> Skips:
        """Leave early: the first ``layers`` layers run."""
        rest = frozenset(range(layers, num_layers))
        return cls(rest, rest)

    def __str__(self) -> str:
        return f"attention {sorted(self.attention)}, MLP {sorted(self.mlp)}"


class Fall:
    """Has the mean of a series fallen? Page's test, with the mean estimated on the way (Page 1954,
    Hinkley 1971).

    A fall is told where the sum of the differences from the mean, ``SLACK`` forgiven in each, is
    ``ALARM`` below its highest. For tokens that are accepted or not, a fall by 0.4 is told behind
    some 60 of them.
    """

    SLACK, ALARM = 0.05, 20.0

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._sum = self._highest = 0.0

    def observe(self, value: float) -> bool:
        """Take the next value in; has the mean fallen by now?"""
        self._count += 1
        self._mean += (value - self._mean) / self._count
        self._sum += value - self._mean + self.SLACK
        self._highest = max(self._highest, self._sum)
        return self._highest - self._sum > self.ALARM


class SkipSearch:
    """The search of one engine; see the module's docstring."""

    def __init__(self, num_layers: int, share: float, form: Literal["paired", "swift"] = "paired"):
        """``share`` of the blocks is left out."""
        inner = range(1, num_layers - 1)
        self._blocks: list[Block] = [(kind, layer) for kind in KINDS for layer in inner]
        self._size = max(1, int(len(self._blocks) * share))
        self._form, self._rng = form, np.random.default_rng(0)
        odd_first = sorted(self._blocks, key=lambda block: (block[1] % 2 == 0, block[1]))
        self.best = set(odd_first[: self._size])
        self.restarts = 0
        self._begin()

    def _begin(self) -> None:
        self.trials = self._since_success = 0
        self._right = self._seen = 0.0
        self._bayes = Bayes(len(self._blocks), seed=self.restarts)
        self._fall = Fall()

    @property
    def accuracy(self) -> float:
        """Share of right predictions of the best set, lately (``paired``) or when it was adopted
        (``swift``); 0 before the first trial."""
        return self._right / self._seen if self._seen else 0.0

    @property
    def resting(self) -> bool:
        """Is there nothing to be tried now?"""
        ended = self._since_success >= PATIENCE or self.trials >= MOST
        return self._size == len(self._blocks) or ended or self.accuracy > ENOUGH

    def candidate(self) -> set[Block]:
        """Another set of the same size."""
        if (self.trials + 1) % BAYES_EVERY == 0:
            highest = np.argsort(-self._bayes.propose(), kind="stable")[: self._size]
            return {self._blocks[i] for i in highest}
        if self._form == "swift" or self._rng.random() < RANDOM_SHARE:
            chosen = self._rng.permutation(len(self._blocks))[: self._size]
            return {self._blocks[i] for i in chosen}
        inside = sorted(self.best)
        outside = sorted(set(self._blocks) - self.best)
        swaps = int(self._rng.integers(1, min(3, len(inside), len(outside)) + 1))
        leave = self._rng.permutation(len(inside))[:swaps]
        enter = self._rng.permutation(len(outside))[:swaps]
        return self.best - {inside[i] for i in leave} | {outside[i] for i in enter}

    def judge(self, candidate: set[Block], right: int, best_right: int, seen: int) -> None:
        """Of the form ``paired``: take a candidate that predicted more of ``seen`` tokens than the
        best did."""
        self._tried(candidate, right / seen)
        if right > best_right:
            self._adopt(candidate)
            self._right = self._seen = 0.0  # of another set
            best_right = right
        self._right = MEMORY * self._right + best_right
        self._seen = MEMORY * self._seen + seen

    def score(self, candidate: set[Block], right: int, seen: int) -> None:
        """Of the form ``swift``: take a candidate that predicted a greater share than any did."""
        self._tried(candidate, right / seen)
        if right / seen > self.accuracy:
            self._adopt(candidate)
            self._right, self._seen = float(right), float(seen)

    def _tried(self, candidate: set[Block], share: float) -> None:
        self.trials += 1
        self._since_success += 1
        self._bayes.tell(np.array([float(block in candidate) for block in self._blocks]), share)

    def _adopt(self, candidate: set[Block]) -> None:
        self.best, self._since_success = candidate, 0
        self._fall = Fall()  # its acceptance is another

    def accepted(self, drafted: int, accepted: int) -> None:
        """Of ``drafted`` levels of a draft by the best set so many were accepted; begin anew if
        that has become fewer than it was."""
        for level in range(
            min(accepted + 1, drafted)
        ):  # behind the first rejection nothing is known
            if self._fall.observe(float(level < accepted)):
                self.restarts += 1
                self._begin()
                return
