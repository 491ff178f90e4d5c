"""Layer-parallel drafting: what is computed, by whom, and what it costs in messages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from datetime import timedelta

import numpy as np
import pytest
import torch

from tests.drafting.sharded import CPU, NODES, SLOTS, in_threads, model_of, plan_of
from tests.drafting.test_drafting import EXPERTS, FAMILIES, VOCAB, save_draft
from tests.drafting.test_graphs import record_on_cpu
from vllm_specplus.drafting import group as group_file
from vllm_specplus.drafting.cache import PAGE
from vllm_specplus.drafting.division import (
    check_divisible,
    divide_heads,
    divide_mlp,
    heads_of,
    layer_owner,
    layers_of,
    share_of,
)
from vllm_specplus.drafting.easyspec import (
    LayerParallelExecutor,
    Parts,
    groups_of,
    layer_groups,
)
from vllm_specplus.drafting.executor import DraftExecutor
from vllm_specplus.drafting.group import Group, open_store
from vllm_specplus.drafting.layer_parts import UnknownLayers
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.shards import Shard, messages, rejoin
from vllm_specplus.drafting.watchdog import LostPeer, Watchdog

LAYERS = 8
DIVIDED = [
    ("attentions", 2), ("attentions", 3), ("attentions_and_mlps", 2), ("attentions_and_mlps", 3),
    ("tensor_parallel", 2),
]  # fmt: skip


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


def local(folder: str, group_size: int, parts: type[Parts] = Parts) -> LayerParallelExecutor:
    model = model_of(folder)
    model.quicken()
    groups = groups_of("attentions", model.num_layers, group_size)
    return LayerParallelExecutor(parts(model, groups), SLOTS, NODES)


def plain(folder: str) -> DraftExecutor:
    model = model_of(folder)
    model.quicken()
    return DraftExecutor(model, SLOTS, NODES)


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
    return [each.clone() for each in out]


# -- the algorithm ---------------------------------------------------------------------------


def test_groups():
    assert [list(g) for g in layer_groups(8, 4)] == [[0], [1, 2, 3, 4], [5, 6], [7]]
    assert [list(g) for g in layer_groups(3, 1)] == [[0], [1], [2]]
    assert [list(g) for g in layer_groups(1, 4)] == [[0]]
    assert len(layer_groups(32, 4)) == 10  # 8 groups of the paper's Llama-3-8B, and two layers
    assert groups_of("attentions_and_mlps", 8, 4) == layer_groups(8, 4)
    assert groups_of("tensor_parallel", 8, 4) == groups_of("one_device", 8, 4) == layer_groups(8, 1)


def test_fuzzy_is_the_sum_and_exact_the_product():
    """The check of the algorithm card: A_j = 0.1 h and no MLPs give 1.4, not 1.1^4."""

    class Toy(Parts):
        def embed(self, tokens):
            return torch.ones(1, 1, dtype=torch.float64)

        def alone(self, layer, hidden, given):
            return (0.1 if 0 < layer < 5 else 0.0) * hidden

        def feed(self, layer, hidden):
            return 0 * hidden

    parts = Toy(None, layer_groups(6, 4))
    for exact, expected in ((False, 1.4), (True, 1.4641)):
        assert float(parts.layers(None, None, exact)) == pytest.approx(expected)


def test_groups_of_one_are_the_plain_draft(draft):
    for fuzzy, exact in zip(rounds(local(draft, 1)), rounds(plain(draft)), strict=True):
        assert torch.equal(fuzzy, exact)


def test_text_is_exact_and_nodes_are_not(draft):
    """The first passes of both rounds are exact although fuzzy nodes came between."""
    fuzzy, exact = rounds(local(draft, 3)), rounds(plain(draft))
    for i, (a, b) in enumerate(zip(fuzzy, exact, strict=True)):
        assert torch.equal(a, b) == (i % 3 == 0)


def test_after_calibration_the_cache_is_that_of_a_fresh_reading(draft):
    run, fresh = local(draft, 3), plain(draft)
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


# -- what is divided -------------------------------------------------------------------------

#: Of these the heads are not divided: their projections lead to several kinds of heads at once, or
#: norms go over all heads.
WHOLE_HEADS = ("olmo2", "olmo3", "olmoe", "phi3")
WITH_EXPERTS = tuple(family for family, keys in FAMILIES.items() if keys.items() >= EXPERTS.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_of_mlps_and_heads_add_up_or_are_refused(tmp_path, family):
    model = model_of(save_draft(tmp_path, family))
    for placement, shards, refused in (
        ("attentions", 3, ()),
        ("attentions_and_mlps", 3, WITH_EXPERTS),
        ("tensor_parallel", 2, WITH_EXPERTS + WHOLE_HEADS),
    ):
        if family in refused:
            with pytest.raises(UnknownLayers):
                check_divisible(model, placement, shards)
        else:
            check_divisible(model, placement, shards)


def test_a_share_that_does_not_add_up_is_refused(draft, monkeypatch):
    """As of an MLP that only looks like projections."""
    model = model_of(draft)
    monkeypatch.setattr(
        type(model.layers[3].mlp), "forward", lambda self, x: self.down_proj(self.up_proj(x)) + x
    )
    with pytest.raises(UnknownLayers, match="do not add up"):
        check_divisible(model, "attentions_and_mlps", 2)


def test_fewer_heads_than_shards_are_refused(draft):
    with pytest.raises(UnknownLayers, match="2 heads of keys, too few for 3 shards"):
        share_of(model_of(draft), "tensor_parallel", 0, 3, 4)


def test_heads_need_not_be_as_many_on_every_shard(tmp_path):
    """As of SmolLM2-135M, which has 9 heads and 3 of keys."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=144, intermediate_size=99, num_hidden_layers=4,
        num_attention_heads=9, num_key_value_heads=3, initializer_range=0.2,
        max_position_embeddings=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    folder = str(tmp_path)
    assert [list(heads_of(rank, 3, 2)) for rank in range(2)] == [[0, 1], [2]]
    plan = plan_of(folder, "tensor_parallel", 2)
    with in_threads(plan) as (home, _):
        run = home.place("tensor_parallel", SLOTS)
        assert run.model.kv_heads == 2
        for theirs, mine in zip(rounds(run), rounds(plain(folder)), strict=True):
            torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-4)


