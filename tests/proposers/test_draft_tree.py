"""Drafts behind a model or a head: what is left undrafted, and why."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from tests.drafting.test_eagle import PAGE, Texts, Vocabulary
from tests.drafting.test_eagle import VOCAB as HEAD_VOCAB
from tests.eagle_heads import HIDDEN, save_head
from vllm_specplus import registry
from vllm_specplus.config import parse
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.proposers.draft_tree import DraftMemoryError
from vllm_specplus.step import StepContext, bare_step

PAGES = [[5, 37, 36, 35], [*range(10, 25)], [6, 7, 8, 9, 25, 26, 27]]
NODES = 12
CPU = torch.device("cpu")


@pytest.fixture
def counted() -> Counter:
    return Counter()


@pytest.fixture
def reported() -> list[Exception]:
    return []


def made(config: dict, services: Services) -> Proposer:
    proposer = registry.method_class(config["method"])(parse(config), services)
    proposer.load_draft(CPU, torch.float32)
    return proposer


def texts_of(lengths: list[int], drafter: Proposer) -> StepContext:
    rng = np.random.default_rng(0)
    texts = rng.integers(0, VOCAB, (len(lengths), max(lengths))).astype(np.int32)
    return replace(bare_step(drafter.sources, texts, NODES), num_tokens=np.array(lengths, np.int32))


@pytest.mark.parametrize(("context", "drafted"), [(64, True), (63, False)])
def test_a_text_beyond_the_drafts_positions_is_not_drafted_for(
    tmp_path, counted, reported, context, drafted
):
    """52 tokens and 12 nodes. It is no fault, and its pages are others'."""
    folder = save_draft(tmp_path, context=context)
    services = Services(VOCAB, report=reported.append, count=lambda name: counted.update([name]))
    drafter = made({"method": "draft_tree", "model": folder, "shape": "topk"}, services)
    free = len(drafter._executor.cache._free)
    assert drafter.propose(texts_of([30, 40], drafter)).counts.tolist() == [NODES, NODES]
    for _ in range(2):
        batch = drafter.propose(texts_of([30, 52], drafter))
        assert batch.counts.tolist() == [NODES, NODES * drafted]
    assert counted["texts_beyond_head"] == 2 * (not drafted)
    assert reported == []
    drafter.forget("request 0")
    assert (len(drafter._executor.cache._free) == free) == (not drafted)


def test_a_text_that_memory_does_not_hold_is_reported(tmp_path, counted, reported):
    services = Services(VOCAB, report=reported.append, count=lambda name: counted.update([name]))
    folder = save_draft(tmp_path, context=4096)
    keys = {"method": "draft_tree", "model": folder, "shape": "topk", "kv_memory_mb": 1}
    drafter = made(keys, services)
    # 2 layers, keys and values, 2 heads of 16 units, 4 bytes: 2048 slots.
    batch = drafter.propose(texts_of([30, 3000], drafter))
    assert batch.counts.tolist() == [NODES, 0]
    assert [type(error) for error in reported] == [DraftMemoryError]
    assert "a text of 3000 tokens: raise kv_memory_mb (1)" in str(reported[0])
    assert counted["texts_beyond_head"] == 0


@pytest.mark.parametrize(("most", "drafted"), [(72, True), (71, False), (60, False)])
def test_a_text_beyond_the_heads_positions_is_not_drafted_for(tmp_path, counted, most, drafted):
    """70 tokens have rows 0 to 68; three levels, whose logits are wanted, lie at 69 to 71."""
    folder = save_head(tmp_path, 3, HEAD_VOCAB, max_position_embeddings=most)
    generator = torch.Generator().manual_seed(0)
    vocabulary = Vocabulary(*torch.randn(2, HEAD_VOCAB, HIDDEN, generator=generator))
    services = Services(
        HEAD_VOCAB, count=lambda name: counted.update([name]), target_vocabulary=lambda: vocabulary
    )
    drafter = made({"method": "eagle_tree", "model": folder}, services)
    drafter.share_pages(40, PAGE, 4)
    texts = Texts([3, 70, 30], 3, PAGES)
    step = replace(
        bare_step(drafter.sources, texts.tokens, NODES),
        num_tokens=texts.lengths.astype(np.int32),
        target_rows=texts.rows([(0, n - 1) for n in texts.lengths.tolist()]),
    )
    batch = drafter.propose(step)
    assert (batch.counts > 0).tolist() == [True, drafted, True]
    assert counted["texts_beyond_head"] == (not drafted)
    assert ("request 1" in drafter._executor._waiting) == drafted
