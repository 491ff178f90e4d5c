"""EasySpec: a draft model whose layers run in parallel (arXiv 2502.02493).

The trees are those of ``draft_tree``. What differs is the draft's forward pass
(``drafting/easyspec.py``): the attentions of a group of layers read one input at the same time,
each on its own device, and the MLPs are divided among all of them (``drafting/shards.py``), or what
else is found to pay at the start (``drafting/trial.py``). Ray places the processes
(``drafting/placement.py``, ``drafting/ray_owners.py``).

A lost or hung owner costs drafts, not text: after one bounded wait requests go on undrafted while
the group is built anew, and their drafts' caches are filled again by reading their texts.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from vllm_specplus.drafting.division import check_divisible
from vllm_specplus.drafting.easyspec import LayerParallelExecutor, Parts, groups_of
from vllm_specplus.drafting.layer_parts import UnknownLayers
from vllm_specplus.drafting.memory import check_fits, fingerprint
from vllm_specplus.drafting.model import DraftModel, DraftModelError, read_config
from vllm_specplus.drafting.placement import Placement
from vllm_specplus.drafting.shaped_config import ShapedDraftConfig
from vllm_specplus.drafting.shards import Plan, Shard, rejoin
from vllm_specplus.drafting.trial import try_all
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.draft_tree import DraftTree, DraftTreeConfig
from vllm_specplus.registry import register_method
from vllm_specplus.step import StepContext
from vllm_specplus.strict import quoted
from vllm_specplus.target import Target
from vllm_specplus.tree import DraftBatch

#: Seconds before each further attempt to start lost owners anew; after the last one nothing more is
#: drafted.
RETRY_SECONDS = (30, 60, 120, 240, 480)
#: Owners that lived so long were well: attempts are counted anew.
WELL_SECONDS = 600
#: Keys of transformers' configs that tell of experts, which are not divided.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class DraftGroupLost(RuntimeError):
    """The draft's owners do not come back."""


