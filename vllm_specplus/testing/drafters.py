"""Drafting methods of the worst and the best cases, which no real method reaches.

Importing this file registers them; they are for tests, so no entry point names them.
"""

from __future__ import annotations

import json
from typing import Literal

import numpy as np
from pydantic import model_validator

from vllm_specplus.config import MethodConfig
from vllm_specplus.control.settings import ControlConfig, FixedControl
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.step import StepContext
from vllm_specplus.tree import DraftBatch


class Everything(MethodConfig):
    """Verifies all that is drafted, unless a test wants the controller."""

    control: ControlConfig = FixedControl(policy="fixed")

    @model_validator(mode="after")
    def _fixed_says_how_many(self):
        return self


class HiddenTruthConfig(Everything):
    method: Literal["hidden_truth"] = "hidden_truth"
    num_speculative_tokens: int = 8
    reference: str
    """JSON file: list of [prompt ids, output ids] of plain decoding."""
    shape: Literal["tree", "chain", "random"] = "tree"
    seed: int = 0


@register_method
class HiddenTruth(Proposer):
    """Hides a random prefix of the true continuation somewhere in a random tree.

    ``tree`` mixes accepted, partly accepted and rejected paths in every step, with
    the accepted nodes at arbitrary places, so wrong positions, masks or compaction
    change the text at once. ``chain`` proposes only the truth; ``random`` never does.
    """

    config_class = HiddenTruthConfig
    top_k = 1

    def __init__(self, config: HiddenTruthConfig, services: Services):
        super().__init__(config, services)
        with open(config.reference) as f:
            self.texts = [prompt + output for prompt, output in json.load(f)]
        self.rng = np.random.default_rng(config.seed)

    def propose(self, step: StepContext) -> DraftBatch:
        tokens, parents, counts = [], [], []
        for r in range(len(step.num_tokens)):
            budget = int(step.max_nodes[r])
            n = int(step.num_tokens[r])
            drafted = self._draft(step.token_ids[r, :n].tolist(), budget, step.chain_only[r])
            counts.append(len(drafted))
            tokens += [t for t, _ in drafted]
            parents += [p for _, p in drafted]
        return DraftBatch(*(np.array(x, np.int32) for x in (tokens, parents, counts)))

    def _draft(self, text, budget, chain_only):
        if not budget:
            return []
        truth = next((t[len(text) :] for t in self.texts if t[: len(text)] == text), [])
        if self.config.shape == "chain" or chain_only:
            return [(t, i - 1) for i, t in enumerate(truth[:budget])]
        if self.config.shape == "random":
            truth = []
        keep = int(self.rng.integers(0, 6))
        truth = truth[:keep]
        nodes, tip = [], -1
        for _ in range(int(self.rng.integers(1, budget + 1))):
            if truth and self.rng.random() < 0.4:
                nodes.append((truth.pop(0), tip))
                tip = len(nodes) - 1
            else:
                token = int(self.rng.integers(self.services.vocab_size))
                nodes.append((token, int(self.rng.integers(-1, len(nodes)))))
        return nodes


class BrokenConfig(Everything):
    method: Literal["broken"] = "broken"
    num_speculative_tokens: int = 4


@register_method
class Broken(Proposer):
    """Fails in every step."""

    config_class = BrokenConfig

    def propose(self, step: StepContext) -> DraftBatch:
        raise OSError("the datastore is gone")
