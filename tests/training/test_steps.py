"""Chains from every position against a head's formulas, row by row."""

from __future__ import annotations

import pytest
import torch

from tests.drafting.test_eagle import CLOSE, HEADS, VOCAB, Vocabulary
from tests.eagle_heads import HIDDEN, Reference, save_head
from vllm_specplus.drafting.eagle import EagleHead
from vllm_specplus.training.steps import Chains, ahead, step_weights

STEPS, LENGTHS = 3, (11, 7)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    generator = torch.Generator().manual_seed(0)
    embedding, output = torch.randn(2, VOCAB, HIDDEN, generator=generator)
    return Vocabulary(embedding, 0.1 * output)


class Case:
    """A head, two texts of different lengths, and what their target computed."""

    def __init__(self, path, vocabulary: Vocabulary, **keys):
        folder = save_head(path, vocab=VOCAB, **keys)
        self.head = EagleHead(folder, vocabulary, VOCAB, torch.device("cpu"), torch.float32)
        self.reference = Reference(folder, vocabulary.embedding, vocabulary.matrix)
        generator = torch.Generator().manual_seed(1)
        width, units = max(LENGTHS), self.head.config.states * HIDDEN
        self.tokens = torch.randint(0, VOCAB, (2, width), generator=generator)
        self.states = torch.randn(2, width, units, generator=generator)
        for row, length in enumerate(LENGTHS):
            self.tokens[row, length:] = 0

    def logits(self) -> list[torch.Tensor]:
        """[2, width - 1, VOCAB] of every step."""
        chains = Chains(self.head, self.states[:, :-1])
        return [self.head.logits(chains.step(ahead(self.tokens, step))) for step in range(STEPS)]

    def expected(self, text: int, row: int, step: int, seen: list[int] | None = None):
        """What the formulas say at a step of the chain from ``row``, served behind the text up to
        token ``row + 1``."""
        tokens = self.tokens[text].tolist()
        path = tokens[row + 2 : row + 2 + step]
        return self.reference(tokens[: row + 2], self.states[text, : row + 1], path, seen)

    def places(self):
        """(text, row, step) wherever there is a token for the step."""
        return [
            (text, row, step)
            for text, length in enumerate(LENGTHS)
            for step in range(STEPS)
            for row in range(length - 1 - step)
        ]


@pytest.mark.parametrize("name", HEADS)
def test_each_chain_is_what_serving_computes_row_by_row(tmp_path, vocabulary, name):
    case = Case(tmp_path, vocabulary, **HEADS[name])
    logits = case.logits()
    for text, row, step in case.places():
        expected = case.expected(text, row, step)
        torch.testing.assert_close(logits[step][text, row], expected, **CLOSE)


def test_a_row_that_sees_another_row_would_be_noticed(tmp_path, vocabulary):
    """The comparison tells apart what a chain's second row may see: not row 0, or itself alone."""
    case = Case(tmp_path, vocabulary, generation=3)
    right = case.logits()[1][0, 4]
    everything = [0, 1, 2, 3, 4, 5]
    torch.testing.assert_close(case.expected(0, 4, 1, everything), right, **CLOSE)
    for seen in (everything[1:], everything[-1:], everything[:3] + everything[4:]):
        assert not torch.allclose(case.expected(0, 4, 1, seen), right, **CLOSE)


def test_what_is_behind_a_chain_does_not_change_it(tmp_path, vocabulary):
    """Neither tokens, nor the target's states, nor padding."""
    case = Case(tmp_path, vocabulary, generation=3)
    before = case.logits()
    case.tokens[:, 6:], case.states[:, 4:] = 1, 7.0
    after = case.logits()
    for step in range(STEPS):
        # A chain from row r holds the tokens up to r + step + 1, and reads states up to r.
        rows = min(4, 6 - step - 1)
        torch.testing.assert_close(after[step][:, :rows], before[step][:, :rows])
    assert not torch.allclose(after[0][:, 4], before[0][:, 4])


def test_gradients_are_those_of_the_formulas(tmp_path, vocabulary):
    """Through all steps: later ones reach back through the features that they were given."""
    case = Case(tmp_path, vocabulary, generation=3)
    case.head.parts.requires_grad_(True)
    for weight in case.reference.w.values():
        weight.requires_grad_(True)
    goals = torch.randn(STEPS, VOCAB, generator=torch.Generator().manual_seed(4))
    logits = case.logits()
    places = [each for each in case.places() if each[0] == 1]
    sum((logits[step][text, row] * goals[step]).sum() for text, row, step in places).backward()
    sum((case.expected(*place) * goals[place[2]]).sum() for place in places).backward()
    ours = dict(case.head.parts.named_parameters())
    for name in ("self_attn.k_proj.weight", "mlp.down_proj.weight", "hidden_norm.weight"):
        torch.testing.assert_close(
            ours[f"layer.{name}"].grad, case.reference.w[name].grad, atol=1e-3, rtol=1e-3
        )
    torch.testing.assert_close(
        ours["fc.weight"].grad, case.reference.w["fc.weight"].grad, atol=1e-3, rtol=1e-3
    )


def test_rows_look_ahead():
    values = torch.tensor([[10, 11, 12, 13]])
    assert ahead(values, 0).tolist() == [[11, 12, 13]]
    assert ahead(values, 1).tolist() == [[12, 13, 0]]
    assert ahead(values, 5).tolist() == [[0, 0, 0]]
    assert ahead(values > 11, 1).tolist() == [[True, True, False]]


def test_weights_of_steps():
    assert step_weights(3, 1.0) == pytest.approx([1 / 3] * 3)
    assert step_weights(3, 0.5) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert step_weights(1, 0.8) == [1.0]
