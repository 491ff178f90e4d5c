"""Trees from LongSpec's draft (arXiv 2502.17421), for long contexts.

One layer that sees a window of the text by itself, and all of it through the keys and values that
the target's last layer of full attention has of it anyway, where the target's KV cache has them
(``drafting/context_pages.py``). What it holds of a text is as large for a long one as for a short
one.

Levels are beams of unequal widths, by default the paper's. The tree that is verified are the most
probable of all nodes that the beams have seen, as many as the controller grants: functions of the
past, which the target verifies by its own draw at every node, lossless at any temperature.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from vllm_specplus.capabilities import TEXT, Need
from vllm_specplus.config import Megabytes, MethodConfig
from vllm_specplus.drafting import long_checkpoint
from vllm_specplus.drafting.head_target import check_fits
from vllm_specplus.drafting.long_draft import LongDraft
from vllm_specplus.drafting.long_executor import LongExecutor
from vllm_specplus.drafting.stop_config import NoStop
from vllm_specplus.proposers.draft_tree import DraftMemoryError, DraftTree
from vllm_specplus.registry import register_method
from vllm_specplus.step import StepContext
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target


class LongDraftConfig(MethodConfig):
    """``{"method": "long_draft", "model": "...", ...}``."""

    supports: ClassVar[frozenset[Need]] = TEXT - {
        Need.ADAPTED_LAYERS,
        Need.KV_GROUPS,
        Need.MROPE,
    }
    fuses: ClassVar[bool] = False
    shape: ClassVar[str] = "beams"
    stop: ClassVar[NoStop] = NoStop()

    method: Literal["long_draft"] = "long_draft"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 68
    """Nodes of the whole tree, as many as ``tree`` makes."""
    model: str
    """Folder of a long draft that was trained for the target."""
    tree: list[Annotated[int, Field(ge=1, le=32)]] = Field(
        default=[4, 16, 16, 16, 16], min_length=1, max_length=80
    )
    """Nodes of each level."""
    kv_memory_mb: Megabytes = 512
    """The draft's windows; requests of a step beyond it go undrafted."""

    @model_validator(mode="after")
    def _tree_fits(self):
        nodes = sum(self.tree)
        if self.num_speculative_tokens != nodes:
            raise ValueError(
                f"'tree' {quoted(self.tree)} makes {nodes} nodes (at most 80): set "
                f"num_speculative_tokens to the number of nodes"
            )
        return self

    @model_validator(mode="after")
    def _draft_runs(self):
        long_checkpoint.read_config(self.model)
        return self

    def check_target(self, target: Target) -> None:
        target.check_keeps_texts(self.method)
        if target.fp8_cache:
            raise ValueError(
                "method 'long_draft' reads the target's keys and values as they were computed: set "
                "--kv-cache-dtype to bfloat16, or use another method, such as 'token_recycling'"
            )
        if target.tensor_parallel_size > 1:
            raise ValueError(
                "method 'long_draft' reads all KV heads of the target on one rank: set "
                "tensor_parallel_size to 1"
            )
        draft = long_checkpoint.read_config(self.model)
        name = f"long draft {quoted(self.model)}"
        check_fits(target, name, draft.hidden_size, draft.vocab_size, None)

    def levels(self) -> tuple[int, ...]:
        """Nodes of each level of the largest tree."""
        return tuple(self.tree)

    def shape_arguments(self, depth: int) -> tuple:
        """What the shape takes for a tree of ``depth`` levels."""
        return (self.levels()[:depth],)


@register_method
class LongDraftTree(DraftTree):
    config_class = LongDraftConfig
    reads_context = borrows_vocabulary = True
    _executor: LongExecutor
    config: LongDraftConfig

    def _make_model(self, device: torch.device, dtype: torch.dtype) -> LongDraft:
        return LongDraft(self.config.model, self.services.target_vocabulary(), device, dtype)

    def _make_executor(self, model: LongDraft, max_slots: int) -> Any:
        return LongExecutor(model, max_slots, sum(self.levels))

    def share_pages(self, pages: int, page: int, max_requests: int) -> None:
        self._executor.read_from(self.services.context_pages())
        super().share_pages(pages, page, max_requests)

    def _has_room(self, step: StepContext, r: int) -> bool:
        if self._executor.room(step.request_ids[r]):
            return True
        self.services.report(
            DraftMemoryError(
                f"the draft has windows for {self._executor.rings} requests of a step, and this "
                f"one has more: raise kv_memory_mb ({self.config.kv_memory_mb})"
            )
        )
        return False

    def _begin(
        self, step: StepContext, rows: np.ndarray, names: list[str], texts: list[np.ndarray]
    ) -> torch.Tensor:
        return self._executor.begin(names, texts, step.pages[rows])
