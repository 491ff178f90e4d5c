"""The memory model: hand values, limits, and what torch really allocates."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile
from vllm.v1.sample.ops import topk_topp_sampler

from tests.model_configs import LLAMA_2_7B, LLAMA_3_8B
from tests.samplers.test_relaxed import make_rows
from vllm_specplus.control import memory
from vllm_specplus.control.memory import ModelDimensions
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.token_recycling import TokenRecycling, TokenRecyclingConfig
from vllm_specplus.samplers.sampled import Traversal
from vllm_specplus.step import DraftProbs

LLAMA_3 = ModelDimensions.from_config(LLAMA_3_8B)
LLAMA_2 = ModelDimensions.from_config(LLAMA_2_7B)

dimensions = st.builds(
    ModelDimensions,
    layers=st.integers(1, 4),
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    head_dim=st.integers(1, 16),
    hidden_size=st.integers(1, 64),
    intermediate_size=st.integers(1, 64),
    vocab_size=st.integers(1, 100),
    dtype_bytes=st.sampled_from([2, 4]),
    tensor_parallel=st.sampled_from([1, 2, 4]),
)
samplings = st.sampled_from(list(memory.SAMPLER_BYTES))
blocks = st.sampled_from([1, 4, 16])


# -- dimensions -----------------------------------------------------------------


def test_config_of_a_llama():
    assert (
        ModelDimensions(
            layers=32,
            kv_heads=8,
            head_dim=128,
            hidden_size=4096,
            intermediate_size=14336,
            vocab_size=128256,
            dtype_bytes=2,
            tensor_parallel=1,
        )
        == LLAMA_3
    )


def test_fields_that_follow_from_others():
    assert (LLAMA_2.kv_heads, LLAMA_2.head_dim) == (32, 128)
    nulls = {**LLAMA_2_7B, "num_key_value_heads": None, "head_dim": None}
    assert ModelDimensions.from_config(nulls) == LLAMA_2
    own = ModelDimensions.from_config({**LLAMA_2_7B, "head_dim": 64})
    assert memory.kv_token_bytes(own) == 524288 // 2


def test_vllm_runs_float32_checkpoints_in_half_precision():
    assert ModelDimensions.from_config({**LLAMA_3_8B, "torch_dtype": "float32"}) == LLAMA_3
    assert ModelDimensions.from_config(LLAMA_3_8B, dtype_bytes=4).dtype_bytes == 4


def test_multimodal_config():
    nested = {"text_config": LLAMA_3_8B, "hidden_size": 1, "vision_config": {"hidden_size": 2}}
    assert ModelDimensions.from_config(nested) == LLAMA_3
    with pytest.raises(ValueError, match=r"config\.json's text_config has no num_hidden_layers"):
        ModelDimensions.from_config(
            {**LLAMA_3_8B, "text_config": {"hidden_size": 8, "num_attention_heads": 2}}
        )


@pytest.mark.parametrize(
    "field",
    [
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "vocab_size",
    ],
)
def test_missing_field_is_named(field):
    config = {name: value for name, value in LLAMA_3_8B.items() if name != field}
    with pytest.raises(ValueError, match=f"has no {field},"):
        ModelDimensions.from_config(config)


@pytest.mark.parametrize("value", [0, -1, 2.5, "8", [8, 4], True])
def test_field_that_is_no_size(value):
    with pytest.raises(ValueError, match=r"num_key_value_heads is .*, not a positive integer"):
        ModelDimensions.from_config({**LLAMA_3_8B, "num_key_value_heads": value})


@pytest.mark.parametrize("config", [[], None, {"text_config": "llama"}])
def test_config_that_is_no_object(config):
    with pytest.raises(ValueError, match="JSON object"):
        ModelDimensions.from_config(config)


def test_latent_attention_is_refused():
    with pytest.raises(ValueError, match="kv_lora_rank"):
        ModelDimensions.from_config({**LLAMA_3_8B, "kv_lora_rank": 512})


def test_heads_that_cannot_be_divided():
    with pytest.raises(ValueError, match="8 KV heads cannot be divided among 3 ranks"):
        ModelDimensions.from_config(LLAMA_3_8B, tensor_parallel=3)
    with pytest.raises(ValueError, match="tensor_parallel is 0"):
        ModelDimensions.from_config(LLAMA_3_8B, tensor_parallel=0)


# -- terms ------------------------------------------------------------------------


def test_hand_values():
    assert memory.kv_token_bytes(LLAMA_3) == 131072
    assert memory.kv_token_bytes(LLAMA_2) == 524288
    assert memory.logits_bytes(replace(LLAMA_3, dtype_bytes=4), 1) == 513024
    assert memory.logits_bytes(LLAMA_3, 1) == 256512
    assert memory.logits_copies_bytes(LLAMA_3, 1) == 3 * 513024
    assert memory.logits_copies_bytes(LLAMA_3, 1, "greedy") == 0
    assert memory.kv_nodes_bytes(LLAMA_3, 4, 12) == 4 * 12 * 131072
    assert memory.activation_bytes(LLAMA_3, 3) == 3 * 8 * 14336 * 2
    assert memory.tree_mask_bytes(4, 12) == 4 * 13 * 13
    # The paper's own table of 32000 * 8 is int64, 2048000 bytes; ours is int32.
    assert memory.token_recycling_bytes(32000, pair_slots=0) == 2048000 // 2


def test_worked_example():
    """Llama-3-8B, 256 requests, 5 nodes: the numbers a user is told."""
    assert memory.speculation_bytes(LLAMA_3, requests=256, nodes=5) == {
        "kv_nodes": 256 * 16 * 131072,
        "logits": 1280 * 256512,
        "logits_copies": 1280 * 3 * 513024,
        "tree_mask": 256 * 36,
        "activations": 1280 * 8 * 14336 * 2,
        "prompt_logits": 256 * 256512,
        "proposer": 128256 * 8 * 4 + 16384 * 6 * 4,
    }


def test_block_rounding():
    """Card's test 7: 16 tokens take one block of 16, 17 take two."""
    block = 16 * 131072
    for tokens, expected in ((0, 0), (1, 1), (16, 1), (17, 2), (32, 2)):
        assert memory.kv_bytes(LLAMA_3, 3, tokens, 16) == 3 * expected * block
    assert memory.request_bytes(LLAMA_3, 13, 3) + block == (memory.request_bytes(LLAMA_3, 14, 3))


