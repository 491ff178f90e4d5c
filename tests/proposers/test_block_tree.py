"""block_tree: what a step drafts, and how its nodes are labelled."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.block_heads import Reference, medusa_reference, save_block, save_medusa
from tests.drafting.test_block_trees import paths
from tests.drafting.test_eagle import PAGE, VOCAB, Texts, Vocabulary
from tests.parallel_heads import ParallelReference, save_parallel
from vllm_specplus.config import parse
from vllm_specplus.drafting.block_heads import MedusaHead
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.block_tree import BlockTree
from vllm_specplus.step import PROBABILITY_CLASSES, StepContext, bare_step
from vllm_specplus.tree import DraftTokens

PAGES = [[5, 37, 36, 35], [*range(10, 25)], [6, 7, 8, 9, 25, 26, 27]]


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    generator = torch.Generator().manual_seed(0)
    embedding, output = torch.randn(2, VOCAB, 64, generator=generator)
    return Vocabulary(embedding, 0.3 * output)


@pytest.fixture
def counted() -> Counter:
    return Counter()


def proposer(folder: str, vocabulary: Vocabulary, counted: Counter, **keys) -> BlockTree:
    services = Services(
        VOCAB, count=lambda name: counted.update([name]), target_vocabulary=lambda: vocabulary
    )
    made = BlockTree(parse({"method": "block_tree", "model": folder, **keys}), services)
    made.load_draft(torch.device("cpu"), torch.float32)
    made.warm_up()
    made.share_pages(40, PAGE, 4)
    return made


def first_step(drafter: BlockTree, texts: Texts, nodes: int = 10) -> StepContext:
    """The prompts have just been read."""
    step = bare_step(drafter.sources, texts.tokens, nodes)
    rows = texts.rows([(0, n - 1) for n in texts.lengths.tolist()])
    return replace(step, num_tokens=texts.lengths.astype(np.int32), target_rows=rows)


def tree_of(batch, r: int) -> list[tuple[int, ...]]:
    """The paths of a request's nodes."""
    first = int(batch.counts[:r].sum())
    here = slice(first, first + int(batch.counts[r]))
    return paths(type("T", (), {"tokens": batch.tokens[here], "parents": batch.parents[here]}))


@pytest.mark.parametrize("kind", ["dflash", "dspark"])
def test_the_most_probable_nodes_of_every_text(tmp_path, vocabulary, counted, kind):
    folder = save_block(tmp_path, kind, VOCAB)
    drafter = proposer(folder, vocabulary, counted)
    reference = Reference(folder, vocabulary.embedding, vocabulary.matrix)
    texts = Texts([3, 70, 30], 2, PAGES)
    step = first_step(drafter, texts)
    step.max_nodes[:] = [10, 0, 5]
    step.chain_only[2] = True
    batch = drafter.propose(step)
    depth = drafter._head.config.depth
    assert batch.counts.tolist() == [10, 0, depth]
    assert batch.draft_probs is None  # judged by the target's own draws
    # The greedy chain of the third; what follows most probably at once of the first.
    for r in (0, 2):
        length = int(texts.lengths[r])
        text = texts.tokens[r, :length].tolist()
        logits = reference(text, texts.states[r, : length - 1])
        law = reference.law(logits[0], text[-1])
        tree = tree_of(batch, r)
        assert tree[0] == (int(law.argmax()),)
        if r == 2:
            chain = tree[-1]
            assert tree == [chain[: i + 1] for i in range(depth)]
    assert DraftTokens is type(batch.split()[0])