def test_a_bias_is_added_once(tmp_path):
    model = model_of(save_draft(tmp_path, "starcoder2"))
    mlp, attention = model.layers[0].mlp, model.layers[0].attention
    for linear in (mlp.c_fc, mlp.c_proj, attention.o_proj):
        torch.nn.init.normal_(linear.bias)
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        total = sum(divide_mlp(mlp, rank, 3)(rows) for rank in range(3))
        torch.testing.assert_close(total, mlp(rows), atol=1e-5, rtol=1e-5)
    biases = [divide_heads(attention, heads_of(r, 2, 2), 2).o_proj.bias for r in range(2)]
    assert [bias is None for bias in biases] == [False, True]


def numbers(model: DraftModel) -> dict[str, int]:
    """Numbers that a share holds."""
    count = {"attention": 0, "mlp": 0}
    for each in model.layers:
        for name in count:
            part = getattr(each, name)
            count[name] += sum(p.numel() for p in part.parameters()) if part is not None else 0
    count["vocabulary"] = sum(
        0 if weight is None else weight.numel()
        for weight in (model._head, model._embed and model._embed.weight)
    )
    return count


def test_weights_are_divided(draft):
    whole = model_of(draft)
    held = numbers(whole)
    shares = {
        placement: [numbers(share_of(whole, placement, rank, 2, 3)) for rank in range(2)]
        for placement in ("attentions", "attentions_and_mlps", "tensor_parallel")
    }
    for parts in shares.values():
        assert {key: sum(part[key] for part in parts) for key in held} == held
    home, owner = shares["attentions"]
    assert owner["mlp"] == owner["vocabulary"] == 0 < owner["attention"]
    assert owner["attention"] * LAYERS == 2 * held["attention"]
    home, owner = shares["attentions_and_mlps"]
    assert home["mlp"] == owner["mlp"]
    assert home["vocabulary"] == owner["vocabulary"]
    home, owner = shares["tensor_parallel"]
    assert home == owner
    assert numbers(whole) == held


def test_shares_hold_no_memory_of_the_whole(draft):
    whole = model_of(draft)
    share = share_of(whole, "attentions_and_mlps", 1, 2, 3)
    theirs = {p.untyped_storage().data_ptr() for p in whole.layers[0].mlp.parameters()}
    theirs |= {whole._head.untyped_storage().data_ptr()}
    mine = {p.untyped_storage().data_ptr() for p in share.layers[0].mlp.parameters()}
    assert not theirs & (mine | {share._head.untyped_storage().data_ptr()})


