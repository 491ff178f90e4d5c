"""SpecEE: the *target* is left early, where a draft and predictors say it may be. **Lossy.**

SpecEE (arXiv 2504.08850). Another method drafts a tree. Its leaves are not verified: they and their
siblings are the *candidates* of the row above, the few tokens among which the target's next one is
sought. While the target runs, predictors look at its logits of the candidates behind some layers
(``drafting/exit_predictors.py``); where one fires and the target's whole output layer, at that
layer, has its best token among the candidates, the row's text is decided. A request is done when
every row on the path that its text takes is; the pass ends when all are (``engine/exit_pass.py``).

With a tree of one level nothing is verified: that is the paper's autoregressive form, one row and
its k candidates. With more levels the rows of a path are what the paper calls a hyper-token: they
exit together, at the layer of the last of them.

It is lossy: an exit is a guess, and the layers behind it never see the token. So it is refused
without ``allow_lossy``. Greedy requests exit; a pass with another one, or with a prompt in it, runs
through.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import field_validator, model_validator

from vllm_specplus import registry
from vllm_specplus.config import MethodConfig, parse
from vllm_specplus.control.settings import FixedControl
from vllm_specplus.drafting.exit_predictors import ExitPredictors, read_sizes
from vllm_specplus.drafting.stop_config import Probability
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.step import Observation, Rows, StepContext
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target
from vllm_specplus.tree import DraftBatch

#: Keys that the method has, and its draft may not.
COMMON = ("num_speculative_tokens", "control", "acceptance", "memory", "allow_lossy")


class SpecEeConfig(MethodConfig):
    """``{"method": "spec_ee", ...}``."""

    fuses: ClassVar[bool] = False

    method: Literal["spec_ee"] = "spec_ee"
    control: FixedControl = FixedControl(policy="fixed")
    """Exits are looked for in every step: there is nothing to decide."""
    draft: dict[str, Any]
    """The method that drafts, with its keys."""
    predictors: str
    """File of the predictors, written by ``vllm-specplus train spec_ee``."""
    threshold: Probability = 0.5
    """Probability above which a predictor lets a row exit."""

    @property
    def lossless(self) -> bool:
        return False

    @property
    def accepts_by(self) -> str:
        return self.method

    @model_validator(mode="after")
    def _loss_is_wanted(self):
        if self.acceptance.rule != "lossless":
            raise ValueError(
                f"method 'spec_ee' leaves the target early, and has no 'acceptance' rule beside "
                f"that: remove {self.acceptance.rule!r}"
            )
        if not self.allow_lossy:
            raise ValueError(
                "method 'spec_ee' changes what is answered: set 'allow_lossy' to true if that is "
                "wanted"
            )
        return self

    @field_validator("draft")
    @classmethod
    def _names_a_method(cls, keys: dict[str, Any]) -> dict[str, Any]:
        for key in COMMON:
            if key in keys:
                raise ValueError(f"'draft' has {key!r} of its own: set it once, for 'spec_ee'")
        if keys.get("method") == "spec_ee":
            raise ValueError("'draft' is 'spec_ee' itself: name a method that drafts")
        return keys

    @model_validator(mode="after")
    def _draft_is_a_function_of_the_past(self):
        drafts = self.drafts()
        if drafts.rule is not None:
            raise ValueError(
                f"'draft' draws its nodes, and candidates are the most probable tokens: set its "
                f"'shape' to 'topk', or another method than {drafts.method!r}"
            )
        if drafts.drafts_latents or drafts.drafts_pictures:
            raise ValueError(f"'draft' is {drafts.method!r}, which drafts no text: name another")
        if drafts.reads_layers:
            raise ValueError(
                f"'draft' is {drafts.method!r} and reads hidden states of layers that a pass which "
                f"ends early has not run: use an EAGLE head that reads those behind the last norm, "
                f"or 'draft_tree'"
            )
        read_sizes(self.predictors)
        return self

    def drafts(self) -> MethodConfig:
        """The configuration of the method that drafts."""
        method = registry.config_class(self.draft.get("method"))
        common = {"num_speculative_tokens": self.num_speculative_tokens}
        return parse(method.as_source(self.draft) | common | {"control": {"policy": "fixed"}})

    def serves(self):
        return self.drafts().serves()

    def check_target(self, target: Target) -> None:
        if not target.eager:
            raise ValueError(
                "method 'spec_ee' ends the target's pass between its layers, which a compiled one "
                "has no place for: set --enforce-eager"
            )
        if target.tensor_parallel_size > 1:
            raise ValueError(
                f"method 'spec_ee' leaves the target of one rank early: set tensor_parallel_size "
                f"({target.tensor_parallel_size}) to 1"
            )
        sizes = read_sizes(self.predictors)
        if sizes.predictors >= target.num_layers:
            raise ValueError(
                f"'predictors' {quoted(self.predictors)} is of a target of {sizes.predictors + 1} "
                f"layers or more, and this one has {target.num_layers}: train them on it"
            )
        self.drafts().check_target(target)


@register_method
class SpecEe(Proposer):
    """Another method's trees without their leaves, which are candidates."""

    config_class = SpecEeConfig
    config: SpecEeConfig
    predictors: ExitPredictors | None = None
    """None on ranks that do not draft."""

    def __init__(self, config: SpecEeConfig, services: Services):
        super().__init__(config, services)
        drafts = config.drafts()
        self.inner: Proposer = registry.method_class(drafts.method)(drafts, services)
        self.top_k, self.sources = self.inner.top_k, self.inner.sources
        self.levels = self.inner.levels
        for flag in ("reads_target_probs", "reads_prompt", "reads_hidden", "may_miss",
                     "reads_context", "borrows_vocabulary"):  # fmt: skip
            setattr(self, flag, getattr(self.inner, flag))
        self._count = read_sizes(config.predictors).candidates
        # Of each request: tokens and parent rows of the root and the nodes that are verified, and
        # the candidates of these rows.
        self._candidates: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    def propose(self, step: StepContext) -> DraftBatch:
        self._candidates = {}  # whatever fails: those of earlier texts are of no use
        drafts = self.inner.propose(step)
        verified, candidates = without_leaves(drafts, self._count)
        ends = np.cumsum(verified.counts).tolist()
        roots = step.token_ids[np.arange(len(ends)), step.num_tokens - 1]
        for name, root, n, end, own in zip(
            step.request_ids, roots, verified.counts.tolist(), ends, candidates, strict=True
        ):
            tokens = np.append(root, verified.tokens[end - n : end])
            parents = np.append(np.int32(-1), verified.parents[end - n : end] + 1)
            self._candidates[name] = tokens, parents, own
        return verified

    def candidates(self, request_ids: list[str], rows: Rows) -> np.ndarray:
        """Int64 [L, k] the candidates of the verified ``rows`` of the requests, [R] names, best
        first; -1 where a row has fewer than k, or is of another tree than was drafted."""
        found = np.full((len(rows.tokens), self._count), -1, np.int64)
        for r, name in enumerate(request_ids):
            first, end = int(rows.starts[r]), int(rows.starts[r + 1])
            known = self._candidates.get(name)
            if known is None or len(known[0]) != end - first:
                continue
            tokens, parents, own = known
            same = (tokens == rows.tokens[first:end]) & (parents == rows.parents[first:end])
            if same.all():
                found[first:end] = own
        return found

    def load_draft(self, device: torch.device, dtype: torch.dtype) -> None:
        self.predictors = ExitPredictors(self.config.predictors, self.config.threshold, device)
        self.inner.load_draft(device, dtype)

    # What the inner method does for itself.

    def observe_prompt(self, observation: Observation) -> None:
        self.inner.observe_prompt(observation)

    def held_bytes(self) -> int:
        return self.inner.held_bytes()

    def slot_bytes(self) -> int:
        return self.inner.slot_bytes()

    def share_pages(self, pages: int, page: int, max_requests: int) -> None:
        self.inner.share_pages(pages, page, max_requests)

    def warm_up(self) -> None:
        self.inner.warm_up()

    def forget(self, request_id: str) -> None:
        self._candidates.pop(request_id, None)
        self.inner.forget(request_id)

    def close(self) -> None:
        self.inner.close()


