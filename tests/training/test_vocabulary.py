"""The tokens that a head predicts."""

from __future__ import annotations

import torch

from vllm_specplus.training.texts import Text
from vllm_specplus.training.vocabulary import OUTSIDE, DraftVocabulary, token_counts

#: Behind prompts of 9s: four 7s, three 3s, two 0s and one 5.
TEXTS = [
    Text("a", (9, 9, 7, 7, 3, 0), 2, "target"),
    Text("b", (9, 7, 3, 7, 3, 5, 0), 1, "target"),
]


def test_the_most_frequent_written_tokens_are_kept():
    own = DraftVocabulary.of(TEXTS, 12, 3)
    assert own.ids.tolist() == [0, 3, 7]
    assert own.coverage(TEXTS) == 9 / 10
    assert own.coverage([Text("c", (7, 9, 9, 3, 1), 1, "target")]) == 1 / 4
    assert own.coverage([]) == 0


def test_ids_are_written_as_offsets_and_as_a_mask():
    """The card's: (0, 2, 5) are the ids 0, 3, 7."""
    own = DraftVocabulary.of(TEXTS, 12, 3)
    assert own.d2t.tolist() == [0, 2, 5]
    assert own.d2t.dtype == torch.int64
    assert own.t2d.nonzero()[:, 0].tolist() == [0, 3, 7]
    assert own.t2d.dtype == torch.bool
    assert (torch.arange(3) + own.d2t).equal(own.ids)


def test_tokens_are_found_in_it_or_not():
    own = DraftVocabulary.of(TEXTS, 12, 3)
    assert own.rows(torch.tensor([[7, 9], [0, 3]])).tolist() == [[2, OUTSIDE], [0, 1]]


def test_ties_and_tokens_that_never_occur_go_by_their_ids():
    """As many as are asked for, whatever there is."""
    assert DraftVocabulary.of(TEXTS, 12, 6).ids.tolist() == [0, 1, 2, 3, 5, 7]
    assert DraftVocabulary.of([], 12, 2).ids.tolist() == [0, 1]
    assert DraftVocabulary.of(TEXTS, 12, 12).ids.tolist() == list(range(12))
    tied = [Text("a", (4, 2, 8, 2, 8, 4), 0, "given")]
    assert DraftVocabulary.of(tied, 12, 2).ids.tolist() == [2, 4]


def test_prompts_do_not_count():
    assert int(token_counts(TEXTS, 12)[9]) == 0
    assert int(token_counts(TEXTS, 12).sum()) == 10