def test_tensor_parallel():
    def dims(ranks):
        return ModelDimensions.from_config(LLAMA_3_8B, tensor_parallel=ranks)

    assert memory.kv_token_bytes(dims(4)) == 131072 // 4
    assert memory.kv_token_bytes(dims(16)) == 131072 // 8  # replicated: one head per rank
    # Every rank gathers the whole vocabulary.
    assert memory.logits_bytes(dims(8), 1) == memory.logits_bytes(LLAMA_3, 1)
    assert memory.logits_copies_bytes(dims(2), 1, "greedy") == 256512 + 256512 // 2
    assert memory.logits_copies_bytes(dims(2), 1, "sampled") == 3 * 513024
    assert memory.activation_bytes(dims(2), 1) == 8 * 7168 * 2
    assert memory.activation_bytes(dims(8), 1) == 8 * 4096 * 2  # the hidden size is not divided


@pytest.mark.parametrize(("top_k", "pair_keys"), [(8, True), (3, True), (8, False)])
def test_token_recycling_state_is_what_it_allocates(top_k, pair_keys):
    config = TokenRecyclingConfig(top_k=top_k, pair_keys=pair_keys)
    proposer = TokenRecycling(config, Services(1000))
    arrays = (proposer.matrix, proposer.pair_keys, proposer.pair_rows)
    options = {} if pair_keys else {"pair_slots": 0}
    assert memory.token_recycling_bytes(1000, top_k, **options) == sum(a.nbytes for a in arrays)


def test_constants_of_other_modules():
    assert TokenRecyclingConfig().top_k == 8  # the default of token_recycling_bytes


def peak_bytes(function) -> int:
    """Most that was allocated at one time while ``function`` ran, on the CPU."""
    function()  # what is allocated once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("sampling", ["sampled", "sorted"])
