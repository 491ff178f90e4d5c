"""The public MAR checkpoints' format, on files of that layout with random weights."""

from __future__ import annotations

import argparse

import pytest
import torch
from torch.nn import functional as F
from typer.testing import CliRunner

from tests.image.test_masked_latents import small
from vllm_specplus.image.continuous import convert
from vllm_specplus.image.continuous.folder import LatentsFolder
from vllm_specplus.image.continuous.generation import Cspd, PictureMaker, Recipe
from vllm_specplus.image.continuous.masked import MaskedConfig, MaskedLatents

CHANNELS, MULTIPLIERS, BLOCKS, SIZE = 32, (1, 2, 4), 2, 4


def autoencoder() -> dict[str, torch.Tensor]:
    """In latent diffusion's names; what only the encoder needs is there too."""
    torch.manual_seed(0)
    out = {}

    def conv(name, inputs, outputs, side=3):
        out[f"{name}.weight"] = torch.randn(outputs, inputs, side, side) / (side * inputs**0.5)
        out[f"{name}.bias"] = 0.1 * torch.randn(outputs)

    def norm(name, channels):
        out[f"{name}.weight"], out[f"{name}.bias"] = torch.rand(2, channels)

    def residual(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        conv(f"{name}.conv1", inputs, outputs)
        norm(f"{name}.norm2", outputs)
        conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    widest = CHANNELS * MULTIPLIERS[-1]
    conv("encoder.conv_in", 3, CHANNELS)
    conv("quant_conv", 2 * SIZE, 2 * SIZE, 1)
    conv("post_quant_conv", SIZE, SIZE, 1)
    conv("decoder.conv_in", SIZE, widest)
    residual("decoder.mid.block_1", widest, widest)
    norm("decoder.mid.attn_1.norm", widest)
    for part in ("q", "k", "v", "proj_out"):
        conv(f"decoder.mid.attn_1.{part}", widest, widest, 1)
    residual("decoder.mid.block_2", widest, widest)
    inputs = widest
    for level in (2, 1, 0):
        outputs = CHANNELS * MULTIPLIERS[level]
        for block in range(BLOCKS + 1):
            residual(f"decoder.up.{level}.block.{block}", inputs, outputs)
            inputs = outputs
        if level:
            conv(f"decoder.up.{level}.upsample.conv", outputs, outputs)
    norm("decoder.norm_out", CHANNELS)
    conv("decoder.conv_out", CHANNELS, 3)
    return out


def decoded(tensors, x: torch.Tensor) -> torch.Tensor:
    """What latent diffusion's decoder makes of latents [B, size, rows, columns]."""

    def conv(name, x):
        weight = tensors[f"{name}.weight"]
        return F.conv2d(x, weight, tensors[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name, x):
        return F.group_norm(x, 32, tensors[f"{name}.weight"], tensors[f"{name}.bias"], 1e-6)

    def residual(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.nin_shortcut", x) if h.shape != x.shape else x)

    x = conv("decoder.conv_in", conv("post_quant_conv", x))
    x = residual("decoder.mid.block_1", x)
    h = norm("decoder.mid.attn_1.norm", x)
    q, k, v = (conv(f"decoder.mid.attn_1.{part}", h).flatten(2) for part in "qkv")
    weights = ((q.transpose(1, 2) @ k) * q.shape[1] ** -0.5).softmax(-1)
    x = x + conv("decoder.mid.attn_1.proj_out", (v @ weights.transpose(1, 2)).view_as(x))
    x = residual("decoder.mid.block_2", x)
    for level in (2, 1, 0):
        for block in range(BLOCKS + 1):
            x = residual(f"decoder.up.{level}.block.{block}", x)
        if level:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = conv(f"decoder.up.{level}.upsample.conv", x)
    return conv("decoder.conv_out", F.silu(norm("decoder.norm_out", x)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(target, draft, autoencoder): files, and the target as it should come back."""
    folder = tmp_path_factory.mktemp("mar")
    target, draft = small(depth=2), small(seed=1)
    worse = {name: torch.zeros_like(t) for name, t in target.state_dict().items()}
    args = argparse.Namespace(model="mar_huge", lr=1e-4)
    torch.save({"model": worse, "model_ema": target.state_dict(), "args": args}, folder / "target")
    torch.save({"model_ema": draft.state_dict()}, folder / "draft")
    torch.save({"model": autoencoder()}, folder / "vae")
    return {name: folder / name for name in ("target", "draft", "vae")}, target


def run(files, out, *more):
    options = [part for name, path in files.items() for part in (f"--{name}", str(path))]
    app = convert.typer.Typer()
    app.command()(convert.main)
    return CliRunner().invoke(app, [*options, "--out", str(out), *more])


def test_a_folder_comes_out_that_makes_pictures(files, tmp_path):
    paths, target = files
    result = run(paths, tmp_path / "out", "--heads", "2")
    assert result.exit_code == 0, result.output
    folder = LatentsFolder.load(tmp_path / "out")
    assert folder.masked
    assert folder.classifier is None
    # The schedule is not in the tensors: it is MAR's.
    expected = target.config.model_dump() | {"steps": 100, "end": 0, "prediction": "noise"}
    assert folder.target.config.model_dump() == expected
    for name, tensor in target.state_dict().items():
        torch.testing.assert_close(folder.target.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)
    recipe = Recipe(cspd=Cspd(window=2), iterations=4, guidance_scale=2.0)
    made = PictureMaker(tmp_path / "out", recipe)([0, 2], [1, 2])
    assert made.shape == (2, 3 * 4, 3 * 4, 3)


def test_the_autoencoder_decodes_like_the_original(files):
    model = convert.kl_decoder(files[0]["vae"])
    assert model.config.multipliers == MULTIPLIERS
    latents = torch.randn(2, 9, SIZE)
    grid = latents.transpose(1, 2).view(2, SIZE, 3, 3) / 0.2325
    with torch.inference_mode():
        torch.testing.assert_close(
            model.decode(latents), decoded(autoencoder(), grid), atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("name", ["b", "l", "h"])
def test_sizes_of_the_public_models_are_found(name):
    sizes = {
        "b": (768, 12, 12, 6, 1024),
        "l": (1024, 16, 16, 8, 1280),
        "h": (1280, 20, 16, 12, 1536),
    }
    width, depth, heads, head_depth, head_width = sizes[name]
    config = MaskedConfig(
        encoder_width=width, encoder_depth=depth, encoder_heads=heads, decoder_width=width,
        decoder_depth=depth, decoder_heads=heads, head_depth=head_depth, head_width=head_width,
    )  # fmt: skip
    with torch.device("meta"):
        tensors = MaskedLatents(config).state_dict()
    assert convert.mar_config(tensors) == config


def test_what_is_no_mar_is_refused(files, tmp_path):
    paths, _ = files

    def said(files, *more) -> str:
        result = run(files, tmp_path / "out", *more)
        assert result.exit_code == 2
        return " ".join(result.output.replace("│", " ").split())

    swapped = {**paths, "target": paths["vae"]}
    assert "not a MAR: it has no class_emb.weight" in said(swapped, "--heads", "2")
    swapped = {**paths, "vae": paths["draft"]}
    assert "is no autoencoder" in said(swapped, "--heads", "2")
    assert "is no public one" in said(paths)
    assert not (tmp_path / "out").exists()
