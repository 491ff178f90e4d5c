"""What requests have generated, as files and as pictures that are not whole yet."""

from __future__ import annotations

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from vllm_specplus.cli.model import IMAGE_MODEL, LATENTS_MODEL
from vllm_specplus.image.pictures import as_logprobs, encoded, latents_of, load_pictures


def codes(count: int) -> SimpleNamespace:
    drawn = np.random.default_rng(0).integers(0, 512, 64)
    return SimpleNamespace(token_ids=drawn[:count].tolist(), logprobs=None)


def latents(count: int) -> SimpleNamespace:
    drawn = np.random.default_rng(0).normal(size=(64, 4)).tolist()[:count]
    said = [
        {0: SimpleNamespace(logprob=0.0)}
        | {i: SimpleNamespace(logprob=value) for i, value in enumerate(each, 1)}
        for each in drawn
    ]
    return SimpleNamespace(token_ids=[0] * count, logprobs=said)


@pytest.mark.parametrize(("model", "made"), [(IMAGE_MODEL, codes), (LATENTS_MODEL, latents)])
def test_a_picture_that_is_not_whole_shows_its_rows_above_grey(model, made):
    pictures = load_pictures(model)
    assert pictures.beginning(made(7), 64) is None
    some = pictures.beginning(made(29), 64)
    assert (some.shape, some.dtype) == ((32, 32), np.uint8)
    assert (some[12:] == 128).all()
    assert len(np.unique(some[:12])) > 20
    whole = pictures.pixels(made(64))
    assert whole.shape == (32, 32)
    assert (pictures.beginning(made(64), 64) == whole).all()


def test_rows_of_codes_are_decoded_alone():
    pictures = load_pictures(IMAGE_MODEL)
    with torch.inference_mode():
        alone = pictures.vq.decode(torch.tensor(codes(24).token_ids).view(1, 3, 8))
    expected = ((alone[0, 0].clamp(-1, 1) + 1) * 127.5).round()
    assert (pictures.beginning(codes(29), 64)[:12] == expected.numpy()).all()


def test_latents_travel_as_logprobs():
    drawn = latents_of(latents(3))
    assert drawn.shape == (3, 4)
    assert float(drawn[2, 1]) == pytest.approx(latents(3).logprobs[2][2].logprob)
    again = latents_of(SimpleNamespace(token_ids=[0] * 3, logprobs=as_logprobs(drawn)))
    assert torch.equal(again, drawn)


@pytest.mark.parametrize("shape", [(20, 24), (20, 24, 3)])
def test_a_file_is_of_the_format_and_quality_that_is_asked_for(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    exact = Image.open(io.BytesIO(encoded(pixels)))
    assert (exact.format, np.asarray(exact).tolist()) == ("PNG", pixels.tolist())
    for kind in ("jpeg", "webp"):
        fine, coarse = encoded(pixels, kind, 95), encoded(pixels, kind, 10)
        assert Image.open(io.BytesIO(fine)).format == kind.upper()
        assert len(coarse) < len(fine)
