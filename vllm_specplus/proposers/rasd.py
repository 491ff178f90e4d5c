"""RASD: several sources of drafts fused into one tree.

"RASD: Retrieval-Augmented Speculative Decoding" (arXiv 2503.03434). A draft tree and
retrieved continuations are joined by longest prefix, so that shared nodes are verified
once; what the drafting source finds improbable prunes what was retrieved. The paper has one
drafter and one retriever; here any methods of this package may be combined.

All of them compete for the same nodes: each node's survival comes from the acceptance
learnt for its source (``control/acceptance.py``), and the best nodes of the union are
kept. What the paper does with fixed budgets per part, the estimates do: a retriever
whose matches have been wrong lately loses its nodes to the others. ``prune`` is the
paper's explicit rule: drop retrieved branches whose first token the drafting sources
give less than this probability (0, the default, prunes nothing).

Most sources draft deterministically, given the text (a draft model by default too: its
most probable sequences, as EAGLE-2's trees in the paper): the one-hot rule of the engine is
exact for their union (``tests/proposers/test_rasd.py`` enumerates it). One draft model may draw its
nodes instead. Siblings are then tried in draw order by ``samplers.sampled.WithoutReplacement``,
and what others found after them, by what is left of the target's distribution. What was
drawn stays, whatever it is: nodes to verify, their number and the labels that decide about
them are fixed before the draw. What was looked up may depend on anything.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from vllm_specplus.proposers import proposer_class
from vllm_specplus.proposers.base import Proposer
from vllm_specplus.proposers.trees import Fusion
from vllm_specplus.step import Observation, StepContext, bare_step
from vllm_specplus.tree import DraftBatch

if TYPE_CHECKING:
    import torch


class Rasd(Proposer):
    """Fuses the drafts of other proposers; a failing one is left out."""

    def __init__(self, config, vocab_size: int, fingerprint: str):
        super().__init__(config, vocab_size, fingerprint)
        members = [
            proposer_class(member.method)(member, vocab_size, fingerprint)
            for member in config.members()
        ]
        for member in members:
            member.report = lambda error: self.report(error)
            member.count = lambda name: self.count(name)
        # Draws come before other siblings; then drafters: what they think of a token prunes
        # what the others retrieved.
        self.members = sorted(members, key=lambda m: (m.config.retrieves, m.rule is None))
        self.rule = config.rule
        self.top_k = max(member.top_k for member in self.members)
        self.reads_prompt = any(member.reads_prompt for member in self.members)
        self._fusion = Fusion(
            [member.sources for member in self.members],
            [member.config.retrieves for member in self.members],
        )
        self.sources = self._fusion.sources

    def propose(self, step: StepContext) -> DraftBatch:
        drafts = []
        bounds = self._fusion.offsets.tolist()
        for member, low, high in zip(self.members, bounds, bounds[1:], strict=False):
            own = replace(
                step,
                observation=_first_ranks(step.observation, member.top_k),
                acceptance=np.ascontiguousarray(step.acceptance[:, :, low:high]),
                max_nodes=np.minimum(step.max_nodes, member.config.num_speculative_tokens),
            )
            try:
                draft = member.propose(own)
            except Exception as error:
                self.report(error)
                draft = DraftBatch.empty(len(step.num_tokens))
            drafts.append(draft if len(draft.tokens) else _nothing(len(step.num_tokens)))
        return self._fusion.fuse(drafts, step, self.config.prune)

    def observe_prompt(self, observation: Observation) -> None:
        for member in self.members:
            if member.reads_prompt:
                member.observe_prompt(_first_ranks(observation, member.top_k))

    def load_draft(self, device: torch.device, dtype: torch.dtype) -> None:
        for member in self.members:
            member.target_layers = lambda: self.target_layers()
            member.record = self.record
            member.load_draft(device, dtype)

    def warm_up(self) -> None:
        for member in self.members:
            member.warm_up()
        step = bare_step(
            self.sources, np.zeros((1, 4), np.int32), self.config.num_speculative_tokens
        )
        self._fusion.fuse([_nothing(1) for _ in self.members], step, self.config.prune)

    def forget(self, request_id: str) -> None:
        for member in self.members:
            member.forget(request_id)

    def close(self) -> None:
        for member in self.members:
            member.close()


def _first_ranks(observation: Observation, k: int) -> Observation:
    """What a member with ``top_k`` k asked for of an observation of the largest k."""
    if observation.top_ids.shape[1] == k:
        return observation
    return replace(observation, top_ids=np.ascontiguousarray(observation.top_ids[:, :k]))


def _nothing(num_requests: int) -> DraftBatch:
    empty = DraftBatch.empty(num_requests)
    return replace(empty, sources=empty.tokens)
