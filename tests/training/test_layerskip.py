"""Teaching a target to be left early."""

from __future__ import annotations

import pytest
import torch

from tests.training.tiny import batch_of, fit, save_target, setup, some_texts
from vllm_specplus.training.cost_model import Shape
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.exits import layer_weights
from vllm_specplus.training.recipes.layerskip import (
    LayerSkip,
    Settings,
    build,
    exits_of,
    layer_dropout,
    work,
)

LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("target"), layers=LAYERS)


def made(folder, texts=(), dtype=torch.float32, **settings) -> LayerSkip:
    return build(folder, Settings(**settings), setup(texts, dtype))


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_exits_come_nearer_and_the_target_stays(folder, dtype, rounding):
    texts = some_texts(12)
    recipe = made(folder, texts, dtype, exits=[2, 3], dropout=0.05)
    before = recipe.measure(texts)
    fit(recipe, texts, 60, rate=1e-3)
    after = recipe.measure(texts)
    for layers in (2, 3):
        assert after.others[f"exit_{layers}_tvd"] > before.others[f"exit_{layers}_tvd"] + 0.05
    assert before.others["target_kept"] == pytest.approx(1, abs=rounding)
    assert after.others["target_kept"] > 0.8
    assert after.others["exit"] in (2, 3)
    assert after.tvd_acceptance == after.others[f"exit_{after.others['exit']}_tvd"]
    assert after.by_depth[0].rate > before.by_depth[0].rate
    assert {name.split(".")[1] for name in recipe.state()} == {"layers", "norm"}


def test_exits_are_read_where_early_exit_reads_them(folder):
    """As transformers says after so many layers; without dropout the last is the target itself."""
    recipe = made(folder, exits=[1, 3])
    batch = batch_of(some_texts(3))

    def hooks() -> list[int]:
        return [len(layer._forward_hooks) for layer in recipe.student.layers]

    before = hooks()
    with torch.no_grad():
        found = recipe.read_exits(batch)
        assert hooks() == before
        out = recipe.student.model(
            batch.tokens, attention_mask=batch.mask.long(), output_hidden_states=True
        )
        for states, layers in zip(found, (1, 3), strict=False):
            expected = recipe.student.body.norm(out.hidden_states[layers])
            torch.testing.assert_close(states[batch.mask], expected[batch.mask])
            left = recipe.student.after(layers).read(batch.tokens, batch.mask)
            torch.testing.assert_close(states[batch.mask], left[batch.mask])
    torch.testing.assert_close(found[-1], out.hidden_states[-1])


def test_a_text_passes_by_the_layers_that_are_drawn(folder):
    """One text is as if the model had not the layer, its neighbour as ever."""
    recipe = made(folder, exits=[2])
    batch = batch_of(some_texts(2))
    dropped = torch.zeros(LAYERS, 2, dtype=torch.bool)
    dropped[1, 0] = True
    with torch.no_grad():
        early, _ = recipe.read_exits(batch, dropped)
        plain, _ = recipe.read_exits(batch)
        without = recipe.student.after(1).read(batch.tokens, batch.mask)
    torch.testing.assert_close(early[0], without[0])
    torch.testing.assert_close(early[1], plain[1])
    assert not torch.allclose(early[0], plain[0])


def test_later_layers_are_left_out_more_often(folder):
    shares = [layer_dropout(n, 30, 0.1) for n in range(30)]
    assert shares[0] == 0
    assert shares[-1] == pytest.approx(0.1)
    assert shares == sorted(shares)
    assert shares[15] < 0.1 * 15 / 29  # exponentially
    recipe = made(folder, dropout=0.5)
    batch = batch_of(some_texts(4))
    drawn = sum(
        recipe._dropped(batch, torch.Generator().manual_seed(seed)).float() for seed in range(500)
    )
    expected = torch.tensor([layer_dropout(n, LAYERS, 0.5) for n in range(LAYERS)])
    torch.testing.assert_close(drawn.mean(1) / 500, expected, atol=0.04, rtol=0)