def test_owners_of_layers():
    assert [layers_of(shard, LAYERS, 3, 2) for shard in range(2)] == [[0, 1, 3, 4, 6, 7], [2, 5]]
    assert [layer_owner(layer, 8, 3, 3) for layer in range(8)] == [0, 0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("tied", [False, True])
def test_the_vocabulary_is_divided_by_rows(tmp_path, tied):
    """Of a size that three shards do not divide, and of an output layer that is cut short."""
    folder = save_draft(tmp_path, vocab=97, tie_word_embeddings=tied)
    whole = DraftModel(folder, CPU, torch.float32, head_tokens=50)
    shares = [share_of(whole, "attentions_and_mlps", rank, 3, 4) for rank in range(3)]
    tokens, hidden = torch.tensor([0, 32, 33, 65, 66, 96]), torch.randn(4, 64)
    with torch.inference_mode():
        assert torch.equal(sum(s.embed_share(tokens) for s in shares), whole.embed(tokens))
        logits = shares[0].whole_logits([s.logits_share(hidden) for s in shares])
        torch.testing.assert_close(logits, whole.logits(hidden))
    assert logits.shape == (4, 50)


# -- several shards ----------------------------------------------------------------------------


class Summed(Parts):
    """Naive: what a divided MLP computes, share by share."""

    shares = 2

    def __init__(self, model, groups):
        super().__init__(model, groups)
        whole = model_of(model.config._name_or_path)
        self._shares = [
            share_of(whole, "attentions_and_mlps", rank, self.shares, 3)
            for rank in range(self.shares)
        ]
        for share in self._shares:
            share.quicken()

    def feed(self, layer, hidden):
        return sum(share.mlp_share(layer, hidden) for share in self._shares)


@pytest.mark.parametrize(("placement", "shards"), DIVIDED)
def test_several_shards_equal_one(draft, placement, shards):
    plan = plan_of(draft, placement, shards)
    reference = plain(draft) if placement == "tensor_parallel" else local(draft, 3)
    with in_threads(plan) as (home, group):
        theirs = rounds(home.place(placement, SLOTS))
        counts = group.counts.copy()
    for a, b in zip(theirs, rounds(reference), strict=True):
        if placement == "attentions":
            assert torch.equal(a, b)
        else:  # sums in another order
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    # Two rounds: all that is new in one pass, and two levels.
    per_pass = messages(LAYERS, 3, shards, placement)
    expected = Counter()
    for kind, passes in (("text", 2), ("output", 2), ("level", 4)):
        for name, count in per_pass[kind].items():
            expected[name] += passes * count
    assert counts == expected


def test_two_shards_equal_the_naive_sum_of_theirs_bit_for_bit(draft):
    plan = plan_of(draft, "attentions_and_mlps", 2)
    with in_threads(plan) as (home, _):
        hidden = level_of(home.place("attentions_and_mlps", SLOTS))
    assert torch.equal(hidden, level_of(local(draft, 3, Summed)))


def level_of(run: LayerParallelExecutor) -> torch.Tensor:
    """Hidden states of a level below a text."""
    run.room("a", 9)
    run.begin(["a"], [np.arange(9, dtype=np.int32)])
    run.grow(torch.tensor([0]), torch.tensor([[5, 6, 7]]), torch.tensor([[-1, -1, -1]]))
    return run._level_hidden


@pytest.mark.parametrize(("placement", "shards"), DIVIDED[::2])
def test_levels_are_replayed_on_all_shards(draft, placement, shards):
    """The stand-in for CUDA graphs, recorded by all at once; some widths are not."""
    plan = plan_of(draft, placement, shards)
    with in_threads(plan) as (home, _):
        eager = rounds(home.place(placement, SLOTS))
    for widths in ([2], [5]):
        with in_threads(plan, record_on_cpu) as (home, _):
            run = home.place(placement, SLOTS)
            run.warm_up(widths, 4)
            assert len(run.graphs._graphs) == 3
            for a, b in zip(rounds(run), eager, strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_other_shards_go_on_where_the_lost_ones_were(draft):
    """The draft's share stays; texts are read again, graphs recorded again."""
    plan = plan_of(draft, "attentions_and_mlps", 2)
    with in_threads(plan, record_on_cpu) as (home, _):
        run = home.place("attentions_and_mlps", SLOTS)
        run.warm_up([2], 4)
        before = rounds(run)
    with in_threads(plan, record_on_cpu) as (_, group):
        rejoin(run, plan, group)
        assert run.graphs._graphs == {}
        run.record([2], 4)
        for a, b in zip(rounds(run), before, strict=True):
            assert torch.equal(a, b)


def test_messages_of_the_papers_model():
    """Llama-3-8B on 4 devices: of attentions 16 collectives for the hidden states of a fuzzy pass
    and 22 layers elsewhere; tensor-parallel passes take 64 all-reduces, and those with attentions
    in parallel 32."""
    counted = messages(32, 4, 4, "attentions")
    assert counted["level"] == Counter(broadcast=2 + 8, gather=8)
    assert counted["text"] == Counter(broadcast=2, copy=2 * 22)
    counted = messages(32, 4, 4, "attentions_and_mlps")
    assert counted["level"] == Counter(broadcast=2 + 2, all_reduce=33, all_gather=8, gather=1)
    assert counted["text"] == Counter(broadcast=2 + 32, all_reduce=33)
    counted = messages(32, 4, 4, "tensor_parallel")
    assert counted["level"] == Counter(broadcast=2, all_reduce=65, gather=1)
    assert messages(32, 4, 1, "one_device")["level"] == Counter()


def test_what_is_sent_is_counted(draft):
    plan = plan_of(draft, "attentions_and_mlps", 2)
    with in_threads(plan) as (home, group):
        run = home.place("attentions_and_mlps", SLOTS)
        run.room("a", 9)
        run.begin(["a"], [np.arange(9, dtype=np.int32)])
        before = group.sent.copy()
        run.grow(torch.tensor([0]), torch.tensor([[5, 6, 7]]), torch.tensor([[-1, -1, -1]]))
        sent = group.sent - before
    rows, hidden, size = 3, 64, 4
    assert sent["all_reduce"] == (1 + LAYERS) * rows * hidden * size
    assert sent["all_gather"] == 2 * 2 * rows * hidden * size  # two groups, two layers at home
    assert sent["gather"] == rows * VOCAB // 2 * size


# -- faults ----------------------------------------------------------------------------------


def test_a_watchdog_ends_what_is_not_over_once():
    ended = threading.Event()
    dog = Watchdog(ended.set, 0.05)
    dog.watch(lambda: True)
    dog.check()
    dog.watch(lambda: False)
    assert ended.wait(30)
    dog._thread.join(30)
    dog.seconds = 3
    with pytest.raises(LostPeer, match="did not answer within 3 s"):
        dog.check()
    dog.close()


def test_a_watchdog_looks_at_the_last_only():
    """What was watched before is over when the last is."""
    ended, looked = threading.Event(), threading.Event()
    dog = Watchdog(ended.set, 0.2)
    dog.watch(lambda: False)
    dog.watch(lambda: looked.set() or True)
    assert looked.wait(30)
    dog.close()
    dog.check()
    assert not ended.is_set()


def start_owners(plan, port: int) -> list[subprocess.Popen]:
    code = (
        "import sys, torch; from datetime import timedelta;"
        "from tests.drafting.sharded import model_of, plan_of;"
        "from vllm_specplus.drafting.group import Group, join_store;"
        "from vllm_specplus.drafting.shards import Shard;"
        "torch.set_num_threads(1);"
        f"plan = plan_of({plan.model!r}, {plan.placement!r}, {plan.shards});"
        "wait = timedelta(seconds=60); rank = int(sys.argv[1]);"
        f"store = join_store('127.0.0.1', {port}, wait);"
        "group = Group(rank, plan.shards, store, torch.device('cpu'), wait);"
        "Shard(plan, model_of(plan.model), group, None).serve()"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], env=environment,
                         stderr=subprocess.PIPE)
        for rank in range(1, plan.shards)
    ]  # fmt: skip


