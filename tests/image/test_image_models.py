"""The plain image models: rotary embedding, checkpoints, guidance, quality."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from vllm_specplus.image import convert
from vllm_specplus.image.llamagen import LlamaGen, LlamaGenConfig, rotary_2d, rotate
from vllm_specplus.image.pictures import load_pictures
from vllm_specplus.image.quality import (
    ClassifierConfig,
    Gaussian,
    PictureClassifier,
    distance_error,
    increase,
    same_law,
)
from vllm_specplus.image.vq import VQConfig, VQModel, to_bytes

CONFIG = LlamaGenConfig(
    codebook_size=20, codebook_dim=4, num_classes=3, grid_size=4, hidden_size=64,
    intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
SMALL = VQConfig(
    codebook_size=20, codebook_dim=4, image_channels=1, channels=32, multipliers=(1, 2), blocks=1,
    latent_channels=16,
)  # fmt: skip


def test_a_position_is_turned_by_row_and_by_column():
    """Pair by pair, in plain arithmetic."""
    turn = rotary_2d(CONFIG)
    assert turn.shape == (17, 8, 2)
    assert (turn[0] == 0).all()
    x = torch.randn(17, 2, 16)
    out = rotate(x, turn)
    assert (out[0] == 0).all()
    for place in (1, 6, 16):
        row, column = divmod(place - 1, 4)
        for pair in range(8):
            frequency = 10000 ** (-2 * (pair % 4) / 8)
            angle = (row if pair < 4 else column) * frequency
            a, b = (float(v) for v in x[place, 1, 2 * pair : 2 * pair + 2])
            want = (
                a * math.cos(angle) - b * math.sin(angle),
                b * math.cos(angle) + a * math.sin(angle),
            )
            got = out[place, 1, 2 * pair : 2 * pair + 2].tolist()
            assert got == pytest.approx(want, abs=1e-5)


def test_guidance_mixes_two_passes():
    torch.manual_seed(0)
    model = LlamaGen(CONFIG).eval()
    codes, labels = torch.randint(20, (2, 5)), torch.tensor([0, 2])
    with torch.inference_mode():
        label, other = model(codes, labels), model(codes, torch.tensor([3, 3]))
        assert torch.allclose(model.guided(codes, labels, 1.0), label, atol=1e-5)
        assert torch.allclose(model.guided(codes, labels, 0.0), other, atol=1e-5)
        mixed = model.guided(codes, labels, 2.5)
        assert torch.allclose(mixed, other + 2.5 * (label - other), atol=1e-4)


def test_the_configs_ids():
    assert CONFIG.vocab_size == 24
    assert CONFIG.max_position_embeddings == 17
    assert CONFIG.label_token(3) == 23
    again = LlamaGenConfig(**CONFIG.to_dict())
    assert again.to_dict() == CONFIG.to_dict()


def test_codes_are_the_nearest_by_angle_and_decode_to_pictures():
    torch.manual_seed(0)
    model = VQModel(SMALL).eval()
    with torch.inference_mode():
        pictures = torch.rand(3, 1, 8, 8) * 2 - 1
        codes = model.encode(pictures)
        assert codes.shape == (3, 4, 4)
        distance = (model.latents(pictures)[..., None, :] - model.quantize.vectors()).norm(dim=-1)
        assert codes.equal(distance.argmin(-1))
        back = model.decode(codes)
    assert back.shape == pictures.shape
    assert to_bytes(torch.tensor([[[[-3.0, 0.0, 1.0]]]])).flatten().tolist() == [0, 128, 255]


@pytest.fixture
def checkpoints(tmp_path):
    """As the public ones are laid out, with what they carry besides."""
    torch.manual_seed(0)
    model, vq = LlamaGen(CONFIG), VQModel(SMALL)
    torch.save({"model": model.state_dict() | {"freqs_cis": torch.zeros(3)}}, tmp_path / "ar.pt")
    used = {"quantize.codebook_used": torch.zeros(65536)}
    torch.save({"model": vq.state_dict() | used}, tmp_path / "vq.pt")
    return tmp_path, model, vq


def run(*arguments: str):
    import typer

    app = typer.Typer()
    app.command()(convert.main)
    return CliRunner().invoke(app, list(arguments))


def test_a_public_checkpoint_becomes_a_folder(checkpoints):
    from safetensors.torch import load_file

    folder, model, vq = checkpoints
    out = folder / "out"
    done = run("--ar", f"{folder}/ar.pt", "--vq", f"{folder}/vq.pt", "--out", str(out),
               "--grid-size", "4", "--heads", "4")  # fmt: skip
    assert done.exit_code == 0, done.output
    made = LlamaGenConfig(**json.loads((out / "config.json").read_text()))
    for name in ("codebook_size", "num_classes", "hidden_size", "intermediate_size",
                 "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
                 "vocab_size"):  # fmt: skip
        assert getattr(made, name) == getattr(CONFIG, name)
    weights = load_file(out / "model.safetensors")
    assert weights.pop("codebook").equal(vq.quantize.vectors().detach())
    model.load_state_dict(weights)
    codes = torch.randint(20, (1, 4, 4))
    with torch.inference_mode():
        assert VQModel.load(out).decode(codes).equal(vq.eval().decode(codes))
    # As the public sample script draws, on our route and on vLLM's own.
    from transformers import GenerationConfig

    assert GenerationConfig.from_pretrained(out).top_k == 2000
    assert load_pictures(out).defaults == {"temperature": 1.0, "top_k": 2000, "top_p": 1.0}


def test_what_cannot_be_converted_says_why(checkpoints):
    folder, model, _ = checkpoints
    arguments = ["--vq", f"{folder}/vq.pt", "--out", f"{folder}/out"]
    done = run("--ar", f"{folder}/ar.pt", *arguments)
    assert done.exit_code == 2
    assert "give --heads" in done.output
    del model.cls_embedding
    torch.save({"model": model.state_dict()}, folder / "text.pt")
    done = run("--ar", f"{folder}/text.pt", *arguments)
    assert done.exit_code == 2
    assert "embeds neither classes nor captions" in " ".join(done.output.replace("│", "").split())


def test_the_distance_of_gaussians():
    """Closed form for diagonal covariances; 0 for the same pictures."""
    rng = np.random.default_rng(0)
    a, b = np.diag(rng.uniform(0.5, 2, 6)), np.diag(rng.uniform(0.5, 2, 6))
    shift = rng.normal(size=6)
    want = shift @ shift + ((np.sqrt(np.diag(a)) - np.sqrt(np.diag(b))) ** 2).sum()
    assert Gaussian(np.zeros(6), a).distance(Gaussian(shift, b)) == pytest.approx(want)
    seen = rng.normal(size=(500, 6))
    mine = Gaussian.of(seen)
    assert mine.distance(mine) == pytest.approx(0, abs=1e-6)
    assert 0 < distance_error(seen, mine, resamples=20) < 0.1
    twice = Gaussian.of(np.concatenate((seen, seen[:100])))
    weighted = Gaussian.of(seen, np.where(np.arange(500) < 100, 2.0, 1.0))
    assert twice.distance(weighted) == pytest.approx(0, abs=1e-4)


def test_an_increase_is_told_with_an_interval_that_holds_it():
    """Of 40 pairs of sets, the second a little further away, all but a few intervals do."""
    rng = np.random.default_rng(0)
    reference, shift = Gaussian(np.zeros(4), np.eye(4)), 0.3
    held = 0
    for seed in range(40):
        plain = rng.normal(size=(400, 4))
        worse = rng.normal(size=(400, 4)) + shift
        found = increase(worse, plain, reference, resamples=60, seed=seed)
        assert found.low <= found.mean <= found.high
        held += found.low <= 4 * shift**2 <= found.high
    assert held >= 33
    with pytest.raises(ValueError, match="400 and 399 pictures"):
        increase(plain, plain[1:], reference)


def test_another_law_is_told_from_the_same():
    rng = np.random.default_rng(0)
    one, two = rng.normal(size=(2, 300, 4))
    assert same_law(one, two, 99) > 0.01
    assert same_law(one, two + 0.3, 99) == 0.01


def test_a_classifier_says_in_its_folder_what_it_reads(tmp_path):
    config = ClassifierConfig(
        name="toy", side=16, image_channels=3, classes=5, widths=(8, 12), features=7
    )
    torch.manual_seed(0)
    made = PictureClassifier(config).eval()
    made.save(tmp_path)
    again = PictureClassifier.load(tmp_path)
    pictures = torch.rand(3, 3, 16, 16)
    assert again.config == config
    assert made.features(pictures).shape == (3, 7)
    assert torch.allclose(made(pictures), again(pictures), atol=1e-2)
    # The digits' has no such file.
    (tmp_path / "classifier" / "config.json").unlink()
    with pytest.raises(RuntimeError, match=r"size mismatch|Missing key"):
        PictureClassifier.load(tmp_path)
