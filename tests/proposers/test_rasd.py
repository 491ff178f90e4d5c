"""RASD: members are run, fused, and lossless together."""

from __future__ import annotations

import itertools
import os
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.datastores import build_datastore
from tests.drafting.test_drafting import save_draft
from vllm_specplus import config
from vllm_specplus.drafting.payoff import EVERY
from vllm_specplus.drafting.trees import Fusion
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.proposers.rasd import TOP, Rasd, probable
from vllm_specplus.samplers import lossless
from vllm_specplus.step import (
    PROBABILITY_CLASSES,
    Observation,
    Rows,
    Sampling,
    StepContext,
    bare_step,
)
from vllm_specplus.tree import DraftBatch, row_depths

VOCAB = 40


def observed(text: list[int], ranks: int = 8) -> Observation:
    """Every token of the text is followed by the next one and by ranks that are wrong."""
    tokens = np.array(text[:-1], np.int32)
    top = np.stack([(np.array(text[1:], np.int32) + i) % VOCAB for i in range(ranks)], 1)
    previous = np.concatenate(([-1], tokens[:-1])).astype(np.int32)
    return Observation(tokens, previous, np.ascontiguousarray(top), np.ones(len(tokens), bool))


def context(proposer: Proposer, text: list[int], nodes: int = 20) -> StepContext:
    step = bare_step(proposer.sources, np.array([text], np.int32), nodes)
    return replace(step, request_ids=["r"], observation=observed(text))


def paths_of(batch: DraftBatch) -> set[tuple[int, ...]]:
    paths = []
    for token, parent in zip(batch.tokens.tolist(), batch.parents.tolist(), strict=True):
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return set(paths)


@pytest.fixture
def reported() -> list[Exception]:
    return []


@pytest.fixture
def rasd(tmp_path, reported) -> Rasd:
    store = build_datastore(tmp_path / "store", [[7, 8, 30, 31, 32], [7, 8, 9, 33]], VOCAB)
    parsed = config.parse(
        {
            "method": "rasd",
            "sources": ["suffix_tree", {"method": "rest", "datastore": str(store)},
                        {"method": "token_recycling", "top_k": 4, "match_context": False}],
        }
    )  # fmt: skip
    return Rasd(parsed, Services(VOCAB, report=reported.append))


TEXT = [5, 7, 8, 9, 10, 5, 7, 8]


def test_the_draft_holds_what_every_source_finds(rasd):
    rasd.warm_up()
    batch = rasd.propose(context(rasd, TEXT, nodes=60))
    paths = paths_of(batch)
    assert (9, 10, 5) in paths  # its own text
    assert (30, 31, 32) in paths  # the datastore
    assert (12,) in paths  # fourth rank of a row
    by_path = {rasd.sources[s].name for s in batch.sources}
    assert any(name.startswith(("two agree", "more agree")) for name in by_path)
    assert any(name.startswith("datastore") for name in by_path)
    assert any(name.startswith("pair rank") for name in by_path)


def test_drafters_come_first_and_get_the_ranks_they_asked_for(rasd):
    assert [m.config.method for m in rasd.members] == ["token_recycling", "suffix_tree", "rest"]
    assert rasd.top_k == 4
    rasd.propose(context(rasd, TEXT))
    assert rasd.members[0].matrix[5].tolist() == [7, 8, 9, 10]


def test_a_step_without_drafts_is_learnt_from(rasd):
    """By all sources; nothing of it is weighed, and what was drafted before is."""
    for _ in range(EVERY):
        rasd.propose(context(rasd, TEXT[:4], nodes=60))
    judged = []
    rasd._payoff._learn = lambda trees, step, interval: judged.append(trees.tokens)
    silent = rasd.propose(context(rasd, [*TEXT, 21, 22, 23], nodes=0))
    assert not len(silent.tokens)
    assert silent.counts.tolist() == [0]
    assert len(judged) == 1
    assert rasd._payoff._drafted is None
    assert rasd.members[0].matrix[22].tolist() == [23, 24, 25, 26]
    paths = paths_of(rasd.propose(context(rasd, [*TEXT, 21, 22, 23, 21], nodes=60)))
    assert (22, 23) in paths


