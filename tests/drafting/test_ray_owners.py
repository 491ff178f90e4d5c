"""Owners of a draft, apart from any cluster: what they are told, where they are, how they end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import torch

from tests.drafting.sharded import plan_of
from tests.drafting.test_drafting import save_draft
from vllm_specplus.drafting import memory, placement, ray_owners
from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.drafting.placement import PlacementError
from vllm_specplus.target import TargetDevice

HERE = socket.gethostname()


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("draft"))


@pytest.fixture
def order(draft) -> ray_owners.Order:
    plan = plan_of(draft, "attentions", 3)
    return ray_owners.Order(plan, "GPU", None, 1234, 1, ["5", "6"], {"NCCL_DEBUG": "WARN"})


def targets(*names: str, host: str = HERE) -> list[TargetDevice]:
    return [TargetDevice(host, name, f"uuid {name}") for name in names]


def test_an_order_arrives_as_it_was(order):
    assert ray_owners.Order.load(order.dump()) == order


def test_owners_that_share_see_the_other_ranks_gpus(order):
    """Wherever vLLM has put these: on 4 to 6 of a node, or by their ids."""
    shared = placement._shared_devices
    assert shared(targets("4", "5", "6"), 2) == ["5", "6"]
    assert shared(targets("GPU-a", "GPU-b"), 1) == ["GPU-b"]
    with pytest.raises(PlacementError, match=r"needs 2 more devices .* which has 1: lower"):
        shared(targets("4", "5") + targets("0", host="elsewhere"), 2)
    seen = [ray_owners.variables(order, owner)["CUDA_VISIBLE_DEVICES"] for owner in range(2)]
    assert seen == ["5", "6"]
    assert "CUDA_VISIBLE_DEVICES" not in ray_owners.variables(replace(order, shared=None), 0)


def test_a_cluster_of_its_own_leaves_the_targets_gpus_out(order, monkeypatch):
    own = replace(order, shared=None)

    def visible(to: ray_owners.Order, *ranks: str) -> str:
        return placement._environment(to, targets(*ranks))["CUDA_VISIBLE_DEVICES"]

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    assert visible(own, "4") == "5,6"
    assert visible(own, "5", "6") == "4"
    assert visible(own, "4", "5", "6") == ""
    for other in ({"address": "head:6379"}, {"shared": ["5", "6"]}, {"resource": "CPU"}):
        assert visible(replace(own, **other), "4") == "4,5,6"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert visible(own, "4", "5", "6", "7") == "0,1,2,3"


def test_owners_on_the_targets_gpus_are_one_clear_error():
    """Others are legitimate, wherever the target is."""
    ranks = targets("4", "5")
    placement.check_apart(["uuid 0", "uuid 1"], ranks)
    placement.check_apart(["", ""], [TargetDevice(HERE, "", "")])
    with pytest.raises(PlacementError, match=r"\(uuid 5\): .*CUDA_VISIBLE_DEVICES"):
        placement.check_apart(["uuid 0", "uuid 5"], ranks)


class Said(list):
    def __call__(self, key, what):
        self.append((key, what))


def owners_at(order, places: list[tuple[str, str]], monkeypatch, home: str = "n1"):
    """Owners that Ray has put on (node, GPU)."""
    ray = pytest.importorskip("ray")

    class Context:
        def get_node_id(self):
            return home

    monkeypatch.setattr(ray, "get_runtime_context", Context)
    owners = ray_owners.Owners(order, Said())
    owners._places = [{"node": node, "gpu": gpu, "host": f"{node}.ip"} for node, gpu in places]
    owners._check_places()
    return owners._say


def test_what_ray_has_placed_is_checked(order, monkeypatch):
    assert owners_at(order, [("n1", "a"), ("n1", "b")], monkeypatch) == []
    ((key, note),) = owners_at(order, [("n2", "a"), ("n2", "b")], monkeypatch)
    assert key == "note"
    assert "are on node n2.ip, not on the target's" in note
    for places, says in (
        ([("n1", "a"), ("n2", "b")], "on several nodes"),
        ([("n1", "a"), ("n1", "a")], "on one GPU"),
        ([("n1", "a"), ("n1", "")], "sees no GPU"),
    ):
        with pytest.raises(PlacementError, match=says):
            owners_at(order, places, monkeypatch)


def test_variables_of_the_serving_shell_are_forwarded():
    shell = {
        "NCCL_SOCKET_IFNAME": "eth1", "GLOO_SOCKET_IFNAME": "eth1", "HF_HOME": "/models",
        "HF_TOKEN": "secret", "PATH": "/bin", "MINE": "1", "OURS_A": "2",
        "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY": "OURS_, ",
        "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": "MINE",
    }  # fmt: skip
    got = ray_owners.forwarded(shell, {"HF_TOKEN"})
    assert set(got) == {"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME", "HF_HOME", "MINE", "OURS_A"}


def test_a_node_keeps_its_own_variables(monkeypatch):
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    monkeypatch.delenv("NCCL_DEBUG", raising=False)
    ray_owners.Owner({"NCCL_SOCKET_IFNAME": "eth1", "NCCL_DEBUG": "WARN"})
    assert (os.environ["NCCL_SOCKET_IFNAME"], os.environ["NCCL_DEBUG"]) == ("ib0", "WARN")
    monkeypatch.delenv("NCCL_DEBUG")


def test_what_a_user_keeps_from_rays_workers_is_kept_from_owners(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_CONFIG_ROOT", str(tmp_path))
    assert placement._kept_back() == set()
    (tmp_path / "ray_non_carry_over_env_vars.json").write_text(json.dumps(["HF_TOKEN"]))
    assert placement._kept_back() == {"HF_TOKEN"}


def test_a_process_is_ended_only_if_it_is_the_one():
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    started = psutil.Process(sleeper.pid).create_time()
    ray_owners.kill(sleeper.pid, started - 60)
    assert sleeper.poll() is None
    ray_owners.kill(sleeper.pid, started)
    assert sleeper.wait(30) < 0
    ray_owners.kill(sleeper.pid, started)  # gone already


def test_faults_of_owners_are_one_sentence():
    class Told(Exception):
        cause = DraftModelError("draft model 'x' is another one on node 10.0.0.2")

    assert ray_owners.sentence(Told("ray::Owner.run()\n  File ...")) == str(Told.cause)
    trace = RuntimeError("ray::Owner.run() (pid=1)\n  File 'x'\nRuntimeError: no memory\n")
    assert ray_owners.sentence(trace) == "an owner of the draft failed: RuntimeError: no memory"


# -- the draft on other nodes ------------------------------------------------------------------


def test_another_draft_on_a_node_is_refused(tmp_path, draft):
    known = memory.fingerprint(draft)
    memory.check_same(draft, known, "10.0.0.2")
    for keys in ({"layers": 3}, {"rms_norm_eps": 1e-3}):
        other = save_draft(tmp_path / str(keys), **keys)
        with pytest.raises(DraftModelError, match=r"another one on node 10\.0\.0\.2"):
            memory.check_same(other, known, "10.0.0.2")
    with pytest.raises(DraftModelError, match=r"cannot be read on node 10\.0\.0\.2"):
        memory.check_same(str(tmp_path / "nothing"), known, "10.0.0.2")


def test_a_draft_larger_than_memory_is_refused_before_it_is_loaded(draft, monkeypatch):
    cpu = torch.device("cpu")
    memory.check_fits(draft, torch.float32, cpu, 1 << 20)
    with pytest.raises(DraftModelError, match=r"takes 1000000\.\d GB .* and cpu has"):
        memory.check_fits(draft, torch.float32, cpu, 10**15)
    monkeypatch.setattr(memory, "_free", lambda device: 10_000)
    with pytest.raises(DraftModelError, match="use a smaller draft"):
        memory.check_fits(draft, torch.bfloat16, cpu, 0)
