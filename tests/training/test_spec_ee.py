"""Training SpecEE's predictors."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.training.tiny import CPU, batch_of, fit, save_target, setup, some_texts
from vllm_specplus.drafting.exit_predictors import ExitPredictors, features, read_sizes
from vllm_specplus.training.cost_model import Shape
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.recipes.spec_ee import Settings, _first_exits, build, work

LAYERS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_target(tmp_path_factory.mktemp("target"), layers=LAYERS)


def made(folder, **settings):
    """The target drafts for itself, so that its token is a candidate."""
    return build(folder, Settings(draft=str(folder), inner=16, **settings), setup())


def test_what_is_read_is_what_serving_reads(folder):
    """Row by row: the four best of the draft, their logits behind every layer."""
    recipe, batch = made(folder), batch_of(some_texts(2))
    read = torch.cat([each for each, _ in recipe._read(batch)], 1)
    labels = torch.cat([each for _, each in recipe._read(batch)], 1)
    with torch.no_grad():
        states = recipe.target.outputs(batch.tokens, batch.mask, output_hidden_states=True)
        final = recipe.target.output(states.last_hidden_state)[batch.learn]
        ids, said = final.topk(4).indices, final.argmax(-1)
        before = None
        for number, layers in enumerate(range(1, LAYERS)):
            hidden = recipe.target.body.norm(states.hidden_states[layers][batch.learn])
            logits = recipe.target.output(hidden).gather(1, ids)
            expected, before = features(logits, torch.zeros_like(ids, dtype=torch.bool), before)
            torch.testing.assert_close(read[number], expected, atol=2e-4, rtol=1e-3)
            best = ids.gather(1, logits.argmax(-1, keepdim=True))[:, 0]
            assert (labels[number] == (best == said)).float().mean() > 0.98


def test_predictors_learn_where_the_target_has_decided(folder, tmp_path):
    recipe = made(folder, static=2)
    texts, unseen = some_texts(30), some_texts(10, seed=1)
    before = recipe.measure(unseen)
    losses = []
    fit(recipe, texts, 60, rate=3e-3, seen=lambda figures: losses.append(figures["loss"]))
    assert losses[-1] < losses[0]
    found = recipe.measure(unseen)
    assert found.others["exits_right"] >= before.others["exits_right"]
    assert 0 < found.others["layers_run"] <= 1
    recipe.export(tmp_path)
    file = tmp_path / "predictors.safetensors"
    assert read_sizes(file) == (LAYERS - 1, 4)
    served = ExitPredictors(file, 0.5, CPU)
    assert served.layers == [1, 2, 3]
    static = set(load_file(file)["static"].tolist())
    assert served.schedule.asked() == static
    assert len(static) == 2
    # The offline level is where most exits were.
    most = {recipe.layers[i] for i in recipe._exits.topk(2).indices.tolist()}
    assert static == most


def test_some_positions_do_without_candidates(folder):
    recipe, ids = made(folder), torch.zeros(4000, 4, dtype=torch.long)
    assert not recipe._missing(ids, None).any()
    missing = recipe._missing(ids, torch.Generator().manual_seed(0))
    assert not missing[:, 0].any()
    left = (~missing).sum(1)
    assert 0.55 < (left == 4).float().mean() < 0.7
    assert (missing == (torch.arange(4) >= left[:, None])).all()


def test_a_row_exits_behind_the_first_layer_that_lets_it():
    fires = torch.tensor([[0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
    assert _first_exits(fires).tolist() == [1, 1, 1]


def test_it_goes_on_from_a_checkpoint(folder):
    texts = some_texts(3)
    first, second = made(folder), made(folder)
    fit(first, texts, 3)
    second.load_state({name: each.clone() for name, each in first.state().items()})
    assert all(each.equal(second.state()[name]) for name, each in first.state().items())


def test_a_predictor_has_the_papers_weights():
    """Of four candidates, by 512 units: 7,169."""
    shape = Shape(32, 4096, 11008, 32, 32, 128, 32000, False)
    assert work(shape, Settings()).trained == 31 * 7169


def test_what_cannot_be_trained_is_named(folder, tmp_path):
    with pytest.raises(TrainingError, match="--set draft=DIR"):
        build(folder, Settings(), setup())
    with pytest.raises(TrainingError, match="take a deeper one"):
        build(save_target(tmp_path, layers=1), Settings(draft=str(folder)), setup())
