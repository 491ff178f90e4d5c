"""Owners of a layer-parallel draft: the engine's end.

Ray finds the devices, starts an owner on each and knows when one is gone, for a process of
its own (``ray_owners.py``); the engine listens to that process and forms the group in which
a step's tensors travel.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from vllm_specplus.drafting.ray_owners import CONNECT_SECONDS, Order, PlacementError, gpu_id
from vllm_specplus.drafting.shards import Group, Plan

#: For bundles to be reserved; for a cluster to be reached or started; for an end.
RESERVE_SECONDS, CLUSTER_SECONDS, END_SECONDS = 30, 60, 20


class Placement:
    """The owners of one plan and home's end of their group."""

    _ray: subprocess.Popen | None = None
    _starting: subprocess.Popen | None = None
    _cancelled = False

    def __init__(self, plan: Plan, device: torch.device, address: str | None, share: bool = False):
        """Starts everything; PlacementError in bounded time if it cannot.

        ``address``: of a Ray cluster; None: the one this process belongs to, else the one
        RAY_ADDRESS names, else a local one that lives as long as this object; ``share``: on the
        other devices of this process' node that the target runs on.
        """
        self._device = device
        self._order = Order(
            plan,
            "GPU" if device.type == "cuda" else "CPU",
            address or _own_cluster(),
            RESERVE_SECONDS,
            _other_devices(device, plan.shards - 1) if share else None,
        )
        self.restart()

    def restart(self) -> None:
        """Owners anew, with empty caches, in the place of those there are."""
        self.close()
        command = [sys.executable, "-m", "vllm_specplus.drafting.ray_owners", self._order.dump()]
        self._ray = self._starting = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            # Ctrl-C is for the engine, which then closes.
            start_new_session=True, env=_environment(self._order),
        )  # fmt: skip
        try:
            if self._cancelled:
                raise PlacementError("the engine is closing")
            placed = self._hear(CLUSTER_SECONDS + RESERVE_SECONDS + CONNECT_SECONDS)
            if placed is None:
                raise PlacementError("the Ray cluster did not answer in time")
            self._pids = placed["pids"]
            if self._order.shared is None and self._device.type == "cuda":
                _check_apart(placed["gpus"])
            self.group = Group(
                0, self._order.plan.shards, placed["host"], placed["port"], self._device,
                timedelta(seconds=CONNECT_SECONDS), check=lambda: self._hear(0),
            )  # fmt: skip
        except PlacementError:
            self.close()
            raise
        except (RuntimeError, ValueError) as error:
            self.close()
            raise PlacementError(f"the owners of the draft did not connect: {error}") from error
        finally:
            self._starting = None

    def _hear(self, seconds: float) -> dict | None:
        """What the process that talks to Ray has placed, None if it is silent that long;
        raises what failed."""
        out = self._ray.stdout
        if not select.select([out], [], [], seconds)[0]:
            return None
        line = out.readline()
        if not line:
            raise PlacementError(f"the process that talks to Ray ended ({self._ray.wait()})")
        said = json.loads(line)
        if "failed" in said:
            raise PlacementError(said["failed"])
        return said["placed"]

    def pids(self) -> list[int]:
        """Process ids of the owners, on their node."""
        return self._pids

    def cancel(self) -> None:
        """For good: a :meth:`restart` under way in another thread fails at once."""
        self._cancelled = True
        if self._starting is not None:
            self._starting.kill()

    def close(self) -> None:
        """End the owners, and the cluster if it was started for them."""
        if self._ray is None:
            return
        self._ray.stdin.close()
        try:
            self._ray.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._ray.kill()
            self._ray.wait()
        self._ray.stdout.close()
        self._ray = None


def _environment(order: Order) -> dict[str, str]:
    """Of the process that talks to Ray. A cluster of its own must not give away the GPUs of the
    target, of which Ray knows nothing."""
    if order.resource == "CPU" or order.address is not None or order.shared is not None:
        return dict(os.environ)
    return os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(_visible_gpus()[_target_ranks() :])}


def _check_apart(owners: list[str]) -> None:
    """That no owner runs on a GPU of the target's, by the ids of the owners' GPUs. Ray gives away
    those as well where vLLM does not run on Ray."""
    target = [gpu_id(rank) for rank in range(min(_target_ranks(), torch.cuda.device_count()))]
    if common := sorted(set(owners) & set(target)):
        raise PlacementError(
            f"Ray has put owners of the draft on GPUs of the target ({', '.join(common)}): start "
            "that cluster with CUDA_VISIBLE_DEVICES set to the other GPUs, or set 'share_target'"
        )


def _target_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _other_devices(device: torch.device, count: int) -> list[str]:
    """Ids of ``count`` GPUs of this node beside ``device``, where vLLM has put the other ranks;
    on the CPU all ranks share one device, which has no id."""
    if device.type == "cpu":
        return [""] * count
    others = [name for number, name in enumerate(_visible_gpus()) if number != (device.index or 0)]
    if len(others) < count:
        raise PlacementError(
            f"'share_target' needs {count} more GPUs of the target on this node, which has "
            f"{len(others)}: lower 'shards'"
        )
    return others[:count]


def _visible_gpus() -> list[str]:
    """Ids of the GPUs this process may use; vLLM's ranks use the first ones."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))


def _own_cluster() -> str | None:
    """Address of the cluster this process works for, or is told to work on."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return ray.get_runtime_context().gcs_address
    return os.environ.get("RAY_ADDRESS")
