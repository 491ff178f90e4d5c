"""Two ranks give the text that two ranks give without drafts: every rank sees the same tree."""

from __future__ import annotations

import os
import secrets

import pytest

from tests.drafting.test_drafting import save_draft
from tests.engine import harness
from tests.engine.conftest import VOCAB
from tests.engine.test_eagle import single_layer

pytestmark = pytest.mark.engine

SPEC = {
    "method": "token_recycling", "num_speculative_tokens": 8, "control": {"policy": "fixed"}
}  # fmt: skip
ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

#: vLLM's Ray executor refuses the CPU because its platform names no Ray resource.
PLATFORM = """
from vllm.platforms.cpu import CpuPlatform


class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"
"""


@pytest.fixture(scope="module")
def engine(tiny_engine) -> dict:
    return tiny_engine | {"tensor_parallel_size": 2}


@pytest.fixture(scope="module")
def expected(tmp_path_factory, engine, mixed_requests) -> list:
    """Without drafts, on two local processes."""
    engine = engine | {"distributed_executor_backend": "mp"}
    result = harness.run(
        tmp_path_factory.mktemp("plain"), engine, [{"requests": mixed_requests}] * 2, env=ENV
    )
    return [harness.ids(result, 0), harness.ids(result, 1)]


@pytest.fixture
def ray_env(tmp_path) -> dict[str, str]:
    """A platform plugin whose devices Ray counts as GPUs, and a token for the cluster."""
    (tmp_path / "ray_cpu_plugin.py").write_text(
        'def register():\n    return "ray_cpu_platform.RayCpuPlatform"\n'
    )
    (tmp_path / "ray_cpu_platform.py").write_text(PLATFORM)
    info = tmp_path / "ray_cpu-0.0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray_cpu\nVersion: 0.0.0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.platform_plugins]\nray_cpu = ray_cpu_plugin:register\n"
    )
    return {
        "PYTHONPATH": os.pathsep.join((str(harness.ROOT), str(tmp_path))),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }


@pytest.mark.parametrize(
    "backend", ["mp", pytest.param("ray", marks=pytest.mark.full("vllm_specplus/engine/*.py"))]
)
def test_two_ranks(tmp_path, engine, mixed_requests, expected, backend, request):
    env = ENV
    if backend == "ray":
        pytest.importorskip("ray")
        env = ENV | request.getfixturevalue("ray_env")
    result = harness.run(
        tmp_path,
        engine | {"distributed_executor_backend": backend, "speculative_config": SPEC},
        [{"requests": mixed_requests}] * 2,
        env=env,
    )
    assert [harness.ids(result, 0), harness.ids(result, 1)] == expected
    counters = result["counters"]
    assert counters["nodes_accepted"] > 200
    assert counters["draft_failures"] == 0
    # Both ranks moved the same slots, and only the first counts for /metrics.
    second = result["ranks"][1]
    assert counters["kv_slots_moved"] == second["kv_slots_moved"] > 0
    assert counters["request_steps"] > second["request_steps"] == 0


@pytest.mark.full(
    "vllm_specplus/engine/clock.py",
    "vllm_specplus/engine/runner.py",
    "vllm_specplus/control/cost.py",
)
def test_two_ranks_measure_once_and_read_together(tmp_path, engine, mixed_requests, expected):
    """Measuring is collective; with the file there, no rank may wait for another to."""
    path = tmp_path / "cost.json"
    spec = {
        "method": "token_recycling",
        "control": {"policy": "goodput", "cost_file": str(path)},
    }
    two = engine | {"distributed_executor_backend": "mp", "speculative_config": spec}
    written = set()
    for _ in range(2):
        result = harness.run(tmp_path, two, [{"requests": mixed_requests}], env=ENV)
        assert harness.ids(result) == expected[0]
        counters = result["counters"]
        # How many are passed over goes by the machine's mood.
        assert counters["control_steps"] + counters["unwatched_steps"] > 50
        written.add(path.stat().st_mtime_ns)
    assert len(written) == 1


@pytest.mark.full(
    "vllm_specplus/engine/*.py", "vllm_specplus/samplers/*.py", "vllm_specplus/drafting/*.py",
    "vllm_specplus/proposers/draft_tree.py",
)  # fmt: skip
def test_two_ranks_agree_on_sampled_drafts(tmp_path, engine, mixed_requests, expected, tiny_model):
    """Rank 0 alone knows what the nodes were drawn from. With top_k = 1 the text is the
    greedy one, and goes through the rules for sampled trees."""
    requests = [[p, params | {"temperature": 1.0, "top_k": 1}] for p, params in mixed_requests]
    draft = {
        "method": "draft_tree", "model": tiny_model, "num_speculative_tokens": 6,
        "control": {"policy": "fixed"},
    }  # fmt: skip
    result = harness.run(
        tmp_path,
        engine | {"distributed_executor_backend": "mp", "speculative_config": draft},
        [{"requests": requests}, {"requests": mixed_requests}],
        env=ENV,
    )
    assert [harness.ids(result, 0), harness.ids(result, 1)] == [expected[0]] * 2
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 400


