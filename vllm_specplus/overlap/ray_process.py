"""``python -m vllm_specplus.overlap.ray_process ORDER``: the process that talks to Ray for a draft.

As ``drafting/ray_owners.py``, whose pieces it uses: Ray may end a process that loses its cluster,
and that must not be the engine. It reserves a device, starts an actor there, and watches it; it
ends, with what it has started, when its standard input does. The actor connects to the engine at
``HOST PORT`` and shows the token, all of which come as a line of JSON on standard input.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from dataclasses import asdict, dataclass
from typing import Any

from vllm_specplus.drafting.ray_owners import (
    CONNECT_SECONDS,
    PlacementError,
    connect,
    gpu_id,
    watch,
)


@dataclass(frozen=True, slots=True)
class Order:
    """What is asked for."""

    resource: str
    """"CPU" or "GPU", one."""
    address: str | None
    """Of a Ray cluster; None: a local one, for as long as the process lives."""
    reserve_seconds: int
    """How long the cluster may take to find it."""

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Order:
        return cls(**json.loads(text))


class Draft:
    """A Ray actor: one draft."""

    def run(self, host: str, port: int, token: str) -> None:
        """Serve until the engine is gone."""
        import torch

        from vllm_specplus.overlap.channel import Channel
        from vllm_specplus.overlap.loop import serve

        stream = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
        stream.settimeout(None)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        stream.sendall(token.encode())
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        serve(Channel(stream), device, gpu=gpu_id(0) if on_gpu else "")


def start(order: Order, where: dict[str, Any]) -> tuple[list, list]:
    """Reserve a device and start the actor there: references that keep it alive, and what it
    runs."""
    import ray
    from ray.util.placement_group import placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    bundle = placement_group([{order.resource: 1}])
    if not bundle.wait(order.reserve_seconds):
        there = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
        raise PlacementError(
            f"'overlap' asks for a {order.resource} that is free for the draft, and the Ray "
            f"cluster has {there or 'none'} left: free one, or remove the key"
        )
    actor = ray.remote(Draft).options(
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}},
        scheduling_strategy=PlacementGroupSchedulingStrategy(bundle),
        **{"num_cpus": 0} | {f"num_{order.resource.lower()}s": 1},
    ).remote()  # fmt: skip
    return [bundle, actor], [actor.run.remote(where["host"], where["port"], where["token"])]


def main() -> None:
    # What Ray and torch print goes to standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import ray

    order, where = Order.load(sys.argv[1]), json.loads(sys.stdin.readline())
    try:
        connect(order.address)
        _kept, runs = start(order, where)
        watch(runs)
    except PlacementError as error:
        print(json.dumps({"failed": str(error)}), file=answers)
    except ray.exceptions.RayError as error:
        print(json.dumps({"failed": f"the draft's actor failed: {error}"}), file=answers)
    # Ends actor and placement group with this process' job, and a local cluster.
    ray.shutdown()


if __name__ == "__main__":
    main()
