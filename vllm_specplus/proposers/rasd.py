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
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from vllm_specplus import registry
from vllm_specplus.capabilities import Need
from vllm_specplus.config import MethodConfig, parse
from vllm_specplus.drafting.trees import Fusion
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.step import Observation, StepContext, bare_step
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target
from vllm_specplus.tree import DraftBatch

if TYPE_CHECKING:
    import torch


class RasdConfig(MethodConfig):
    """``{"method": "rasd", "sources": [...]}``."""

    fuses: ClassVar[bool] = False

    method: Literal["rasd"] = "rasd"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 32
    sources: list[str | dict[str, Any]] = Field(
        default=["token_recycling", "suffix_tree"], min_length=1, max_length=16
    )
    """Methods to fuse: names, or objects with the method's own keys."""
    prune: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Retrieved branches go if the drafting sources give their first token less."""

    @model_validator(mode="after")
    def _sources_fit(self):
        members = self.members()
        names = [member.method for member in members]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"'sources' names {name!r} twice: name every method once")
        drawing = [member.method for member in members if member.rule is not None]
        if len(drawing) > 1:
            raise ValueError(
                f"'sources': {' and '.join(drawing)} both draw their nodes: give all but one of "
                f"them the shape 'topk'"
            )
        if drawing and self.prune:
            raise ValueError(
                f"'prune' goes by what a draft thinks, and {drawing[0]!r} draws its nodes: give "
                f"it the shape 'topk' or remove 'prune'"
            )
        if self.prune and all(member.retrieves for member in members):
            raise ValueError(
                "'prune' needs a source that drafts, such as token_recycling: "
                "add one or remove 'prune'"
            )
        return self

    def serves(self) -> frozenset[Need]:
        return self.supports.intersection(*(member.serves() for member in self.members()))

    @property
    def rule(self) -> str | None:
        return next((member.rule for member in self.members() if member.rule), None)

    def members(self) -> list[MethodConfig]:
        """The sources' own configs; all but draft models get ``num_speculative_tokens``."""
        members = []
        sources: list[dict[str, Any]] = [
            {"method": s} if isinstance(s, str) else dict(s) for s in self.sources
        ]
        names = [keys.get("method") for keys in sources]
        for source, keys, name in zip(self.sources, sources, names, strict=True):
            method = _source(name)
            if method is None:
                allowed = ", ".join(registry.usable_methods(lambda config: config.fuses))
                raise ValueError(f"'sources' holds {quoted(source)} (allowed: {allowed})")
            common = {"num_speculative_tokens": self.num_speculative_tokens}
            if method.own_size:
                common = {}
            for key in (*common, "control", "acceptance", "allow_lossy"):
                if key in keys:
                    raise ValueError(
                        f"'sources': {name!r} has a {key!r} of its own: "
                        f"set it once, for {self.method!r}"
                    )
            keys = method.as_source(keys) | common
            if name == "token_recycling" and "suffix_tree" in names:
                keys.setdefault("match_context", False)  # the suffix tree does that, and better
            members.append(parse(keys))
            members[-1].check_source()
        return members

    def check_target(self, target: Target) -> None:
        for member in self.members():
            member.check_target(target)


@register_method
class Rasd(Proposer):
    """Fuses the drafts of other proposers; a failing one is left out."""

    config_class = RasdConfig

    def __init__(self, config: RasdConfig, services: Services):
        super().__init__(config, services)
        members = [
            registry.method_class(member.method)(member, services) for member in config.members()
        ]
        # Draws come before other siblings; then drafters: what they think of a token prunes
        # what the others retrieved.
        self.members = sorted(members, key=lambda m: (m.config.retrieves, m.rule is None))
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
                self.services.report(error)
                draft = DraftBatch.empty(len(step.num_tokens))
            drafts.append(draft if len(draft.tokens) else _nothing(len(step.num_tokens)))
        return self._fusion.fuse(drafts, step, self.config.prune)

    def observe_prompt(self, observation: Observation) -> None:
        for member in self.members:
            if member.reads_prompt:
                member.observe_prompt(_first_ranks(observation, member.top_k))

    def load_draft(self, device: torch.device, dtype: torch.dtype) -> None:
        for member in self.members:
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
            try:
                member.forget(request_id)
            except Exception as error:  # the others forget all the same
                self.services.report(error)

    def close(self) -> None:
        for member in self.members:
            member.close()


def _source(name: Any) -> type[MethodConfig] | None:
    """Configuration class of the method ``name``, if it may be a source."""
    if name not in registry.method_names():
        return None
    config = registry.config_class(name)
    return config if config.fuses else None


def _first_ranks(observation: Observation, k: int) -> Observation:
    """What a member with ``top_k`` k asked for of an observation of the largest k."""
    if observation.top_ids.shape[1] == k:
        return observation
    return replace(observation, top_ids=np.ascontiguousarray(observation.top_ids[:, :k]))


def _nothing(num_requests: int) -> DraftBatch:
    empty = DraftBatch.empty(num_requests)
    return replace(empty, sources=empty.tokens)
