"""Relaxed acceptance against its definitions, node by node."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from vllm_specplus.config import parse
from vllm_specplus.samplers import lossless, relaxed
from vllm_specplus.step import Rows
from vllm_specplus.tree import row_depths

VOCAB = 12
TYPICAL = relaxed.Typical(epsilon=0.09, delta=0.3)
MARGIN = relaxed.TopKMargin(top_k=3, margin=0.7)


def make_rows(tokens, parents, starts) -> Rows:
    parents, starts = np.array(parents, np.int32), np.array(starts, np.int32)
    return Rows(np.array(tokens, np.int32), parents, starts, row_depths(parents, starts))


def random_rows(rng, requests: int) -> Rows:
    tokens, parents, starts = [], [], [0]
    for _ in range(requests):
        count = int(rng.integers(1, 9))
        parents += [-1, *(int(rng.integers(0, i)) for i in range(1, count))]
        tokens += rng.integers(0, VOCAB, count).tolist()
        starts.append(len(tokens))
    return make_rows(tokens, parents, starts)


def test_what_the_rules_see():
    rng = np.random.default_rng(0)
    rows = random_rows(rng, 30)  # more nodes than one chunk
    temperature = rng.choice([0.0, 0.5, 1.3], 30).astype(np.float32)
    logits = torch.from_numpy(rng.normal(0, 2, (len(rows.tokens), VOCAB))).float()
    logits[:, 3] = float("-inf")  # a padded vocabulary
    statistics = relaxed.candidate_statistics(logits.clone(), rows, temperature)
    assert statistics.rows.tolist() == np.flatnonzero(rows.parents >= 0).tolist()
    assert len(statistics.rows) > relaxed.CHUNK
    for n, row in enumerate(statistics.rows):
        r = int(np.searchsorted(rows.starts, row, side="right")) - 1
        above = rows.starts[r] + rows.parents[row]
        p = torch.softmax(logits[above].double() / (temperature[r] or 1.0), 0).numpy()
        x = p[rows.tokens[row]]
        assert statistics.probability[n] == pytest.approx(x, rel=1e-4)
        assert statistics.rank[n] == (p > x).sum()
        assert statistics.mass_above[n] == pytest.approx(p[p > x].sum(), rel=1e-4, abs=1e-6)
        assert statistics.best[n] == pytest.approx(p.max(), rel=1e-4)
        entropy = -sum(q * np.log(q) for q in p if q > 0)
        assert statistics.entropy[n] == pytest.approx(entropy, rel=1e-4, abs=1e-5)


def candidates(probability, rank, best, entropy) -> relaxed.CandidateStatistics:
    columns = (probability, np.zeros(len(rank)), best, entropy)
    p, mass, best, entropy = (np.array(c, np.float32) for c in columns)
    return relaxed.CandidateStatistics(np.arange(len(rank)), p, np.array(rank), mass, best, entropy)


def test_typical():
    """Certain texts (entropy 0): 9 %. Open ones: 30 % of exp(-H), here 1.5 % of e^-3."""
    statistics = candidates(
        [0.08, 0.1, 0.014, 0.016], [1, 1, 9, 9], [0.9, 0.9, 0.1, 0.1], [0, 0, 3, 3]
    )
    assert TYPICAL.accepts(statistics).tolist() == [False, True, False, True]


def test_top_k_margin():
    best = [0.4] * 4
    statistics = candidates([0.19, 0.21, 0.4, 0.25], [2, 2, 0, 3], best, [0] * 4)
    assert MARGIN.accepts(statistics).tolist() == [False, True, True, False]


def test_the_best_accepted_node_takes_the_place_of_a_draw_that_no_node_holds():
    #        root -> 5, 6;  5 -> 7;  6 -> 8 -> 9
    rows = make_rows([1, 5, 6, 7, 8, 9], [-1, 0, 0, 1, 2, 4], [0, 6])
    statistics = relaxed.CandidateStatistics(
        np.arange(1, 6), np.array([0.2, 0.3, 0.5, 0.4, 0.1], np.float32), *[np.zeros(5)] * 4
    )
    everything = np.ones(5, bool)

    def text(sampled, accepted=everything, stop=frozenset()):
        out, count = relaxed.substitute(
            rows, np.array(sampled, np.int32), statistics, accepted, [stop]
        )
        kept = lossless.accept(rows, out)
        return kept.output[0, : kept.lengths[0]].tolist(), count

    draws = [3, 0, 0, 0, 0, 2]
    assert text(draws) == ([6, 8, 9, 2], 3)  # 6 is more probable than 5
    assert text([5, 7, 0, 4, 0, 0]) == ([5, 7, 4], 0)  # the draws are followed first
    assert text(draws, np.array([1, 0, 1, 1, 1], bool)) == ([5, 7, 0], 2)
    assert text(draws, np.zeros(5, bool)) == ([3], 0)
    assert text(draws, stop=frozenset({3})) == ([3], 0)  # the target stops
    assert text(draws, stop=frozenset({8})) == ([6, 0], 1)  # a node must not
    assert text(draws, stop=None) == ([3], 0)


def test_without_an_accepted_node_the_draws_stand():
    rng = np.random.default_rng(1)
    rows = random_rows(rng, 40)
    sampled = rng.integers(0, VOCAB, len(rows.tokens)).astype(np.int32)
    logits = torch.from_numpy(rng.normal(0, 1, (len(rows.tokens), VOCAB))).float()
    statistics = relaxed.candidate_statistics(logits, rows, np.ones(40, np.float32))
    nothing = np.zeros(len(statistics.rows), bool)
    out, count = relaxed.substitute(rows, sampled, statistics, nothing, [frozenset()] * 40)
    assert count == 0
    assert (out == sampled).all()
    loose, _ = relaxed.substitute(rows, sampled, statistics, ~nothing, [frozenset()] * 40)
    before, after = lossless.accept(rows, sampled), lossless.accept(rows, loose)
    assert (after.lengths >= before.lengths).all()
    assert after.lengths.sum() > before.lengths.sum()


@pytest.mark.parametrize("rule", [TYPICAL, MARGIN], ids=lambda rule: rule.name)
def test_all_nodes_at_once_equal_the_reference(rule):
    rng = np.random.default_rng(3)
    rows = random_rows(rng, 60)
    logits = torch.from_numpy(rng.normal(0, 2, (len(rows.tokens), VOCAB)))
    temperature = rng.choice([0.0, 0.7], 60).astype(np.float32)
    statistics = relaxed.candidate_statistics(logits.float(), rows, temperature)
    expected = []
    for row in statistics.rows:
        r = int(np.searchsorted(rows.starts, row, side="right")) - 1
        above = rows.starts[r] + rows.parents[row]
        p = torch.softmax(logits[above] / float(temperature[r] or 1.0), 0).numpy()
        expected.append(bool(rule.reference(p, rows.tokens[row], None)))
    assert rule.accepts(statistics).tolist() == expected
    assert {True, False} == set(expected)


def test_the_draws_are_followed_as_the_reference_does():
    rng = np.random.default_rng(4)
    rows = random_rows(rng, 80)
    sampled = rng.integers(-1, 4, len(rows.tokens)).astype(np.int32)
    sampled[rows.starts[:-1]] = rng.integers(0, 4, 80)
    rows.tokens[:] %= 4
    kept = lossless.accept(rows, sampled)
    texts = [out[:n].tolist() for out, n in zip(kept.output, kept.lengths, strict=True)]
    assert texts == lossless.Lossless().reference(rows, sampled)
    assert kept.lengths.max() > 2


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"acceptance": {"rule": "typical"}}, "changes what is answered: set 'allow_lossy'"),
        ({"allow_lossy": True}, "'allow_lossy' is for an 'acceptance' rule that is: remove it"),
        ({"acceptance": {"rule": "lax"}}, "unknown acceptance rule 'lax' (allowed: lossless, typ"),
        ({"acceptance": {}}, "'acceptance' needs a rule (allowed: lossless"),
        (
            {"acceptance": {"rule": "typical", "top_k": 3}},
            "unknown key 'acceptance.top_k' (rule 'typical' allows: rule, epsilon, delta)",
        ),
        ({"acceptance": {"rule": "top_k_margin", "margin": -1.0}}, "'acceptance.margin' is -1.0"),
        (
            {"method": "rasd", "sources": [{"method": "rest", "allow_lossy": True}]},
            "'rest' has a 'allow_lossy' of its own: set it once",
        ),
        (
            {"method": "layer_skip", "shape": "rsd_s", "allow_lossy": True,
             "acceptance": {"rule": "typical"}},
            "takes nodes that were not drawn: set 'shape' to 'topk'",
        ),
    ],
)  # fmt: skip
def test_mistakes_in_the_config(keys, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse({"method": "token_recycling"} | keys)


def test_a_method_is_lossless_unless_told_otherwise():
    assert parse({"method": "token_recycling"}).lossless
    loose = {"acceptance": {"rule": "typical"}, "allow_lossy": True}
    assert not parse({"method": "rasd"} | loose).lossless
    assert parse({"method": "token_recycling", "acceptance": {"rule": "lossless"}}).lossless
