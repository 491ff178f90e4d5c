"""Drafts, after every token, the token that was most probable after it the last time."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from vllm_specplus.config import MethodConfig
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.step import Source, StepContext
from vllm_specplus.tree import DraftBatch


class SuccessorsConfig(MethodConfig):
    """``{"method": "successors", ...}``."""

    method: Literal["successors"] = "successors"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 4
    """Longest chain."""


@register_method
class Successors(Proposer):
    """Chains through a table of successors, which every verified row updates."""

    config_class = SuccessorsConfig
    top_k = 1
    sources = (Source("successor", "draft", 0.3),)

    def __init__(self, config: SuccessorsConfig, services: Services):
        super().__init__(config, services)
        self._next = np.full(services.vocab_size, -1, np.int32)

    def propose(self, step: StepContext) -> DraftBatch:
        rows = step.observation
        known = (rows.tokens >= 0) & (rows.tokens < len(self._next))
        self._next[rows.tokens[known]] = rows.top_ids[known, 0]
        chains = [self._chain(step, r) for r in range(len(step.request_ids))]
        counts = np.array([len(chain) for chain in chains], np.int32)
        return DraftBatch(
            tokens=np.array([token for chain in chains for token in chain], np.int32),
            parents=np.array([i - 1 for n in counts for i in range(n)], np.int32),
            counts=counts,
            sources=np.zeros(counts.sum(), np.int32),
        )

    def _chain(self, step: StepContext, r: int) -> list[int]:
        chain: list[int] = []
        token = step.token_ids[r, step.num_tokens[r] - 1]
        while len(chain) < step.max_nodes[r] and 0 <= token < len(self._next):
            token = self._next[token]
            if token < 0:
                break
            chain.append(int(token))
        return chain