class EasySpecConfig(DraftTreeConfig):
    """``{"method": "easyspec", "model": "...", ...}``."""

    stops: ClassVar[frozenset[str]] = ShapedDraftConfig.stops  # its hidden states are approximate

    method: Literal["easyspec"] = "easyspec"  # type: ignore[assignment]
    group_size: Annotated[int, Field(ge=1, le=16)] = 4
    """Consecutive layers of the draft whose attentions read the same input."""
    shards: Annotated[int, Field(ge=1, le=16)] = 1
    """Processes that share the draft, this one included; the others are placed by Ray."""
    placement: Literal["auto", "attentions", "attentions_and_mlps", "tensor_parallel"] = "auto"
    """What the shards divide among themselves; "auto": what is found to pay at the start."""
    ray_address: str | None = None
    """Cluster for the other shards; by default the one vLLM runs on, or a local one."""
    placement_timeout_s: Annotated[int, Field(ge=1, le=7200)] = 30
    """How long the cluster may take to find devices for the other shards, or to start them."""
    share_target: bool = False
    """Do the other shards run on the devices of the target's other ranks, which idle while rank 0
    drafts, instead of devices of their own?"""

    @model_validator(mode="after")
    def _shards_have_work(self):
        given = self.model_fields_set
        if self.placement == "tensor_parallel" and "group_size" in given:
            raise ValueError("placement 'tensor_parallel' has no 'group_size': remove it")
        if self.placement != "tensor_parallel" and self.shards > self.group_size:
            raise ValueError(
                f"'shards' ({self.shards}) is more than 'group_size' ({self.group_size}), the "
                f"layers that run at the same time: lower it"
            )
        if self.shards > 1 and importlib.util.find_spec("ray") is None:
            raise ValueError("more than one shard needs Ray: pip install 'vllm-specplus[ray]'")
        if self.shards == 1 and self.ray_address is not None:
            raise ValueError("'ray_address' is for 'shards' > 1: set it or remove the address")
        for key in ("share_target", "placement", "placement_timeout_s"):
            if self.shards == 1 and key in given and getattr(self, key):
                raise ValueError(f"'{key}' is for 'shards' > 1: set it or remove the key")
        return self

    @model_validator(mode="after")
    def _draft_can_be_divided(self):
        if self.placement in ("auto", "attentions"):
            return self
        config = read_config(self.folder)
        if any(config.get(key) for key in _EXPERTS):
            raise ValueError(
                f"placement {self.placement!r} divides MLPs, and those of draft model "
                f"{quoted(self.model)} are experts: use 'attentions', or 'auto'"
            )
        heads = config.get("num_key_value_heads") or config["num_attention_heads"]
        if self.placement == "tensor_parallel" and heads < self.shards:
            raise ValueError(
                f"placement 'tensor_parallel' divides the {heads} heads of keys of draft model "
                f"{quoted(self.model)} among {self.shards} 'shards': lower these, or use another "
                f"placement"
            )
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
    _given_up = False
    _recorded: tuple[list[int], int] | None = None
    """Of the graphs: widths of levels, and of how many requests."""

    def __init__(self, config: EasySpecConfig, services: Services):
        super().__init__(config, services)
        self.places_processes = config.shards > 1
        self._closing = threading.Event()
        self._attempts, self._built, self._is_new = 0, 0.0, False

    # -- the draft and its shards ---------------------------------------------------------

    def _make_model(self, device: torch.device, dtype: torch.dtype) -> Any:
        check_fits(self.config.folder, dtype, device, self.held_bytes())
        return super()._make_model(device, dtype)

    def _make_executor(self, model: DraftModel, max_slots: int) -> LayerParallelExecutor:
        config, record, nodes = self.config, self.services.record, self.most_nodes
        if config.shards == 1:
            model.quicken()
            groups = groups_of("attentions", model.num_layers, config.group_size)
            return LayerParallelExecutor(Parts(model, groups), max_slots, nodes, record)
        if config.placement != "auto":
            self._check_divisible(model)
        plan = Plan(
            config.model, fingerprint(config.folder), str(model.dtype).removeprefix("torch."),
            config.head_tokens, max_slots, nodes, config.group_size, config.shards,
            config.placement, record is not None,
        )  # fmt: skip
        self._placement = Placement(
            plan, model.device, config.ray_address, targets=self.services.target_devices(),
            share=config.share_target, reserve_seconds=config.placement_timeout_s,
        )  # fmt: skip
        self._built = time.monotonic()
        try:
            return self._placed(Shard(plan, model, self._placement.group, record), plan, model)
        except BaseException:
            self._placement.close()
            raise

    def _placed(self, shard: Shard, plan: Plan, model: DraftModel) -> LayerParallelExecutor:
        """This process' share, where it is said or tried which that is."""
        if plan.placement != "auto":
            self._chosen = plan.placement
            return shard.place(plan.placement, plan.max_slots)
        verdict = try_all(
            model, plan.shards, plan.group_size, self.levels, self.services.target_bytes(),
            lambda placement, slots: shard.place(placement, slots, settle=False),
        )  # fmt: skip
        self._chosen = verdict.placement
        executor = shard.place(verdict.placement, plan.max_slots)
        if verdict.placement == "one_device":
            self._placement.close()
            self._placement = None
        return executor

    def _check_divisible(self, model: DraftModel) -> None:
        try:
            check_divisible(model, self.config.placement, self.config.shards)
        except UnknownLayers as error:
            raise DraftModelError(
                f"draft model {quoted(self.config.model)} cannot be divided as placement "
                f"{self.config.placement!r} does: {error}; use 'attentions', or 'auto'"
            ) from None

    def share_pages(self, pages: int, page: int, max_requests: int) -> None:
        self._recorded = sorted(set(self.levels[:-1])), max_requests
        super().share_pages(pages, page, max_requests)

    # -- drafting, and what follows from faults -------------------------------------------

    def propose(self, step: StepContext) -> DraftBatch:
        if self._given_up or (self._rebuild is not None and self._rebuild.is_alive()):
            return DraftBatch.empty(len(step.request_ids))
        self._rebuild = None
        try:
            if self._is_new and self._recorded is not None:
                self._executor.record(*self._recorded)
            drafts = super().propose(step)
            if self._placement is not None:
                # A wait that had to be ended has left anything in the tensors.
                self._placement.group.check()
                self._placement.group.hurry()
            self._is_new = False
            return drafts
        except Exception:
            # A peer is gone, or waits for the rest of a pass that broke off.
            if self._placement is not None:
                self._rebuild = threading.Thread(target=self._build_anew, daemon=True)
                self._rebuild.start()
            raise

    def _build_anew(self) -> None:
        """In the background: new owners, with empty caches; a bounded number of attempts."""
        if time.monotonic() - self._built > WELL_SECONDS:
            self._attempts = 0
        # What owners are for is settled.
        plan = replace(self._placement.plan, placement=self._chosen)
        while self._attempts <= len(RETRY_SECONDS):
            if self._closing.wait((0, *RETRY_SECONDS)[self._attempts]):
                return
            self._attempts += 1
            try:
                self._placement.restart(plan)
                rejoin(self._executor, plan, self._placement.group)
            except Exception as error:
                self.services.report(error)
                continue
            self._built, self._is_new = time.monotonic(), True
            self.services.count("draft_group_rebuilds")
            return
        self._give_up()

    def _give_up(self) -> None:
        self._given_up = True
        self._placement.close()
        self.services.report(
            DraftGroupLost(
                f"the draft's owners were lost, and {self._attempts} attempts to start new ones "
                f"failed: requests go on undrafted until the engine is started again"
            )
        )

    def close(self) -> None:
        self._closing.set()
        if self._placement is not None:
            self._placement.cancel()
        if self._rebuild is not None:
            self._rebuild.join()
        if self._placement is not None:
            self._placement.close()
