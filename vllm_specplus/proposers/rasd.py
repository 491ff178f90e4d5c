"""RASD: several sources of drafts fused into one tree.

"RASD: Retrieval-Augmented Speculative Decoding" (arXiv 2503.03434). A draft tree and
retrieved continuations are joined by longest prefix, so that shared nodes are verified
once; what the drafting source finds improbable prunes what was retrieved. The paper has one
drafter and one retriever; here any methods of this package may be combined.

All of them compete for the same nodes: each node's survival comes from the acceptance
learnt for its source (``control/acceptance.py``), and the best nodes of the union are
kept. What the paper does with fixed budgets per part, the estimates do: a retriever
whose matches have been wrong lately loses its nodes to the others. A source that takes more of a
step's time than it alone brings of its tokens is asked rarely (``drafting/payoff.py``).

``prune`` is the paper's explicit rule: a retrieved branch goes whose first token is neither among
the ten that a draft model finds most probable, nor has at least this probability there (0, the
default, prunes nothing). Its own rule for deeper nodes is not known; here they compete by survival.

Most sources draft deterministically, given the text (a draft model by default too: its
most probable sequences, as EAGLE-2's trees in the paper): the one-hot rule of the engine is
exact for their union (``tests/proposers/test_rasd.py`` enumerates it). One draft model may draw its
nodes instead. Siblings are then tried in draw order by ``samplers.sampled.WithoutReplacement``,
and what others found after them, by what is left of the target's distribution. What was
drawn stays, whatever it is: nodes to verify, their number and the labels that decide about
them are fixed before the draw. What was looked up may depend on anything.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from vllm_specplus import registry
from vllm_specplus.capabilities import Need
from vllm_specplus.config import MethodConfig, parse
from vllm_specplus.drafting.payoff import Payoff
from vllm_specplus.drafting.trees import Fusion
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.step import Observation, StepContext, bare_step
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target
from vllm_specplus.tree import DraftBatch

#: First tokens that no probability prunes.
TOP = 10


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
    """Retrieved branches go if a draft model gives their first token less, and others more."""

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
        if self.prune and not any(member.knows_next for member in members):
            knowing = ", ".join(registry.usable_methods(lambda c: c.knows_next and c.fuses))
            raise ValueError(
                f"'prune' goes by what a draft model thinks of the next token: add a source that "
                f"has one ({knowing}), or remove 'prune'"
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
            for key in (*common, "control", "acceptance", "memory", "allow_lossy"):
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

    @property
    def reads_layers(self) -> bool:
        return any(member.reads_layers for member in self.members())

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
        reading = [member for member in self.members if member.reads_hidden]
        self.reads_hidden = bool(reading)
        self.borrows_vocabulary = any(member.borrows_vocabulary for member in self.members)
        self.places_processes = any(member.places_processes for member in self.members)
        for member in reading:
            self.hidden_layers = member.hidden_layers
            if member.hidden_layers != reading[0].hidden_layers:
                raise ValueError(
                    f"'sources': {reading[0].config.method!r} and {member.config.method!r} read "
                    f"hidden states of different layers: leave one of them out"
                )
        for member in self.members:
            member.tells_next = member.config.knows_next and config.prune > 0
        self._fusion = Fusion([member.sources for member in self.members])
        self.sources = self._fusion.sources
        # Under the policy "fixed" all sources are asked, whatever they bring.
        self._payoff = None if config.control.policy == "fixed" else Payoff(len(self.members))
        self._begun = 0.0  # the last step

    def propose(self, step: StepContext) -> DraftBatch:
        begun, self._begun = self._begun, time.perf_counter()
        if self._payoff is not None:
            self._payoff.learn(step, self._begun - begun)
        if not step.max_nodes.any():  # they only learn, and there is nothing to choose
            for number in range(len(self.members)):
                self._ask(number, step, True)
            return _nothing(len(step.num_tokens))
        asked, measured = np.ones(len(self.members), bool), False
        if self._payoff is not None:
            asked, measured = self._payoff.ask()
        drafts, times = [], [time.perf_counter()]
        for number in range(len(self.members)):
            drafts.append(self._ask(number, step, bool(asked[number])))
            times.append(time.perf_counter())
        fused = self._fusion.fuse(drafts, step, self._possible(drafts))
        if measured:
            self._payoff.drafted(step, np.diff(times), fused, self._fusion.finders)
        return fused

    def _ask(self, number: int, step: StepContext, drafts: bool) -> DraftBatch:
        """A member's trees; not ``drafts``: it rests, and only learns from the step."""
        member, (low, high) = self.members[number], self._fusion.offsets[number : number + 2]
        if not drafts:
            self.services.count("rested_sources")
        own = replace(
            step,
            observation=_first_ranks(step.observation, member.top_k),
            acceptance=np.ascontiguousarray(step.acceptance[:, :, low:high]),
            max_nodes=np.minimum(step.max_nodes, drafts * member.config.num_speculative_tokens),
        )
        try:
            draft = member.propose(own)
        except Exception as error:
            self.services.report(error)
            draft = DraftBatch.empty(len(step.num_tokens))
        return draft if len(draft.tokens) else _nothing(len(step.num_tokens))

    def _possible(self, drafts: list[DraftBatch]) -> np.ndarray | None:
        """Bool [N] of the nodes of all ``drafts``: may they stay, by what a draft model thinks of
        the first token? None: all."""
        told = next((draft for draft in drafts if draft.next_probs is not None), None)
        if told is None:
            return None
        return np.concatenate(
            [
                probable(draft, told.next_probs, told.next_row, self.config.prune)
                if member.config.retrieves
                else np.ones(len(draft.tokens), bool)
                for member, draft in zip(self.members, drafts, strict=True)
            ]
        )

    def observe_prompt(self, observation: Observation) -> None:
        for member in self.members:
            if member.reads_prompt:
                member.observe_prompt(_first_ranks(observation, member.top_k))

    def load_draft(self, device: torch.device, dtype: torch.dtype) -> None:
        for member in self.members:
            member.load_draft(device, dtype)

    def load_share(self, device: torch.device, dtype: torch.dtype) -> None:
        for member in self.members:
            member.load_share(device, dtype)

    def warm_up(self) -> None:
        for member in self.members:
            member.warm_up()
        step = bare_step(
            self.sources, np.zeros((1, 4), np.int32), self.config.num_speculative_tokens
        )
        nothing = [_nothing(1) for _ in self.members]
        fused = self._fusion.fuse(nothing, step)
        compiled = Payoff(len(nothing))
        compiled.drafted(step, np.zeros(len(nothing)), fused, self._fusion.finders)
        compiled.learn(step, 1.0)

    def forget(self, request_id: str) -> None:
        if self._payoff is not None:
            self._payoff.forget(request_id)
        for member in self.members:
            try:
                member.forget(request_id)
            except Exception as error:  # the others forget all the same
                self.services.report(error)

    def held_bytes(self) -> int:
        return sum(member.held_bytes() for member in self.members)

    def slot_bytes(self) -> int:
        return sum(member.slot_bytes() for member in self.members)

    def share_pages(self, pages: int, page: int, max_requests: int) -> None:
        for member in self.members:
            member.share_pages(pages, page, max_requests)

    def close(self) -> None:
        for member in self.members:
            member.close()