@pytest.mark.full(
    "vllm_specplus/engine/runner.py", "vllm_specplus/engine/drafter.py",
    "vllm_specplus/engine/target_vocabulary.py", "vllm_specplus/drafting/**/*.py",
    "vllm_specplus/proposers/eagle_tree.py",
)  # fmt: skip
def test_a_head_drafts_with_the_vocabulary_of_both_ranks(tmp_path, engine, mixed_requests):
    """It is nearly right if the rows of both are in their places."""
    target, head = single_layer(tmp_path, VOCAB, 0.25)
    spec = {
        "method": "eagle_tree", "model": head, "num_speculative_tokens": 12,
        "control": {"policy": "fixed"},
    }  # fmt: skip
    two = engine | {"model": target, "distributed_executor_backend": "mp"}
    batches = [{"requests": mixed_requests}] * 2
    plain = harness.run(tmp_path, two, batches, env=ENV)
    result = harness.run(tmp_path, two | {"speculative_config": spec}, batches, env=ENV)
    for batch in range(2):
        assert harness.ids(result, batch) == harness.ids(plain, batch)
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 2 * result["counters"]["request_steps"]


@pytest.mark.full(
    "vllm_specplus/engine/runner.py", "vllm_specplus/engine/drafter.py",
    "vllm_specplus/drafting/**/*.py", "vllm_specplus/proposers/easyspec.py",
)  # fmt: skip
@pytest.mark.parametrize("backend", ["mp", "ray"])
def test_a_draft_in_parallel_shares_the_devices_of_both_ranks(
    tmp_path, engine, mixed_requests, expected, backend, request
):
    """The second shard of the draft beside the target's second rank. On vLLM's Ray executor the
    shard joins the cluster that the ranks run on, whose devices are all given away."""
    pytest.importorskip("ray")
    env = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    if backend == "ray":
        env = request.getfixturevalue("ray_env")
    draft = save_draft(tmp_path / "draft", layers=6, vocab=512, context=1024)
    spec = {
        "method": "easyspec", "model": draft, "group_size": 2, "shards": 2, "share_target": True,
        "placement": "attentions_and_mlps", "shape": "chain", "num_speculative_tokens": 3,
        "control": {"policy": "fixed"},
    }  # fmt: skip
    result = harness.run(
        tmp_path,
        engine | {"distributed_executor_backend": backend, "speculative_config": spec},
        [{"requests": mixed_requests}],
        env=ENV | env,
    )
    assert harness.ids(result) == expected[0]
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_drafted"] > 1000


FIXED = {"policy": "fixed"}
SKIPPING = {"method": "layer_skip", "num_speculative_tokens": 9, "control": FIXED}
EXITING = {
    "method": "early_exit", "exit_layers": [1, 2], "num_speculative_tokens": 6, "shape": "rsd_s",
    "control": FIXED,
}  # fmt: skip
BOTH = {
    "method": "rasd", "num_speculative_tokens": 16, "control": FIXED,
    "sources": [
        "token_recycling",
        {"method": "early_exit", "exit_layers": [1, 2], "num_speculative_tokens": 6},
        {"method": "layer_skip", "num_speculative_tokens": 6},
    ],
}  # fmt: skip
on_all_ranks = pytest.mark.full(
    "vllm_specplus/engine/runner.py", "vllm_specplus/engine/drafter.py",
    "vllm_specplus/engine/ranks.py", "vllm_specplus/engine/target_layers.py",
    "vllm_specplus/drafting/**/*.py", "vllm_specplus/proposers/layer_skip.py",
    "vllm_specplus/proposers/early_exit.py", "vllm_specplus/proposers/rasd.py",
    "tests/engine/child.py",
)  # fmt: skip


@on_all_ranks
@pytest.mark.parametrize("spec", [SKIPPING, EXITING, BOTH], ids=lambda spec: spec["method"])
def test_both_ranks_draft_with_their_heads(tmp_path, engine, mixed_requests, expected, spec):
    """The first one decides; layers that are left out change, and requests are preempted."""
    two = engine | {"distributed_executor_backend": "mp", "speculative_config": spec}
    result = harness.run(tmp_path, two, [{"requests": mixed_requests}] * 2, env=ENV)
    assert [harness.ids(result, 0), harness.ids(result, 1)] == expected
    for rank in result["ranks"]:
        assert rank["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 100


@on_all_ranks
def test_faults_of_the_rank_that_drafts_cost_drafts_only(
    tmp_path, engine, mixed_requests, expected
):
    """Before a pass and within one: the other rank is let go, and both are in step again."""
    two = engine | {"distributed_executor_backend": "mp", "speculative_config": SKIPPING}
    fails = [3, 5, 6, 20]
    batches = [{"requests": mixed_requests, "fail_at": fails}, {"requests": mixed_requests}]
    result = harness.run(tmp_path, two, batches, env=ENV)
    assert [harness.ids(result, 0), harness.ids(result, 1)] == expected
    assert [rank["draft_failures"] for rank in result["ranks"]] == [len(fails), 0]
    first, both = (each["nodes_accepted"] for each in result["counted"])
    assert both > first + 50 > 100


@on_all_ranks
def test_ranks_that_came_apart_end_the_engine(tmp_path, engine, mixed_requests):
    """With an error, and soon: the other rank would wait for the one that failed."""
    two = engine | {"distributed_executor_backend": "mp", "speculative_config": SKIPPING}
    batch = {"requests": mixed_requests, "apart_at": 4}
    with pytest.raises(RuntimeError, match="engine process failed"):
        harness.run(tmp_path, two, [batch], env=ENV)
    (log,) = tmp_path.glob("out*.log")
    assert "a pass that all ranks draft in broke off on this one" in log.read_text()
