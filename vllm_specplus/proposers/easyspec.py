"""EasySpec: a draft model whose layers run in parallel (arXiv 2502.02493).

The trees are those of ``draft_tree``. What differs is the draft's forward pass: the
attentions of a group of layers read one input at the same time, each on its own device
(``drafting/easyspec.py``, ``drafting/shards.py``), which Ray placed
(``drafting/placement.py``, ``drafting/ray_owners.py``).

A lost owner costs drafts, not text: requests go on undrafted while the group is built anew,
and their drafts' caches are filled again by reading their texts.
"""

from __future__ import annotations

import importlib.util
import threading
from typing import Annotated, Literal

from pydantic import Field, model_validator

from vllm_specplus.drafting.easyspec import LayerParallelExecutor, layers_of
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.placement import Placement
from vllm_specplus.drafting.shards import Plan, RemoteAttentions
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.draft_tree import DraftTree, DraftTreeConfig
from vllm_specplus.registry import register_method
from vllm_specplus.step import StepContext
from vllm_specplus.target import Target
from vllm_specplus.tree import DraftBatch

#: Between two attempts to start lost owners anew.
RETRY_SECONDS = 30


class EasySpecConfig(DraftTreeConfig):
    """``{"method": "easyspec", "model": "...", ...}``."""

    method: Literal["easyspec"] = "easyspec"  # type: ignore[assignment]
    group_size: Annotated[int, Field(ge=1, le=16)] = 4
    """Consecutive layers of the draft whose attentions read the same input."""
    shards: Annotated[int, Field(ge=1, le=16)] = 1
    """Processes that share the attentions, this one included; the others are placed by Ray."""
    ray_address: str | None = None
    """Cluster for the other shards; by default the one vLLM runs on, or a local one."""
    share_target: bool = False
    """Do the other shards run on the devices of the target's other ranks, which idle while rank 0
    drafts, instead of devices of their own?"""

    @model_validator(mode="after")
    def _shards_have_work(self):
        if self.shards > self.group_size:
            raise ValueError(
                f"'shards' ({self.shards}) is more than 'group_size' ({self.group_size}), the "
                f"layers that run at the same time: lower it"
            )
        if self.shards > 1 and importlib.util.find_spec("ray") is None:
            raise ValueError("more than one shard needs Ray: pip install 'vllm-specplus[ray]'")
        if self.shards == 1 and self.ray_address is not None:
            raise ValueError("'ray_address' is for 'shards' > 1: set it or remove the address")
        if self.shards == 1 and self.share_target:
            raise ValueError("'share_target' is for 'shards' > 1: set it or remove the key")
        return self

    def check_target(self, target: Target) -> None:
        super().check_target(target)
        if self.share_target and self.shards > target.tensor_parallel_size:
            raise ValueError(
                f"'share_target' puts every shard on the device of a rank of the target: 'shards' "
                f"({self.shards}) is more than tensor_parallel_size ({target.tensor_parallel_size})"
            )


@register_method
class EasySpec(DraftTree):
    config_class = EasySpecConfig
    _placement: Placement | None = None
    _rebuild: threading.Thread | None = None

    def __init__(self, config: EasySpecConfig, services: Services):
        super().__init__(config, services)
        self._closing = threading.Event()

    def _make_executor(self, model: DraftModel, max_slots: int) -> LayerParallelExecutor:
        size, shards = self.config.group_size, self.config.shards
        model.keep_attention(layers_of(0, model.num_layers, size, shards), mlps=True)
        executor = LayerParallelExecutor(model, max_slots, self.most_nodes, size)
        if shards > 1:
            dtype = str(model.dtype).removeprefix("torch.")
            self._plan = Plan(self.config.folder, dtype, executor.cache.pages, size, shards)
            self._placement = Placement(
                self._plan, model.device, self.config.ray_address, self.config.share_target
            )
            self._attach(executor)
        return executor

    def _attach(self, executor: LayerParallelExecutor) -> None:
        executor.attentions = RemoteAttentions(
            executor.model,
            executor.cache,
            self._plan,
            self._placement.group,
        )

    def propose(self, step: StepContext) -> DraftBatch:
        if self._rebuild is not None:
            if self._rebuild.is_alive():
                return DraftBatch.empty(len(step.request_ids))
            self._rebuild = None
        try:
            return super().propose(step)
        except Exception:
            # A peer is gone, or waits for the rest of a pass that broke off.
            if self._placement is not None:
                self._rebuild = threading.Thread(target=self._build_anew, daemon=True)
                self._rebuild.start()
            raise

    def _build_anew(self) -> None:
        """In the background: new owners, with empty caches."""
        try:
            self._placement.restart()
        except Exception as error:
            self.services.report(error)
            # The next step finds no owners and tries again, but a cluster may be away for long.
            self._closing.wait(RETRY_SECONDS)
            return
        self._attach(self._executor)
        self._executor.cache.forget_texts()
        self.services.count("draft_group_rebuilds")

    def close(self) -> None:
        self._closing.set()
        if self._placement is not None:
            self._placement.cancel()
        if self._rebuild is not None:
            self._rebuild.join()
        if self._placement is not None:
            self._placement.close()