def _source(name: Any) -> type[MethodConfig] | None:
    """Configuration class of the method ``name``, if it may be a source."""
    if name not in registry.method_names():
        return None
    config = registry.config_class(name)
    return config if config.fuses else None


def probable(
    draft: DraftBatch, next_probs: torch.Tensor, next_row: np.ndarray, least: float
) -> np.ndarray:
    """Bool [N]: has a node that follows its text at once a probability of ``least``, or one of the
    ten highest? True of deeper nodes, and where no draft model was asked.

    ``next_probs`` float32 [A, V'], of the requests whose ``next_row`` int32 [R] is not -1.
    """
    rows = np.repeat(next_row, draft.counts)
    first = np.flatnonzero((draft.parents < 0) & (rows >= 0))
    kept = np.ones(len(draft.tokens), bool)
    if len(first):
        rows, tokens = rows[first].astype(np.int64), draft.tokens[first].astype(np.int64)
        known = tokens < next_probs.shape[1]
        at = torch.from_numpy(np.where(known, tokens, 0)).to(next_probs.device)
        where = torch.from_numpy(rows).to(next_probs.device)
        tenth = next_probs.topk(min(TOP, next_probs.shape[1])).values[:, -1]
        p = next_probs[where, at]
        kept[first] = ((p >= least) | (p >= tenth[where])).cpu().numpy() & known
    return kept


def _first_ranks(observation: Observation, k: int) -> Observation:
    """What a member with ``top_k`` k asked for of an observation of the largest k."""
    if observation.top_ids.shape[1] == k:
        return observation
    return replace(observation, top_ids=np.ascontiguousarray(observation.top_ids[:, :k]))


def _nothing(num_requests: int) -> DraftBatch:
    empty = DraftBatch.empty(num_requests)
    return replace(empty, sources=empty.tokens)