def test_nodes_say_how_probable_they_are(tmp_path, vocabulary, counted):
    """By class of probability, apart for those behind a sibling."""
    folder = save_medusa(tmp_path, VOCAB)
    drafter = proposer(folder, vocabulary, counted)
    assert isinstance(drafter._head, MedusaHead)
    assert drafter.slot_bytes() == 0
    texts = Texts([9], 1, PAGES[:1])
    batch = drafter.propose(first_step(drafter, texts, 30))
    law = medusa_reference(folder, texts.states[0, 7], vocabulary.matrix).softmax(-1)
    tree = tree_of(batch, 0)
    assert len(tree) == 30
    best = law.argmax(-1).tolist()
    classes = len(PROBABILITY_CLASSES)
    for path, source in zip(tree, batch.sources.tolist(), strict=True):
        p = float(law[len(path) - 1, path[-1]])
        column = int(np.searchsorted(PROBABILITY_CLASSES, p))
        behind = any(token != best[i] for i, token in enumerate(path[:-1]))
        assert source == column + classes * behind
    assert {*batch.sources // classes} == {0, 1}
    assert len(drafter.sources) == 2 * classes


def test_a_text_beyond_the_heads_positions_is_not_drafted_for(tmp_path, vocabulary, counted):
    """70 tokens: the anchor is at 69 and the last mask at 72."""
    for most, drafted in ((73, True), (72, False)):
        folder = save_block(tmp_path / str(most), "dflash", VOCAB, max_position_embeddings=most)
        drafter = proposer(folder, vocabulary, counted)
        counted.clear()
        batch = drafter.propose(first_step(drafter, Texts([3, 70, 30], 2, PAGES)))
        assert (batch.counts > 0).tolist() == [True, drafted, True]
        assert counted["texts_beyond_head"] == (not drafted)


def test_what_is_kept_per_slot(tmp_path, vocabulary, counted):
    drafter = proposer(save_block(tmp_path, "dflash", VOCAB), vocabulary, counted)
    assert drafter.slot_bytes() == 2 * 2 * 2 * 32 * 4  # layers, keys and values, heads, size, bytes
    assert drafter.hidden_layers == (1, 2)
    assert (drafter.reads_hidden, drafter.levels, drafter.rule) == (True, None, None)


def test_a_step_in_which_nobody_drafts_is_followed(tmp_path, vocabulary, counted):
    """Its rows are context of the next one."""
    folder = save_block(tmp_path, "dflash", VOCAB)
    texts = Texts([3, 70, 30], 2, PAGES)
    drafts = []
    for pauses in (False, True):
        drafter = proposer(folder, vocabulary, counted)
        step = first_step(drafter, texts)
        if pauses:
            step.max_nodes[:] = 0
            assert not len(drafter.propose(step).tokens)
            rows = texts.rows([(n - 2, n - 1) for n in texts.lengths.tolist()])
            step = replace(step, target_rows=rows, max_nodes=np.full(3, 10, np.int32))
        drafts.append(drafter.propose(step).tokens.tolist())
    assert drafts[0] == drafts[1]


def test_p_eagle_goes_on_from_the_text(tmp_path, vocabulary, counted):
    folder = save_parallel(tmp_path, VOCAB)
    drafter = proposer(folder, vocabulary, counted)
    assert drafter.slot_bytes() == 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, size, bytes
    assert drafter.hidden_layers == ()  # vLLM's choice
    reference = ParallelReference(folder, vocabulary.embedding, vocabulary.matrix)
    texts = Texts([3, 70, 30], 3, PAGES)
    step = first_step(drafter, texts)
    step.chain_only[:] = True
    batch = drafter.propose(step)
    assert batch.counts.tolist() == [4, 4, 4]
    for r, length in enumerate(texts.lengths.tolist()):
        text = texts.tokens[r, :length].tolist()
        logits = reference(text, texts.states[r, : length - 1], 4)
        assert tree_of(batch, r)[-1] == tuple(logits.argmax(-1).tolist())
    drafter.forget(step.request_ids[1])
    assert list(drafter._executor._waiting) == [step.request_ids[0], step.request_ids[2]]


def test_p_eagle_has_a_row_less_ahead(tmp_path, vocabulary, counted):
    """70 tokens: the newest one's row is at 68, and the last of three masks at 71."""
    for most, drafted in ((72, True), (71, False)):
        folder = save_parallel(tmp_path / str(most), VOCAB)
        path = tmp_path / str(most) / "config.json"
        config = json.loads(path.read_text())
        config["transformer_layer_config"]["max_position_embeddings"] = most
        path.write_text(json.dumps(config))
        drafter = proposer(folder, vocabulary, counted)
        counted.clear()
        batch = drafter.propose(first_step(drafter, Texts([3, 70, 30], 3, PAGES)))
        assert (batch.counts > 0).tolist() == [True, drafted, True]
        assert counted["texts_beyond_head"] == (not drafted)
