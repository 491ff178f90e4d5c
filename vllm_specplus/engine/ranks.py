"""vLLM's tensor-parallel group: what drafting in lockstep reaches (``drafting/lockstep.py``), and
where it runs."""

from __future__ import annotations

import os
import socket
from typing import Any

import torch
from vllm.distributed import get_tp_group

from vllm_specplus.drafting.lockstep import Lockstep
from vllm_specplus.target import TargetDevice


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


def devices_of_ranks(device: torch.device) -> list[TargetDevice]:
    """Return the devices of all ranks, in their order, each of which calls this with its own.

    A rank runs where vLLM has put it, be it by ``assigned_physical_gpu_ids``, by Ray or by its
    place among several replicas; only the rank itself knows."""
    group = get_tp_group()
    found: list[TargetDevice] = [_described(device)] * group.world_size
    if group.world_size > 1:
        torch.distributed.all_gather_object(found, found[0], group=group.cpu_group)
    return found


def _described(device: torch.device) -> TargetDevice:
    host = socket.gethostname()
    if device.type != "cuda":
        return TargetDevice(host, "", "")
    number = torch.cuda.current_device() if device.index is None else device.index
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    name = visible.split(",")[number] if visible else str(number)
    return TargetDevice(host, name, str(torch.cuda.get_device_properties(number).uuid))
