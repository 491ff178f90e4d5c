"""Where a draft's process runs, what is refused, and how one that Ray places is reached."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from tests.model_configs import target
from vllm_specplus import overlap, registry
from vllm_specplus.config import parse
from vllm_specplus.drafting.overlap_config import cores_of
from vllm_specplus.drafting.ray_owners import PlacementError
from vllm_specplus.overlap import process, ray_process
from vllm_specplus.overlap.home import OverlappedDraft
from vllm_specplus.overlap.ray_process import Order
from vllm_specplus.proposer import Services
from vllm_specplus.target import TargetDevice

ON_GPU = {"vocab_size": VOCAB, "device_type": "cuda"}
#: What an actor does, of which the engine knows nothing else.
CONNECTS = """
import json, socket, sys
where = json.loads(sys.stdin.readline())
for token in ("0" * 32, where["token"]):
    stream = socket.create_connection(("127.0.0.1", where["port"]))
    stream.sendall(token.encode())
    if token == where["token"]:
        stream.sendall(b"\\0\\0\\0\\2ok")
        sys.stdin.read()
"""


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("draft"))


def config_of(model: str, **keys):
    return parse({"method": "draft_tree", "model": model, "overlap": True, **keys})


def test_cores_are_named_as_taskset_does():
    assert cores_of("4-7, 9") == {4, 5, 6, 7, 9}
    for wrong in ("", "a", "1-", "-1", "1--2", "3-1", "1-99999999"):
        with pytest.raises(ValueError, match="cores"):
            cores_of(wrong)


def test_a_draft_needs_cores_of_its_own(draft):
    here = sorted(os.sched_getaffinity(0))
    with pytest.raises(ValueError, match="'overlap' needs cores that the engine does not run on"):
        config_of(draft).check_target(target(vocab_size=VOCAB))
    with pytest.raises(ValueError, match="share cores"):
        config_of(draft, draft_cores=f"{here[-1]}").check_target(target(vocab_size=VOCAB))


def test_cores_that_the_engine_leaves_are_the_drafts(draft, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2})
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    fits = target(vocab_size=VOCAB)
    config_of(draft, draft_cores="3-5").check_overlap(fits)
    config_of(draft, overlap="paper", draft_cores="4").check_overlap(fits)
    with pytest.raises(ValueError, match="names core 6, and this machine has 6"):
        config_of(draft, draft_cores="5-6").check_overlap(fits)


def test_on_gpus_ray_finds_a_device(draft, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    config_of(draft).check_overlap(target(**ON_GPU))
    with pytest.raises(ValueError, match="'draft_cores' is for engines on a CPU"):
        config_of(draft, draft_cores="3").check_overlap(target(**ON_GPU))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        config_of(draft).check_overlap(target(**ON_GPU))


def test_only_who_asks_for_it_has_another_process(draft):
    method = registry.method_class("draft_tree")
    plain = overlap.proposer(method, config_of(draft, overlap=False), Services(VOCAB))
    assert type(plain) is method
    apart = overlap.proposer(method, config_of(draft, draft_cores="3"), Services(VOCAB))
    assert isinstance(apart, OverlappedDraft)
    for name in (
        "sources",
        "levels",
        "reads_hidden",
        "hidden_layers",
        "borrows_vocabulary",
        "rule",
    ):
        assert getattr(apart, name) == getattr(plain, name)
    assert apart.held_bytes() == plain.held_bytes() > 0
    apart.forget("nobody")
    apart.close()


def test_a_gpu_of_the_targets_is_refused():
    targets = [TargetDevice("here", str(n), f"gpu-{n}") for n in range(2)]
    process.check_apart("gpu-2", targets)
    with pytest.raises(PlacementError, match=r"\(gpu-1\), where drafting and verifying would take"):
        process.check_apart("gpu-1", targets)


def placed(monkeypatch, code: str) -> process.RayProcess:
    """A process whose child runs ``code`` instead of talking to Ray."""
    popen = subprocess.Popen
    monkeypatch.setattr(
        process.subprocess, "Popen",
        lambda command, **keys: popen([sys.executable, "-c", code], **keys),
    )  # fmt: skip
    return process.RayProcess("CPU", "nowhere:1", [])


def test_who_does_not_know_the_token_is_turned_away(monkeypatch):
    """The first connection is a stranger's; it gets no channel."""
    found = placed(monkeypatch, CONNECTS)
    try:
        assert found.ended() is None
        # What follows the token is no message of ours, and closes the channel.
        with pytest.raises(ConnectionError):
            found.channel.receive(10)
    finally:
        found.close()
    assert found._process.poll() == 0


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("""print('{"failed": "no GPU is free"}')""", "no GPU is free"),
        ("import sys; sys.exit(3)", r"the process that talks to Ray ended \(3\)"),
    ],
)
def test_what_ray_cannot_do_is_told(monkeypatch, code, says):
    with pytest.raises(PlacementError, match=says):
        placed(monkeypatch, code)


class Ray(ModuleType):
    """What is used of it; ``free``: is there a device?"""

    def __init__(self, free: bool):
        super().__init__("ray")
        self.asked: list = []
        self.util = ModuleType("ray.util")
        groups, strategies = ModuleType("placement_group"), ModuleType("strategies")
        groups.placement_group = self._group
        strategies.PlacementGroupSchedulingStrategy = lambda bundle: ("on", bundle)
        self.modules = {
            "ray": self, "ray.util": self.util, "ray.util.placement_group": groups,
            "ray.util.scheduling_strategies": strategies,
        }  # fmt: skip
        self._free = free

    def _group(self, bundles):
        self.asked.append(bundles)
        return SimpleNamespace(wait=lambda seconds: self._free)

    def available_resources(self):
        return {"CPU": 3.0, "memory": 9.0}

    def remote(self, cls):
        def options(**keys):
            self.asked.append(keys)
            run = SimpleNamespace(remote=lambda *where: ("runs", *where))
            return SimpleNamespace(remote=lambda: SimpleNamespace(run=run))

        return SimpleNamespace(options=options)


def order(resource: str = "GPU") -> Order:
    return Order(resource, None, 1)


@pytest.mark.parametrize("resource", ["GPU", "CPU"])
def test_the_actor_has_a_device_of_its_own(monkeypatch, resource):
    ray = Ray(free=True)
    for name, module in ray.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    where = {"host": "h", "port": 5, "token": "t"}
    kept, runs = ray_process.start(order(resource), where)
    assert runs == [("runs", "h", 5, "t")]
    bundles, options = ray.asked
    assert bundles == [{resource: 1}]
    assert options["scheduling_strategy"] == ("on", kept[0])
    assert options[f"num_{resource.lower()}s"] == 1
    assert options["num_cpus"] == (resource == "CPU")


def test_no_free_device_is_one_clear_error(monkeypatch):
    ray = Ray(free=False)
    for name, module in ray.modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(PlacementError, match=r"a GPU that is free .* has \{'CPU': 3.0\} left"):
        ray_process.start(order(), {})


def test_the_actor_shows_its_token(monkeypatch):
    """And serves what it has connected to."""
    from vllm_specplus.overlap import loop

    served = []
    monkeypatch.setattr(loop, "serve", lambda channel, device, gpu: served.append((channel, gpu)))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ray_process.Draft().run("127.0.0.1", listener.getsockname()[1], "t" * 32)
        stream, _ = listener.accept()
        assert stream.recv(32, socket.MSG_WAITALL) == b"t" * 32
        ((channel, gpu),) = served
        assert (gpu == "") == (not torch.cuda.is_available())
        channel.close()
        stream.close()
