"""Trees from an EAGLE head (EAGLE, EAGLE-2, EAGLE-3), driven level by level.

vLLM's own ``eagle`` and ``eagle3`` draft chains. The same heads give the trees of their
papers here, in all the shapes of ``draft_tree``: by default EAGLE-2's (arXiv 2406.16858),
the most probable sequences, of a depth that the controller chooses; and EAGLE's own, static trees
(``drafting/static_trees.py``), which LANTERN++ drafts pictures with.

The head reads the target's hidden states, so it costs one layer and no second context; its
keys and values lie beside the target's (``drafting/head_executor.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
import torch
from pydantic import model_validator

from vllm_specplus.capabilities import TEXT, Need
from vllm_specplus.drafting import eagle_checkpoint, static_trees
from vllm_specplus.drafting.eagle import EagleHead, Vocabulary
from vllm_specplus.drafting.head_executor import HeadExecutor
from vllm_specplus.drafting.head_target import check_fits
from vllm_specplus.drafting.hub import model_folder
from vllm_specplus.drafting.noise import DraftNoise
from vllm_specplus.drafting.overlap_config import OverlapConfig
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.draft_tree import DraftTree
from vllm_specplus.registry import register_method
from vllm_specplus.step import StepContext
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target
from vllm_specplus.tree import DraftBatch

if TYPE_CHECKING:
    from vllm_specplus.drafting.mtp import MtpHead


Shape = Literal["chain", "topk", "rsd_c", "rsd_s", "spectr", "caterpillar", "static"]


class EagleTreeConfig(OverlapConfig):
    """``{"method": "eagle_tree", "model": "...", ...}``."""

    supports: ClassVar[frozenset[Need]] = TEXT - {
        Need.ADAPTED_LAYERS,
        Need.KV_GROUPS,
        Need.MROPE,
    }
    takes_speculators: ClassVar[bool] = True

    method: Literal["eagle_tree"] = "eagle_tree"
    model: str
    """Folder of an EAGLE or EAGLE-3 head that was trained for the target, or its name on the
    Hugging Face hub."""
    shape: Shape = "topk"  # type: ignore[assignment]
    static_tree: Literal["mc_sim_7b_63", "naive_extend_57"] = "mc_sim_7b_63"
    """The tree of shape ``static``, of 25 or 57 nodes."""

    def levels(self) -> tuple[int, ...]:
        """Nodes of each level of the largest tree."""
        if self.shape == "static":
            return static_trees.levels(static_trees.TREES[self.static_tree])
        return super().levels()

    def shape_arguments(self, depth: int) -> tuple:
        """What the shape takes for a tree of ``depth`` levels."""
        if self.shape == "static":
            return (static_trees.TREES[self.static_tree][:depth],)
        return super().shape_arguments(depth)

    @property
    def folder(self) -> str:
        """Where the head is on this machine."""
        return model_folder(self.model, "EAGLE head")

    @property
    def reads_layers(self) -> bool:
        return eagle_checkpoint.read_config(self.folder).generation == 3

    @model_validator(mode="after")
    def _head_runs(self):
        eagle_checkpoint.read_config(self.folder)
        return self

    def check_target(self, target: Target) -> None:
        target.check_keeps_texts(self.method)
        self.check_overlap(target)
        head = eagle_checkpoint.read_config(self.folder)
        check_fits(
            target, f"EAGLE head {quoted(self.model)}", head.target_hidden_size, head.vocab_size,
            (head.layer_ids or ()) if head.generation == 3 else None,
        )  # fmt: skip


@register_method
class EagleTree(DraftTree):
    config_class = EagleTreeConfig
    reads_hidden = borrows_vocabulary = True
    _executor: HeadExecutor | None
    _head: EagleHead | MtpHead | None = None
    """None on ranks that do not draft."""
    config: EagleTreeConfig

    def __init__(self, config: EagleTreeConfig, services: Services):
        super().__init__(config, services)
        self.hidden_layers = self._reads()

    def _reads(self) -> tuple[int, ...] | None:
        """See ``hidden_layers``."""
        head = eagle_checkpoint.read_config(self.config.folder)
        return (head.layer_ids or ()) if head.generation == 3 else None

    def load_draft(self, device: torch.device, dtype: torch.dtype) -> None:
        self._head = self._load_head(self.services.target_vocabulary(), device, dtype)
        self._noise = DraftNoise(device)
        self._stop = self._make_stop()

    def _load_head(
        self, target: Vocabulary, device: torch.device, dtype: torch.dtype
    ) -> EagleHead | MtpHead:
        return EagleHead(self.config.folder, target, self.services.vocab_size, device, dtype)

    def held_bytes(self) -> int:
        return 0  # it has slots of the target's cache

    def slot_bytes(self) -> int:
        head = self._head
        return 0 if head is None else 2 * head.kv_heads * head.head_dim * head.dtype.itemsize

    def share_pages(self, pages: int, page: int, max_requests: int) -> None:
        assert self._head is not None
        self._executor = HeadExecutor(
            self._head, self.most_nodes, max_requests, pages, page, self.services.record
        )
        super().share_pages(pages, page, max_requests)

    def propose(self, step: StepContext) -> DraftBatch:
        self._executor.follow(step.request_ids, step.token_ids, step.target_rows)
        return super().propose(step)

    def _is_beyond(self, length: int) -> bool:
        # A row behind every token but the newest, and one for each level but the last.
        return length + len(self.levels) - 2 > self._head.max_positions

    def _holds(self, request: str, length: int) -> bool:
        return True  # where the target does

    def _begin(
        self, step: StepContext, rows: np.ndarray, names: list[str], texts: list[np.ndarray]
    ) -> torch.Tensor:
        return self._executor.begin(names, rows, step.num_tokens[rows].astype(np.int64))
