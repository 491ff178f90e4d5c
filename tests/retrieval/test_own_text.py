"""The longest earlier occurrence of a growing text's suffix, against a search of the whole text."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_specplus.retrieval import own_text
from vllm_specplus.retrieval.own_text import OwnText, OwnTexts
from vllm_specplus.step import Source, bare_step


def search(text: list[int], longest: int) -> tuple[int, int]:
    """By definition; a match may overlap the suffix it repeats."""
    best = (0, -1)
    for end in range(1, len(text)):
        for n in range(1, min(longest, end) + 1):
            if text[end - n : end] == text[len(text) - n :]:
                best = max(best, (n, end))
    return best[::-1]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60),
    st.integers(1, 8),
    st.lists(st.integers(1, 7), min_size=60, max_size=60),
)
@settings(deadline=None, max_examples=300)  # the first call compiles
def test_as_a_search_of_the_whole_text(tokens, longest, pieces):
    text, known = OwnText(longest), 0
    array = np.array(tokens, np.int32)
    for piece in pieces:
        known = min(known + piece, len(tokens))
        text.read(array, known)
        assert text.match == search(tokens[:known], longest)


def test_texts_that_outgrow_their_room():
    """Rooms are made anew many times, in the middle of what is read."""
    rng = np.random.default_rng(0)
    tokens = (rng.zipf(1.5, 5000) % 1000).astype(np.int32)
    tokens[3000:4000] = tokens[500:1500]  # a quotation: long matches
    text, known = OwnText(8), 0
    while known < len(tokens):
        known = min(known + int(rng.integers(1, 400)), len(tokens))
        text.read(tokens, known)
        assert text.match == search(tokens[:known].tolist(), 8)
    assert text.nbytes < 100 * len(tokens)


def steps_of(tokens: np.ndarray, lengths, versions):
    """What a request that has ``lengths`` tokens, step by step, looks like to a proposer."""
    for length, version in zip(lengths, versions, strict=True):
        step = bare_step((Source("x", "x", 0.5),), tokens[None], 4)
        numbers = None if version is None else np.array([version])
        yield replace(step, num_tokens=np.array([length], np.int32), versions=numbers)


def test_only_new_tokens_are_read(monkeypatch):
    read = []
    extend = own_text._extend

    def counted(nodes, table, count, text, first, end, longest):
        out = extend(nodes, table, count, text, first, end, longest)
        read.append(out[1] - first)
        return out

    monkeypatch.setattr(own_text, "_extend", counted)
    tokens = np.arange(3000, dtype=np.int32) % 700
    lengths = [2000, 2003, 2003, 2010, 2010]
    texts = OwnTexts(8)
    for step in steps_of(tokens, lengths, [5, 5, 5, 5, 6]):
        assert texts.matches(step)[0].tolist() == [step.num_tokens[0] - 700, 8]
    # The last one has another version: it may have been cut, and is read again.
    assert sum(read) == 2010 + 2010
    read.clear()
    for step in steps_of(tokens, lengths, [None] * 5):  # nobody knows: again and again
        texts.matches(step)
    assert sum(read) == sum(lengths)


def test_a_text_that_was_cut_is_read_anew():
    first, second = np.array([[1, 2, 3, 4, 1, 2]], np.int32), np.array([[1, 2, 9, 9, 9, 2]])
    second = second.astype(np.int32)
    texts = OwnTexts(8)
    (before,) = steps_of(first[0], [6], [0])
    (after,) = steps_of(second[0], [6], [1])
    (wrong,) = steps_of(second[0], [6], [0])
    assert texts.matches(before).tolist() == [[2, 2]]
    assert texts.matches(wrong).tolist() == [[2, 2]], "the test could not see a text that is kept"
    assert texts.matches(after).tolist() == [[2, 1]]
    texts.forget("request 0")
    assert not texts._texts


def test_requests_that_may_not_draft_wait():
    tokens = np.array([[1, 2, 1], [1, 2, 1]], np.int32)
    step = replace(bare_step((Source("x", "x", 0.5),), tokens, 4), versions=np.zeros(2, np.int64))
    step.max_nodes[1] = 0
    texts = OwnTexts(8)
    assert texts.matches(step).tolist() == [[1, 1], [-1, 0]]
    assert list(texts._texts) == ["request 0"]
