"""Placements against a walk through the layers, and against what the product counts."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.planning.shapes import LLAMA_8B, LLAMA_70B
from vllm_specplus.drafting import shards
from vllm_specplus.planning import rounds
from vllm_specplus.planning.devices import DEVICES
from vllm_specplus.planning.passes import Load, Machine
from vllm_specplus.planning.software import LAUNCH, TRANSFORMERS, VLLM

GRAPHS = Machine(DEVICES["A100-80GB"], VLLM)
EAGER = Machine(DEVICES["A100-80GB"], TRANSFORMERS)
ONE = Load(1, 1, 1024)


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
@pytest.mark.parametrize("layers", [3, 5, 30, 32])
def test_messages_are_those_that_the_shards_count(layers, devices):
    counted = shards.messages(layers, devices, devices, "attentions")
    found = rounds.messages(layers, devices, split=False)
    assert {kind: Counter(sent) for kind, sent in found.items()} == {
        kind: counted[each] for kind, each in (("fuzzy", "level"), ("exact", "text"))
    }


@pytest.mark.parametrize("devices", [2, 4])
@pytest.mark.parametrize("layers", [5, 32])
def test_messages_of_divided_mlps_by_a_walk_through_the_layers(layers, devices):
    """Rows are described in two broadcasts; attentions of the first and last layer are at home,
    those of a group are gathered everywhere; every MLP ends in an all-reduce; logits are gathered.
    """
    fuzzy, exact = Counter({"broadcast": 2}), Counter({"broadcast": 2})
    middle = list(range(1, layers - 1))
    for layer in (0, layers - 1):
        fuzzy.update(["broadcast"])
        assert layer not in middle
    for start in range(0, len(middle), devices):
        assert middle[start : start + devices]
        fuzzy.update(["all-gather"])
    for _ in range(layers):
        exact.update(["broadcast"])  # of its attention, from whoever has it
        for each in (fuzzy, exact):
            each.update(["all-reduce"])
    for each in (fuzzy, exact):
        each.update(["all-gather"])
    assert rounds.messages(layers, devices, split=True) == {"fuzzy": fuzzy, "exact": exact}


@pytest.mark.parametrize("machine", [GRAPHS, EAGER])
def test_on_one_device_all_placements_are_the_same(machine):
    spent = {
        name: place(machine, LLAMA_8B, ONE, 1, 4).total for name, place in rounds.PLACEMENTS.items()
    }
    assert all(value == pytest.approx(spent["one device"]) for value in spent.values())


def test_a_fuzzy_pass_waits_for_one_attention_of_each_group():
    fuzzy = rounds.fuzzy_pass(GRAPHS, LLAMA_8B, ONE, 4, split=False)
    parts = (
        GRAPHS.attention(LLAMA_8B, ONE) * (2 + 8)
        + GRAPHS.mlp(LLAMA_8B, ONE) * 32
        + GRAPHS.head(LLAMA_8B, ONE)
    )
    assert fuzzy.weights == pytest.approx(parts.weights)


def test_with_graphs_attentions_in_parallel_gain_little_and_divided_mlps_much():
    one = rounds.one_device(GRAPHS, LLAMA_8B, ONE, 4, 5).total
    a = one / rounds.layer_parallel(GRAPHS, LLAMA_8B, ONE, 4, 5).total
    b = one / rounds.layer_parallel_split(GRAPHS, LLAMA_8B, ONE, 4, 5).total
    assert 1 < a < 1.14 < 2 < b


def test_without_graphs_layers_in_parallel_gain_what_the_paper_says_and_tensor_parallelism_none():
    one = rounds.one_device(EAGER, LLAMA_8B, ONE, 4, 5).total
    gain = one / rounds.layer_parallel(EAGER, LLAMA_8B, ONE, 4, 5).total
    assert gain == pytest.approx(1.62, rel=0.1)
    assert rounds.tensor_parallel(EAGER, LLAMA_8B, ONE, 4, 5).total > one


def test_verifying_nothing_is_a_step_and_its_judging():
    plain = rounds.step(GRAPHS, LLAMA_70B, ONE, 8)
    assert plain.host == VLLM.step
    more = rounds.verified(GRAPHS, LLAMA_70B, ONE, 0, 8).total - plain.total
    assert more == pytest.approx(VLLM.round_launches * LAUNCH)


def test_more_nodes_never_take_less():
    load = Load(16, 16, 1024)
    seconds = [rounds.verified(GRAPHS, LLAMA_8B, load, n, 1).total for n in range(0, 80, 8)]
    assert seconds == sorted(seconds)
    assert seconds[-1] > 1.5 * seconds[0]


def test_the_third_eagle_has_a_vocabulary_of_its_own():
    second, third = (rounds.eagle_head(LLAMA_8B, third) for third in (False, True))
    assert (second.layers, second.vocab) == (1, 128256)
    assert (third.layers, third.vocab) == (1, 32000)
    spent = [rounds.head_drafts(GRAPHS, LLAMA_8B, ONE, 3, third=each) for each in (False, True)]
    assert spent[1].weights < spent[0].weights
