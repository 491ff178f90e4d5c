"""Trees from a draft model (RSD, SpecTr, EAGLE-2's best-first trees, plain chains).

A small model drafts level by level; each level costs one of its forward passes over all requests.
It has the target's tokenizer, or drafts the tokens that both have (``drafting/shared_tokens.py``).
What a level holds is the shape's choice:

* ``rsd_s``: stochastic beam search, sequences without replacement (arXiv 2402.14160);
* ``rsd_c``: a constant number of children, drawn without replacement (the same paper);
* ``spectr``: independent paths, with replacement (arXiv 2310.15141);
* ``chain``: one sampled path (arXiv 2211.17192);
* ``topk``: the most probable sequences, deterministic (arXiv 2406.16858);
* ``caterpillar``: a chain with leaves beside it (arXiv 2410.06916).

A chain, or a caterpillar, may end before the levels that were planned for it
(``drafting/stopping.py``).

Sampled nodes are verified against the distributions they were drawn from, which travel
with them (``DraftBatch.draft_probs``); that accepts more than matching the target's own draw.
Greedy requests get the same shapes without noise.

As a source of ``rasd`` it drafts ``topk`` trees by default: they are functions of the past,
so that they may be fused with what was retrieved, and trimmed, without harm. What the draft
gave a node tells how good it is.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from vllm_specplus.config import Megabytes, MethodConfig
from vllm_specplus.drafting.acceptance_head import AcceptanceHead, head_size
from vllm_specplus.drafting.ends import Ends
from vllm_specplus.drafting.executor import DraftExecutor
from vllm_specplus.drafting.hub import model_folder
from vllm_specplus.drafting.model import DraftModel, check_target, read_config
from vllm_specplus.drafting.noise import DraftNoise
from vllm_specplus.drafting.overlap_config import OverlapConfig
from vllm_specplus.drafting.rounds import Knobs, collect, grow_levels
from vllm_specplus.drafting.shaped_config import ShapedDraftConfig
from vllm_specplus.drafting.shapes import (
    Beams,
    BestFirst,
    Caterpillar,
    ConstantBranching,
    IndependentPaths,
    StochasticBeam,
)
from vllm_specplus.drafting.shared_tokens import SharedTokens, share
from vllm_specplus.drafting.static_trees import StaticTree
from vllm_specplus.drafting.stop_config import AcceptanceHeadStop
from vllm_specplus.drafting.stopping import Stop, make_stop
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.step import PROBABILITY_CLASSES, Source, StepContext
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target
from vllm_specplus.tree import DraftBatch

SHAPES = {
    "chain": StochasticBeam,
    "topk": BestFirst,
    "beams": Beams,
    "caterpillar": Caterpillar,
    "rsd_c": ConstantBranching,
    "rsd_s": StochasticBeam,
    "spectr": IndependentPaths,
    "static": StaticTree,
}


LEVEL = Source("level", "draft", 0.5)
# Of deterministic nodes, by the probability the draft gave them.
_PRIORS = (0.03, 0.08, 0.18, 0.3, 0.42, 0.55, 0.7, 0.85)
LIKELY = tuple(
    Source(f"draft gives up to {high}", "draft", prior)
    for high, prior in zip(PROBABILITY_CLASSES, _PRIORS, strict=True)
)


class DraftMemoryError(RuntimeError):
    """A request goes undrafted because the draft cannot hold its text."""


class DraftTreeConfig(OverlapConfig):
    """``{"method": "draft_tree", "model": "...", ...}``."""

    method: Literal["draft_tree"] = "draft_tree"
    model: str
    """Folder of the draft, or its name on the Hugging Face hub; with the target's tokenizer."""
    shape: Literal["chain", "topk", "rsd_c", "rsd_s", "spectr", "caterpillar"] = "rsd_s"
    stops: ClassVar[frozenset[str]] = ShapedDraftConfig.stops | {"acceptance_head"}
    head_tokens: Annotated[int, Field(ge=2, le=1 << 24)] | None = None
    """Draft the first so many token ids only: the ids of byte-pair tokenizers are in order
    of frequency, and the output layer is most of a small draft (arXiv 2502.14856)."""
    vocabulary: Literal["same", "intersection"] = "same"
    """Must the draft have the target's tokenizer, or does it draft the tokens that both have?"""
    kv_memory_mb: Megabytes = 512
    """The draft's own keys and values; requests beyond it go undrafted."""

    @property
    def folder(self) -> str:
        """Where the draft is on this machine."""
        return model_folder(self.model, "draft model")

    @model_validator(mode="after")
    def _model_runs(self):
        config = read_config(self.folder)
        tokens = config["vocab_size"]
        if isinstance(self.stop, AcceptanceHeadStop):
            size = head_size(self.stop.head)
            if size != config["hidden_size"]:
                raise ValueError(
                    f"'head' {quoted(self.stop.head)} reads {size} hidden units, and the draft has "
                    f"{config['hidden_size']}: train it on this draft"
                )
        if self.head_tokens is not None and self.head_tokens > tokens:
            raise ValueError(
                f"'head_tokens' is {quoted(self.head_tokens)}, and the draft has {tokens} token "
                f"ids: lower it, or remove it"
            )
        return self

    def check_target(self, target: Target) -> None:
        self.check_overlap(target)
        tokenizer = target.load_tokenizer()
        if self.vocabulary == "same":
            check_target(self.folder, tokenizer, target.vocab_size)
        else:
            rows = read_config(self.folder)["vocab_size"]
            share(self.folder, tokenizer, target.vocab_size, rows, self.head_tokens or rows)


