"""Training LongSpec's draft on a tiny target; what it computes, and what serving computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.drafting.test_drafting import VOCAB
from tests.training.test_eagle3 import texts, train
from tests.training.tiny import CPU, save_target, setup
from vllm_specplus.config import parse
from vllm_specplus.drafting.cache import PageStore
from vllm_specplus.drafting.context_pages import PlainPages
from vllm_specplus.drafting.long_checkpoint import read_config
from vllm_specplus.drafting.long_executor import LongExecutor
from vllm_specplus.training.batch import collate
from vllm_specplus.training.cost_model import Shape
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.recipes import long_draft

PAGE = 8


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"), layers=2, context=4096)


def build(target: Path, dtype=torch.float32, **settings) -> long_draft.LongDraftRecipe:
    return long_draft.build(target, long_draft.Settings(**settings), setup(texts(), dtype))


def test_positions_behind_the_sinks_are_moved():
    assert long_draft.anchored(6, 2, 100).tolist() == [0, 1, 102, 103, 104, 105]
    assert long_draft.anchored(3, 0, 0).tolist() == [0, 1, 2]
    assert long_draft.anchored(3, 4, 100).tolist() == [0, 1, 2]


def test_short_texts_are_moved_within_the_targets_positions_and_long_ones_are_not(target):
    """4,096 positions, less those that are left behind a text."""
    recipe, rng = build(target, reach=2000), torch.Generator().manual_seed(0)
    drawn = [recipe._positions(50, rng) for _ in range(300)]
    sinks = [int((each == torch.arange(50)).sum()) for each in drawn]
    assert {0, 1, 2, 3, 4} <= {*sinks} <= {0, 1, 2, 3, 4, 50}
    ends = [int(each[-1]) for each in drawn]
    assert min(ends) >= 49
    assert 1900 < max(ends) < 2000
    recipe = build(target)
    assert max(int(recipe._positions(50, rng)[-1]) for _ in range(300)) < 4096 - long_draft.MARGIN
    assert torch.equal(recipe._positions(1201, rng), torch.arange(1201))


def test_of_the_targets_keys_the_newest_are_hidden():
    assert long_draft.verified(4, 1)[0].int().tolist() == [
        [1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0],
    ]  # fmt: skip
    assert long_draft.verified(5, 3)[0].sum(1).tolist() == [1, 1, 1, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_draft_learns_its_target(target, dtype):
    given = texts()
    recipe = build(target, dtype)
    frozen = {name: w.clone() for name, w in recipe.target.model.state_dict().items()}
    before = recipe.measure(given)
    log = train(recipe, given, 60)
    after = recipe.measure(given)
    assert sum(each["loss"] for each in log[-5:]) < 0.8 * sum(each["loss"] for each in log[:5])
    assert after.tvd_acceptance > before.tvd_acceptance + 0.05
    assert all(torch.equal(frozen[n], w) for n, w in recipe.target.model.state_dict().items())


def test_what_is_trained_is_what_is_served(target):
    """Row by row: the executor's logits behind every beginning of a text, with a window that the
    text is longer than."""
    recipe = build(target, window=5)
    batch = collate(texts(1))
    length = batch.tokens.shape[1]
    positions = torch.arange(length)
    seen = recipe.read(batch.tokens, batch.mask, positions)
    every = recipe.rows(batch.tokens, positions, seen, long_draft.verified(length, 1))
    pages = -(-length // PAGE)
    store = PageStore([0], seen.keys.shape[1], seen.keys.shape[3], pages, PAGE, torch.float32, CPU)
    store.write(0, positions, *(each[0].transpose(0, 1) for each in (seen.keys, seen.values)))
    recipe.draft.parts.requires_grad_(False)
    run = LongExecutor(recipe.draft, 400, 4)
    run.read_from(PlainPages(*store.pages_of(0)))
    table = torch.arange(pages, dtype=torch.int32)[None].numpy()
    for place in range(1, length):
        assert run.room("a")
        text = batch.tokens[0, : place + 1].int().numpy()
        served = run.begin(["a"], [text], table)[0]
        trained = recipe.draft.logits(every[0, place]).detach()
        torch.testing.assert_close(served, trained, atol=1e-4, rtol=1e-3)


def test_a_step_is_the_gradient_of_the_mean_loss(target):
    recipe, batch = build(target), collate(texts(3))
    first, same, other = (
        recipe.step(batch, 0.0, torch.Generator().manual_seed(seed))["loss"] for seed in (1, 1, 2)
    )
    assert first == same != other
    for weight in recipe.parameters():
        weight.grad = None
    rng = torch.Generator().manual_seed(1)
    length = batch.tokens.shape[1]
    positions = recipe._positions(length, rng)
    hidden = long_draft._drawn(1, 4, rng)
    seen = recipe.read(batch.tokens, batch.mask, positions)
    every = recipe.rows(batch.tokens, positions, seen, long_draft.verified(length, hidden))
    log_p = recipe.target.output(seen.last[batch.learn]).log_softmax(-1)
    log_q = recipe.draft.logits(every[batch.learn]).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert first == pytest.approx(expected.item(), 1e-4)
    expected.backward()
    naive = [weight.grad.clone() for weight in recipe.parameters()]
    for weight in recipe.parameters():
        weight.grad = None
    recipe.step(batch, 0.0, torch.Generator().manual_seed(1))
    for weight, grad in zip(recipe.parameters(), naive, strict=True):
        torch.testing.assert_close(weight.grad, grad, atol=1e-4, rtol=1e-3)


def test_what_is_written_is_a_draft(tmp_path, target):
    recipe = build(target, window=99)
    recipe.export(tmp_path)
    assert parse({"method": "long_draft", "model": str(tmp_path)}).model == str(tmp_path)
    config = read_config(str(tmp_path))
    assert (config.window, config.vocab_size) == (99, VOCAB)
    assert "norm.weight" in config.shapes


def test_a_target_of_another_family_is_refused(tmp_path):
    folder = save_target(tmp_path, layers=2, family="gemma")
    with pytest.raises(TrainingError, match="is of type 'gemma', and long drafts are served for"):
        build(folder)


def test_what_a_step_costs_is_what_there_is(target):
    cost = long_draft.work(Shape.of(target), long_draft.Settings())
    recipe = build(target)
    assert cost.trained == sum(each.numel() for each in recipe.parameters() if each.dim() == 2)
