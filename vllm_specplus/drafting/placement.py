"""Owners of a draft on several shards: the engine's end.

Ray finds the devices, starts an owner on each and knows when one is gone, for a process of
its own (``ray_owners.py``); the engine listens to that process and forms the group in which
a step's tensors travel.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from vllm_specplus.drafting.group import Group, open_store
from vllm_specplus.drafting.ray_owners import CONNECT_SECONDS, Order, PlacementError, forwarded
from vllm_specplus.drafting.shards import Plan
from vllm_specplus.target import TargetDevice

logger = logging.getLogger("vllm.specplus")

#: For a cluster to be reached or started; for an end.
CLUSTER_SECONDS, END_SECONDS = 60, 30


class Placement:
    """The owners of one plan and home's end of their group."""

    _ray: subprocess.Popen | None = None
    _starting: subprocess.Popen | None = None
    _cancelled = False
    group: Group | None = None

    def __init__(
        self, plan: Plan, device: torch.device, address: str | None = None, *,
        targets: list[TargetDevice], share: bool = False, reserve_seconds: int = 30,
    ):  # fmt: skip
        """Starts everything; PlacementError in bounded time if it cannot.

        ``address``: of a Ray cluster; None: the one this process belongs to, else the one
        RAY_ADDRESS names, else a local one that lives as long as this object; ``targets``: devices
        of the target's ranks, this process' first; ``share``: are the owners on those of them that
        are on this node? ``reserve_seconds``: how long the cluster may take to find devices.
        """
        self.plan, self._device, self._targets = plan, device, targets
        self._order = Order(
            plan=plan,
            resource="GPU" if device.type == "cuda" else "CPU",
            address=address or own_cluster(),
            port=0,
            reserve_seconds=reserve_seconds,
            shared=_shared_devices(targets, plan.shards - 1) if share else None,
            environment=forwarded(dict(os.environ), _kept_back()),
        )
        self.restart(plan)

    def restart(self, plan: Plan) -> None:
        """Owners anew, with empty caches, in the place of those there are."""
        self.close()
        connect = timedelta(seconds=CONNECT_SECONDS)
        store = open_store(connect)
        self.plan, order = plan, replace(self._order, plan=plan, port=store.port)
        command = [sys.executable, "-m", "vllm_specplus.drafting.ray_owners", order.dump()]
        self._ray = self._starting = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0,
            # Ctrl-C is for the engine, which then closes.
            start_new_session=True, env=_environment(order, self._targets),
        )  # fmt: skip
        try:
            if self._cancelled:
                raise PlacementError("the engine is closing")
            placed = self._hear(CLUSTER_SECONDS + order.reserve_seconds + CONNECT_SECONDS)
            if placed is None:
                raise PlacementError("the Ray cluster did not answer in time")
            self._pids = placed["pids"]
            if order.shared is None:
                check_apart(placed["gpus"], self._targets)
            self.group = Group(
                0, plan.shards, store, self._device, connect, placed["host"],
                check=lambda: self._hear(0),
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
        raises what failed. Its notes go to the log."""
        out, end = self._ray.stdout, time.monotonic() + seconds
        while select.select([out], [], [], max(end - time.monotonic(), 0))[0]:
            line = out.readline()
            if not line:
                raise PlacementError(f"the process that talks to Ray ended ({self._ray.wait()})")
            said = json.loads(line)
            if "failed" in said:
                raise PlacementError(said["failed"])
            if "placed" in said:
                return said["placed"]
            logger.info("easyspec: %s", said["note"])
        return None

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
        if self.group is not None:
            self.group.close()
            self.group = None
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


def _environment(order: Order, targets: list[TargetDevice]) -> dict[str, str]:
    """Of the process that talks to Ray. A cluster of its own must not give away the GPUs of the
    target, of which Ray knows nothing."""
    if order.resource == "CPU" or order.address is not None or order.shared is not None:
        return dict(os.environ)
    return apart_from(targets)


def apart_from(targets: list[TargetDevice]) -> dict[str, str]:
    """This process' variables, but for the GPUs of ``targets`` on this node."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else map(str, range(torch.cuda.device_count()))
    taken = {each.name for each in targets if each.host == socket.gethostname()}
    left = ",".join(name for name in names if name not in taken)
    return os.environ | {"CUDA_VISIBLE_DEVICES": left}


def check_apart(owners: list[str], targets: list[TargetDevice]) -> None:
    """Raise PlacementError if an owner runs on a GPU of the target's, by the ids of the owners'
    GPUs. Ray gives away those as well where vLLM does not run on Ray."""
    if common := sorted(set(owners) & {each.uuid for each in targets} - {""}):
        raise PlacementError(
            f"Ray has put owners of the draft on GPUs of the target ({', '.join(common)}): start "
            "that cluster with CUDA_VISIBLE_DEVICES set to the other GPUs, or set 'share_target'"
        )


def _shared_devices(targets: list[TargetDevice], count: int) -> list[str]:
    """Names of ``count`` devices of this node that the target's other ranks run on."""
    here = socket.gethostname()
    others = [each.name for each in targets[1:] if each.host == here]
    if len(others) < count:
        raise PlacementError(
            f"'share_target' needs {count} more devices of the target on this node, which has "
            f"{len(others)}: lower 'shards'"
        )
    return others[:count]


def _kept_back() -> set[str]:
    """Variables that a user keeps from Ray's workers, in vLLM's own file."""
    configs = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    root = os.environ.get("VLLM_CONFIG_ROOT") or Path(configs) / "vllm"
    try:
        names = json.loads((Path(root) / "ray_non_carry_over_env_vars.json").read_text())
        return {name for name in names if isinstance(name, str)}
    except (OSError, ValueError, TypeError):
        return set()


def own_cluster() -> str | None:
    """Address of the cluster this process works for, or is told to work on."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        return ray.get_runtime_context().gcs_address
    return os.environ.get("RAY_ADDRESS")
