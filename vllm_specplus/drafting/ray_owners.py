"""``python -m vllm_specplus.drafting.ray_owners ORDER``: the process that talks to Ray.

Ray ends a process whose cluster is lost, and stopping a cluster's head must not end an
engine. So this process joins the cluster in the engine's place: it reserves the devices (one
placement group, STRICT_PACK: all on one node, the engine's if it has them), starts an actor on
each, and waits for the end of one. Owners that share the target's devices reserve nothing, since
Ray has given those away: they are bound to this node.

ORDER is the JSON of an :class:`Order`. The process answers with JSON lines on standard output::

    {"note": "one sentence"}     what it waits for, or what the user should know
    {"placed": {"host": ..., "pids": [...], "gpus": [...], "nodes": [...]}}
                                 owners wait for home; addresses of nodes
    {"failed": "one sentence"}   now or later; then it ends

and ends, with everything it started, when its standard input does. An owner that does not end when
Ray asks it to, because it is stopped or hangs, is killed.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from vllm_specplus.drafting.group import Group, join_store
from vllm_specplus.drafting.hub import model_folder
from vllm_specplus.drafting.memory import check_fits, check_same
from vllm_specplus.drafting.model import DraftModel, DraftModelError
from vllm_specplus.drafting.shards import Plan, Shard

if TYPE_CHECKING:
    from ray.util.placement_group import PlacementGroup

#: For owners to load their weights and connect.
CONNECT_SECONDS = 120
#: Between two notes while a cluster looks for devices.
NOTE_SECONDS = 10
#: For Ray to end an owner or a placement group.
END_SECONDS = 5


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
    port: int
    """Of the store in which home and owners meet, on this host."""
    reserve_seconds: int
    """How long the cluster may take to find the devices, or to start nodes that have them."""
    shared: list[str] | None = None
    """Names, for ``CUDA_VISIBLE_DEVICES``, of this node's GPUs that owners share with the target
    ("" on the CPU), one for each; None: Ray finds devices for them."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables that owners have unless their node sets them (``forwarded``)."""

    def dump(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str) -> Order:
        fields = json.loads(text)
        return cls(**fields | {"plan": Plan(**fields["plan"])})


class Owner:
    """A Ray actor: one shard."""

    def __init__(self, environment: dict[str, str]):
        """``environment``: variables that are set unless the node has them."""
        for name, value in environment.items():
            os.environ.setdefault(name, value)

    def where(self) -> dict[str, Any]:
        """This process' id and start, its GPU's id ("" on a CPU), and its node."""
        import psutil
        import ray
        import torch

        return {
            "pid": os.getpid(),
            "started": psutil.Process().create_time(),
            "gpu": gpu_id(0) if torch.cuda.is_available() else "",
            "node": ray.get_runtime_context().get_node_id(),
            "host": ray.util.get_node_ip_address(),
        }

    def run(self, plan: Plan, rank: int, host: str, port: int) -> None:
        """Serve until home stops, is gone or keeps the draft for itself."""
        import ray
        import torch

        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        if device.type == "cpu":
            torch.set_num_threads(1)
        here, dtype = ray.util.get_node_ip_address(), getattr(torch, plan.dtype)
        folder = model_folder(plan.model, "draft model")
        check_same(folder, plan.fingerprint, here)
        check_fits(folder, dtype, device, 0)
        whole = DraftModel(folder, device, dtype, plan.head_tokens)
        connect = timedelta(seconds=CONNECT_SECONDS)
        # Last, when nothing slow is left: home does not wait long within a step.
        store = join_store(host, port, connect)
        group = Group(rank, plan.shards, store, device, connect, here)
        record = None
        if plan.graphs and device.type == "cuda":
            from vllm_specplus.drafting.graphs import CudaRecorder

            record = CudaRecorder()
        shard = Shard(plan, whole, group, record)
        del whole  # let go when the shard has its share
        shard.serve()


def gpu_id(number: int) -> str:
    """What all processes call this process' ``number``-th GPU."""
    import torch

    return str(torch.cuda.get_device_properties(number).uuid)