def test_a_failing_source_costs_only_its_own_drafts(rasd, reported):
    store = rasd.members[2]
    os.truncate(store.datastore.path / "order.bin", 5)
    paths = paths_of(rasd.propose(context(rasd, TEXT, nodes=60)))
    assert "order.bin" in str(reported[0])
    assert (9, 10, 5) in paths
    assert (30, 31, 32) not in paths


def test_forgetting_reaches_every_source(rasd):
    rasd.propose(context(rasd, TEXT))
    suffix_tree = rasd.members[1]
    assert suffix_tree._requests
    rasd.forget("r")
    assert not suffix_tree._requests


def test_a_source_that_cannot_forget_stops_no_other(rasd, reported, monkeypatch):
    def fail(request_id):
        raise KeyError(request_id)

    forgotten = []
    monkeypatch.setattr(rasd.members[0], "forget", fail)
    monkeypatch.setattr(rasd.members[1], "forget", forgotten.append)
    rasd.forget("r")
    assert forgotten == ["r"]
    assert [type(error) for error in reported] == [KeyError]


def test_without_retrieved_tokens_the_draft_is_the_drafters(tmp_path):
    store = build_datastore(tmp_path / "store", [[1, 2]], VOCAB)
    keys = {"method": "token_recycling", "match_context": False}
    both = Rasd(
        config.parse(
            {"method": "rasd", "sources": [keys, {"method": "rest", "datastore": str(store)}]}
        ),
        Services(VOCAB),
    )
    alone = Rasd(config.parse({"method": "rasd", "sources": [keys]}), Services(VOCAB))
    drafts = [r.propose(context(r, TEXT)) for r in (both, alone)]
    assert drafts[0].tokens.tolist() == drafts[1].tokens.tolist()
    assert drafts[0].parents.tolist() == drafts[1].parents.tolist()
    assert drafts[0].sources.tolist() == drafts[1].sources.tolist()


# -- a draft model among the sources --------------------------------------------------


@pytest.fixture
def with_draft(tmp_path, reported) -> Rasd:
    return make_with_draft(tmp_path, reported.append)


def make_with_draft(tmp_path, report=lambda error: None, **keys) -> Rasd:
    draft = {
        "method": "draft_tree", "model": save_draft(tmp_path / "draft", vocab=VOCAB), "width": 3,
        "num_speculative_tokens": 6, **keys,
    }  # fmt: skip
    parsed = config.parse({"method": "rasd", "sources": ["suffix_tree", draft]})
    proposer = Rasd(parsed, Services(VOCAB, report=report))
    torch.manual_seed(0)  # of what is drawn
    proposer.load_draft(torch.device("cpu"), torch.float32)
    return proposer


def test_a_draft_model_adds_its_most_probable_sequences(with_draft):
    draft = with_draft.members[0]
    assert draft.config.shape == "topk"
    batch = with_draft.propose(context(with_draft, TEXT, nodes=60))
    alone = draft.propose(context(draft, TEXT, nodes=6))
    assert len(alone.tokens) == 6
    assert paths_of(alone) <= paths_of(batch)
    assert (9, 10, 5) in paths_of(batch)
    assert batch.draft_probs is None  # the one-hot rule
    # Labelled by what the draft thinks of the first child.
    text = torch.tensor([TEXT])
    reference = AutoModelForCausalLM.from_pretrained(draft.config.model, dtype=torch.float32)
    likely = reference(text).logits[0, -1].softmax(-1).max().item()
    high = next(high for high in PROBABILITY_CLASSES if likely <= high)
    assert draft.sources[alone.sources[0]].name == f"draft gives up to {high}"


def test_a_small_budget_takes_fewer_passes_of_the_draft(with_draft):
    draft, passes = with_draft.members[0], []
    grow = draft._executor.grow
    draft._executor.grow = lambda *args: passes.append(1) or grow(*args)
    for nodes, expected in ((3, 0), (6, 1), (60, 1), (0, 0)):
        passes.clear()
        with_draft.propose(context(with_draft, TEXT, nodes=nodes))
        assert len(passes) == expected


