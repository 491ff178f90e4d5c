"""What verification takes of the memory that vLLM would give to the KV cache.

vLLM measures at start how much memory is left beside its model, with one row of logits per request,
and gives all of it to the cache. Rows of drafts have logits too: without a plan for them the first
full batch ends in the middle of a step for want of memory.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from vllm_specplus.control import memory
from vllm_specplus.engine.row_penalties import CHUNK_BYTES

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_specplus.config import MemoryBudget
    from vllm_specplus.proposer import Proposer


def max_rows(vllm_config: VllmConfig, proposer: Proposer) -> int:
    """Most rows a step may verify: the batch's token budget and the logits' memory, or the budget
    that the user gives. ValueError with one sentence if that holds no draft."""
    scheduler = vllm_config.scheduler_config
    by_logits = memory.LOGITS_BUDGET // _row_bytes(vllm_config, _sampling(proposer))
    most = min(scheduler.max_num_batched_tokens, max(by_logits, scheduler.max_num_seqs))
    budget = proposer.config.memory
    return most if budget is None else min(most, _budget_rows(budget, vllm_config, proposer))


def _budget_rows(budget: MemoryBudget, vllm_config: VllmConfig, proposer: Proposer) -> int:
    """Rows that the budget holds beside what the method keeps, of which every request has one."""
    row = whole_row_bytes(vllm_config, proposer)
    requests = vllm_config.scheduler_config.max_num_seqs
    held, given = proposer.held_bytes(), int(budget.budget_gb * 1e9)
    rows = (given - held) // row
    if rows <= requests:
        needed = math.ceil((held + (requests + 1) * row) / 1e6) / 1e3
        raise ValueError(
            f"'budget_gb' is {budget.budget_gb:g}, and {needed:g} is the least for "
            f"{requests} requests at once: {memory.human(held)} that the method keeps, and "
            f"{memory.human(row)} for each request's row: raise it, or lower --max-num-seqs"
            + (" or the method's memory" if held else "")
        )
    return rows


def whole_row_bytes(vllm_config: VllmConfig, proposer: Proposer) -> int:
    """Of one verified row: its logits and what drawing from them takes, its keys and values, and
    its activations."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    text = model.hf_text_config
    hidden = model.get_hidden_size()
    dims = memory.ModelDimensions(
        layers=model.get_num_layers(parallel),
        kv_heads=model.get_num_kv_heads(parallel),
        head_dim=model.get_head_size(),
        hidden_size=hidden,
        intermediate_size=getattr(text, "intermediate_size", None) or 4 * hidden,
        vocab_size=model.get_vocab_size(),
        dtype_bytes=model.dtype.itemsize,
    )
    logits = _row_bytes(vllm_config, _sampling(proposer))
    return logits + memory.kv_token_bytes(dims) + memory.activation_bytes(dims, 1)


def verification_bytes(vllm_config: VllmConfig, proposer: Proposer) -> int:
    """What a step may take beside what vLLM has measured: rows of drafts with their logits and the
    sampler's copies of them, penalties of those, and logits of prompts that are looked at."""
    requests = vllm_config.scheduler_config.max_num_seqs
    nodes = vllm_config.num_speculative_tokens
    allowed = max_rows(vllm_config, proposer)
    most = min(allowed, requests * (1 + nodes))
    row = _row_bytes(vllm_config, _sampling(proposer))
    bytes_ = max(most - requests, 0) * row + CHUNK_BYTES
    if proposer.reads_prompt:
        bytes_ += min(memory.PROMPT_CHUNK, allowed) * _row_bytes(vllm_config, "greedy")
    return bytes_


def for_kv_cache(
    available: int, vllm_config: VllmConfig, proposer: Proposer, slot_bytes: int
) -> int:
    """What is left for the target's keys and values of the ``available`` bytes: less what a step
    takes, unless whoever serves has said how large the cache is, and less the share of a draft
    that has a place for every ``slot_bytes`` bytes of the target's.

    ValueError with one sentence if nothing is left.
    """
    if vllm_config.cache_config.kv_cache_memory_bytes is None:
        taken = verification_bytes(vllm_config, proposer)
        if taken >= available:
            raise ValueError(
                f"verifying drafts may take {memory.human(taken)} for logits, and "
                f"{memory.human(max(available, 0))} are left beside the model: lower "
                f"--max-num-seqs or num_speculative_tokens, or raise --gpu-memory-utilization"
            )
        available -= taken
    return int(available * slot_bytes / (slot_bytes + proposer.slot_bytes()))


def common_pages(kv_cache_config: Any, page: int) -> int:
    """How many pages of ``page`` slots all layers have in vLLM's ``KVCacheConfig``; 0 if groups of
    them have pages of their own."""
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return 0
    return kv_cache_config.num_blocks * groups[0].kv_cache_spec.block_size // page


def _sampling(proposer: Proposer) -> memory.Sampling:
    """How rows are drawn from: drawn drafts are judged by what they were drawn from."""
    return "sampled" if proposer.rule is None else "judged"


def _row_bytes(vllm_config: VllmConfig, sampling: memory.Sampling) -> int:
    """Of one row's logits and what drawing from them takes."""
    model = vllm_config.model_config
    ranks = vllm_config.parallel_config.tensor_parallel_size
    return memory.logits_row_bytes(model.get_vocab_size(), model.dtype.itemsize, ranks, sampling)
