"""Training an EAGLE head on a tiny target."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import smooth_l1_loss

from tests.drafting.test_drafting import VOCAB, save_draft
from tests.training.test_eagle3 import CPU, texts, train
from vllm_specplus.config import parse
from vllm_specplus.training.batch import collate
from vllm_specplus.training.cost_model import Shape
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.recipe import Setup
from vllm_specplus.training.recipes import eagle


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return Path(save_draft(tmp_path_factory.mktemp("target"), layers=2))


def build(target: Path, dtype=torch.float32, **settings) -> eagle.EagleRecipe:
    return eagle.build(target, eagle.Settings(**settings), Setup(dtype, CPU, 0, texts()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tiny_head_learns_its_target(target, dtype):
    given = texts()
    recipe = build(target, dtype)
    frozen = {name: w.clone() for name, w in recipe.target.model.state_dict().items()}
    before = recipe.measure(given)
    log = train(recipe, given, 60)
    after = recipe.measure(given)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]
    assert after.tvd_acceptance > before.tvd_acceptance + 0.05
    assert all(torch.equal(frozen[n], w) for n, w in recipe.target.model.state_dict().items())


def test_a_step_is_the_gradient_of_the_mean_loss(target):
    """Of the divergence and of the distance of the states, position by position."""
    recipe = build(target, noise=0.0)
    batch = collate(texts(3))
    _, last = recipe.states(batch)
    y = eagle.Chains(recipe.head, last[:, :-1]).step(batch.tokens[:, 1:])
    total = torch.zeros(())
    for row, text in enumerate(batch.texts):
        for position in range(text.start - 1, len(text.tokens) - 1):
            wanted, own = last[row, position], y[row, position - 1]
            log_p, log_q = (recipe.target.output(h).log_softmax(-1) for h in (wanted, own))
            total = total + (log_p.exp() * (log_p - log_q)).sum() + smooth_l1_loss(own, wanted)
    expected = total / batch.learn.sum()
    expected.backward()
    naive = [weight.grad.clone() for weight in recipe.parameters()]
    for weight in recipe.parameters():
        weight.grad = None
    assert recipe.step(batch, 0.0, torch.Generator())["loss"] == pytest.approx(
        expected.item(), 1e-4
    )
    for weight, grad in zip(recipe.parameters(), naive, strict=True):
        torch.testing.assert_close(weight.grad, grad, atol=1e-4, rtol=1e-3)


def test_noise_comes_from_the_steps_generator(target):
    recipe, batch = build(target), collate(texts(3))
    first, same, other = (
        recipe.step(batch, 0.0, torch.Generator().manual_seed(seed))["loss"] for seed in (1, 1, 2)
    )
    assert first == same != other


def test_what_is_written_is_a_head(tmp_path, target):
    """The method and vLLM's own ``eagle`` know its names."""
    recipe = build(target)
    recipe.export(tmp_path)
    assert parse({"method": "eagle_tree", "model": str(tmp_path)}).model == str(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"layers", "fc"}
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())


def test_an_unknown_loss_is_refused(target):
    with pytest.raises(TrainingError, match="unknown loss 'forward_lk', did you mean 'forward_kl'"):
        build(target, loss="forward_lk")


def test_what_a_step_costs_is_what_there_is(target):
    cost = eagle.work(Shape(2, 64, 96, 4, 2, 16, VOCAB, tied=False), eagle.Settings())
    recipe = build(target)
    assert cost.trained == sum(each.numel() for each in recipe.parameters() if each.dim() == 2)
