"""long_draft: what a step drafts, and what happens where memory is short."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.drafting.test_eagle import Vocabulary
from tests.drafting.test_long_draft import VOCAB, WINDOW, Texts, pages_of
from tests.long_heads import HIDDEN, Reference, save_long
from vllm_specplus.config import parse
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.long_draft import LongDraftTree
from vllm_specplus.step import StepContext, bare_step
from vllm_specplus.tree import DraftBatch

TREE = [3, 4, 4]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    generator = torch.Generator().manual_seed(0)
    embedding, output = torch.randn(2, VOCAB, HIDDEN, generator=generator)
    return Vocabulary(embedding, 0.3 * output)


@pytest.fixture
def texts() -> Texts:
    return Texts([2, 70, WINDOW + 1], 16)


def proposer(
    folder: str, vocabulary: Vocabulary, texts: Texts, reported: list | None = None
) -> LongDraftTree:
    keys = {"tree": TREE, "num_speculative_tokens": sum(TREE), "kv_memory_mb": 1}
    services = Services(
        VOCAB, report=(reported if reported is not None else []).append,
        target_vocabulary=lambda: vocabulary, context_pages=lambda: pages_of(texts.store),
    )  # fmt: skip
    made = LongDraftTree(parse({"method": "long_draft", "model": folder, **keys}), services)
    made.load_draft(torch.device("cpu"), torch.float32)
    made.warm_up()
    made.share_pages(40, 16, 4)
    return made


def step_of(drafter: LongDraftTree, texts: Texts, nodes: int = sum(TREE)) -> StepContext:
    step = bare_step(drafter.sources, texts.tokens, nodes)
    return replace(step, num_tokens=texts.lengths.astype(np.int32), pages=texts.pages)


def tree_of(batch: DraftBatch, r: int) -> tuple[list[int], list[int]]:
    first = int(batch.counts[:r].sum())
    here = slice(first, first + int(batch.counts[r]))
    return batch.tokens[here].tolist(), batch.parents[here].tolist()


def path_to(tokens: list[int], parents: list[int], node: int) -> list[int]:
    path: list[int] = []
    while node >= 0:
        path.insert(0, tokens[node])
        node = parents[node]
    return path


def test_the_most_probable_nodes_of_every_text(tmp_path, vocabulary, texts):
    folder = save_long(tmp_path, VOCAB, WINDOW)
    drafter = proposer(folder, vocabulary, texts)
    reference = Reference(folder, vocabulary.embedding, vocabulary.matrix)
    step = step_of(drafter, texts)
    step.max_nodes[:] = [sum(TREE), 0, TREE[0] + TREE[1]]
    batch = drafter.propose(step)
    assert batch.counts.tolist() == [sum(TREE), 0, TREE[0] + TREE[1]]
    assert batch.draft_probs is None  # judged by the target's own draws
    assert (batch.sources > 0).all()
    for r in (0, 2):
        tokens, parents = tree_of(batch, r)
        laws = {(): texts.expected(reference, r, []).softmax(-1)}
        scores = []
        for node, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
            above = path_to(tokens, parents, parent)
            if tuple(above) not in laws:
                laws[tuple(above)] = texts.expected(reference, r, above).softmax(-1)
            score = float(laws[tuple(above)][token])
            scores.append(score * (scores[parent] if parent >= 0 else 1))
            assert path_to(tokens, parents, node) == [*above, token]
        assert all(a > b - 1e-6 for a, b in itertools.pairwise(scores))
        assert tokens[0] == int(laws[()].argmax())
        # The widest level that is drafted is the first one's.
        assert sum(parent < 0 for parent in parents) <= TREE[0]


def test_structured_output_is_drafted_as_a_chain(tmp_path, vocabulary, texts):
    drafter = proposer(save_long(tmp_path, VOCAB, WINDOW), vocabulary, texts)
    step = step_of(drafter, texts)
    step.chain_only[:] = True
    batch = drafter.propose(step)
    for r in range(3):
        tokens, parents = tree_of(batch, r)
        assert 0 < len(tokens) <= len(TREE)
        assert parents == list(range(-1, len(tokens) - 1))


def test_requests_beyond_the_memory_go_undrafted_and_are_counted(tmp_path, vocabulary, texts):
    reported: list[Exception] = []
    drafter = proposer(save_long(tmp_path, VOCAB, WINDOW), vocabulary, texts, reported)
    executor = drafter._executor
    executor._free = executor._free[:2]
    batch = drafter.propose(step_of(drafter, texts))
    assert (batch.counts > 0).tolist() == [True, True, False]
    assert "and this one has more: raise kv_memory_mb (1)" in str(reported[0])
    drafter.forget("request 0")
    batch = drafter.propose(step_of(drafter, texts))
    assert (batch.counts > 0).sum() == 2


def test_what_the_engine_is_told(tmp_path, vocabulary, texts):
    drafter = proposer(save_long(tmp_path, VOCAB, WINDOW), vocabulary, texts)
    assert drafter.levels == tuple(TREE)
    assert drafter.reads_context
    assert drafter.borrows_vocabulary
    assert (drafter.reads_hidden, drafter.hidden_layers, drafter.rule) == (False, None, None)
    assert drafter._executor.held_bytes() <= drafter.held_bytes() == 2**20
    assert drafter.slot_bytes() == 0
