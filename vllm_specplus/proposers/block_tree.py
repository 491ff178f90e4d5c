"""Trees from heads that draft a block in one pass (DFlash, DSpark, Medusa, P-EAGLE).

The head is a *block drafter*: from the target's hidden states it predicts the tokens behind the
newest one (the *anchor*) in parallel, so a draft costs one forward pass, however deep and wide its
tree is. DFlash fills masks behind the anchor and sees the text through keys and values it makes of
the target's hidden states; DSpark makes the same block semi-autoregressive by a *Markov head*, a
bias by the token before; Medusa has a small network per depth on the last hidden state; P-EAGLE is
an EAGLE-3 head that goes on from masks.

The *marginals* of the block make a tree as in DDTree: best first, the most probable prefixes, which
is optimal if the depths are independent. With a Markov head the tree is *path-conditional*: a child
is as probable as the law of its own parent says (``drafting/block_trees.py``).

Such trees are functions of the past. The target draws at every node by itself, and a node is
accepted if it is what was drawn: lossless at any temperature, and whatever part of a tree is
verified. So the controller cuts them by what it has learnt of nodes of that probability, apart for
those behind a sibling: a marginal does not know on which path it is, and is right less often there.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from vllm_specplus.capabilities import TEXT, Need
from vllm_specplus.config import MethodConfig
from vllm_specplus.drafting import block_checkpoint
from vllm_specplus.drafting.block_executor import BlockExecutor, MedusaExecutor
from vllm_specplus.drafting.block_heads import BlockHead, MedusaHead, load_head
from vllm_specplus.drafting.block_trees import Laws, Tree, best_first
from vllm_specplus.drafting.head_target import check_fits
from vllm_specplus.drafting.hub import model_folder
from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.drafting.peagle import ParallelHead
from vllm_specplus.drafting.peagle_executor import ParallelExecutor
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import register_method
from vllm_specplus.step import PROBABILITY_CLASSES, Source, StepContext
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target
from vllm_specplus.tree import DraftBatch

# Acceptance of nodes by the probability that the head gave them, before anything is learnt.
_PRIORS = (0.03, 0.08, 0.18, 0.3, 0.42, 0.55, 0.7, 0.85)
_BEHIND_A_SIBLING = (0.02, 0.05, 0.1, 0.16, 0.2, 0.25, 0.3, 0.4)


class BlockTreeConfig(MethodConfig):
    """``{"method": "block_tree", "model": "...", ...}``."""

    supports: ClassVar[frozenset[Need]] = TEXT - {
        Need.ADAPTED_LAYERS,
        Need.KV_GROUPS,
        Need.MROPE,
    }
    takes_speculators: ClassVar[bool] = True

    method: Literal["block_tree"] = "block_tree"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 32
    """Nodes of the whole tree. How deep it can be is the head's to say."""
    model: str
    """Folder of a DFlash, DSpark, Medusa or P-EAGLE head that was trained for the target, or its
    name on the Hugging Face hub."""

    @property
    def folder(self) -> str:
        """Where the head is on this machine."""
        return model_folder(self.model, "block head")

    @model_validator(mode="after")
    def _head_runs(self):
        block_checkpoint.read_config(self.folder)
        return self

    def check_target(self, target: Target) -> None:
        target.check_keeps_texts(self.method)
        head = block_checkpoint.read_config(self.folder)
        name = f"block head {quoted(self.model)}"
        check_fits(target, name, head.target_hidden_size, head.vocab_size, head.layer_ids)
        if head.body is not None and not 0 <= head.body.mask_token < target.vocab_size:
            raise DraftModelError(
                f"{name} has mask token {head.body.mask_token}, and the target "
                f"{target.vocab_size} tokens: use a head of this target"
            )


