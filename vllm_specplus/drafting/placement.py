"""Owners of a layer-parallel draft, placed and watched by Ray.

Ray finds the devices (one placement group, STRICT_PACK: all on one node), starts an actor
on each, and knows when one is gone. The tensors of a step never pass through it.
"""

from __future__ import annotations

import logging
import os
import socket
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from vllm_specplus.drafting.shards import Group, Plan, serve

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

logger = logging.getLogger("vllm.specplus")

#: For bundles to be reserved, and for owners to load their weights and connect.
RESERVE_SECONDS, CONNECT_SECONDS = 30, 120


class PlacementError(RuntimeError):
    """The owners cannot be placed; the message says what was asked for and what is there."""


class Owner:
    """A Ray actor: one shard."""

    def run(self, plan: Plan, rank: int, host: str, port: int) -> None:
        """Serve until home stops or is gone."""
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(1)
        serve(plan, rank, host, port, device, timedelta(seconds=CONNECT_SECONDS))

    def pid(self) -> int:
        return os.getpid()


class Placement:
    """The owners of one plan and home's end of their group."""

    def __init__(self, plan: Plan, device: torch.device, address: str | None):
        """Starts everything; PlacementError in bounded time if it cannot.

        ``address``: of a Ray cluster; None: the one this process belongs to, else a local
        one that lives as long as this object.
        """
        import ray

        self._plan, self._device = plan, device
        self._owners: list = []
        self._bundles: PlacementGroup | None = None
        self._cluster_is_ours = not ray.is_initialized()
        try:
            if self._cluster_is_ours:
                self._connect(address)
            self.restart()
        except BaseException:
            self.close()
            raise

    def restart(self) -> None:
        """Owners anew, with empty caches, in the place of those there are."""
        self._release()
        self._reserve(self._plan.shards - 1, "GPU" if self._device.type == "cuda" else "CPU")
        self._start(self._plan, self._device)

    def _connect(self, address: str | None) -> None:
        import ray

        try:
            ray.init(
                address=address or os.environ.get("RAY_ADDRESS"), include_dashboard=False,
                log_to_driver=False, logging_level=logging.ERROR,
                namespace="vllm-specplus",
            )  # fmt: skip
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise PlacementError(f"cannot reach a Ray cluster at {address!r}: {reason}") from error

    def _reserve(self, count: int, resource: str) -> None:
        import ray
        from ray.util.placement_group import placement_group

        bundles = [{resource: 1}] * count
        self._bundles = placement_group(bundles, strategy="STRICT_PACK")
        if not self._bundles.wait(RESERVE_SECONDS):
            there = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            raise PlacementError(
                f"easyspec asks for {count} free {resource}s on one node of the Ray cluster, "
                f"which has {there or 'none'} left: lower 'shards' or free some"
            )

    def _start(self, plan: Plan, device: torch.device) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        on_gpu = device.type == "cuda"
        host = ray.util.get_node_ip_address()
        port = _free_port()
        actor = ray.remote(Owner)
        for rank in range(1, plan.shards):
            strategy = PlacementGroupSchedulingStrategy(
                self._bundles, placement_group_bundle_index=rank - 1
            )
            owner = actor.options(
                num_cpus=0 if on_gpu else 1, num_gpus=1 if on_gpu else 0, max_concurrency=2,
                scheduling_strategy=strategy,
                runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
            )  # fmt: skip
            self._owners.append(owner.remote())
        self._runs = [
            owner.run.remote(plan, rank, host, port)
            for rank, owner in enumerate(self._owners, start=1)
        ]
        connect = timedelta(seconds=CONNECT_SECONDS)
        try:
            self.group = Group(0, plan.shards, host, port, device, connect, self._check)
        except (RuntimeError, ValueError) as error:
            raise PlacementError(f"the owners of the draft did not connect: {error}") from error

    def _check(self) -> None:
        """Raise what ended an owner, if one has ended."""
        import ray

        ended, _ = ray.wait(self._runs, num_returns=1, timeout=0)
        for run in ended:
            try:
                ray.get(run)
            except ray.exceptions.RayError as error:
                raise PlacementError(f"an owner of the draft failed: {error}") from error

    def pids(self) -> list[int]:
        """Process ids of the owners, on their node."""
        import ray

        return ray.get([owner.pid.remote() for owner in self._owners], timeout=10)

    def close(self) -> None:
        """End the actors, give the bundles back, leave the cluster if we joined it."""
        import ray

        self._release()
        if self._cluster_is_ours:
            ray.shutdown()

    def _release(self) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for owner in self._owners:
            ray.kill(owner)
        self._owners = []
        if self._bundles is not None:
            remove_placement_group(self._bundles)
            self._bundles = None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
