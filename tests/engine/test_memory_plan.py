"""What verification takes off the memory for keys and values."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_specplus.control import memory
from vllm_specplus.engine.memory_plan import for_kv_cache, max_rows, verification_bytes
from vllm_specplus.engine.row_penalties import CHUNK_BYTES

VOCAB = 128_256
GIB = 2**30


def config(requests=64, nodes=80, budget=8192, said=None):
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=requests, max_num_batched_tokens=budget),
        model_config=SimpleNamespace(get_vocab_size=lambda: VOCAB, dtype=torch.bfloat16),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
        cache_config=SimpleNamespace(kv_cache_memory_bytes=said),
        num_speculative_tokens=nodes,
    )


def proposer(rule=None, reads_prompt=False, slot=0):
    return SimpleNamespace(rule=rule, reads_prompt=reads_prompt, slot_bytes=lambda: slot)


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
