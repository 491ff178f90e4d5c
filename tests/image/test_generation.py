"""Pictures by a recipe, on one device and on many."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_specplus.cli.model import LATENTS_MODEL
from vllm_specplus.image import quality
from vllm_specplus.image.continuous import ray_generation
from vllm_specplus.image.continuous.decoding import Settings
from vllm_specplus.image.continuous.folder import LatentsFolder
from vllm_specplus.image.continuous.generation import Cspd, PictureMaker, Recipe
from vllm_specplus.image.continuous.masked import Guidance, MaskedConfig, decode_masked
from vllm_specplus.image.continuous.ray_generation import make_pictures

FAST = Recipe(iterations=4, cspd=Cspd(window=2))
MASKED = LATENTS_MODEL / "masked"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "recipe"),
    [
        (MASKED, Recipe(iterations=8)),
        (MASKED, Recipe(iterations=8, cspd=Cspd(window=4), guidance_scale=1.5)),
        (LATENTS_MODEL, Recipe(cspd=Cspd(window=4))),
    ],
)
def test_pictures_show_their_label_and_depend_on_the_seed_alone(model, recipe):
    make = PictureMaker(model, recipe)
    labels, seeds = [i % 10 for i in range(40)], list(range(40))
    made = make(labels, seeds)
    assert made.shape == (40, 32, 32, 1)
    assert made.dtype == np.uint8
    classifier = LatentsFolder.load(model).classifier
    seen = torch.from_numpy(made).float().movedim(-1, 1) / 127.5 - 1
    found = quality.accuracy(classifier, quality.features(classifier, seen), np.array(labels))
    assert found > 0.6
    some = make(labels[10:13], seeds[10:13])
    # Sums in batches of another shape differ by rounding.
    assert np.abs(some.astype(int) - made[10:13]).max() <= 2


def test_mistakes_are_one_sentence():
    with pytest.raises(ValueError, match="iterations is for masked models: remove it"):
        PictureMaker(LATENTS_MODEL, Recipe(iterations=3))
    with pytest.raises(ValueError, match="guidance_schedule is for masked models: remove it"):
        PictureMaker(LATENTS_MODEL, Recipe(guidance_scale=2.0, guidance_schedule="constant"))
    # What leaves the range of a float makes black pictures.
    for key, wrong in (("temperature", (0.0, 2.1)), ("guidance_scale", (-0.1, 1e30, float("inf")))):
        for value in wrong:
            with pytest.raises(ValueError, match=key):
                Recipe(**{key: value})
    make = PictureMaker(MASKED, FAST)
    with pytest.raises(ValueError, match="label 10: the model's are 0 to 9"):
        make([3, 10], [0, 1])
    with pytest.raises(ValueError, match="2 labels and 1 seeds"):
        make([3, 1], [0])
    with pytest.raises(ValueError, match="workers=0, batch=64: at least 1"):
        make_pictures(MASKED, FAST, [1], [1], workers=0)
    with pytest.raises(ValueError, match="iterations is for masked models"):
        make_pictures(LATENTS_MODEL, FAST, [1], [1], workers=1)


def test_iterations_are_the_models_own_and_otherwise_mars():
    folder = LatentsFolder.load(MASKED)
    labels, seeds = torch.tensor([3]), [1]
    assert Recipe().way(folder)(labels, seeds)[1] == folder.target.config.iterations == 16
    assert Recipe(iterations=2).way(folder)(labels, seeds)[1] == 2
    assert MaskedConfig().iterations == 64


def test_guidance_may_be_constant():
    folder = LatentsFolder.load(MASKED)
    labels, seeds = torch.tensor([3, 1]), [1, 2]
    settings = Settings(folder.length, folder.size, folder.schedule)
    made = {}
    for name in ("constant", "linear"):
        recipe = Recipe(iterations=4, guidance_scale=3.0, guidance_schedule=name)
        made[name], _ = recipe.way(folder)(labels, seeds)
        how = Guidance(3.0, name)
        expected = decode_masked(folder.target, labels, seeds, settings, 4, how)
        assert torch.equal(made[name], expected)
    assert not torch.allclose(made["constant"], made["linear"], atol=0.1)


class Mortal(ray_generation.Worker):
    """Dies with its process at the first batch that anybody makes."""

    def make(self, labels, seeds):
        marker = Path(os.environ["MORTAL_MARKER"])
        if not marker.exists():
            marker.touch()
            os._exit(1)
        return super().make(labels, seeds)


class Poisoned(ray_generation.Worker):
    """Dies of one seed, whoever makes it."""

    def make(self, labels, seeds):
        if 107 in seeds:
            os._exit(1)
        return super().make(labels, seeds)


@pytest.fixture
def cluster(tmp_path):
    """A cluster of this test's own, gone with it."""
    ray = pytest.importorskip("ray")
    ray.init(
        "local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        _node_ip_address="127.0.0.1",
        runtime_env={"env_vars": {
            "MORTAL_MARKER": str(tmp_path / "died"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        }},
    )  # fmt: skip
    yield
    ray.shutdown()


@pytest.mark.slow
def test_many_devices_make_what_one_makes_even_if_one_is_lost(cluster, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_generation, "Worker", Mortal)
    labels, seeds = [i % 10 for i in range(21)], list(range(100, 121))
    made = make_pictures(MASKED, FAST, labels, seeds, workers=2, batch=5)
    assert (tmp_path / "died").exists()
    alone = PictureMaker(MASKED, FAST)(labels, seeds)
    assert made.shape == alone.shape
    assert np.abs(made.astype(int) - alone).max() <= 2


@pytest.mark.slow
def test_a_batch_that_loses_every_device_is_not_tried_for_ever(cluster, monkeypatch):
    monkeypatch.setattr(ray_generation, "Worker", Poisoned)
    monkeypatch.setattr(ray_generation, "RETRIES", 1)
    monkeypatch.setattr(ray_generation, "RESTARTS", 1)
    labels, seeds = [i % 10 for i in range(15)], list(range(100, 115))
    with pytest.raises(ray_generation.PicturesLost, match="pictures 5 to 9 could not be made"):
        make_pictures(MASKED, FAST, labels, seeds, workers=1, batch=5)


@pytest.mark.slow
def test_workers_that_find_no_device_are_one_clear_error(cluster, monkeypatch):
    monkeypatch.setattr(ray_generation, "START_SECONDS", 3)
    with pytest.raises(ray_generation.PicturesLost, match="none of 2 workers could be started"):
        make_pictures(MASKED, FAST, [1], [1], workers=2, gpus_per_worker=1)
