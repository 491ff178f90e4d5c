"""Layer-parallel drafting: what is computed, by whom, and what it costs in messages."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch

from tests.drafting.test_drafting import VOCAB, executor, save_draft
from tests.model_configs import target
from vllm_specplus.config import parse
from vllm_specplus.drafting import placement, ray_owners
from vllm_specplus.drafting.cache import PAGE
from vllm_specplus.drafting.easyspec import LayerParallelExecutor, layer_groups, layers_of
from vllm_specplus.drafting.executor import DraftExecutor
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.shards import Group, Plan, RemoteAttentions, messages

LAYERS = 8


@pytest.fixture(scope="module")
def draft(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("deep"), layers=LAYERS)


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one order, in every process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def local(folder: str, group_size: int) -> LayerParallelExecutor:
    model = DraftModel(folder, torch.device("cpu"), torch.float32)
    return LayerParallelExecutor(model, 2000, 12, group_size)


def rounds(run: DraftExecutor) -> list[torch.Tensor]:
    """Logits of two rounds over three texts, two levels each."""
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (3, 20, 50)]
    out = []
    for _ in range(2):
        names = ["a", "b", "c"]
        assert all(run.room(name, len(text)) for name, text in zip(names, texts, strict=True))
        out.append(run.begin(names, texts))
        first = torch.from_numpy(rng.integers(0, VOCAB, (3, 2)))
        out.append(run.grow(torch.arange(3), first, torch.full((3, 2), -1)))
        second = torch.from_numpy(rng.integers(0, VOCAB, (3, 2)))
        out.append(run.grow(torch.arange(3), second, torch.tensor([[0, 1]] * 3)))
        texts = [np.append(t, rng.integers(0, VOCAB, 3)).astype(np.int32) for t in texts]
    return out


def test_groups():
    assert [list(g) for g in layer_groups(8, 4)] == [[0], [1, 2, 3, 4], [5, 6], [7]]
    assert [list(g) for g in layer_groups(3, 1)] == [[0], [1], [2]]
    assert [list(g) for g in layer_groups(1, 4)] == [[0]]
    assert len(layer_groups(32, 4)) == 10  # 8 groups of the paper's Llama-3-8B, and two layers


def test_fuzzy_is_the_sum_and_exact_the_product():
    """The check of the algorithm card: A_j = 0.1 h and no MLPs give 1.4, not 1.1^4."""

    class Model:
        def embed(self, tokens):
            return torch.ones(1, 1, dtype=torch.float64)

        def mlp(self, layer, hidden):
            return 0 * hidden

    class Attentions:
        def begin(self, *_):
            pass

        def one_layer(self, layer, hidden):
            return (0.1 if 0 < layer < 5 else 0.0) * hidden

        def layer_group(self, layers, hidden):
            return [self.one_layer(layer, hidden) for layer in layers]

    run = LayerParallelExecutor.__new__(LayerParallelExecutor)
    run.model, run.attentions, run._groups = Model(), Attentions(), layer_groups(6, 4)
    for exact, expected in ((False, 1.4), (True, 1.4641)):
        out = run._forward(None, None, exact)
        assert float(out) == pytest.approx(expected)


def test_groups_of_one_are_the_plain_draft(draft):
    for fuzzy, plain in zip(rounds(local(draft, 1)), rounds(executor(draft)), strict=True):
        assert torch.equal(fuzzy, plain)


def test_text_is_exact_and_nodes_are_not(draft):
    """The first passes of both rounds are exact although fuzzy nodes came between."""
    fuzzy, plain = rounds(local(draft, 3)), rounds(executor(draft))
    for i, (a, b) in enumerate(zip(fuzzy, plain, strict=True)):
        assert torch.equal(a, b) == (i % 3 == 0)


def test_after_calibration_the_cache_is_that_of_a_fresh_reading(draft):
    run, fresh = local(draft, 3), executor(draft)
    text = np.arange(40, dtype=np.int32)
    for end in (30, 33, 34):
        run.room("r", end)
        run.begin(["r"], [text[:end]])
        run.grow(torch.tensor([0]), torch.tensor([[5, 6]]), torch.tensor([[-1, -1]]))
        run.grow(torch.tensor([0]), torch.tensor([[7, 8]]), torch.tensor([[0, 1]]))
    fresh.room("r", 34)
    fresh.begin(["r"], [text[:34]])
    places = np.arange(34)
    for layer in range(LAYERS):
        both = []
        for cache in (run.cache, fresh.cache):
            slots = cache.table(["r"])[0][places // PAGE].astype(np.int64) * PAGE + places % PAGE
            both.append(cache.read(layer, torch.from_numpy(slots)))
        for mine, theirs in zip(*both, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def start_owners(plan: Plan, port: int) -> list[subprocess.Popen]:
    code = (
        "import sys, torch; from datetime import timedelta;"
        "from vllm_specplus.drafting.shards import Plan, serve;"
        "torch.set_num_threads(1);"
        f"plan = Plan({plan.folder!r}, 'float32', {plan.pages}, {plan.group_size}, {plan.shards});"
        f"serve(plan, int(sys.argv[1]), '127.0.0.1', {port}, torch.device('cpu'),"
        " timedelta(seconds=60))"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], env=environment,
                         stderr=subprocess.PIPE)
        for rank in range(1, plan.shards)
    ]  # fmt: skip


@pytest.fixture(params=[2, 3])
def shared(draft, request):
    """(executor over that many processes, its group, the owners)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = local(draft, 3)
    plan = Plan(draft, "float32", run.cache.pages, 3, request.param)
    owners = start_owners(plan, port)
    cpu = torch.device("cpu")
    group = Group(0, plan.shards, "127.0.0.1", port, cpu, timedelta(seconds=60))
    run.attentions = RemoteAttentions(run.model, run.cache, plan, group)
    yield run, group, owners
    for owner in owners:
        owner.kill()
        owner.wait()


