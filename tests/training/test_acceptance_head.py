"""Training SpecDec++'s head."""

from __future__ import annotations

import copy
import math
import re

import pytest
import torch

from tests.drafting.test_drafting import VOCAB
from tests.training.tiny import CPU, batch_of, fit, quieten, save_target, setup, some_texts
from vllm_specplus.drafting.acceptance_head import AcceptanceHead, head_size, probability
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.recipes.acceptance_head import Settings, build, weighted_loss


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target, and a draft of other weights."""
    root = tmp_path_factory.mktemp("models")
    return save_target(root / "target", layers=2), save_target(root / "draft", layers=1)


def made(folders, **settings):
    target, draft = folders
    return build(target, Settings(draft=str(draft), **settings), setup())


def test_the_loss_is_weighted_by_hand():
    weights = {"out.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0]]), "out.bias": torch.zeros(2)}
    hidden = torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    labels = torch.tensor([0.75, 0.1])
    total = weight = 0.0
    for (reject, accept), y in zip(hidden.tolist(), labels.tolist(), strict=True):
        a = math.exp(accept) / (math.exp(accept) + math.exp(reject))
        total -= y * math.log(a) + 6 * (1 - y) * math.log(1 - a)
        weight += y + 6 * (1 - y)
    found = weighted_loss(weights, hidden, labels, 6.0)
    assert float(found) == pytest.approx(total / weight, rel=1e-5)


def test_what_is_learnt_from_is_drawn_from_the_draft(folders):
    """Labels are min(1, p / q) of the drawn token; the hidden state is that of reading it."""
    recipe = made(folders, keep_share=0.0)
    batch = batch_of(some_texts(3))
    hidden, labels = recipe._drawn(batch, torch.Generator().manual_seed(0))
    rng = torch.Generator().manual_seed(0)
    learn = batch.learn[:, :-1]
    with torch.no_grad():
        q = recipe.draft.output(recipe.draft.read(batch.tokens, batch.mask)[:, :-1][learn])
        p = recipe.target.output(recipe.target.read(batch.tokens, batch.mask)[:, :-1][learn])
        q, p = q.softmax(-1), p.softmax(-1)
        drawn = torch.multinomial(q, 1, generator=rng)[:, 0]
        here = torch.arange(len(drawn))
        expected = (p[here, drawn] / q[here, drawn]).clamp(max=1)
        tokens = batch.tokens.clone()
        tokens[:, 1:][learn] = drawn
        states = recipe.draft.read(tokens, batch.mask)[:, 1:][learn]
    torch.testing.assert_close(labels, expected)
    torch.testing.assert_close(hidden, states.float())


def test_positions_of_the_text_teach_nothing(folders):
    batch = batch_of(some_texts(6))
    every, _ = made(folders, keep_share=0.0)._drawn(batch, torch.Generator().manual_seed(0))
    some, labels = made(folders, keep_share=0.5)._drawn(batch, torch.Generator().manual_seed(0))
    assert 0.3 * len(every) < len(some) == len(labels) < 0.7 * len(every)


@pytest.mark.slow
def test_a_head_learns_which_tokens_the_target_never_says(folders, tmp_path):
    """Of texts that it has not seen, more than a constant knows; and serves what it has learnt."""
    recipe = made(folders, blocks=1)
    draft = recipe.draft
    quieten(draft.model)
    recipe.target = copy.copy(draft)
    never = torch.arange(VOCAB // 3)
    recipe.target.output = lambda states: draft.output(states).index_fill(-1, never, -30.0)
    texts, unseen = some_texts(120), some_texts(10, seed=1)
    fit(recipe, texts, 200, rate=1e-2)
    found = recipe.measure(unseen)
    assert found.others["loss"] < 0.8 * found.others["constant_loss"]
    assert min(found.others["accepted_told"], found.others["rejected_told"]) > 0.7
    assert (found.tvd_acceptance, found.by_depth) == (None, ())
    recipe.export(tmp_path)
    file = tmp_path / "head.safetensors"
    assert head_size(file) == 64
    hidden = torch.randn(4, 64)
    served = AcceptanceHead(file, CPU)(hidden)
    with torch.no_grad():
        torch.testing.assert_close(served, probability(recipe.weights, hidden))


def test_it_goes_on_from_a_checkpoint(folders):
    texts = some_texts(3)
    first, second = made(folders), made(folders)
    fit(first, texts, 3)
    second.load_state({name: each.clone() for name, each in first.state().items()})
    assert all(each.equal(second.weights[name]) for name, each in first.weights.items())


def test_a_draft_has_to_be_named_and_to_fit(folders, tmp_path):
    target, _ = folders
    with pytest.raises(TrainingError, match="--set draft=DIR"):
        build(target, Settings(), setup())
    other = save_target(tmp_path, layers=1, vocab=40)
    with pytest.raises(TrainingError, match=re.escape("the draft has 40 token ids")):
        build(target, Settings(draft=str(other)), setup())