@pytest.fixture(params=["attentions", "attentions_and_mlps"])
def shared(draft, request, monkeypatch):
    """(executor over three processes, its group, the owners); waits end early."""
    monkeypatch.setattr(group_file, "STEP_TIMEOUT", timedelta(seconds=3))
    plan, connect = plan_of(draft, request.param, 3), timedelta(seconds=60)
    store = open_store(connect)
    owners = start_owners(plan, store.port)
    group = Group(0, plan.shards, store, CPU, connect)
    run = Shard(plan, model_of(draft), group, None).place(request.param, SLOTS)
    yield run, group, owners
    for owner in owners:
        owner.kill()
        owner.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_or_hung_owner_is_an_error_soon(shared, number):
    run, _, owners = shared
    rounds(run)
    os.kill(owners[-1].pid, number)
    run.room("d", 5)
    with pytest.raises(RuntimeError):
        run.begin(["d"], [np.arange(5, dtype=np.int32)])


@pytest.mark.slow
def test_a_lost_home_ends_the_owners(shared):
    run, group, owners = shared
    rounds(run)
    group.close()
    assert all(owner.wait(30) != 0 for owner in owners)


def test_a_page_holds_what_the_plan_says(draft):
    """Home and owners agree on slots only if their pages do."""
    assert local(draft, 3).cache.pages == 1 + -(-SLOTS // PAGE)