@pytest.mark.slow
def test_several_processes_equal_one_bit_for_bit(draft, shared):
    run, group, _ = shared
    for theirs, mine in zip(rounds(run), rounds(local(draft, 3)), strict=True):
        assert torch.equal(theirs, mine)
    # Two rounds: all that is new in one pass, and two levels.
    expected = Counter()
    for kind, passes in (("exact", 2), ("fuzzy", 4)):
        for name, count in messages(LAYERS, 3, group.size)[kind].items():
            expected[name] += passes * count
    assert group.counts == expected


@pytest.mark.slow
def test_a_lost_owner_is_an_error_soon(shared):
    run, _, owners = shared
    rounds(run)
    owners[-1].kill()
    owners[-1].wait()
    run.room("d", 5)
    with pytest.raises(RuntimeError):
        run.begin(["d"], [np.arange(5, dtype=np.int32)])


@pytest.mark.slow
def test_a_lost_home_ends_the_owners(shared):
    run, group, owners = shared
    rounds(run)
    run.attentions = None
    del group._group, group._hosts
    assert all(owner.wait(30) != 0 for owner in owners)


def held_by(model: DraftModel) -> int:
    """Numbers in the layers, the embedding, the output layer and the last norm."""
    parts = [part for each in model.layers for part in (each.attention, each.mlp, *each.placed)]
    parts += [model._embed, model._norm]
    count = sum(p.numel() for part in parts if part is not None for p in part.parameters())
    return count if model._head is None else count + model._head.numel()


def test_weights_are_divided(draft):
    held = [layers_of(shard, LAYERS, 3, 2) for shard in range(2)]
    assert held == [[0, 1, 3, 4, 6, 7], [2, 5]]
    model = DraftModel(draft, torch.device("cpu"), torch.float32)
    whole = held_by(model)
    model.keep_attention(held[1], mlps=False)
    attention = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 64)
    assert held_by(model) == attention + 64  # and a norm
    assert whole > 10 * attention


