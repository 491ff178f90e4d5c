"""Where a draft learns: AdaSPEC's share of positions, OSD's rejected ones."""

from __future__ import annotations

import pytest
import torch

from vllm_specplus.training.batch import collate
from vllm_specplus.training.losses import LOSSES, Rows
from vllm_specplus.training.selectors import rejected, top_quantile
from vllm_specplus.training.texts import Text


def test_the_largest_deltas_are_kept():
    delta = torch.arange(1.0, 11)[torch.tensor([3, 9, 0, 5, 7, 1, 8, 2, 6, 4])]
    assert sorted(delta[top_quantile(delta, 0.4)].tolist()) == [7, 8, 9, 10]
    assert top_quantile(delta, 1.0).all()
    assert delta[top_quantile(delta, 1e-9)].tolist() == [10]


@pytest.mark.parametrize("keep", [0.1, 0.37, 0.4, 0.5, 0.99, 1.0])
def test_the_threshold_is_the_quantile(keep):
    torch.manual_seed(0)
    delta = torch.randn(101, dtype=torch.float64)
    assert top_quantile(delta, keep).equal(delta >= delta.quantile(1 - keep))
    assert top_quantile(delta[:1], keep).all()


def test_positions_that_are_not_selected_have_no_gradient():
    torch.manual_seed(0)
    target, draft = torch.randn(10, 7), torch.randn(10, 7, requires_grad=True)
    losses = LOSSES["forward_kl"](Rows(target, draft, torch.zeros(10, dtype=torch.long)))
    kept = top_quantile(losses - torch.linspace(0, 1, 10), 0.4)
    losses[kept].sum().backward()
    assert kept.sum() == 4
    assert draft.grad[kept].any(1).all()
    assert not draft.grad[~kept].any()


def test_where_a_draft_was_rejected_is_the_row_before():
    """Tokens 3 and 5 took the place of rejected ones: rows 2 and 4 had predicted those. A token of
    the prompt, and the first one of a text, have no row to learn."""
    labels = (-1, 0, 1, 0, 1, 0)
    texts = [
        Text("a", tuple(range(6)), 2, "traffic", labels),
        Text("b", tuple(range(4)), 0, "traffic", (0, 1, 1, 1)),
        Text("c", tuple(range(5)), 1, "traffic"),
    ]
    rows = rejected(collate(texts))
    assert rows[0].nonzero()[:, 0].tolist() == [2, 4]
    assert not rows[1:].any()
