"""Speculative Jacobi decoding: what becomes the next draft."""

from __future__ import annotations

import numpy as np
import torch

from vllm_specplus.config import parse
from vllm_specplus.proposer import Services
from vllm_specplus.proposers.jacobi import Jacobi
from vllm_specplus.step import Observation, Sampling, StepContext

VOCAB = 10


def proposer() -> Jacobi:
    made = Jacobi(parse({"method": "jacobi", "num_speculative_tokens": 4}), Services(VOCAB))
    made.load_draft(torch.device("cpu"), torch.float32)
    return made


def step(
    accepted: list[list[bool]], probs: torch.Tensor | None, temperature, max_nodes, seeds=None
):
    """Requests with these verified rows; the most probable id of row i is i."""
    starts = np.cumsum([0, *map(len, accepted)]).astype(np.int32)
    rows, requests = int(starts[-1]), len(accepted)
    none = np.zeros(rows, np.int32)
    return StepContext(
        request_ids=[str(r) for r in range(requests)],
        token_ids=np.zeros((requests, 50), np.int32),
        num_tokens=np.full(requests, 20, np.int32),
        max_nodes=np.array(max_nodes, np.int32),
        chain_only=np.zeros(requests, bool),
        observation=Observation(
            none, none, np.arange(rows, dtype=np.int32)[:, None], np.concatenate(accepted)
        ),
        sampling=Sampling(
            np.array(temperature, np.float32), np.full(requests, VOCAB), np.ones(requests),
            seeds or [None] * requests,
        ),
        row_starts=starts,
        target_probs=probs,
    )  # fmt: skip


def test_rows_behind_the_rejection_come_first_then_the_last_row_again():
    """Two of five rows are on the text: the token of the second is known, so the draft begins
    with what the third says."""
    probs = torch.eye(VOCAB)[:5]
    rows = [[True, True, False, False, False]]
    drafts = proposer().propose(step(rows, probs, [1.0], [4]))
    assert drafts.tokens.tolist() == [2, 3, 4, 4]
    assert drafts.parents.tolist() == [-1, 0, 1, 2]
    assert drafts.drawn_from.tolist() == [0, 1, 2, 3]
    assert drafts.draft_probs.equal(probs[[2, 3, 4, 4]])


def test_all_accepted_leaves_only_the_last_row():
    drafts = proposer().propose(step([[True] * 3], torch.eye(VOCAB)[:3], [1.0], [2]))
    assert drafts.tokens.tolist() == [2, 2]


def test_greedy_requests_take_the_most_probable_and_draw_nothing():
    rows = [[True, False, False], [True, True]]
    alone = proposer().propose(step(rows, None, [0.0, 0.0], [3, 1]))
    assert alone.tokens.tolist() == [1, 2, 2, 4]
    assert alone.draft_probs is None
    mixed = proposer().propose(step(rows, torch.eye(VOCAB)[[9, 8, 7, 6, 5]], [1.0, 0.0], [3, 1]))
    assert mixed.tokens.tolist() == [8, 7, 7, 4]
    assert mixed.drawn_from.tolist() == [0, 1, 2, -1]


def test_a_request_that_may_not_draft_gets_nothing():
    rows = [[True, False], [True, False]]
    drafts = proposer().propose(step(rows, torch.eye(VOCAB)[:4], [1.0, 1.0], [0, 2]))
    assert drafts.counts.tolist() == [0, 2]
    assert drafts.tokens.tolist() == [3, 3]


def test_drafts_follow_the_rows_distribution():
    law = torch.tensor([0.5, 0.3, 0.2, 0, 0, 0, 0, 0, 0, 0])
    made = proposer()
    drawn = np.concatenate([
        made.propose(step([[True]], law[None], [1.0], [4])).tokens for _ in range(1500)
    ])  # fmt: skip
    share = np.bincount(drawn, minlength=VOCAB) / len(drawn)
    np.testing.assert_allclose(share, law, atol=4 * 0.5 / np.sqrt(len(drawn)))


def test_a_seeded_requests_drafts_do_not_depend_on_its_batch():
    law = torch.full((3, VOCAB), 0.1)
    alone = proposer().propose(step([[True]], law[:1], [1.0], [4], seeds=[5]))
    rows = [[True, False], [True]]
    beside = proposer().propose(step(rows, law, [1.0, 1.0], [3, 4], seeds=[None, 5]))
    assert beside.tokens[3:].tolist() == alone.tokens.tolist()


def with_any_code(codebook: torch.Tensor) -> Jacobi:
    config = parse({"method": "jacobi", "num_speculative_tokens": 4, "initial": "random"})
    made = Jacobi(config, Services(VOCAB, codebook=lambda: codebook))
    made.load_draft(torch.device("cpu"), torch.float32)
    return made


def test_fresh_places_may_hold_any_code():
    """Of the codes alone, evenly, and drawn from nothing; what rows tell of stays as it was."""
    codebook = torch.zeros(8, 2)
    codebook[3:7] = 1.0
    made, law = with_any_code(codebook), torch.full((5, VOCAB), 0.1)
    law[2] = torch.eye(VOCAB)[2]
    seen = []
    for _ in range(400):
        drafts = made.propose(step([[True, True, False, False]], law[:4], [1.0], [4]))
        assert drafts.tokens[0] == 2
        assert drafts.drawn_from.tolist() == [0, 1, -1, -1]
        assert drafts.sources.tolist() == [0, 0, 1, 1]
        seen += drafts.tokens[2:].tolist()
    share = np.bincount(seen, minlength=VOCAB) / len(seen)
    want = np.array([0, 0, 0, 0.25, 0.25, 0.25, 0.25, 0, 0, 0])
    np.testing.assert_allclose(share, want, atol=4 * 0.5 / np.sqrt(len(seen)))


def test_where_no_code_may_stand_none_is_put():
    codebook = torch.zeros(8, 2)
    codebook[3:7] = 1.0
    words = torch.zeros(1, VOCAB)
    words[0, 8] = 1.0
    drafts = with_any_code(codebook).propose(step([[True]], words, [1.0], [3]))
    assert drafts.tokens.tolist() == [8, 8, 8]
    assert drafts.drawn_from.tolist() == [0, 1, 2]


def test_a_preset_stands_behind_the_keys_that_are_given():
    lumina = parse({"method": "jacobi", "preset": "lumina_mgpt"})
    assert (lumina.num_speculative_tokens, lumina.initial) == (15, "random")
    rule = lumina.acceptance
    assert (rule.rule, rule.group, rule.max_gap, rule.max_distance) == ("gsd", 14, 0.15, 0.5)
    own = {"method": "jacobi", "preset": "anole", "initial": "row", "control": {"policy": "fixed"}}
    anole = parse(own)
    assert (anole.num_speculative_tokens, anole.initial, anole.lossless) == (15, "row", True)