@register_method
class DraftTree(Proposer):
    config_class: ClassVar[type[MethodConfig]] = DraftTreeConfig
    sources = (LEVEL, *LIKELY)
    _shared: SharedTokens | None = None
    """None: the draft has the target's tokens."""

    def __init__(self, config: ShapedDraftConfig, services: Services):
        super().__init__(config, services)
        self.levels = config.levels()
        self._executor: Any = None  # one of the kind that :meth:`_make_executor` makes
        self._stop: Stop | None = None
        # Of each request: tokens of its text, and levels that were drafted behind it.
        self._drafted: dict[str, tuple[int, int]] = {}

    @property
    def most_nodes(self) -> int:
        """Of one request, in a round of drafting."""
        return sum(self.levels)

    def load_draft(self, device: torch.device, dtype: torch.dtype) -> None:
        model = self._make_model(device, dtype)
        layers = max(len(model.attention_layers), 1)
        slot = 2 * layers * model.kv_heads * model.head_dim * dtype.itemsize
        self._executor = self._make_executor(model, self.config.kv_memory_mb * 2**20 // slot)
        self._noise = DraftNoise(device)
        self._stop = self._make_stop()

    def _make_model(self, device: torch.device, dtype: torch.dtype) -> Any:
        config, services = self.config, self.services
        model = DraftModel(config.folder, device, dtype, config.head_tokens)
        if config.vocabulary == "intersection":
            tokenizer, rows = services.load_tokenizer(), model.config.vocab_size
            shared = share(config.folder, tokenizer, services.vocab_size, rows, model.vocab_size)
            self._shared = shared.to(device)
        return model

    def _make_executor(self, model: Any, max_slots: int) -> DraftExecutor:
        model.quicken()
        return DraftExecutor(model, max_slots, self.most_nodes, self.services.record)

    def share_pages(self, pages: int, page: int, max_requests: int) -> None:
        # Of the last level's nodes nobody asks, and of a caterpillar's leaves.
        widths = self.levels[:-1]
        if self.config.shape == "caterpillar":
            widths = (1,) * len(widths)
        self._executor.warm_up(widths, max_requests)

    def held_bytes(self) -> int:
        return self.config.kv_memory_mb * 2**20

    def forget(self, request_id: str) -> None:
        self._executor.forget(request_id)
        self._drafted.pop(request_id, None)
        if self._stop is not None:
            self._stop.forget(request_id)

    def propose(self, step: StepContext) -> DraftBatch:
        rows = [r for r in np.flatnonzero(step.max_nodes > 0) if self._has_room(step, int(r))]
        if not rows:
            return DraftBatch.empty(len(step.request_ids))
        return self._draft(step, np.array(rows))

    def _has_room(self, step: StepContext, r: int) -> bool:
        length = len(self._text(step, r))
        if not length:  # nothing of it is the draft's
            return False
        if self._is_beyond(length):
            self.services.count("texts_beyond_head")
            self._executor.forget(step.request_ids[r])  # others have a use for its pages
            return False
        if self._holds(step.request_ids[r], length):
            return True
        self.services.report(
            DraftMemoryError(
                f"the draft cannot hold a text of {length} tokens: raise kv_memory_mb "
                f"({self.config.kv_memory_mb})"
            )
        )
        return False

    def _text(self, step: StepContext, r: int) -> np.ndarray:
        """A request's text int32 [n] in the draft's tokens."""
        text = step.token_ids[r, : step.num_tokens[r]]
        return text if self._shared is None else self._shared.read(text)

    def _is_beyond(self, length: int) -> bool:
        """Has the draft too few positions for a text of ``length`` tokens and its tree?"""
        return length + sum(self.levels) > self._executor.model.max_positions

    def _holds(self, request: str, length: int) -> bool:
        """Is there memory for such a text and its tree? Reserves it."""
        return self._executor.room(request, length)

    @torch.inference_mode()
    def _draft(self, step: StepContext, rows: np.ndarray) -> DraftBatch:
        """One round for the requests ``rows`` int [A]."""
        counts = step.max_nodes[rows]
        # By the nodes above each level.
        depths = (np.cumsum((0, *self.levels[:-1])) < counts[:, None]).sum(1)
        knobs = Knobs.of(step, rows, self.services.vocab_size, self._executor.model.device)
        names = [step.request_ids[r] for r in rows]
        texts = [self._text(step, r) for r in rows]
        self._tell_outcomes(names, knobs.lengths)
        shape = SHAPES[self.config.shape](
            *self.config.shape_arguments(int(depths.max())), knobs.greedy
        )
        greedy = np.ones(len(rows), bool)
        if step.sampling is not None:
            greedy = step.sampling.temperature[rows] == 0
        logits = self._begin(step, rows, names, texts)[:, None]
        ends = Ends(depths, counts, shape, greedy, self._stop, names)
        grown, draft_probs = grow_levels(
            shape, self.levels, logits, knobs, ends, self._grow, self._noise
        )
        for name, length, levels in zip(names, knobs.lengths, ends.depths.tolist(), strict=True):
            self._drafted[name] = length, levels
        if isinstance(shape, BestFirst):
            nodes = [
                (tokens, parents, np.full(len(tokens), -1, np.int32), _likelihood_class(given))
                for tokens, parents, given in zip(*shape.best(counts), strict=True)
            ]
        else:
            nodes = collect(grown, [len(q) for q in draft_probs], ends.kept(grown), counts)
        one_path = step.chain_only[rows]
        if self.config.shape == "spectr":
            one_path = one_path | greedy  # all paths coincide
        nodes = [
            _first_path(*tree) if one else tree for tree, one in zip(nodes, one_path, strict=True)
        ]
        deterministic = greedy | step.chain_only[rows]
        return self._batch(step, rows, nodes, deterministic, draft_probs)

    def _tell_outcomes(self, names: list[str], lengths: list[int]) -> None:
        """What became of the last drafts of requests whose texts have these lengths now."""
        for name, length in zip(names, lengths, strict=True):
            before, drafted = self._drafted.pop(name, (length, 0))
            if drafted and length > before:
                self._verified(name, drafted, min(length - before - 1, drafted))

    def _verified(self, request: str, drafted: int, accepted: int) -> None:
        """So many of the ``drafted`` levels of a request were accepted."""
        if self._stop is not None:
            self._stop.verified(request, drafted, accepted)

    def _make_stop(self) -> Stop | None:
        stop = self.config.stop
        rate = None
        if isinstance(stop, AcceptanceHeadStop):
            executor = self._executor
            head = AcceptanceHead(stop.head, executor.model.device)

            def rate() -> np.ndarray:
                return head(executor.model.normed(executor.read_last)).cpu().numpy()

        return make_stop(stop, rate)

    def _begin(
        self, step: StepContext, rows: np.ndarray, names: list[str], texts: list[np.ndarray]
    ) -> torch.Tensor:
        """Logits [A, V] behind the texts of the requests ``rows`` int [A], by the target's ids."""
        logits = self._executor.begin(names, texts, step.versions_of(rows))
        return logits if self._shared is None else self._shared.logits(logits)

    def _grow(
        self, active: torch.Tensor, tokens: torch.Tensor, parents: torch.Tensor
    ) -> torch.Tensor:
        """As ``TreeExecutor.grow``, by the target's ids."""
        if self._shared is None:
            return self._executor.grow(active, tokens, parents)
        logits = self._executor.grow(active, self._shared.nodes(tokens), parents)
        return self._shared.logits(logits)

    def _batch(
        self,
        step: StepContext,
        rows: np.ndarray,
        nodes: list,
        deterministic: np.ndarray,
        draft_probs: list,
    ) -> DraftBatch:
        counts = np.zeros(len(step.request_ids), np.int32)
        counts[rows] = [len(tokens) for tokens, *_ in nodes]
        tokens, parents, drawn_from, sources = (
            np.concatenate(part) for part in zip(*nodes, strict=True)
        )
        drawn_from[np.repeat(deterministic, counts[rows])] = -1
        drawn = bool((drawn_from >= 0).any())
        batch = DraftBatch(
            tokens, parents, counts, sources,
            draft_probs=torch.cat(draft_probs) if drawn else None,
            drawn_from=drawn_from if drawn else None,
        )  # fmt: skip
        if self.tells_next:
            batch.next_probs = draft_probs[0]
            batch.next_row = np.full(len(counts), -1, np.int32)
            batch.next_row[rows] = np.arange(len(rows))
        return batch


def _likelihood_class(probabilities: np.ndarray) -> np.ndarray:
    """The source of nodes with these probabilities, int32 [n]."""
    column = np.searchsorted(PROBABILITY_CLASSES, np.minimum(probabilities, 1.0))
    return (1 + column).astype(np.int32)


def _first_path(tokens: np.ndarray, parents: np.ndarray, *labels: np.ndarray) -> tuple:
    """The tree's path along first children, as a tree."""
    path, node = [], -1
    for i, parent in enumerate(parents):
        if parent == node:
            path.append(i)
            node = i
    chain = np.arange(-1, len(path) - 1, dtype=np.int32)
    return tokens[path], chain, *(label[path] for label in labels)