def test_sampler_copies_are_what_vllm_allocates(sampling):
    rows, vocab = 16, 20000
    raw = torch.randn(rows, vocab, dtype=torch.bfloat16)
    top_p = torch.full((rows,), 0.9)

    def draw():
        logits = raw.to(torch.float32)
        topk_topp_sampler.random_sample(logits.softmax(-1, dtype=torch.float32), {})

    def sort():
        topk_topp_sampler.apply_top_k_top_p_pytorch(raw.to(torch.float32), None, top_p, True)

    run = {"sampled": draw, "sorted": sort}[sampling]
    measured = peak_bytes(run) / (rows * vocab)
    assert measured == pytest.approx(memory.SAMPLER_BYTES[sampling], rel=0.01)


def test_judging_takes_no_more_than_planned():
    """Every row a root or its one child, drawn from a row of the draft's of its own."""
    pairs, vocab = 16, 20000
    rows, rule = make_rows([1, 2] * pairs, [-1, 0] * pairs, range(0, 2 * pairs + 1, 2)), Traversal()
    raw = torch.randn(2 * pairs, vocab, dtype=torch.bfloat16)
    index = np.arange(2 * pairs, dtype=np.int32)
    index[1::2] = -1
    drawn = (index >= 0).astype(np.int32)
    noise = torch.rand(2 * pairs, dtype=torch.float64), torch.rand(pairs, dtype=torch.float64)

    def judge():
        draft = torch.randn(2 * pairs, vocab).softmax(-1)
        p = raw.to(torch.float32).softmax(-1, dtype=torch.float32)
        rule.verify(p, rows, DraftProbs(draft, index, drawn), *noise)

    assert peak_bytes(judge) / (2 * pairs * vocab) <= memory.SAMPLER_BYTES["judged"]


# -- sums and limits ----------------------------------------------------------------


@given(dims=dimensions, context=st.integers(1, 60), block=blocks, sampling=samplings)
def test_zero_speculation_is_plain_decoding(dims, context, block, sampling):
    blocks_of_context = (context + block - 1) // block
    plain = (
        blocks_of_context * block * memory.kv_token_bytes(dims)
        + memory.logits_bytes(dims, 1)
        + memory.logits_copies_bytes(dims, 1, sampling)
        + memory.activation_bytes(dims, 1)
    )
    assert memory.request_bytes(dims, context, 0, block, sampling) == plain
    added = memory.speculation_bytes(dims, 7, 0, block, sampling)
    assert set(added.values()) == {0}


@given(
    dims=dimensions,
    requests=st.integers(1, 8),
    nodes=st.integers(1, 20),
    context=st.integers(1, 60),
    sampling=samplings,
)
def test_added_bytes_are_the_difference_to_plain_decoding(dims, requests, nodes, context, sampling):
    """With blocks of one slot, where no rounding hides anything."""
    terms = memory.speculation_bytes(dims, requests, nodes, 1, sampling)
    shared = terms.pop("prompt_logits") + terms.pop("proposer")
    assert shared > 0
    drafting = memory.request_bytes(dims, context, nodes, 1, sampling)
    plain = memory.request_bytes(dims, context, 0, 1, sampling)
    assert sum(terms.values()) == requests * (drafting - plain)
    mask = memory.tree_mask_bytes(1, nodes)
    assert drafting - plain == nodes * memory.node_bytes(dims, sampling) + mask


@given(
    dims=dimensions,
    requests=st.integers(1, 8),
    nodes=st.integers(0, 20),
    context=st.integers(1, 60),
    block=blocks,
    sampling=samplings,
)
def test_bytes_grow(dims, requests, nodes, context, block, sampling):
    def total(requests, nodes):
        return sum(memory.speculation_bytes(dims, requests, nodes, block, sampling).values())

    def request(context, nodes):
        return memory.request_bytes(dims, context, nodes, block, sampling)

    assert total(requests, nodes) < total(requests, nodes + 1)
    assert total(requests, nodes + 1) < total(requests + 1, nodes + 1)
    assert request(context, nodes) < request(context, nodes + 1)
    assert request(context, nodes) <= request(context + 1, nodes)
    assert request(context, nodes) < request(context + block, nodes)


@given(
    context=st.integers(1, 60),
    nodes=st.integers(0, 20),
    block=blocks,
)
def test_kv_of_nodes_is_the_worst_case_over_contexts(context, nodes, block):
    def extra(context):
        return memory.kv_bytes(LLAMA_3, 1, context + nodes, block) - (
            memory.kv_bytes(LLAMA_3, 1, context, block)
        )

    worst = memory.kv_nodes_bytes(LLAMA_3, 1, nodes, block)
    assert extra(context) <= worst
    assert worst == max(extra(context + shift) for shift in range(block))


