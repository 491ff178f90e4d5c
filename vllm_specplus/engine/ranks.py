"""vLLM's tensor-parallel group, as drafting in lockstep reaches it (``drafting/lockstep.py``)."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed import get_tp_group

from vllm_specplus.drafting.lockstep import Lockstep


class TensorRanks:
    """A ``drafting.lockstep.Ranks``. Announcements go through vLLM's queue in shared memory, or as
    messages between hosts, and tensors as collectives of the group that runs the layers."""

    def announce(self, what: Any = None) -> Any:
        """As ``Ranks.announce``."""
        return get_tp_group().broadcast_object(what, src=0)

    def broadcast(self, tensor: torch.Tensor) -> Any:
        """As ``Ranks.broadcast``."""
        return get_tp_group().broadcast(tensor, src=0)


def lockstep() -> Lockstep | None:
    """Return what keeps the target's ranks in step; None: it is on one."""
    return Lockstep(TensorRanks()) if get_tp_group().world_size > 1 else None
