"""Blocks of a training pass against a head's formulas, row by row; and what is learnt from them."""

from __future__ import annotations

import pytest
import torch

from tests.block_heads import HIDDEN, MASK, Reference, save_block
from tests.drafting.test_eagle import CLOSE, VOCAB, Vocabulary
from vllm_specplus.drafting.block_heads import load_head
from vllm_specplus.training.batch import collate
from vllm_specplus.training.blocks import Blocks, Lesson, all_anchors, decay, draw_anchors
from vllm_specplus.training.texts import Text

LENGTHS, BLOCK = (11, 7), 4
#: The first block has no context, and the last one's rows go beyond the text.
ANCHORS = torch.tensor([[5, 0, 4, 10], [6, 3, -1, -1]])


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    generator = torch.Generator().manual_seed(0)
    embedding, output = torch.randn(2, VOCAB, HIDDEN, generator=generator)
    return Vocabulary(embedding, 0.1 * output)


class Case:
    """A head, two texts of different lengths, and what their target computed."""

    def __init__(self, path, vocabulary: Vocabulary, **keys):
        folder = save_block(path, "dflash", VOCAB, block=BLOCK, **keys)
        self.head = load_head(folder, vocabulary, VOCAB, torch.device("cpu"), torch.float32)
        self.reference = Reference(folder, vocabulary.embedding, vocabulary.matrix)
        self.embedding = vocabulary.embedding
        generator = torch.Generator().manual_seed(1)
        self.tokens = torch.randint(MASK + 1, VOCAB, (2, max(LENGTHS)), generator=generator)
        self.states = torch.randn(2, max(LENGTHS), 2 * HIDDEN, generator=generator)

    def logits(self) -> torch.Tensor:
        """[2, A, D, V'] of all blocks, of one pass."""
        held = torch.full((*ANCHORS.shape, BLOCK), MASK)
        held[..., 0] = self.tokens.gather(1, ANCHORS.clamp(min=0))
        rows = Blocks(self.head, self.states).rows(ANCHORS, self.embedding[held])
        return self.head.logits(rows)

    def blocks(self) -> list[tuple[int, int]]:
        """(text, number of the block) of those that are there."""
        return [tuple(each) for each in (ANCHORS >= 0).nonzero().tolist()]

    def expected(self, text: int, number: int) -> torch.Tensor:
        """[D, V'] of the formulas, served behind the text up to the anchor."""
        anchor = int(ANCHORS[text, number])
        tokens = self.tokens[text, : anchor + 1].tolist()
        return self.reference(tokens, self.states[text, :anchor])


HEADS = {
    "plain": {},
    "own-tokens": {"own_tokens": 20},
    "biases": {"bias": True},
    "deep": {"layers": 3},
}


@pytest.mark.parametrize("name", HEADS)
def test_each_block_is_what_serving_computes_row_by_row(tmp_path, vocabulary, name):
    case = Case(tmp_path, vocabulary, **HEADS[name])
    logits = case.logits()
    for text, number in case.blocks():
        torch.testing.assert_close(logits[text, number], case.expected(text, number), **CLOSE)


