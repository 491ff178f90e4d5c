"""Chains from every position of a text at once: EAGLE-3's training-time test (arXiv 2503.01840,
section 3.2), and what a head drafts greedily.

The chain of row ``i`` begins with the head's row of the text at ``i``, which reads what the target
computed there and predicts token ``i + 2``. Each further step reads, for a feature, what the head
itself gave a step before, as it does when it is served: step ``k`` (from 0) is a row at position
``i + k`` that holds token ``i + k + 1`` and predicts token ``i + k + 2``.

A row sees what it would see then: the text's rows up to ``i``, which are made of the target's
features, and the rows of its own chain; of later rows of the text, which serving has not got yet,
and of other chains nothing. With all chains side by side that is a causal mask on the keys of step
0 and a diagonal one on those of each step after it.

``speculators`` trains EAGLE-3 heads by the same unrolling; it is not used because it compiles
FlexAttention for modules of its own, which nothing here serves. These are the served ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_specplus.drafting.dense_attention import DenseAttention
from vllm_specplus.drafting.eagle import EagleHead


class ChainKeys:
    """Keys and values of all steps so far, one after the other, where serving has pages."""

    def __init__(self) -> None:
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append [B, kv_heads, rows, head_dim] each; returns [B, kv_heads, steps * rows, head_dim].
        (A ``Keys`` of ``drafting/dense_attention.py``.)"""
        self._keys.append(keys)
        self._values.append(values)
        return torch.cat(self._keys, 2), torch.cat(self._values, 2)


class Chains:
    """One chain of ``head`` from each row of a batch of texts, padded on the right."""

    def __init__(self, head: EagleHead, states: Tensor):
        """``states`` [B, rows, states * target_hidden]: what the target computed at the rows'
        positions, 0 to ``rows - 1``."""
        self._head, self._keys = head, ChainKeys()
        self._given = head.fuse(states)
        rows, device = states.shape[1], states.device
        self._positions = torch.arange(rows, device=device).expand(len(states), -1)
        self._own = torch.eye(rows, dtype=torch.bool, device=device)
        self._seen = torch.ones_like(self._own).tril()

    def step(self, tokens: Tensor) -> Tensor:
        """y [B, rows, hidden] of the next step, whose rows hold ``tokens`` int64 [B, rows].

        A row whose token is behind the text's end, or padding, is of no use, and disturbs no other.
        """
        head = self._head
        attend = DenseAttention(self._seen.expand(len(tokens), 1, -1, -1), self._keys)
        rotary = head.rotary(self._positions.flatten())
        y = head(tokens.flatten(), self._given.flatten(0, 1), rotary, attend)
        y = y.unflatten(0, tokens.shape)
        self._given = head.feature(y)
        self._positions = self._positions + 1
        self._seen = torch.cat((self._seen, self._own), 1)
        return y


def ahead(values: Tensor, step: int) -> Tensor:
    """[B, n - 1] of ``values`` [B, n]: row ``i`` has that of position ``i + step + 1``, or 0 behind
    the end. Of tokens: what the rows of a step hold; of anything about the target's predictions:
    what it says of the prediction that the rows of a step are to make."""
    rows = torch.zeros_like(values[:, 1:])
    there = values[:, step + 1 :]
    rows[:, : there.shape[1]] = there
    return rows


def step_weights(steps: int, decay: float) -> list[float]:
    """Weights of the losses of the steps, 1 in all; each is ``decay`` times that of the one before.
    A draft's later tokens count only where all before them are right."""
    powers = [decay**step for step in range(steps)]
    return [power / sum(powers) for power in powers]