def test_messages_of_the_papers_model():
    """Llama-3-8B on 4 devices: 16 collectives for the hidden states of a fuzzy pass, and 22
    layers elsewhere; a tensor-parallel pass takes 64 all-reduces."""
    counted = messages(32, 4, 4)
    assert counted["fuzzy"] == Counter(broadcast=2 + 8, gather=8)
    assert counted["exact"] == Counter(broadcast=2, copy=2 * 22)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"shards": 5}, "'shards' \\(5\\) is more than 'group_size' \\(4\\)"),
        ({"ray_address": "here:1"}, "'ray_address' is for 'shards' > 1"),
        ({"share_target": True}, "'share_target' is for 'shards' > 1"),
    ],
)
def test_mistakes_are_named(draft, keys, says):
    with pytest.raises(ValueError, match=says):
        parse({"method": "easyspec", "model": draft, **keys})


def test_sharing_the_targets_devices_needs_as_many(draft):
    config = parse({"method": "easyspec", "model": draft, "shards": 2, "share_target": True})
    fits = {"vocab_size": VOCAB, "tensor_parallel_size": 2}
    config.check_target(target(**fits))
    with pytest.raises(ValueError, match="is more than tensor_parallel_size \\(1\\)"):
        config.check_target(target(**fits | {"tensor_parallel_size": 1}))


def test_owners_that_share_see_the_other_ranks_gpus(draft, monkeypatch):
    """vLLM's rank n runs on the n-th GPU its process sees."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    others = placement._other_devices
    assert others(torch.device("cuda:0"), 2) == ["5", "6"]
    assert others(torch.device("cuda:1"), 1) == ["4"]
    with pytest.raises(placement.PlacementError, match=r"3 more GPUs .* which has 2"):
        others(torch.device("cuda:0"), 3)
    order = ray_owners.Order(Plan(draft, "float32", 4, 4, 3), "GPU", None, 1.0, ["5", "6"])
    assert ray_owners.Order.load(order.dump()) == order
    seen = [ray_owners.environment(order, owner)["CUDA_VISIBLE_DEVICES"] for owner in range(2)]
    assert seen == ["5", "6"]
    assert "CUDA_VISIBLE_DEVICES" not in ray_owners.environment(replace(order, shared=None), 0)


def test_a_cluster_of_its_own_leaves_the_targets_gpus_out(draft, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6")
    own = ray_owners.Order(Plan(draft, "float32", 4, 4, 3), "GPU", None, 1.0)
    assert placement._environment(own)["CUDA_VISIBLE_DEVICES"] == "5,6"
    monkeypatch.setattr(placement.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(placement.dist, "get_world_size", lambda: 3)
    assert placement._environment(own)["CUDA_VISIBLE_DEVICES"] == ""
    for other in ({"address": "head:6379"}, {"shared": ["5", "6"]}, {"resource": "CPU"}):
        assert placement._environment(replace(own, **other))["CUDA_VISIBLE_DEVICES"] == "4,5,6"


def test_owners_on_the_targets_gpus_are_one_clear_error(monkeypatch):
    """Of the three GPUs this process sees, the target's two ranks have the first ones."""
    monkeypatch.setattr(placement.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(placement.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(placement, "gpu_id", lambda number: f"gpu-{number}")
    placement._check_apart(["gpu-2", "gpu-7"])
    with pytest.raises(placement.PlacementError, match=r"\(gpu-1\): .*CUDA_VISIBLE_DEVICES"):
        placement._check_apart(["gpu-1", "gpu-2"])


def test_a_page_holds_what_the_plan_says(draft):
    """Home and owners agree on slots only if their pages do."""
    assert local(draft, 3).cache.pages == 1 + -(-2000 // PAGE)


@pytest.mark.slow
def test_too_few_bundles_are_one_clear_error(draft, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(placement, "RESERVE_SECONDS", 2)
    for name, value in {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}.items():
        monkeypatch.setenv(name, value)
    plan = Plan(draft, "float32", 4, 500, 500)
    with pytest.raises(placement.PlacementError, match="asks for 499 free CPUs on one node"):
        placement.Placement(plan, torch.device("cpu"), None)
    import ray

    assert not ray.is_initialized()
