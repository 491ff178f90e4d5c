"""SWIFT's tree, and drafts that end early, by a draft model on its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from tests.proposers.test_draft_tree import made
from vllm_specplus.control.levels import tree_depths
from vllm_specplus.drafting.shapes import (
    CATERPILLAR_WIDTHS,
    Caterpillar,
    caterpillar_widths,
    draft_distribution,
)
from vllm_specplus.proposer import Services
from vllm_specplus.step import Sampling, StepContext, bare_step
from vllm_specplus.tree import DraftBatch

NODES = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return save_draft(tmp_path_factory.mktemp("draft"))


def drafter(folder: str, **keys):
    config = {"method": "draft_tree", "model": folder, "num_speculative_tokens": NODES}
    return made(config | keys, Services(VOCAB))


def step_of(proposer, lengths: list[int], temperature: float = 0.0) -> StepContext:
    texts = np.random.default_rng(0).integers(0, VOCAB, (len(lengths), max(lengths)))
    step = bare_step(proposer.sources, texts.astype(np.int32), NODES)
    count = len(lengths)
    sampling = Sampling(
        np.full(count, temperature, np.float32), np.full(count, VOCAB, np.int32),
        np.ones(count, np.float32), list(range(count)),
    )  # fmt: skip
    return replace(step, num_tokens=np.array(lengths, np.int32), sampling=sampling)


def trees(batch: DraftBatch) -> list[tuple[list[int], list[int]]]:
    ends = np.cumsum(batch.counts)
    return [
        (batch.tokens[end - n : end].tolist(), batch.parents[end - n : end].tolist())
        for n, end in zip(batch.counts.tolist(), ends.tolist(), strict=True)
    ]


def test_widths_are_swifts():
    sure = np.array([0.96, 0.95, 0.81, 0.8, 0.51, 0.5, 0.0], np.float32)
    greedy = caterpillar_widths(sure, np.ones(7, bool)).tolist()
    drawn = caterpillar_widths(sure, np.zeros(7, bool)).tolist()
    assert greedy == [3, 5, 5, 8, 8, 10, 10]
    assert drawn == [1, 3, 3, 5, 5, 10, 10]
    assert CATERPILLAR_WIDTHS == ((3, 5, 8, 10), (1, 3, 5, 10))


def test_a_level_is_a_node_that_goes_on_and_leaves():
    torch.manual_seed(0)
    q = torch.rand(2, 1, 20).softmax(-1)
    greedy = torch.tensor([True, False])
    shape = Caterpillar(3, greedy)
    noise = torch.rand(2, shape.noise_size(1), dtype=torch.float64)
    level = shape.expand(q, noise)
    assert level.tokens[0].tolist() == q[0, 0].topk(10).indices.tolist()
    assert len(set(level.tokens[1].tolist())) == 10
    assert not level.parents.any()
    # The first of the others is drawn by its probability.
    many = Caterpillar(1, torch.zeros(4000, dtype=torch.bool))
    drawn = many.expand(q[1:].expand(4000, 1, 20), torch.rand(4000, 10, dtype=torch.float64))
    share = torch.bincount(drawn.tokens[:, 0], minlength=20) / 4000
    assert (share - q[1, 0]).abs().max() < 0.03


def by_hand(proposer, step: StepContext, r: int, threshold: float) -> tuple[list[int], list[int]]:
    """A greedy caterpillar with a stop, from passes of its own over the whole text."""
    text = step.token_ids[r, : step.num_tokens[r]].tolist()
    tokens, parents, above, room = [], [], -1, NODES
    while room:
        name = f"by hand {len(tokens)}"
        proposer._executor.room(name, len(text))
        logits = proposer._executor.begin([name], [np.array(text, np.int32)])
        q = draft_distribution(logits[:, None], torch.zeros(1), None, None)[0, 0]
        width = min(int(caterpillar_widths(q.max().numpy()[None], np.ones(1, bool))[0]), room)
        best = q.topk(width).indices.tolist()
        first = len(tokens)
        tokens += best
        parents += [above] * width
        above, room = first, room - width
        text.append(best[0])
        if float(q.max()) < threshold:
            break
    return tokens, parents


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.05])
def test_a_greedy_tree_is_the_one_made_by_hand(folder, threshold):
    stop = {"rule": "confidence", "threshold": threshold}
    proposer = drafter(folder, shape="caterpillar", stop=stop)
    step = step_of(proposer, [9, 30, 17])
    found = trees(proposer.propose(step))
    for r, tree in enumerate(found):
        assert tree == by_hand(proposer, step, r, threshold)
    depths = tree_depths(
        np.concatenate([np.array(parents, np.int32) for _, parents in found]),
        np.cumsum([0, *(len(tokens) for tokens, _ in found)]).astype(np.int32),
    )
    assert (depths >= 1).all()


def test_a_sampled_tree_names_what_its_nodes_were_drawn_from(folder):
    proposer = drafter(folder, shape="caterpillar")
    assert proposer.rule == "without_replacement"
    batch = proposer.propose(step_of(proposer, [9, 30], temperature=1.0))
    assert (batch.drawn_from >= 0).all()
    for r, (tokens, parents) in enumerate(trees(batch)):
        first = int(batch.counts[:r].sum())
        rows = batch.drawn_from[first : first + len(tokens)]
        for parent in set(parents):
            siblings = [i for i, each in enumerate(parents) if each == parent]
            assert len({int(rows[i]) for i in siblings}) == 1
            assert len({tokens[i] for i in siblings}) == len(siblings)
        # Only the first of a level goes on.
        firsts = {min(i for i, each in enumerate(parents) if each == p) for p in set(parents)}
        assert set(parents) - {-1} <= firsts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_chain_that_ends_is_the_start_of_one_that_does_not(folder, temperature):
    """The later the less it takes; nobody is sure of a token altogether, which stays anyway."""
    keys = {"shape": "chain", "num_speculative_tokens": 8}
    whole, lengths = drafter(folder, **keys), []
    step = step_of(whole, [9, 30, 17, 22], temperature)
    step.max_nodes[:] = 8
    long = trees(whole.propose(step))
    for threshold in (0.0, 0.02, 0.1, 1.0):
        ended = drafter(folder, **keys, stop={"rule": "confidence", "threshold": threshold})
        short = trees(ended.propose(step))
        for (tokens, _), (some, _) in zip(long, short, strict=True):
            assert tokens[: len(some)] == some
        lengths.append([len(tokens) for tokens, _ in short])
    assert (lengths[0], lengths[-1]) == ([8] * 4, [1] * 4)
    assert (np.diff(lengths, axis=0) <= 0).all()


def test_what_became_of_a_draft_is_told(folder):
    proposer = drafter(folder, shape="chain", num_speculative_tokens=4)
    told = []
    proposer._verified = lambda *each: told.append(each)
    step = step_of(proposer, [9, 30])
    step.max_nodes[:] = 4
    proposer.propose(step)
    assert told == []
    proposer.propose(replace(step, num_tokens=step.num_tokens + np.array([3, 0], np.int32)))
    assert told == [("request 0", 4, 2)]
    proposer.forget("request 0")
    proposer.forget("request 1")
    proposer.propose(replace(step, num_tokens=step.num_tokens + 5))
    assert len(told) == 1


def test_levels_are_told_by_parents():
    """Of a tree whose levels hold different numbers of nodes; of none; of a chain."""
    parents = np.array([-1, -1, -1, 0, 0, 3, -1, 0, 1], np.int32)
    starts = np.array([0, 6, 6, 9], np.int32)
    assert tree_depths(parents, starts).tolist() == [3, 0, 3]
    assert tree_depths(parents[:0], np.zeros(3, np.int32)).tolist() == [0, 0]
