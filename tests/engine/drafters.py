"""Test-only drafting methods: worst and best cases that no real method reaches.

Registered like any method when this file is imported.
"""

from __future__ import annotations

import json
from typing import Literal

import numpy as np

from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.step import StepContext
from vllm_specplus.testing.drafters import Everything
from vllm_specplus.tree import DraftBatch


class SwitchingConfig(Everything):
    method: Literal["switching"] = "switching"
    num_speculative_tokens: int = 8
    reference: str
    record: str
    """File to write: [[tokens known, nodes verified in the step before], ...]."""
    wrong: list[int]
    """Output positions between which all drafts are wrong."""


@register_method
class Switching(Proposer):
    """Chains of the truth for a single request, except between two positions."""

    config_class = SwitchingConfig
    top_k = 1

    def __init__(self, config: SwitchingConfig, services: Services):
        super().__init__(config, services)
        with open(config.reference) as f:
            ((self.prompt, self.output),) = json.load(f)
        self.steps = []

    def propose(self, step: StepContext) -> DraftBatch:
        known = int(step.num_tokens[0])
        self.steps.append([known, len(step.observation.tokens) - 1])
        place = known - len(self.prompt)
        drafts = self.output[place : place + int(step.max_nodes[0])]
        first, end = self.config.wrong
        if first <= place < end:
            drafts = [(token + 1) % self.services.vocab_size for token in drafts]
        n = len(drafts)
        parents = np.arange(-1, n - 1, dtype=np.int32)
        return DraftBatch(np.array(drafts, np.int32), parents, np.array([n], np.int32))

    def close(self) -> None:
        with open(self.config.record, "w") as f:
            json.dump(self.steps, f)