def test_a_draft_without_room_is_reported_and_left_out(with_draft, reported):
    with_draft.members[0]._executor.room = lambda *args: False
    paths = paths_of(with_draft.propose(context(with_draft, TEXT, nodes=60)))
    assert "raise kv_memory_mb" in str(reported[0])
    assert paths
    assert all(path == (9, 10, 5, 7, 8)[: len(path)] for path in paths)


@pytest.mark.parametrize("nodes", [8, 60])
def test_what_is_drawn_stays(tmp_path, nodes):
    """All of it, first among its siblings, with its law and a label that no draw changed."""
    rasd = make_with_draft(tmp_path, shape="rsd_s")
    assert rasd.rule == "without_replacement"
    one = np.ones(1, np.float32)
    sampling = Sampling(one, np.array([VOCAB], np.int32), one, [None])
    twins = 0
    for _ in range(40):
        batch = rasd.propose(replace(context(rasd, TEXT, nodes), sampling=sampling))
        drawn = batch.drawn_from >= 0
        assert drawn.sum() == 6
        assert drawn[:6].all()  # memory would cut the end
        assert {rasd.sources[s].name for s in batch.sources[:6]} == {"level"}
        assert batch.draft_probs.shape == (4, VOCAB)
        drawn_first = batch.tokens[:6][batch.parents[:6] < 0]
        found_first = batch.tokens[6:][batch.parents[6:] < 0]
        twin = 9 in drawn_first  # the token that its own text suggests
        assert found_first.tolist() == ([] if twin else [9])
        twins += twin
    assert 0 < twins < 40


@pytest.mark.parametrize(
    ("keys", "other", "says"),
    [
        (
            {"shape": "spectr"},
            "suffix_tree",
            "chain, rsd_c, rsd_s, caterpillar or topk",
        ),
        ({"verification": "traversal"}, "suffix_tree", "leave 'verification' out"),
        ({}, "easyspec", "draft_tree and easyspec both draw their nodes"),
    ],
)
def test_what_cannot_be_fused_is_refused(tmp_path, keys, other, says):
    draft = {"method": "draft_tree", "model": save_draft(tmp_path), "shape": "rsd_s", **keys}
    sources = [draft, other if other == "suffix_tree" else draft | {"method": other}]
    with pytest.raises(ValueError, match=says):
        config.parse({"method": "rasd", "sources": sources})


# -- the paper's pruning -------------------------------------------------------------


@pytest.mark.slow
def test_what_the_draft_model_finds_improbable_is_pruned(tmp_path):
    """But its ten most probable tokens stay, whatever ``prune`` says."""
    draft = {
        "method": "draft_tree", "model": save_draft(tmp_path / "draft", vocab=VOCAB), "width": 3,
        "num_speculative_tokens": 3,
    }  # fmt: skip
    reference = AutoModelForCausalLM.from_pretrained(draft["model"], dtype=torch.float32)
    seen = {}
    for token in range(6, 30):  # what followed 7, 8 before
        text = [5, 7, 8, token, 10, 5, 7, 8]
        keys = {"method": "rasd", "sources": ["suffix_tree", draft], "prune": 0.9}
        proposer = Rasd(config.parse(keys), Services(VOCAB))
        proposer.load_draft(torch.device("cpu"), torch.float32)
        paths = paths_of(proposer.propose(context(proposer, text, nodes=60)))
        ranks = reference(torch.tensor([text])).logits[0, -1].argsort(descending=True).tolist()
        assert ((token, 10) in paths) == (ranks.index(token) < TOP)
        assert {(t,) for t in ranks[:3]} <= paths  # what was drafted stays
        seen[(token, 10) in paths] = True
    assert seen == {True: True, False: True}


def test_pruning_by_probability():
    draft = DraftBatch(
        np.array([0, 1, 30, 2, 1], np.int32), np.array([-1, 0, -1, -1, -1], np.int32),
        np.array([3, 2], np.int32),
    )  # fmt: skip
    q = torch.full((1, 20), 1e-4)
    q[0, 5:] = 0.01  # more than ten that are more probable than those
    q[0, 0] = 0.005
    everywhere, of_first = np.array([0, 0], np.int32), np.array([0, -1], np.int32)
    assert probable(draft, q, everywhere, 1e-3).tolist() == [True, True, False, False, False]
    assert probable(draft, q, of_first, 1e-3).tolist() == [True, True, False, True, True]
    assert probable(draft, q, everywhere, 1e-2).tolist() == [False, True, False, False, False]