def without_leaves(drafts: DraftBatch, count: int) -> tuple[DraftBatch, list[np.ndarray]]:
    """The nodes of all trees that have children; and of each tree int64 [1 + nodes, count] the
    first ``count`` children of its root and of each of these nodes, -1 behind the last one."""
    tokens, parents, kept_counts, found = [], [], [], []
    sources = []
    first = 0
    for n in drafts.counts.tolist():
        own_tokens = drafts.tokens[first : first + n]
        own_parents = drafts.parents[first : first + n]
        inner = np.isin(np.arange(n), own_parents)
        number = np.append(np.cumsum(inner) - 1, -1).astype(np.int32)  # the last one is the root's
        candidates = np.full((1 + int(inner.sum()), count), -1, np.int64)
        filled = np.zeros(len(candidates), np.int64)
        for node in range(n):
            row = number[own_parents[node]] + 1
            if filled[row] < count:
                candidates[row, filled[row]] = own_tokens[node]
                filled[row] += 1
        tokens.append(own_tokens[inner])
        parents.append(number[own_parents[inner]])
        kept_counts.append(int(inner.sum()))
        found.append(candidates)
        if drafts.sources is not None:
            sources.append(drafts.sources[first : first + n][inner])
        first += n
    return DraftBatch(
        np.concatenate([np.empty(0, np.int32), *tokens]).astype(np.int32),
        np.concatenate([np.empty(0, np.int32), *parents]).astype(np.int32),
        np.array(kept_counts, np.int32),
        np.concatenate(sources) if sources else None,
    ), found
