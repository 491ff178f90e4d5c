"""What cannot become text is cut out of every draft."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specplus.control.allowed import can_be_text
from vllm_specplus.tree import DraftBatch

V = 6


def naive(tokens, parents, ends):
    """(token, parent's place among the kept) of what stays of one request's tree."""
    place, out = {-1: -1}, []
    for i, (token, parent) in enumerate(zip(tokens, parents, strict=True)):
        behind_an_end = parent >= 0 and tokens[parent] in ends
        if parent in place and not behind_an_end and 0 <= token < V:
            place[i] = len(out)
            out.append((token, place[parent]))
    return out


@given(seed=st.integers(0, 10_000))
@settings(max_examples=100, deadline=None)
def test_it_keeps_what_the_definition_keeps(seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 9, size=3).astype(np.int32)
    tokens = rng.integers(-1, V + 2, size=counts.sum()).astype(np.int32)
    parents = np.concatenate([rng.integers(-1, np.arange(n) if n else 0, n) for n in counts])
    ends = [np.array(e, np.int32) for e in ([], [2], [1, 4])]
    drafts = DraftBatch(tokens, parents.astype(np.int32), counts, np.arange(len(tokens)))
    drafts.drawn_from = np.arange(len(tokens))
    out = can_be_text(drafts, V, ends)
    begin, got = 0, 0
    for r, count in enumerate(counts):
        own = slice(begin, begin + count)
        expected = naive(tokens[own].tolist(), parents[own].tolist(), ends[r].tolist())
        mine = slice(got, got + out.counts[r])
        pairs = zip(out.tokens[mine].tolist(), out.parents[mine].tolist(), strict=True)
        assert list(pairs) == expected
        begin, got = begin + count, got + out.counts[r]
    assert tokens[out.sources].tolist() == out.tokens.tolist()
    assert out.drawn_from.tolist() == out.sources.tolist()


@pytest.mark.parametrize("ends", [None, [np.empty(0, np.int32)] * 2])
def test_drafts_that_can_become_text_are_left_as_they_are(ends):
    one = np.array([1, V - 1], np.int32)
    drafts = DraftBatch(one, np.full(2, -1, np.int32), np.ones(2, np.int32))
    assert can_be_text(drafts, V, ends) is drafts
    assert can_be_text(drafts, V - 1, ends).counts.tolist() == [1, 0]
