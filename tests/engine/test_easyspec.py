"""A layer-parallel draft on a real local Ray cluster, in the real engine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.drafting.test_drafting import save_draft
from tests.engine import harness

pytest.importorskip("ray")
pytestmark = pytest.mark.engine

ENV = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@pytest.fixture(scope="module")
def deep_draft(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("deep"), layers=6, vocab=512)


def spec(draft, **keys):
    base = {"method": "easyspec", "group_size": 2, "shape": "chain", "num_speculative_tokens": 3}
    return base | {"control": {"policy": "fixed"}, "model": draft, **keys}


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.full("vllm_specplus/drafting/**/*.py", "vllm_specplus/proposers/easyspec.py")
@pytest.mark.parametrize(
    ("key", "placement"),
    [
        ("kill_owner_at", "attentions"),
        ("stop_owner_at", "attentions_and_mlps"),
        ("kill_owner_at", "tensor_parallel"),
    ],
)
def test_a_lost_or_hung_owner_costs_drafts_and_nothing_else(
    tmp_path, tiny_engine, mixed_requests, plain, deep_draft, key, placement
):
    """In the middle of the second batch; built anew before the third."""
    batch = {"requests": mixed_requests}
    lost = batch | {key: 5}
    config = spec(deep_draft, shards=2, placement=placement)
    if placement == "tensor_parallel":
        del config["group_size"]
    result = harness.run(
        tmp_path,
        tiny_engine | {"speculative_config": config},
        [batch, lost, batch | {"await_rebuild": True}],
        env=ENV,
    )
    for i in range(3):
        assert harness.ids(result, i) == harness.ids(plain)
    counters = result["counters"]
    assert counters["draft_group_rebuilds"] == 1
    assert counters["draft_failures"] >= 1
    first, second = result["owners"]
    assert first != second
    assert all(gone(pid) for pid in first + second)


@pytest.mark.full("vllm_specplus/drafting/**/*.py", "vllm_specplus/proposers/easyspec.py")
def test_the_placement_is_found_at_the_start(
    tmp_path, tiny_engine, mixed_requests, plain, deep_draft
):
    """And said; whichever it is, texts are those of plain decoding."""
    result = harness.run(
        tmp_path,
        tiny_engine | {"speculative_config": spec(deep_draft, shards=2)},
        [{"requests": mixed_requests}],
        env=ENV | {"VLLM_LOGGING_LEVEL": "INFO"},
    )
    assert harness.ids(result) == harness.ids(plain)
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_drafted"] > 100
    (log,) = tmp_path.glob("out*.log")
    said = log.read_text()
    assert "the draft's placement is" in said
    for placement in ("one_device", "attentions", "attentions_and_mlps", "tensor_parallel"):
        assert f"  {placement}: 1 texts" in said


@pytest.fixture
def cluster():
    """A Ray cluster of this machine, apart from any other: its address and the process that
    runs it, whose end is the cluster's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ray = str(Path(sys.executable).parent / "ray")
    start = [ray, "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
             "--include-dashboard=false", "--node-ip-address=127.0.0.1"]  # fmt: skip
    address = f"127.0.0.1:{port}"
    # Since 2.60 Ray lets what runs go on for half a minute: it is to stop at once.
    at_once = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}
    head = subprocess.Popen(start, env=os.environ | ENV | at_once, stdout=subprocess.DEVNULL)
    status = [ray, "status", f"--address={address}"]
    deadline = time.monotonic() + 120
    while subprocess.run(status, env=os.environ | ENV, capture_output=True).returncode:
        assert head.poll() is None, "the cluster ended"
        assert time.monotonic() < deadline, "the cluster did not start"
        time.sleep(0.5)
    yield address, head.pid
    head.terminate()
    head.wait(60)


def test_a_stopped_cluster_costs_drafts_and_nothing_else(
    tmp_path, tiny_engine, mixed_requests, plain, deep_draft, cluster
):
    """Its head is stopped in the middle of the second batch and stays away."""
    batch = {"requests": mixed_requests}
    address, head = cluster
    config = spec(deep_draft, shards=2, ray_address=address, placement="attentions_and_mlps")
    result = harness.run(
        tmp_path,
        tiny_engine | {"speculative_config": config},
        [batch, batch | {"end_process": head, "end_at": 5}, batch | {"pause": 5}],
        env=ENV,
    )
    for i in range(3):
        assert harness.ids(result, i) == harness.ids(plain)
    counters = result["counters"]
    assert counters["draft_group_rebuilds"] == 0
    assert counters["draft_failures"] >= 1
    assert counters["nodes_drafted"] > 100
    assert all(gone(pid) for pid in result["owners"][0])
