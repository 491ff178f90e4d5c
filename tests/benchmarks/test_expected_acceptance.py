"""The benchmark's expected tokens of a step, against the exact oracle's."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tree_rules_oracle as oracle
from tests.samplers.test_tree_rules import Drafts, P, Q
from vllm_specplus.samplers.registry import rule_class
from vllm_specplus.step import DraftProbs
from vllm_specplus.tree import accepted_paths

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from expected_acceptance import expected_tokens, summary

pytestmark = pytest.mark.slow  # tens of seconds together


def expected(rule, drafts):
    draft_probs = DraftProbs(torch.tensor(Q, dtype=torch.float32), drafts.index, drafts.drawn)
    p = torch.tensor(P[drafts.contexts], dtype=torch.float32)
    return p, draft_probs, expected_tokens(rule, p, drafts.rows, draft_probs)


@pytest.mark.parametrize(
    ("rule", "branching", "mode", "law"),
    [
        ("without_replacement", [1, 1, 1], "with", oracle.step([1, 1, 1], "with", "keepq")),
        ("with_replacement", [2, 2], "with", oracle.step([2, 2], "with", "keepq")),
        ("without_replacement", [3, 2], "without", oracle.step([3, 2], "without", "renormq")),
        ("block", [1, 1, 1], "with", oracle.block(3)),
        ("traversal", [2, 2], "without", oracle.traversal([2, 2])),
    ],
)
def test_the_mean_over_drafts_is_the_oracles(rule, branching, mode, law):
    _, _, tokens = expected(rule, Drafts(branching, mode, 4_000))
    error = tokens.std() / len(tokens) ** 0.5
    assert tokens.mean() == pytest.approx(float(oracle.elen(law)), abs=4 * error + 1e-6)


def test_k_seq_at_one_level():
    _, _, tokens = expected("k_seq", Drafts([3], "with", 2_000))
    error = tokens.std() / len(tokens) ** 0.5
    assert tokens.mean() == pytest.approx(1.79669, abs=4 * error)


@pytest.mark.parametrize(
    ("rule", "branching", "mode"),
    [
        ("without_replacement", [2, 2], "without"),
        ("with_replacement", [2, 2], "with"),
        ("k_seq", [2, 2], "with"),
        ("block", [1, 1, 1], "with"),
        ("traversal", [2, 2], "without"),
    ],
)
def test_each_tree_has_the_mean_of_its_judgements(rule, branching, mode):
    drafts = Drafts(branching, mode, 20)
    p, draft_probs, tokens = expected(rule, drafts)
    torch.manual_seed(0)
    n, rows = 400, drafts.rows
    judged = np.zeros((n, drafts.n))
    for each in judged:
        noise = torch.rand(len(rows.tokens)), torch.rand(drafts.n)
        sampled = rule_class(rule)().reference(p, rows, draft_probs, *noise)
        _, each[:] = accepted_paths(rows.tokens, rows.parents, rows.starts, sampled.numpy())
    # Chebyshev would allow more; 20 trees at 4.5 standard errors fail once in 7,000 seeds.
    assert (abs(judged.mean(0) - tokens) < 4.5 * judged.std(0) / n**0.5 + 1e-6).all()
    assert tokens.std() > 0


def test_differences_are_paired_by_question():
    each = [[(1.0, 1), (2.0, 2)], [(3.0, 3)], [], [(1.0, 1)]]
    more = [[(value + 0.5, judged) for value, judged in of] for of in each]
    rows = summary(
        {
            "chain, token by token": each, "chain, block": each, "spectr, recursive": each,
            "spectr, k-SEQ": each, "rsd_s, recursive": more,
        }
    )  # fmt: skip
    row = rows["rsd_s, recursive"]
    assert row["places"] == 4
    assert row["tokens"] == 2.25
    assert row["judged"] == 1.75
    assert row["over spectr, k-SEQ"] == 0.5
    assert row["over spectr, k-SEQ ci"] < 1e-12
    assert row["tokens ci"] > 0
    with pytest.raises(RuntimeError, match="same places"):
        summary({"chain, token by token": each, "spectr, recursive": each[::-1]})
