"""Lossless verification of deterministic drafts, chains and trees.

Draw one token from the target at every row; from the root, follow the child that
holds the drawn token; where there is none, the drawn token is the output and the
walk ends. The text is distributed exactly as in plain decoding for any tree that
is a function of the past: each output token is one draw from the target's own
distribution given the tokens before it (rule D in the terms of SpecInfer,
arXiv 2305.09781, and RSD, arXiv 2402.14160). At temperature 0 the draw is the
argmax.
"""

from __future__ import annotations

import numpy as np

from vllm_specplus.step import Acceptance, Rows
from vllm_specplus.tree import accepted_paths


def accept(rows: Rows, sampled: np.ndarray) -> Acceptance:
    """``sampled`` int32 [L]: the target's draw at every row."""
    path, lengths = accepted_paths(rows.tokens, rows.parents, rows.starts, sampled)
    width = int(lengths.max()) if len(lengths) else 1
    path = path[:, :width]
    output = np.where(path >= 0, sampled[rows.starts[:-1, None] + np.maximum(path, 0)], -1)
    return Acceptance(path, lengths, output.astype(np.int32))