# -- exactness ------------------------------------------------------------------------


def target(path: tuple[int, ...]) -> list[Fraction]:
    """A distribution over three tokens that depends on the whole path."""
    weights = [1 + (7 * t + 3 * sum(path) + len(path) ** 2) % 5 for t in range(3)]
    return [Fraction(w, sum(weights)) for w in weights]


def drawn_from(batch: DraftBatch, length: int, accept) -> dict[tuple[int, ...], Fraction]:
    """Exact law of the next ``length`` tokens: all draws at all rows, then plain decoding."""
    count = len(batch.tokens)
    parents = np.concatenate(([-1], batch.parents + 1)).astype(np.int32)
    starts = np.array([0, count + 1], np.int32)
    rows = Rows(
        np.concatenate(([0], batch.tokens)).astype(np.int32), parents, starts,
        row_depths(parents, starts),
    )  # fmt: skip
    paths = [()]
    for token, parent in zip(batch.tokens.tolist(), batch.parents.tolist(), strict=True):
        paths.append((*paths[parent + 1], token))
    law: dict[tuple[int, ...], Fraction] = {}
    for draws in itertools.product(range(3), repeat=count + 1):
        p = Fraction(1)
        for path, token in zip(paths, draws, strict=True):
            p *= target(path)[token]
        for text, q in accept(rows, np.array(draws, np.int32), paths).items():
            law[text] = law.get(text, 0) + p * q
    for _ in range(length):
        longer: dict[tuple[int, ...], Fraction] = {}
        for text, p in law.items():
            follow = [(text, p)] if len(text) >= length else [
                ((*text, t), p * q) for t, q in enumerate(target(text))
            ]  # fmt: skip
            for t, q in follow:
                longer[t[:length]] = longer.get(t[:length], 0) + q
        law = longer
    return law


def plain(length: int) -> dict[tuple[int, ...], Fraction]:
    law = {(): Fraction(1)}
    for _ in range(length):
        law = {(*t, i): p * q for t, p in law.items() for i, q in enumerate(target(t))}
    return law


def fused_draft() -> DraftBatch:
    """Two deterministic sources that share a node: 0 -> 1 and 0 -> 2, 1."""
    fusion = Fusion([Proposer.sources] * 2)
    zero = np.zeros(4, np.int32)
    first = DraftBatch(np.array([0, 1], np.int32), np.array([-1, 0], np.int32), zero[:1] + 2)
    second = DraftBatch(
        np.array([0, 2, 1], np.int32), np.array([-1, 0, -1], np.int32), zero[:1] + 3
    )
    drafts = [replace(d, sources=zero[: len(d.tokens)]) for d in (first, second)]
    batch = fusion.fuse(drafts, bare_step(fusion.sources, zero[None], 10))
    assert paths_of(batch) == {(0,), (0, 1), (0, 2), (1,)}
    return batch


def test_the_fused_tree_is_verified_exactly():
    def accept(rows, draws, paths):
        accepted = lossless.accept(rows, draws)
        return {tuple(accepted.output[0, : accepted.lengths[0]].tolist()): Fraction(1)}

    assert drawn_from(fused_draft(), 3, accept) == plain(3)


def test_a_ratio_rule_on_retrieved_nodes_is_not():
    """Negative control of the card: p/q with q = the source's probability of the node."""
    q = Fraction(1, 2)

    def accept(rows, draws, paths):
        # The first child of the root is taken with min(1, p/q), else the root's own draw.
        p = target(())[int(rows.tokens[1])]
        ratio = min(Fraction(1), p / q)
        return {(int(rows.tokens[1]),): ratio, (int(draws[0]),): 1 - ratio}

    law, exact = drawn_from(fused_draft(), 1, accept), plain(1)
    distance = sum(abs(law[t] - exact[t]) for t in exact) / 2
    assert distance > Fraction(1, 100)
