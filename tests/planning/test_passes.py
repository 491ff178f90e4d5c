"""A pass against counts by hand: bytes, operations, collectives, launches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.planning.shapes import LLAMA_8B, LLAMA_70B, QWEN_30B
from vllm_specplus.planning.devices import DEVICES, find
from vllm_specplus.planning.passes import Load, Machine, Time
from vllm_specplus.planning.software import (
    COMPUTE_SHARE,
    LAUNCH,
    MEMORY_SHARE,
    SHORT_KERNEL,
    TRANSFORMERS,
    VLLM,
)

A100 = DEVICES["A100-80GB"]
GRAPHS, EAGER = Machine(A100, VLLM), Machine(A100, TRANSFORMERS)
ONE = Load(1, 1, 1000)


def test_one_row_loads_all_weights_and_its_keys():
    time = GRAPHS.forward(LLAMA_8B, ONE)
    weights = 2 * (LLAMA_8B.parameters - LLAMA_8B.embedding)
    keys = 32 * 1000 * 2 * 8 * 128 * 2
    assert time.weights == pytest.approx((weights + keys) / (2039e9 * MEMORY_SHARE))
    assert time.kernels == pytest.approx((32 * 6 + 3) * SHORT_KERNEL)
    assert (time.arithmetic, time.messages, time.host) == (0, 0, 0)


def test_many_rows_compute():
    rows = 4096
    time = GRAPHS.forward(LLAMA_8B, Load(rows, 1, 0))
    done = 2 * rows * (LLAMA_8B.parameters - LLAMA_8B.embedding)
    assert time.arithmetic == pytest.approx(done / (312e12 * COMPUTE_SHARE))
    assert time.weights == 0


def test_a_device_that_does_not_overlap_loads_and_computes():
    block = Machine(replace(A100, overlaps=False), VLLM).block(1e9, 1e12)
    assert block.weights == pytest.approx(1e9 / (2039e9 * MEMORY_SHARE))
    assert block.arithmetic == pytest.approx(1e12 / (312e12 * COMPUTE_SHARE))


def test_ranks_divide_weights_and_send_two_messages_a_layer():
    one, four = (GRAPHS.forward(LLAMA_70B, ONE, ranks) for ranks in (1, 4))
    assert four.weights == pytest.approx(one.weights / 4)
    size = 8192 * 2
    each = A100.latency + 2 * 3 / 4 * size / A100.link
    assert four.messages == pytest.approx(161 * each)
    assert one.messages == 0


def test_without_a_graph_the_host_launches_everything():
    """A small model waits for the host; a large one hides it."""
    small = replace(LLAMA_8B, hidden=256, intermediate=512)
    launches = 32 * 48 + 22
    assert EAGER.forward(small, ONE).total == pytest.approx(launches * LAUNCH)
    large = EAGER.forward(LLAMA_70B, ONE)
    assert large.host == 0
    assert large.total > (80 * 48 + 22) * LAUNCH


def test_choosing_a_drafts_tokens_is_hidden_behind_the_device_and_takes_its_time_otherwise():
    tiny = replace(LLAMA_8B, layers=1, hidden=64, intermediate=64, vocab=1000)
    assert GRAPHS.forward(tiny, ONE, draft=True).total == pytest.approx(30 * LAUNCH)
    assert GRAPHS.forward(LLAMA_8B, ONE, draft=True) == GRAPHS.forward(LLAMA_8B, ONE)
    more = EAGER.forward(tiny, ONE, draft=True).total - EAGER.forward(tiny, ONE).total
    assert more == pytest.approx(30 * LAUNCH)


def test_a_mixture_loads_what_rows_ask_for():
    one, many = (GRAPHS.mlp(QWEN_30B, Load(rows, 1, 0), layer=0) for rows in (1, 64))
    expert = 2 * QWEN_30B.expert / (2039e9 * MEMORY_SHARE)
    assert one.weights == pytest.approx(8 * expert)
    assert many.weights == pytest.approx(QWEN_30B.touched(64) * expert)
    dense = replace(QWEN_30B, dense_layers=1)
    assert GRAPHS.mlp(dense, ONE, layer=0).weights == pytest.approx(
        2 * dense.mlp / (2039e9 * MEMORY_SHARE)
    )


def test_quantized_layers_load_less_and_the_output_layer_does_not():
    half = replace(LLAMA_8B, weight_bits=8)
    less = GRAPHS.forward(LLAMA_8B, Load(1, 1, 0)).weights
    less -= GRAPHS.forward(half, Load(1, 1, 0)).weights
    assert less == pytest.approx(LLAMA_8B.decoder / (2039e9 * MEMORY_SHARE))


def test_times_add_up_by_what_they_are_spent_on():
    assert Time(1, 2, 3, 4, 5) + Time(1) * 2 == Time(3, 2, 3, 4, 5)
    assert Time(1, 2, 3, 4, 5).total == 15


@pytest.mark.parametrize("name", ["a100-80gb", "A100 80GB", "rtx3090", "H100"])
def test_devices_by_name(name):
    assert find(name) in DEVICES.values()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("A100", "comes in several sizes: write A100-40GB or A100-80GB or A100-PCIe"),
        ("H20O", "did you mean H200?"),
        ("TPU", "no data sheet of 'TPU' is known"),
        ("", "no data sheet of '' is known"),
    ],
)
def test_devices_that_are_none(name, said):
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        find(name)
