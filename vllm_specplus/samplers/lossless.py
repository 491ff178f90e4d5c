"""Lossless verification of deterministic drafts, chains and trees.

Draw one token from the target at every row; from the root, follow the child that
holds the drawn token; where there is none, the drawn token is the output and the
walk ends. The text is distributed exactly as in plain decoding for any tree that
is a function of the past: each output token is one draw from the target's own
distribution given the tokens before it (naive sampling in the terms of SpecInfer,
arXiv 2305.09781). At temperature 0 the draw is the argmax.
"""

from __future__ import annotations

import numpy as np

from vllm_specplus.samplers.rules import Nodes, Rule
from vllm_specplus.step import Acceptance, Rows
from vllm_specplus.tree import accepted_paths


def accept(rows: Rows, sampled: np.ndarray) -> Acceptance:
    """Follows ``sampled`` int32 [L], the target's draw at every row, down each tree."""
    if len(sampled) == len(rows.starts) - 1:  # roots alone
        count = len(sampled)
        path = np.zeros((count, 1), np.int32)
        return Acceptance(path, np.ones(count, np.int32), sampled[:, None].astype(np.int32))
    path, lengths = accepted_paths(rows.tokens, rows.parents, rows.starts, sampled)
    width = int(lengths.max()) if len(lengths) else 1
    path = path[:, :width]
    output = np.where(path >= 0, sampled[rows.starts[:-1, None] + np.maximum(path, 0)], -1)
    return Acceptance(path, lengths, output.astype(np.int32))


class Lossless(Rule):
    """Accepts the nodes that the target itself draws; nodes that a draft model drew are accepted
    by the rule of their method (``sampled``)."""

    name = "lossless"
    verifies = frozenset({Nodes.DETERMINISTIC})
    lossless = True

    def reference(self, rows: Rows, sampled: np.ndarray) -> list[list[int]]:
        """Lists each request's output, as :func:`accept` finds it."""
        texts = []
        for first, end in zip(rows.starts[:-1], rows.starts[1:], strict=True):
            row: int | None = int(first)
            text = []
            while row is not None:
                text.append(int(sampled[row]))
                children = [i for i in range(first, end) if rows.parents[i] == row - first]
                matching = [
                    i for i in children if rows.tokens[i] == sampled[row] and sampled[i] >= 0
                ]
                row = matching[0] if matching else None
            texts.append(text)
        return texts
