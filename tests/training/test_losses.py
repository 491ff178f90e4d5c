"""Losses of distributions: the numbers of their definitions, and what they are least at."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.losses import LOSSES, NO_LABEL, Rows, loss_of, mixed

P, Q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])
LABELS = torch.tensor([2])
#: Losses that say how far q is from p.
DISTANCES = (
    "forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "acceptance", "soft_ce",
)  # fmt: skip


def rows(p: torch.Tensor = P, q: torch.Tensor = Q, **given) -> Rows:
    # A distribution's logits are known but for a constant.
    return Rows(p.log() + 3, q.log() - 1, given.pop("labels", LABELS), **given)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("forward_kl", 0.2749), ("reverse_kl", 0.2749), ("jensen_shannon", 0.0664),
        ("total_variation", 0.3), ("acceptance", -math.log(0.7)),
        ("soft_ce", 0.2749 - sum(p * math.log(p) for p in (0.5, 0.3, 0.2))),
        ("hard_ce", -math.log(0.5)),
    ],
)  # fmt: skip
def test_losses_of_two_distributions(name, value):
    assert float(LOSSES[name](rows())) == pytest.approx(value, abs=1e-4)


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_the_two_divergences_are_two(name):
    """Where they differ: of distributions that are no mirror images."""
    p, q = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5]])
    a, b = (p, q) if name == "forward_kl" else (q, p)
    expected = float((a * (a / b).log()).sum())
    assert float(LOSSES[name](rows(p, q, labels=torch.tensor([0])))) == pytest.approx(expected)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_distance_is_least_where_both_are_the_same(name):
    """Its gradient is 0 there, and it grows in any direction."""
    torch.manual_seed(0)
    target = torch.randn(5, 17)
    draft = target.clone().requires_grad_()
    labels = torch.zeros(5, dtype=torch.long)
    here = LOSSES[name](Rows(target, draft, labels))
    if name not in ("total_variation", "acceptance"):  # those have an edge there
        here.sum().backward()
        torch.testing.assert_close(draft.grad, torch.zeros_like(target), atol=1e-6, rtol=0)
    for _ in range(5):
        there = LOSSES[name](Rows(target, target + 0.3 * torch.randn_like(target), labels))
        assert (there > here).all()


@pytest.mark.parametrize("name", DISTANCES)
def test_following_the_gradient_leads_to_the_target(name):
    torch.manual_seed(0)
    target, draft = torch.randn(4, 11), torch.randn(4, 11, requires_grad=True)
    optimizer = torch.optim.Adam([draft], lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        LOSSES[name](Rows(target, draft, torch.zeros(4, dtype=torch.long))).sum().backward()
        optimizer.step()
    both = torch.minimum(target.softmax(-1), draft.softmax(-1)).sum(-1)
    assert both.min() > 0.97


def test_the_texts_token_may_be_none_of_the_vocabulary():
    draft = torch.randn(2, 3, requires_grad=True)
    loss = LOSSES["hard_ce"](Rows(torch.randn(2, 3), draft, torch.tensor([1, NO_LABEL])))
    assert loss[1] == 0
    assert loss[0] > 0
    loss.sum().backward()
    assert not draft.grad[1].any()


def test_an_order_is_as_probable_as_drawing_it():
    """All orders of the target's best tokens, by drawing without replacement: sum 1, and ours is
    the target's."""
    torch.manual_seed(0)
    target, draft = torch.randn(1, 4), torch.randn(1, 4)
    labels = torch.tensor([0])

    def probability(order: tuple[int, ...]) -> float:
        left, found = draft[0].softmax(-1), 1.0
        for token in order:
            found *= float(left[token] / left.sum())
            left = left.clone()
            left[token] = 0
        return found

    orders = {order: probability(order) for order in itertools.permutations(range(4))}
    assert sum(orders.values()) == pytest.approx(1, abs=1e-5)
    own = tuple(target[0].argsort(descending=True).tolist())
    loss = float(LOSSES["list_mle"](Rows(target, draft, labels)))
    assert loss == pytest.approx(-math.log(orders[own]), abs=1e-5)
    others = [-math.log(value) for order, value in orders.items() if order != own]
    assert min(abs(loss - other) for other in others) > 1e-3


def test_only_the_best_ten_are_put_in_order():
    torch.manual_seed(0)
    target, draft = torch.randn(3, 40), torch.randn(3, 40)
    labels = torch.zeros(3, dtype=torch.long)
    loss = LOSSES["list_mle"](Rows(target, draft, labels))
    worst = draft.scatter_add(1, target.topk(30, largest=False).indices, torch.full((3, 30), 9.0))
    assert LOSSES["list_mle"](Rows(target, worst, labels)).equal(loss)
    better = draft.scatter_add(1, target.topk(1).indices, torch.full((3, 1), 9.0))
    assert (LOSSES["list_mle"](Rows(target, better, labels)) < loss).all()


def test_features_are_compared_unit_by_unit():
    features = {
        "target_features": torch.tensor([[0.0, 1.0]]), "draft_features": torch.tensor([[0.5, 4.0]]),
    }  # fmt: skip
    # Quadratic below 1, linear beyond.
    expected = (0.5 * 0.25 + (3.0 - 0.5)) / 2
    assert float(LOSSES["smooth_l1"](rows(**features))) == pytest.approx(expected)
    with pytest.raises(TrainingError, match="use a loss of distributions"):
        LOSSES["smooth_l1"](rows())


def test_losses_are_mixed_by_weight():
    loss = mixed({"soft_ce": 0.9, "hard_ce": 0.1})
    parts = [float(LOSSES[name](rows())) for name in ("soft_ce", "hard_ce")]
    assert float(loss(rows())) == pytest.approx(0.9 * parts[0] + 0.1 * parts[1])
    assert float(loss_of("hard_ce")(rows())) == pytest.approx(parts[1])


@pytest.mark.parametrize(
    ("described", "words"),
    [
        ("forward_kll", "unknown loss 'forward_kll', did you mean 'forward_kl'.*allowed: forward"),
        ({"soft_ce": 0.5, "other": 0.5}, "unknown loss 'other' \\(allowed"),
        ({"soft_ce": 0.0}, "must be above 0"),
        ({}, "no parts: name some of"),
    ],
)
def test_what_is_no_loss_is_told_in_a_sentence(described, words):
    with pytest.raises(TrainingError, match=words):
        loss_of(described)