def test_a_step_is_the_weighted_sum_of_its_exits(folder):
    """By the plain formula, with its gradient."""
    texts = some_texts(3)
    recipe = made(folder, texts, exits=[2, 3], dropout=0.0, early_scale=0.3)
    with torch.no_grad():  # at first the last exit is the target, and teaches nothing
        recipe.student.body.norm.weight.mul_(1.1)
    batch = batch_of(texts)
    figures = recipe.step(batch, 0.0, torch.Generator())
    found = [each.grad.clone() for each in recipe.parameters()]
    for each in recipe.parameters():
        each.grad = None
    given = {"attention_mask": batch.mask.long(), "output_hidden_states": True}
    target = recipe.target.model(batch.tokens, **given).logits[batch.learn]
    out = recipe.student.model(batch.tokens, **given)
    norm, head = recipe.student.body.norm, recipe.student.model.lm_head
    exits = [head(norm(out.hidden_states[n])) for n in (2, 3)] + [out.logits]
    p, total = target.softmax(-1), 0.0
    for weight, logits in zip(layer_weights([2, 3, 4], 4, 0.3), exits, strict=True):
        log_q = logits[batch.learn].log_softmax(-1)
        total = total + weight * (p * (p.log() - log_q)).sum(-1).mean()
    total.backward()
    assert figures["loss"] == pytest.approx(total.item(), rel=1e-4)
    assert set(figures) == {"loss", "exit_2", "exit_3", "exit_4"}
    torch.testing.assert_close(
        found, [each.grad for each in recipe.parameters()], atol=1e-4, rtol=1e-3
    )


def test_steps_repeat_from_a_checkpoint(folder):
    """Dropout, too, comes from the generator that a step is given."""
    texts = some_texts(4)
    first, second = made(folder, texts, dropout=0.4), made(folder, texts, dropout=0.4)
    fit(first, texts, 2)
    second.load_state({name: each.clone() for name, each in first.state().items()})
    batch = batch_of(texts)
    losses = [
        recipe.step(batch, 0.0, torch.Generator().manual_seed(seed))["loss"]
        for recipe, seed in ((first, 5), (second, 5), (second, 6))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_the_result_is_a_whole_model(folder, tmp_path):
    """Its layers are the trained ones, what was not trained is the old target's."""
    from transformers import AutoModelForCausalLM

    recipe = made(folder, exits=[2])
    fit(recipe, some_texts(4), 3)
    recipe.export(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    tokens = torch.tensor([some_texts(1)[0].tokens])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, recipe.student.model(tokens).logits)
        assert not torch.allclose(loaded(tokens).logits, recipe.target.model(tokens).logits)
    assert loaded.lm_head.weight.equal(recipe.target.output_weight)
    assert loaded.config.num_hidden_layers == LAYERS


def test_exits_are_those_of_the_method_or_named():
    assert exits_of(Settings(), 30) == [7, 15, 22]
    assert exits_of(Settings(), 2) == [1]
    assert exits_of(Settings(exits=[3, 8]), 30) == [3, 8]
    for exits, words in (
        ([8, 3], "ascending"), ([0, 3], "ascending from 1"), ([30], "the target has 30 layers"),
    ):  # fmt: skip
        with pytest.raises(TrainingError, match=words):
            exits_of(Settings(exits=exits), 30)


def test_a_target_of_one_layer_cannot_be_left(tmp_path):
    with pytest.raises(TrainingError, match="take a deeper one"):
        made(save_target(tmp_path, layers=1))


def test_what_it_costs(folder):
    shape = Shape(LAYERS, 64, 96, 4, 2, 16, 96, False)
    recipe = made(folder)
    norms = (2 * LAYERS + 1) * 64
    trained = sum(each.numel() for each in recipe.parameters()) - norms
    cost = work(shape, Settings())
    assert (cost.trained, cost.losses) == (trained, 4.0)
