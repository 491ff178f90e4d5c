"""``python -m vllm_specplus.drafting.ray_owners ORDER``: the process that talks to Ray.

Ray ends a process whose cluster is lost, and stopping a cluster's head must not end an
engine. So this process joins the cluster in the engine's place: it reserves the devices (one
placement group, STRICT_PACK: all on one node), starts an actor on each, and watches them.
Owners that share the target's devices reserve nothing, since Ray has given those away: they are
bound to this node.

ORDER is the JSON of an :class:`Order`. The process answers with JSON lines on standard output::

    {"placed": {"host": ..., "port": ..., "pids": [...], "gpus": [...]}}
                                                            owners wait for home there
    {"failed": "one sentence"}                              now or later; then it ends

and ends, with everything it started, when its standard input does.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from vllm_specplus.drafting.shards import Plan, serve

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

#: For owners to load their weights and connect.
CONNECT_SECONDS = 120
#: Between two looks at the owners.
WATCH_SECONDS = 0.5


class PlacementError(RuntimeError):
    """The owners cannot be placed; the message says what was asked for and what is there."""


@dataclass(frozen=True, slots=True)
class Order:
    """What to place where."""

    plan: Plan
    resource: str
    """"CPU" or "GPU", one for every owner."""
    address: str | None
    """Of a Ray cluster; None: a local one, for as long as this process lives."""
    reserve_seconds: float
    """How long the cluster may take to find the devices."""
    shared: list[str] | None = None
    """Ids of this node's GPUs that owners share with the target ("" on the CPU), one for each;
    None: Ray finds devices for them."""

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Order:
        fields = json.loads(text)
        return cls(**fields | {"plan": Plan(**fields["plan"])})


class Owner:
    """A Ray actor: one shard."""

    def run(self, plan: Plan, rank: int, host: str, port: int) -> None:
        """Serve until home stops or is gone."""
        import torch

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(1)
        serve(plan, rank, host, port, device, timedelta(seconds=CONNECT_SECONDS))

    def where(self) -> tuple[int, str]:
        """Process id, and the id of the GPU ("" on a CPU)."""
        import torch

        return os.getpid(), gpu_id(0) if torch.cuda.is_available() else ""


def gpu_id(number: int) -> str:
    """What all processes call this process' ``number``-th GPU."""
    import torch

    return str(torch.cuda.get_device_properties(number).uuid)


def connect(address: str | None) -> None:
    import ray

    try:
        ray.init(
            # Without an address Ray would first look for a cluster that somebody else runs here.
            address=address or "local", include_dashboard=False, log_to_driver=False,
            logging_level=logging.ERROR, namespace="vllm-specplus",
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise PlacementError(f"cannot reach a Ray cluster at {address!r}: {reason}") from error


def reserve(order: Order) -> PlacementGroup:
    import ray
    from ray.util.placement_group import placement_group

    count = order.plan.shards - 1
    bundles = placement_group([{order.resource: 1}] * count, strategy="STRICT_PACK")
    if not bundles.wait(order.reserve_seconds):
        there = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        raise PlacementError(
            f"easyspec asks for {count} free {order.resource}s on one node of the Ray cluster, "
            f"which has {there or 'none'} left: lower 'shards' or free some"
        )
    return bundles


def placements(order: Order) -> list[dict[str, Any]]:
    """Ray's options of each owner: where it runs, and on what."""
    import ray
    from ray.util.scheduling_strategies import (
        NodeAffinitySchedulingStrategy,
        PlacementGroupSchedulingStrategy,
    )

    if order.shared is None:
        bundles, kind = reserve(order), f"num_{order.resource.lower()}s"
        return [
            {"num_cpus": 0, kind: 1, "scheduling_strategy": PlacementGroupSchedulingStrategy(
                bundles, placement_group_bundle_index=bundle
            )}
            for bundle in range(order.plan.shards - 1)
        ]  # fmt: skip
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return [{"num_cpus": 0, "scheduling_strategy": here}] * len(order.shared)


def environment(order: Order, owner: int) -> dict[str, str]:
    """Variables of the process of the ``owner``-th owner."""
    variables = {"OMP_NUM_THREADS": "1"}
    if order.shared is not None and order.resource == "GPU":
        # It sees that GPU, though Ray has given it none.
        variables |= {
            "CUDA_VISIBLE_DEVICES": order.shared[owner],
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        }
    return variables


def start(order: Order) -> tuple[dict[str, Any], list]:
    """Start the owners: where they wait for home, and what they run."""
    import ray

    host, port = ray.util.get_node_ip_address(), _free_port()
    actor = ray.remote(Owner)
    owners = [
        actor.options(
            max_concurrency=2, runtime_env={"env_vars": environment(order, number)}, **options
        ).remote()
        for number, options in enumerate(placements(order))
    ]  # fmt: skip
    runs = [
        owner.run.remote(order.plan, rank, host, port) for rank, owner in enumerate(owners, start=1)
    ]
    where = ray.get([owner.where.remote() for owner in owners], timeout=CONNECT_SECONDS)
    pids, gpus = zip(*where, strict=True)
    # The references keep the actors alive.
    return {"host": host, "port": port, "pids": pids, "gpus": gpus}, [owners, runs]


def watch(runs: list) -> None:
    """Return when home is gone; raise what ended an owner."""
    import ray

    while True:
        if select.select([sys.stdin], [], [], WATCH_SECONDS)[0] and not sys.stdin.readline():
            return
        ended, _ = ray.wait(runs, num_returns=1, timeout=0)
        if ended:
            ray.get(ended)
            raise PlacementError("an owner of the draft ended")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def main() -> None:
    # What Ray and torch print goes to standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import ray

    order = Order.load(sys.argv[1])
    try:
        connect(order.address)
        placed, (_owners, runs) = start(order)
        print(json.dumps({"placed": placed}), file=answers)
        watch(runs)
    except PlacementError as error:
        print(json.dumps({"failed": str(error)}), file=answers)
    except ray.exceptions.RayError as error:
        print(json.dumps({"failed": f"an owner of the draft failed: {error}"}), file=answers)
    # Ends actors and placement group with this process' job, and a local cluster.
    ray.shutdown()


if __name__ == "__main__":
    main()