@given(dims=dimensions, budget=st.integers(-10, 100_000), sampling=samplings)
def test_max_rows_is_the_largest_that_fits(dims, budget, sampling):
    def needed(rows):
        return memory.logits_bytes(dims, rows) + memory.logits_copies_bytes(dims, rows, sampling)

    rows = memory.max_rows(dims, budget, sampling)
    assert rows >= 0
    assert rows == 0 or needed(rows) <= budget
    assert needed(rows + 1) > budget


def test_max_rows_of_llama_3():
    assert memory.max_rows(LLAMA_3) == 2**30 // (128256 * 14)
    assert memory.max_rows(LLAMA_3, sampling="greedy") == 2**30 // (128256 * 2)
    assert memory.max_rows(LLAMA_3, 10) == memory.max_rows(LLAMA_3, -1) == 0


@given(
    dims=dimensions,
    free=st.integers(0, 40_000),
    share=st.floats(0, 1),
    context=st.integers(1, 40),
    block=blocks,
    sampling=samplings,
)
def test_largest_batches_equal_brute_force(dims, free, share, context, block, sampling):
    fixed = int(free * share)
    counts = [0, 1, 3, 8, 20]
    solved = memory.largest_batches(dims, free, fixed, context, counts, block, sampling)
    for nodes in counts:
        slots = -(-(context + nodes) // block) * block
        rows = nodes + 1

        def needed(batch, nodes=nodes, slots=slots, rows=rows):
            return (
                fixed
                + batch * slots * memory.kv_token_bytes(dims)
                + memory.logits_bytes(dims, batch * rows)
                + memory.logits_copies_bytes(dims, batch * rows, sampling)
                + memory.activation_bytes(dims, batch * rows)
                + memory.tree_mask_bytes(batch, nodes)
            )

        batch = 0
        while needed(batch + 1) <= free:
            batch += 1
        assert solved[nodes] == batch
    batches = [solved[nodes] for nodes in counts]
    assert batches == sorted(batches, reverse=True)


def test_budget_below_the_weights():
    with pytest.raises(ValueError, match=r"need 15\.0 GiB, but only 8\.0 GiB are free"):
        memory.largest_batches(LLAMA_3, 8 * 2**30, 15 * 2**30, 1000, [0, 8])
    exactly = memory.largest_batches(LLAMA_3, 2**30, 2**30, 1000, [0, 8])
    assert exactly == {0: 0, 8: 0}


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.0 KiB"),
        (2**20 - 1, "1.0 MiB"),
        (513024, "501.0 KiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**52, "4096.0 TiB"),
    ],
)
def test_human(size, text):
    assert memory.human(size) == text


def test_nothing_heavy_is_imported():
    """The model answers where neither vLLM nor torch is installed."""
    code = (
        "import json, sys, vllm_specplus.control.memory;"
        "print(json.dumps([m for m in ('vllm', 'torch') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


def test_a_plan_is_the_largest_that_fits():
    dims = ModelDimensions.from_config(LLAMA_3_8B)
    state = memory.token_recycling_bytes(dims.vocab_size)
    for budget in (10**9, 3 * 10**9, 20 * 10**9):
        plan = memory.plan(dims, budget, 2048, 8)
        for nodes, most in plan.batches.items():
            one = memory.request_bytes(dims, 2048, nodes)
            assert state + most * one <= budget < state + (most + 1) * one
        if plan.nodes is None:
            assert budget < 8 * memory.request_bytes(dims, 2048, 0) == plan.needed
        else:
            assert plan.needed == state + 8 * memory.request_bytes(dims, 2048, plan.nodes) <= budget
            more = 8 * memory.request_bytes(dims, 2048, plan.nodes + 1)
            assert plan.nodes == 80 or state + more > budget


def test_a_plan_without_room():
    plan = memory.plan(ModelDimensions.from_config(LLAMA_3_8B), 1000, 2048, 8)
    assert set(plan.batches.values()) == {0}
    assert plan.nodes is None
