"""Batches: what is in them, and in which order."""

from __future__ import annotations

import torch

from tests.training.toy import texts
from vllm_specplus.training.batch import Batches, collate
from vllm_specplus.training.texts import Text


def test_what_is_learnt_is_what_a_model_wrote():
    given = [Text("a", (5, 6, 7, 8), 2, "target", (-1, -1, 1, 0)), Text("b", (9, 4), 0, "target"),
             Text("c", (3, 2, 1), 1, "given")]  # fmt: skip
    batch = collate(given)
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [9, 4, 0, 0], [3, 2, 1, 0]]
    assert batch.mask.sum(1).tolist() == [4, 2, 3]
    assert batch.labels.tolist()[0] == [-1, -1, 1, 0]
    assert (batch.labels[1:] == -1).all()
    for text, row in zip(given, batch.learn.tolist(), strict=True):
        n = len(text.tokens)
        assert row == [i >= text.start - 1 and i + 1 < n for i in range(batch.learn.shape[1])]


def test_every_epoch_has_each_text_once_within_the_bound():
    given = texts(60)
    batches = Batches(given, 64, seed=1)
    for epoch in range(3):
        seen = list(batches.epoch(epoch))
        assert len(seen) == len(batches) > 5
        assert sorted(t.id for b in seen for t in b.texts) == sorted(t.id for t in given)
        assert all(b.tokens.numel() <= 64 for b in seen)
        # Padding is little where lengths are alike.
        assert sum(int(b.mask.sum()) for b in seen) > 0.8 * sum(b.tokens.numel() for b in seen)


def test_a_text_longer_than_the_bound_is_alone():
    given = [*texts(5), Text("long", tuple(range(100)), 3, "target")]
    (batch,) = (b for b in Batches(given, 64, 0).epoch(0) if b.tokens.numel() > 64)
    assert [text.id for text in batch.texts] == ["long"]


def order(seed: int, epoch: int, skip: int = 0) -> list[list[str]]:
    return [[t.id for t in b.texts] for b in Batches(texts(60), 64, seed).epoch(epoch, skip)]


def test_the_order_is_that_of_the_seed_and_the_epoch():
    assert order(1, 4) == order(1, 4)
    assert order(1, 4) != order(1, 5)
    assert order(1, 4) != order(2, 4)
    assert order(1, 4, skip=3) == order(1, 4)[3:]


def test_ranks_share_a_batch():
    (batch, *_) = Batches(texts(60), 200, 0).epoch(0)
    parts = [batch.part(rank, 3) for rank in range(3)]
    assert sorted(t.id for p in parts for t in p.texts) == sorted(t.id for t in batch.texts)
    assert sum(int(p.learn.sum()) for p in parts) == int(batch.learn.sum())
    assert collate(batch.texts[:1]).part(1, 2) is None


def test_no_texts_make_no_batches():
    assert len(Batches([], 64, 0)) == 0
    assert list(Batches([], 64, 0).epoch(0)) == []


def test_a_batch_goes_elsewhere_with_all_it_has():
    batch = collate(texts(3)).to(torch.device("meta"))
    tensors = (batch.tokens, batch.mask, batch.learn, batch.labels)
    assert {each.device.type for each in tensors} == {"meta"}
    assert len(batch.texts) == 3
