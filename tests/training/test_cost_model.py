"""The cost model against counts of a real model, and its arithmetic."""

from __future__ import annotations

import io
import re

import pytest
import torch
from rich.console import Console

from tests.drafting.test_drafting import save_draft
from tests.training.toy import save_target, texts
from vllm_specplus.training import cost_model
from vllm_specplus.training.cost_model import (
    GIB,
    Machine,
    Shape,
    Work,
    cost,
    shortage,
    this_machine,
)
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.frozen import KEPT
from vllm_specplus.training.recipe import Setup
from vllm_specplus.training.recipes import RECIPES, recipe_file

#: Llama 3.1 8B.
LLAMA = Shape(32, 4096, 14336, 32, 8, 128, 128256, False)
WORK = Work(trained=10**6, multiplied=10**6, vocab=1000, feature_bytes=100)
RUN = {"tokens": 10**6, "written": 0, "epochs": 2, "batch_tokens": 2048, "width": 2}


def machine(**keys) -> Machine:
    return Machine(**{"memory": 8 * GIB, "disk": GIB, "flops": 1e12} | keys)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_parameters_are_those_of_the_model(tmp_path, family):
    from transformers import AutoModelForCausalLM

    save_draft(tmp_path, family=family, layers=3)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    large = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert Shape.of(tmp_path).parameters == large


def test_an_8b_model_has_8b_parameters():
    assert LLAMA.parameters == pytest.approx(8.03e9, rel=0.01)


def test_what_is_no_model_is_told(tmp_path):
    with pytest.raises(TrainingError, match=r"config.json cannot be read.*name the folder"):
        Shape.of(tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": 3}')
    with pytest.raises(TrainingError, match="has no 'num_attention_heads', which is needed"):
        Shape.of(tmp_path)


def test_time_is_operations_by_speed():
    """By hand: 6 per trained weight, 4 per draft's logit, 2 per target's, and once the target."""
    found = cost(LLAMA, WORK, machine(), **RUN)
    once = 2 * 32 * LLAMA.layer
    each = 6 * 10**6 + 4 * 4096 * 1000 + 2 * 4096 * 1000
    seconds = 10**6 * (once + 2 * each) / (1e12 * cost_model.TRAINING_SHARE)
    assert found.seconds == {"training": pytest.approx(seconds)}
    twice = cost(LLAMA, WORK, machine(devices=2), **RUN)
    assert twice.seconds["training"] == pytest.approx(seconds / 2)
    writing = cost(LLAMA, WORK, machine(), **RUN | {"written": 1000})
    assert writing.seconds["the target writes"] == pytest.approx(
        2 * LLAMA.parameters * 1000 / (1e12 * cost_model.WRITING_SHARE)
    )


def test_features_that_do_not_fit_are_computed_again():
    tokens = 4 * KEPT // WORK.feature_bytes
    found = cost(LLAMA, WORK, machine(), **RUN | {"tokens": tokens})
    assert found.memory["features"] == pytest.approx(KEPT)
    whole, few = 2 * 32 * LLAMA.layer, cost(LLAMA, WORK, machine(), **RUN)
    per_token = few.seconds["training"] / RUN["tokens"]
    # A quarter is kept: of two passes, three quarters are computed twice.
    more = (0.25 + 2 * 0.75 - 1) * whole / (1e12 * cost_model.TRAINING_SHARE)
    assert found.seconds["training"] / tokens == pytest.approx(per_token + more)


def test_memory_is_told_by_parts_and_features_by_where_they_are():
    found = cost(LLAMA, WORK, machine(), **RUN)
    assert found.memory["target"] == 2 * LLAMA.parameters
    assert found.memory["trained weights and optimiser"] == 16 * 10**6
    assert found.memory["features"] == 10**8
    assert "features" not in cost(LLAMA, WORK, machine(own_memory=True), **RUN).memory


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"memory": 10 * GIB}, r"needs \d+\.\d GiB of memory, and 10.0 GiB are free: lower"),
        ({"disk": GIB // 100}, r"GiB of disk, and 0.0 GiB are free: make room"),
    ],
)
def test_what_is_missing_is_told(keys, message):
    enough = machine(memory=64 * GIB)
    assert shortage(cost(LLAMA, WORK, enough, **RUN), enough) is None
    poor = machine(**{"memory": 64 * GIB} | keys)
    assert re.search(message, shortage(cost(LLAMA, WORK, poor, **RUN), poor))


def test_this_machine(tmp_path):
    here = this_machine(
        tmp_path / "not" / "yet", torch.device("cpu"), torch.float32, flops=None, devices=1
    )
    assert here.memory > 0
    assert here.disk > 0
    assert 1e8 < here.flops < 1e14
    stated = this_machine(tmp_path, torch.device("cpu"), torch.float32, flops=5e14, devices=2)
    assert (stated.flops, stated.devices) == (5e14, 2)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_costs(name):
    module = recipe_file(name)
    work = module.work(LLAMA, module.Settings())
    found = cost(LLAMA, work, machine(), **RUN)
    assert 0 < work.trained <= LLAMA.parameters
    assert all(value >= 0 for value in (*found.memory.values(), *found.disk.values()))
    assert found.seconds["training"] > 0


def test_the_table_shows_it_all():
    here = machine()
    shown = io.StringIO()
    Console(width=100, file=shown).print(cost_model.table(cost(LLAMA, WORK, here, **RUN), here))
    text = shown.getvalue()
    for part in ("memory", "activations", "checkpoints", "training", "TFLOP/s", "8.00 GiB"):
        assert part in text
    assert [cost_model.spoken(s) for s in (59, 1800, 7200)] == ["1 min", "30 min", "2.0 h"]


def test_real_trained_parameters_are_those_it_says(tmp_path):
    """Of the recipes that train a part of a tiny target, but for norms and biases."""
    save_draft(tmp_path, layers=4, vocab=96)
    setup = Setup(torch.float32, torch.device("cpu"), 0, texts())
    for name in ("dflash", "distill", "eagle", "eagle3", "layerskip", "long_draft"):
        module = recipe_file(name)
        recipe = module.build(tmp_path, module.Settings(), setup)
        trained = sum(p.numel() for p in recipe.parameters())
        said = module.work(Shape.of(tmp_path), module.Settings()).trained
        assert said == pytest.approx(trained, rel=0.02), name


def test_a_target_without_weights_is_enough(tmp_path):
    assert Shape.of(save_target(tmp_path)).layers == 2