class Owners:
    """The owners of one order, from their placement to their end."""

    def __init__(self, order: Order, say: Any):
        """``say(key, what)`` answers home."""
        self._order, self._say = order, say
        self._bundles: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._places: list[dict[str, Any]] = []

    def start(self) -> list:
        """Place them and tell home; what they run. PlacementError if that is impossible."""
        import ray

        order, actor = self._order, ray.remote(Owner)
        self._actors = [
            actor.options(
                max_concurrency=2, max_restarts=0,
                runtime_env={"env_vars": variables(order, owner)}, **options,
            ).remote(order.environment)
            for owner, options in enumerate(self._placements())
        ]  # fmt: skip
        asked = [each.where.remote() for each in self._actors]
        self._places = ray.get(asked, timeout=CONNECT_SECONDS)
        self._check_places()
        host = ray.util.get_node_ip_address()
        told = {"host": host, "pids": [each["pid"] for each in self._places],
                "gpus": [each["gpu"] for each in self._places],
                "nodes": [each["host"] for each in self._places]}  # fmt: skip
        runs = [
            each.run.remote(order.plan, rank, host, order.port)
            for rank, each in enumerate(self._actors, start=1)
        ]
        self._say("placed", told)
        return runs

    def _placements(self) -> list[dict[str, Any]]:
        """Ray's options of each owner: where it runs, and on what."""
        import ray
        from ray.util.scheduling_strategies import (
            NodeAffinitySchedulingStrategy,
            PlacementGroupSchedulingStrategy,
        )

        order = self._order
        if order.shared is None:
            self._reserve()
            return [
                {"num_cpus": 0, f"num_{order.resource.lower()}s": 1,
                 "scheduling_strategy": PlacementGroupSchedulingStrategy(
                     self._bundles, placement_group_bundle_index=bundle
                 )}
                for bundle in range(order.plan.shards - 1)
            ]  # fmt: skip
        here = ray.get_runtime_context().get_node_id()
        bound = NodeAffinitySchedulingStrategy(here, soft=False)
        return [{"num_cpus": 0, "scheduling_strategy": bound}] * len(order.shared)

    def _reserve(self) -> None:
        """Get the devices, near the target if its node has them."""
        import ray
        from ray.util.placement_group import placement_group

        order, count = self._order, self._order.plan.shards - 1
        self._bundles = placement_group(
            [{order.resource: 1}] * count, strategy="STRICT_PACK",
            _soft_target_node_id=ray.get_runtime_context().get_node_id(),
        )  # fmt: skip
        asked = f"{count} free {order.resource}s on one node of the Ray cluster"
        waited = 0
        while True:
            # Ray takes whole seconds.
            now = min(NOTE_SECONDS, order.reserve_seconds - waited)
            if self._bundles.wait(now):
                return
            waited += now
            there = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            if waited >= order.reserve_seconds:
                raise PlacementError(
                    f"easyspec asks for {asked}, which has {there or 'none'} left after "
                    f"{waited} s: lower 'shards', free some, or raise 'placement_timeout_s' where "
                    f"the cluster starts nodes by itself"
                )
            self._say("note", f"waits for {asked}, {waited} s so far: it has {there or 'none'}")

    def _check_places(self) -> None:
        """What Ray has made of the order."""
        import ray

        nodes = {each["node"] for each in self._places}
        if len(nodes) > 1:
            raise PlacementError("Ray has put the owners of the draft on several nodes")
        gpus = [each["gpu"] for each in self._places if each["gpu"]]
        if len(set(gpus)) < len(gpus):
            raise PlacementError("Ray has put several owners of the draft on one GPU")
        if self._order.resource == "GPU" and len(gpus) < len(self._places):
            raise PlacementError("Ray has put an owner of the draft where torch sees no GPU")
        if nodes and nodes != {ray.get_runtime_context().get_node_id()}:
            self._say(
                "note",
                f"the owners of the draft are on node {self._places[0]['host']}, not on the "
                f"target's: its devices are taken, and a pass' messages go through the network",
            )

    def end(self) -> None:
        """Leave nothing behind, also of an owner that hangs and of a cluster that is gone."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for each in self._actors:
            with suppress(Exception):  # the cluster may be gone
                ray.kill(each)
        self._kill_processes()
        if self._bundles is not None:
            with suppress(Exception):
                remove_placement_group(self._bundles)

    def _kill_processes(self) -> None:
        import ray

        with suppress(Exception):
            here = ray.get_runtime_context().get_node_id()
            others = [each for each in self._places if each["node"] != here]
            ray.get([_kill_there(each) for each in others], timeout=END_SECONDS)
        for each in self._places:
            kill(each["pid"], each["started"])  # elsewhere a process of this id started otherwise


def _kill_there(place: dict[str, Any]) -> Any:
    """End an owner's process by a task on its node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    bound = NodeAffinitySchedulingStrategy(place["node"], soft=False)
    task = ray.remote(kill).options(num_cpus=0, max_retries=0, scheduling_strategy=bound)
    return task.remote(place["pid"], place["started"])