@register_method
class BlockTree(Proposer):
    config_class = BlockTreeConfig
    reads_hidden = borrows_vocabulary = True
    sources = tuple(
        Source(f"{who} up to {high}", group, prior)
        for who, group, priors in (
            ("block gives", "block", _PRIORS),
            ("behind a sibling, block gives", "block aside", _BEHIND_A_SIBLING),
        )
        for high, prior in zip(PROBABILITY_CLASSES, priors, strict=True)
    )
    _executor: BlockExecutor | MedusaExecutor | ParallelExecutor
    _head: BlockHead | MedusaHead | ParallelHead | None = None
    """None on ranks that do not draft."""

    def __init__(self, config: BlockTreeConfig, services: Services):
        super().__init__(config, services)
        self._described = block_checkpoint.read_config(config.folder)
        self.hidden_layers = self._described.layer_ids

    def load_draft(self, device: torch.device, dtype: torch.dtype) -> None:
        self._head = load_head(
            self.config.folder,
            self.services.target_vocabulary(),
            self.services.vocab_size,
            device,
            dtype,
        )

    def slot_bytes(self) -> int:
        head = self._head
        if head is None or isinstance(head, MedusaHead):
            return 0
        row = 2 * head.kv_heads * head.head_dim * head.dtype.itemsize
        return len(head.attention_layers) * row

    def share_pages(self, pages: int, page: int, max_requests: int) -> None:
        head = self._head
        assert head is not None
        if isinstance(head, MedusaHead):
            self._executor = MedusaExecutor(head)
        elif isinstance(head, ParallelHead):
            self._executor = ParallelExecutor(head, pages, page, max_requests)
            self._executor.warm_up((), max_requests)
        else:
            self._executor = BlockExecutor(head, pages, page, max_requests)

    def warm_up(self) -> None:
        """Compile the loop that grows trees."""
        token = torch.zeros(1, 2, 2, dtype=torch.int64)
        best_first(Laws.of(token, torch.zeros(1, 2, 1, 2)), 0, 2)

    def forget(self, request_id: str) -> None:
        self._executor.forget(request_id)

    def propose(self, step: StepContext) -> DraftBatch:
        # Every text's, drafted or not: what is passed over never comes again.
        self._executor.follow(step.request_ids, step.token_ids, step.target_rows)
        requests = self._drafting(step)
        counts = np.zeros(len(step.request_ids), np.int32)
        if not len(requests):
            return DraftBatch.empty(len(counts))
        lengths = step.num_tokens[requests].astype(np.int64)
        newest = step.token_ids[requests, lengths - 1]
        budgets = step.max_nodes[requests]
        laws = self._executor.draft(step.target_rows, requests, newest, lengths, int(budgets.max()))
        trees = [
            best_first(laws, a, int(budget), bool(step.chain_only[r]))
            for a, (r, budget) in enumerate(zip(requests, budgets, strict=True))
        ]
        counts[requests] = [len(tree.tokens) for tree in trees]
        return DraftBatch(
            np.concatenate([tree.tokens for tree in trees]),
            np.concatenate([tree.parents for tree in trees]),
            counts,
            np.concatenate([_sources(tree) for tree in trees]),
        )

    def _drafting(self, step: StepContext) -> np.ndarray:
        """The requests int64 [A] that a block is drafted for: those that may draft, whose last row
        was computed in this step and whose block has places among the head's positions."""
        rows, head = step.target_rows, self._described
        may = (step.max_nodes > 0) & (np.diff(rows.starts) > 0)
        if head.body is not None and head.max_positions is not None:
            beyond = step.num_tokens - 1 + head.ahead > head.max_positions
            for _ in range(int((may & beyond).sum())):
                self.services.count("texts_beyond_head")
            may &= ~beyond
        return np.flatnonzero(may)


def _sources(tree: Tree) -> np.ndarray:
    """The source of each node, int32 [n]."""
    column = np.searchsorted(PROBABILITY_CLASSES, np.minimum(tree.given, 1.0))
    return (column + len(PROBABILITY_CLASSES) * tree.astray).astype(np.int32)
