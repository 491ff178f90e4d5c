"""SpecEE's proposer: another method's trees without their leaves."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.drafting.test_drafting import VOCAB, save_draft
from tests.drafting.test_exit_predictors import tensors
from tests.drafting.test_trees import random_tree
from tests.eagle_heads import save_head
from tests.model_configs import target
from tests.proposers.test_caterpillar import step_of
from vllm_specplus.config import parse
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.spec_ee import SpecEe, without_leaves
from vllm_specplus.step import Rows
from vllm_specplus.tree import DraftBatch, row_depths


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> dict:
    root = tmp_path_factory.mktemp("spec_ee")
    save_file(tensors(), root / "p.safetensors")
    draft = {
        "method": "draft_tree", "model": save_draft(root / "draft"), "shape": "topk", "width": 4
    }  # fmt: skip
    return {
        "method": "spec_ee", "draft": draft, "predictors": str(root / "p.safetensors"),
        "num_speculative_tokens": 4, "allow_lossy": True,
    }  # fmt: skip


@given(st.integers(0, 2**32 - 1), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_leaves_become_candidates(seed, count):
    rng = np.random.default_rng(seed)
    some = [random_tree(rng, most=12, vocab=9) for _ in range(3)]
    batch = DraftBatch(
        np.concatenate([tokens for tokens, _ in some]),
        np.concatenate([parents for _, parents in some]),
        np.array([len(tokens) for tokens, _ in some], np.int32),
        np.zeros(sum(len(tokens) for tokens, _ in some), np.int32),
    )
    verified, candidates = without_leaves(batch, count)
    first = 0
    for (tokens, parents), n, own in zip(some, verified.counts.tolist(), candidates, strict=True):
        inner = [i for i in range(len(tokens)) if i in parents]
        assert verified.tokens[first : first + n].tolist() == [int(tokens[i]) for i in inner]
        above = [inner.index(parents[i]) if parents[i] >= 0 else -1 for i in inner]
        assert verified.parents[first : first + n].tolist() == above
        for row, node in enumerate([-1, *inner]):
            children = [int(tokens[i]) for i in range(len(tokens)) if parents[i] == node]
            assert own[row].tolist() == (children + [-1] * count)[:count]
        first += n
    assert len(verified.sources) == len(verified.tokens) == first


def rows_of(batch: DraftBatch, roots: list[int]) -> Rows:
    tokens, parents, starts, first = [], [], [0], 0
    for root, n in zip(roots, batch.counts.tolist(), strict=True):
        tokens += [root, *batch.tokens[first : first + n].tolist()]
        parents += [-1, *(batch.parents[first : first + n] + 1).tolist()]
        starts.append(len(tokens))
        first += n
    parents, starts = np.array(parents, np.int32), np.array(starts, np.int32)
    return Rows(np.array(tokens, np.int32), parents, starts, row_depths(parents, starts))


@pytest.mark.parametrize("nodes", [4, 12])
def test_rows_are_given_what_was_drafted_below_them(config, nodes):
    """One level: nothing is verified, and the root has four candidates. Of more, the inner nodes
    are."""
    proposer = SpecEe(parse(config | {"num_speculative_tokens": nodes}), Services(VOCAB))
    proposer.load_draft(torch.device("cpu"), torch.float32)
    step = step_of(proposer, [9, 30])
    step.max_nodes[:] = nodes
    batch = proposer.propose(step)
    assert (batch.counts == 0).all() == (nodes == 4)
    roots = step.token_ids[[0, 1], step.num_tokens - 1].tolist()
    rows = rows_of(batch, roots)
    found = proposer.candidates(step.request_ids, rows)
    assert found.shape == (len(rows.tokens), 4)
    assert (found[:, 0] >= 0).all()
    # The verified children of a row are among its candidates.
    for row in np.flatnonzero(rows.parents >= 0):
        r = int(np.searchsorted(rows.starts, row, side="right")) - 1
        above = found[rows.starts[r] + rows.parents[row]]
        assert rows.tokens[row] in above
    # Of another tree, and of an older text, nothing is known.
    other = rows_of(batch, [roots[0] + 1, roots[1]])
    assert (proposer.candidates(step.request_ids, other)[: other.starts[1]] == -1).all()
    proposer.inner.propose = None  # fails
    with pytest.raises(TypeError):
        proposer.propose(step)
    assert (proposer.candidates(step.request_ids, rows) == -1).all()


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"allow_lossy": False}, "method 'spec_ee' changes what is answered: set 'allow_lossy'"),
        ({"acceptance": {"rule": "typical"}}, "has no 'acceptance' rule beside that"),
        ({"draft": {"method": "spec_ee"}}, "'draft' is 'spec_ee' itself"),
        (
            {"draft": {"method": "token_recycling", "num_speculative_tokens": 3}},
            "'draft' has 'num_speculative_tokens' of its own",
        ),
        ({"draft": {"method": "nothing"}}, "unknown method 'nothing'"),
        ({"predictors": "/nowhere"}, "'predictors' '/nowhere' is not a file"),
        ({"control": {"policy": "goodput"}}, "'control.policy' is 'goodput'"),
    ],
)
def test_mistakes_in_the_config(config, keys, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        parse(config | keys)


def test_a_draft_that_draws_is_refused(config):
    drawn = config["draft"] | {"shape": "rsd_s"}
    with pytest.raises(ValueError, match="candidates are the most probable tokens"):
        parse(config | {"draft": drawn})


def test_a_draft_that_reads_layers_which_have_not_run_is_refused(config, tmp_path):
    head = {"method": "eagle_tree", "model": save_head(tmp_path / "3", 3, VOCAB), "width": 2}
    with pytest.raises(ValueError, match="of layers that a pass which ends early has not run"):
        parse(config | {"draft": head})
    head["model"] = save_head(tmp_path / "1", 1, VOCAB)
    assert parse(config | {"draft": head, "num_speculative_tokens": 6}).drafts().shape == "topk"
    # Exits are found by replays then.
    exits = parse(config | {"draft": {"method": "early_exit"}, "num_speculative_tokens": 6})
    assert exits.drafts().statistics == "replay"


def test_what_the_engine_cannot_do_is_refused(config):
    made = parse(config)
    assert not made.lossless
    eager = {"eager": True, "num_layers": 8, "vocab_size": VOCAB}
    with pytest.raises(ValueError, match="set --enforce-eager"):
        made.check_target(target(vocab_size=VOCAB, num_layers=8))
    with pytest.raises(ValueError, match=re.escape("set tensor_parallel_size (2) to 1")):
        made.check_target(target(**eager, tensor_parallel_size=2))
    with pytest.raises(ValueError, match="this one has 3: train them on it"):
        made.check_target(target(**eager | {"num_layers": 3}))
    assert Path(made.predictors).exists()
    made.check_target(target(**eager))