def kill(pid: int, started: float) -> None:
    """End the process of this id, if it is the one that ``started`` then."""
    import psutil

    with suppress(psutil.Error, ProcessLookupError):
        if abs(psutil.Process(pid).create_time() - started) < 0.5:
            os.kill(pid, signal.SIGKILL)


def connect(address: str | None) -> None:
    """Join the cluster at ``address``, or start a local one."""
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


#: Of the serving shell's variables, those that owners need as the engine does: what vLLM copies to
#: its own Ray workers, of communication and model files, with what the user adds for these.
PREFIXES = ("NCCL_", "TORCH_NCCL_", "GLOO_", "UCX_", "HF_", "HUGGING_FACE_", "TRANSFORMERS_")
MORE_PREFIXES, MORE_NAMES = (
    "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY", "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY",
)  # fmt: skip


def forwarded(environment: dict[str, str], kept_back: set[str]) -> dict[str, str]:
    """Variables of ``environment`` that owners get, unless their node sets them; ``kept_back``:
    names that are no other node's."""

    def listed(name: str) -> tuple[str, ...]:
        return tuple(filter(None, (each.strip() for each in environment.get(name, "").split(","))))

    prefixes, names = PREFIXES + listed(MORE_PREFIXES), listed(MORE_NAMES)
    return {
        name: value
        for name, value in environment.items()
        if (name.startswith(prefixes) or name in names) and name not in kept_back
    }


def variables(order: Order, owner: int) -> dict[str, str]:
    """Variables that the process of the ``owner``-th owner has in any case."""
    fixed = {"OMP_NUM_THREADS": "1"}
    if order.shared is not None and order.resource == "GPU":
        # It sees that GPU, though Ray has given it none.
        fixed |= {
            "CUDA_VISIBLE_DEVICES": order.shared[owner],
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        }
    return fixed


def sentence(error: Exception) -> str:
    """What ended an owner, without the traceback that Ray makes of it."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, DraftModelError):
        return str(cause)
    lines = [line.strip() for line in str(cause or error).splitlines() if line.strip()]
    return f"an owner of the draft failed: {lines[-1] if lines else type(error).__name__}"


def watch(runs: list) -> None:
    """Return when home is gone; raise what ended an owner."""
    import ray

    first: queue.SimpleQueue[str] = queue.SimpleQueue()

    def listen() -> None:
        while sys.stdin.buffer.raw.read(1024):  # type: ignore[attr-defined]
            pass
        first.put("home")

    def wait() -> None:
        ray.wait(runs, num_returns=1)
        first.put("owner")

    for target in (listen, wait):
        threading.Thread(target=target, daemon=True).start()
    if first.get() == "home":
        return
    ended, _ = ray.wait(runs, num_returns=1, timeout=0)
    ray.get(ended)
    # Without an error they end when home keeps the draft for itself, which then stops this process.
    while first.get() != "home":
        pass


def main() -> None:
    # What Ray and torch print goes to standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    import ray

    def say(key: str, what: Any) -> None:
        print(json.dumps({key: what}), file=answers)

    order = Order.load(sys.argv[1])
    owners = Owners(order, say)
    try:
        connect(order.address)
        watch(owners.start())
    except PlacementError as error:
        say("failed", str(error))
    except ray.exceptions.RayError as error:
        say("failed", sentence(error))
    finally:
        owners.end()
    # Ends this process' job, and a local cluster.
    ray.shutdown()


if __name__ == "__main__":
    main()
