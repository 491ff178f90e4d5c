"""The trees of a step that is profiled and not served: what drafts cost before there are any."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from vllm_specplus.control.cost import StepShape
from vllm_specplus.engine.batch import Step, chain
from vllm_specplus.step import Rows
from vllm_specplus.tree import row_depths

if TYPE_CHECKING:
    from vllm.v1.attention.backend import CommonAttentionMetadata


def profiled_step(common: CommonAttentionMetadata, kind: str, serves_chains: bool) -> Step:
    """The step of vLLM's dummy batch, all of its rows being drafts: binary trees, or chains,
    which the stock kernel takes unless ours ``serves_chains``."""
    starts = common.query_start_loc_cpu.numpy().astype(np.int32)
    counts = np.diff(starts)
    starts = np.append(0, np.cumsum(counts[counts > 0])).astype(np.int32)
    counts = counts[counts > 0]
    if kind == "tree":
        parents = [(np.arange(n, dtype=np.int32) + 1) // 2 - 1 for n in counts]
    else:
        parents = [chain(n) for n in counts]
    flat = np.concatenate(parents).astype(np.int32)
    tokens = np.zeros(len(flat), np.int32)
    ours = kind == "tree" or serves_chains
    return Step(
        rows=Rows(tokens, flat, starts, row_depths(flat, starts)),
        batch_rows=np.arange(len(flat)),
        tree_attention=np.full(len(counts), ours),
        num_scheduled=counts,
        num_computed=np.zeros(len(counts), np.int32),
        previous=tokens,
        shape=StepShape(len(counts), len(flat), len(flat), tree=kind == "tree"),
        resumed=0,
    )
