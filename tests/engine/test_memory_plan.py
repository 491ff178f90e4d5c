"""What verification takes off the memory for keys and values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_specplus import registry
from vllm_specplus.config import MemoryBudget
from vllm_specplus.control import memory
from vllm_specplus.engine.memory_plan import (
    for_kv_cache,
    max_rows,
    verification_bytes,
    whole_row_bytes,
)
from vllm_specplus.engine.row_penalties import CHUNK_BYTES
from vllm_specplus.proposer import Proposer
from vllm_specplus.proposers.eagle_tree import EagleTree

VOCAB = 128_256
GIB = 2**30


def config(requests=64, nodes=80, budget=8192, said=None):
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=requests, max_num_batched_tokens=budget),
        model_config=SimpleNamespace(  # Llama-3-8B
            get_vocab_size=lambda: VOCAB,
            dtype=torch.bfloat16,
            get_hidden_size=lambda: 4096,
            get_num_layers=lambda parallel: 32,
            get_num_kv_heads=lambda parallel: 8,
            get_head_size=lambda: 128,
            hf_text_config=SimpleNamespace(intermediate_size=14336),
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=said),
        num_speculative_tokens=nodes,
    )


def proposer(rule=None, reads_prompt=False, slot=0, budget_gb=None, held=0):
    limit = None if budget_gb is None else MemoryBudget(budget_gb=budget_gb)
    return SimpleNamespace(
        rule=rule, reads_prompt=reads_prompt, slot_bytes=lambda: slot, held_bytes=lambda: held,
        config=SimpleNamespace(memory=limit),
    )  # fmt: skip


@pytest.mark.parametrize(("rule", "bytes_"), [(None, 14), ("traversal", 18)])
def test_rows_of_drafts_have_logits(rule, bytes_):
    """Those that a step may have beside a root per request."""
    fits = memory.LOGITS_BUDGET // (VOCAB * bytes_)
    assert max_rows(config(), proposer(rule)) == fits
    assert max_rows(config(requests=2000), proposer(rule)) == 2000  # roots are verified anyway
    assert max_rows(config(budget=300), proposer(rule)) == 300
    got = verification_bytes(config(requests=32, nodes=8), proposer(rule))
    assert got == 32 * 8 * VOCAB * bytes_ + CHUNK_BYTES
    assert verification_bytes(config(), proposer(rule)) == (
        (fits - 64) * VOCAB * bytes_ + CHUNK_BYTES
    )
    prompt = verification_bytes(config(), proposer(rule, reads_prompt=True))
    assert prompt - verification_bytes(config(), proposer(rule)) == 256 * VOCAB * 2


def test_the_cache_gets_what_is_left():
    taken = verification_bytes(config(), proposer())
    assert for_kv_cache(20 * GIB, config(), proposer(), 1000) == 20 * GIB - taken
    shared = for_kv_cache(20 * GIB, config(), proposer(slot=250), 1000)
    assert shared == int((20 * GIB - taken) * 0.8)
    # Whoever says how large the cache is has measured.
    assert for_kv_cache(GIB, config(said=GIB), proposer(), 1000) == GIB


def test_a_device_that_is_too_small_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r"may take 9\d\d\.\d MiB for logits, and 512\.0 MiB"):
        for_kv_cache(GIB // 2, config(), proposer(), 1000)


def test_a_budget_bounds_the_rows_of_a_step():
    row = whole_row_bytes(config(), proposer())
    # 14 bytes per id; a key and a value of 8 heads in 32 layers; 8 buffers of 14336 units.
    assert row == VOCAB * 14 + 2 * 32 * 8 * 128 * 2 + 8 * 14336 * 2
    assert max_rows(config(), proposer(budget_gb=100 * row / 1e9)) == 100
    assert max_rows(config(), proposer(budget_gb=(100 * row + 5) / 1e9, held=row)) == 99
    assert max_rows(config(), proposer(budget_gb=100)) == max_rows(config(), proposer())
    less = proposer(budget_gb=100 * row / 1e9)
    assert verification_bytes(config(), less) == 36 * VOCAB * 14 + CHUNK_BYTES
    reads = proposer(budget_gb=100 * row / 1e9, reads_prompt=True)
    assert verification_bytes(config(), reads) == (36 * 14 + 100 * 2) * VOCAB + CHUNK_BYTES


def test_what_every_method_keeps_is_known():
    """Of those with settings for it: they are what it says."""
    keeps = {
        name: registry.method_class(name).held_bytes is not Proposer.held_bytes
        for name in registry.usable_methods(lambda config: True)
    }
    for name, own in keeps.items():
        fields = registry.config_class(name).model_fields
        assert own or not {"kv_memory_mb", "max_memory_mb"} & fields.keys(), name
    tree = EagleTree.held_bytes(SimpleNamespace(config=None))
    assert tree == 0  # no kv_memory_mb of its own


def test_a_budget_that_holds_no_draft_is_refused_in_a_sentence():
    row = whole_row_bytes(config(), proposer())
    enough = (65 * row + 2**20) / 1e9
    assert max_rows(config(), proposer(budget_gb=enough, held=2**20)) == 65
    with pytest.raises(ValueError, match=r"'budget_gb' is 0\.1, and 0\.142 is the least for 64 "):
        max_rows(config(), proposer(budget_gb=0.1, held=2**20))