def test_gradients_are_those_of_the_formulas(tmp_path, vocabulary):
    """Of a sum of logits, each times another number; the context's part among them."""
    case = Case(tmp_path, vocabulary)
    case.head.parts.requires_grad_(True)
    logits = case.logits()
    factors = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    there = (ANCHORS >= 0)[..., None, None]
    (logits * factors * there).sum().backward()
    for weight in case.reference.w.values():
        weight.requires_grad_(True)
    parts = [(case.expected(*each) * factors[each]).sum() for each in case.blocks()]
    torch.stack(parts).sum().backward()
    found = dict(case.head.parts.named_parameters())
    assert found["fc.weight"].grad.abs().sum() > 0
    for name, weight in case.reference.w.items():
        torch.testing.assert_close(found[name].grad, weight.grad, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("column", ["anchor", "another-block"])
def test_a_row_that_sees_more_says_something_else(tmp_path, vocabulary, monkeypatch, column):
    """A negative control: the text at its anchor, and the rows of the block beside it."""
    case = Case(tmp_path, vocabulary)
    sees = Blocks._sees

    def more(self, anchors, width):
        mask = sees(self, anchors, width).clone()
        mask[0, 0, 0, 5 if column == "anchor" else 11 + BLOCK] = True
        return mask

    before = case.logits()
    monkeypatch.setattr(Blocks, "_sees", more)
    after = case.logits()
    assert not torch.allclose(after[0, 0], before[0, 0], **CLOSE)
    torch.testing.assert_close(after[0, 1:], before[0, 1:])


def test_what_is_behind_an_anchor_changes_nothing(tmp_path, vocabulary):
    case = Case(tmp_path, vocabulary)
    before = case.logits()
    case.states[0, 5:] += 1
    after = case.logits()
    torch.testing.assert_close(after[0, :3], before[0, :3])
    assert not torch.allclose(after[0, 3], before[0, 3], **CLOSE)


def learn(*rows: str) -> torch.Tensor:
    return torch.tensor([[mark == "x" for mark in row] for row in rows])


def test_anchors_are_drawn_from_what_is_to_be_learnt():
    mask = learn("..xxxxxxxx..", "xx..........", "............")
    seen = torch.zeros(3, 12)
    for seed in range(400):
        anchors = draw_anchors(mask, 0.3, 9, torch.Generator().manual_seed(seed))
        assert [(row >= 0).sum().item() for row in anchors] == [3, 1, 0]
        for text, row in enumerate(anchors.tolist()):
            own = [each for each in row if each >= 0]
            assert len({*own}) == len(own)
            seen[text, own] += 1
    assert not seen[~mask].any()
    torch.testing.assert_close(seen[0, 2:10] / 400, torch.full((8,), 3 / 8), atol=0.1, rtol=0)
    same = [draw_anchors(mask, 0.3, 9, torch.Generator().manual_seed(0)) for _ in range(2)]
    assert same[0].equal(same[1])
    few = draw_anchors(mask, 1.0, 2, torch.Generator())
    assert [(row >= 0).sum().item() for row in few] == [2, 2, 0]
    assert draw_anchors(mask[2:], 1.0, 2, torch.Generator()).tolist() == [[-1]]


def test_all_anchors_are_all_positions_in_order():
    assert all_anchors(learn(".xx.", "x...")).tolist() == [[1, 2], [0, -1]]


def test_a_lesson_by_hand():
    """Of the texts 10 .. 16 and 20 .. 24, of which models wrote all from the fourth and the second
    token on; blocks of three masks, whose token is 9."""
    texts = [
        Text("a", tuple(range(10, 17)), 3, "target"),
        Text("b", tuple(range(20, 25)), 1, "target"),
    ]
    anchors = torch.tensor([[2, 5], [3, -1]])
    lesson = Lesson.of(collate(texts), anchors, 4, 9)
    assert lesson.tokens.tolist() == [
        [[12, 9, 9, 9], [15, 9, 9, 9]], [[23, 9, 9, 9], [20, 9, 9, 9]]
    ]  # fmt: skip
    assert lesson.learn.int().tolist() == [[[1, 1, 1], [1, 0, 0]], [[1, 0, 0], [0, 0, 0]]]
    assert lesson.truth[0, 0].tolist() == [13, 14, 15]
    assert (lesson.truth[0, 1, 0], lesson.truth[1, 0, 0]) == (16, 24)
    # The target predicts a token at the position before it, counted over both texts.
    assert lesson.places[lesson.learn].tolist() == [2, 3, 4, 5, 7 + 3]


def test_weights_of_the_card():
    assert decay(3, 4.0) == pytest.approx([1, 0.7788, 0.6065], abs=1e-4)
