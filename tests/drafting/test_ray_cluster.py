"""Owners of a draft on a Ray cluster of two nodes, which are processes of this machine.

The target's node is the head, to which drivers of this machine connect.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from tests.drafting.sharded import SLOTS, model_of, plan_of
from tests.drafting.test_drafting import save_draft
from tests.drafting.test_easyspec import local, rounds
from vllm_specplus.drafting.placement import Placement
from vllm_specplus.drafting.ray_owners import PlacementError
from vllm_specplus.drafting.shards import Shard, rejoin

pytest.importorskip("ray")
pytestmark = pytest.mark.full(
    "vllm_specplus/drafting/division.py", "vllm_specplus/drafting/easyspec.py",
    "vllm_specplus/drafting/group.py", "vllm_specplus/drafting/placement.py",
    "vllm_specplus/drafting/ray_owners.py", "vllm_specplus/drafting/shards.py",
    "tests/drafting/sharded.py",
)  # fmt: skip

CPU, ROOT = torch.device("cpu"), Path(__file__).parents[2]
ENV = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
#: Placement groups of a cluster that are not removed, told by a driver of its own.
GROUPS = """
import json, sys, ray
from ray.util import placement_group_table
ray.init(sys.argv[1], log_to_driver=False, logging_level="ERROR")
states = [each["state"] for each in placement_group_table().values()]
print(json.dumps([state for state in states if state != "REMOVED"]))
"""


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("deep"), layers=6)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cluster(monkeypatch) -> Iterator:
    """Ray's own, with a head that has no CPU to give away."""
    for name, value in (ENV | {"PYTHONPATH": str(ROOT)}).items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False},
        shutdown_at_exit=True,
    )
    yield made
    for node in made.list_all_nodes():
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


def place(draft: str, cluster, placement: str = "attentions_and_mlps", **keys) -> Placement:
    plan = plan_of(draft, placement, 3)
    return Placement(plan, CPU, cluster.address, targets=[], **keys)


def run_of(placed: Placement):
    plan = placed.plan
    return Shard(plan, model_of(plan.model), placed.group, None).place(plan.placement, SLOTS)


def check_rounds(draft: str, run) -> None:
    """They are those of one process."""
    for theirs, mine in zip(rounds(run), rounds(local(draft, 3)), strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-4)


def await_end(pids: list[int]) -> None:
    deadline = time.monotonic() + 60
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "owners were left behind"
        time.sleep(0.2)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def groups_left(cluster) -> list[str]:
    command = [sys.executable, "-c", GROUPS, cluster.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_owners_on_the_second_node_compute_the_same(draft, cluster, caplog):
    """The target's has no devices left, which is said; afterwards nothing is left."""
    cluster.add_node(num_cpus=2)
    with caplog.at_level(logging.INFO, "vllm.specplus"):
        placed = place(draft, cluster)
    assert "not on the target's" in caplog.text
    try:
        check_rounds(draft, run_of(placed))
    finally:
        placed.close()
    await_end(placed.pids())
    assert groups_left(cluster) == []


def test_owners_are_near_the_target_where_both_nodes_have_devices(draft, monkeypatch, caplog):
    for name, value in (ENV | {"PYTHONPATH": str(ROOT)}).items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        made.add_node(num_cpus=4)  # emptier, which Ray would prefer
        with caplog.at_level(logging.INFO, "vllm.specplus"):
            placed = place(draft, made)
        placed.close()
        assert "not on the target's" not in caplog.text
    finally:
        for node in made.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


def test_a_lost_node_is_an_error_and_another_takes_its_place(draft, cluster):
    node = cluster.add_node(num_cpus=2)
    placed = place(draft, cluster, reserve_seconds=3)
    try:
        run = run_of(placed)
        rounds(run)
        cluster.remove_node(node, allow_graceful=False)
        run.room("d", 5)
        with pytest.raises(RuntimeError):
            rounds(run)
        with pytest.raises(PlacementError, match="asks for 2 free CPUs on one node"):
            placed.restart(placed.plan)
        cluster.add_node(num_cpus=2)
        placed.restart(placed.plan)
        rejoin(run, placed.plan, placed.group)
        check_rounds(draft, run)
    finally:
        placed.close()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_or_hung_owner_leaves_nothing_behind(draft, cluster, number):
    """A stopped process answers nobody, Ray included."""
    cluster.add_node(num_cpus=2)
    placed = place(draft, cluster)
    pids = placed.pids()
    try:
        run = run_of(placed)
        rounds(run)
        os.kill(pids[0], number)
        with pytest.raises(RuntimeError):
            rounds(run)
    finally:
        placed.close()
    await_end(pids)
    assert groups_left(cluster) == []


def test_a_killed_engine_leaves_nothing_behind(draft, cluster):
    cluster.add_node(num_cpus=2)
    code = (
        "import sys, time\n"
        "from types import SimpleNamespace\n"
        "from tests.drafting.test_ray_cluster import place\n"
        "placed = place(sys.argv[1], SimpleNamespace(address=sys.argv[2]))\n"
        "print(*placed.pids(), flush=True)\n"
        "time.sleep(600)\n"
    )
    engine = subprocess.Popen(
        [sys.executable, "-c", code, draft, cluster.address], stdout=subprocess.PIPE, text=True
    )
    pids = [int(word) for word in engine.stdout.readline().split()]
    assert len(pids) == 2
    assert all(map(alive, pids))
    engine.kill()
    engine.wait()
    await_end(pids)
    # Ray notices a driver that was killed after some seconds.
    deadline = time.monotonic() + 60
    while groups_left(cluster):
        assert time.monotonic() < deadline, "a placement group was left behind"


def test_too_few_bundles_are_one_clear_error(draft, cluster):
    cluster.add_node(num_cpus=1)
    with pytest.raises(PlacementError, match=r"asks for 2 free CPUs on one node .* after 2 s"):
        place(draft, cluster, reserve_seconds=2)
    assert groups_left(cluster) == []


def test_a_node_that_the_cluster_starts_is_waited_for(draft, cluster, caplog, monkeypatch):
    """As an autoscaler does; meanwhile it is said what is waited for."""
    monkeypatch.setattr("vllm_specplus.drafting.placement.CLUSTER_SECONDS", 120)
    added = threading.Timer(15, lambda: cluster.add_node(num_cpus=2))
    added.start()
    try:
        with caplog.at_level(logging.INFO, "vllm.specplus"):
            placed = place(draft, cluster, reserve_seconds=90)
        placed.close()
        assert "waits for 2 free CPUs on one node of the Ray cluster, 10 s so far" in caplog.text
    finally:
        added.join()


def test_another_draft_on_the_other_node_is_refused(draft, cluster, tmp_path):
    """Here both nodes see one folder; what home expects is another's."""
    from dataclasses import replace

    from vllm_specplus.drafting.memory import fingerprint

    cluster.add_node(num_cpus=2)
    other = fingerprint(save_draft(tmp_path, layers=4))
    plan = replace(plan_of(draft, "attentions", 3), fingerprint=other)
    with pytest.raises(PlacementError, match=r"is another one on node .* than on the engine's"):
        Placement(plan, CPU, cluster.address, targets=[])
    assert groups_left(cluster) == []
