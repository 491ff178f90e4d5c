"""``bench --task image-continuous`` and the folders it reads, with small untrained models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vllm_specplus.bench.continuous import ContinuousReport
from vllm_specplus.cli.main import app
from vllm_specplus.cli.model import IMAGE_MODEL, LATENTS_MODEL
from vllm_specplus.image.continuous.folder import LatentsFolder
from vllm_specplus.image.continuous.vae import LatentVAE, VAEConfig, load_vae
from vllm_specplus.training.latents import END, STEPS, causal, masked

DIGITS = IMAGE_MODEL


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("latents")
    torch.manual_seed(0)
    causal(64, 2, 32, 2).save(out)
    causal(32, 1, 32, 1).save(out / "draft")
    masked(32, 1, 32, 1).save(out / "masked")
    masked(32, 1, 32, 1).save(out / "masked" / "draft")
    LatentVAE(VAEConfig(size=4, signal=0.85)).save(out)
    shutil.copytree(DIGITS / "classifier", out / "classifier")
    return out


def bench(*arguments: str):
    return CliRunner().invoke(app, ["bench", "--task", "image-continuous", *arguments])


def test_folders_say_what_they_hold(folder):
    one, other = LatentsFolder.load(folder), LatentsFolder.load(folder / "masked")
    assert (one.masked, one.length, one.size, one.num_classes) == (False, 64, 4, 10)
    assert (other.masked, other.length, other.size, other.num_classes) == (True, 64, 4, 10)
    assert one.schedule.steps == other.schedule.steps == STEPS
    assert one.schedule.signal_at_end == other.schedule.signal_at_end
    assert one.target.config.end == END
    with pytest.raises(FileNotFoundError, match=r"has no draft/config.json"):
        LatentsFolder.load(folder / "draft")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "methods", "passes"),
    [
        (".", 'none,cspd:window=4,cspd:window=4:rule="reference":aligned=false', [64, None, None]),
        ("masked", 'none,plain:iterations=5,cspd:window=4:contexts="shared"', [16, 5, 4]),
    ],
)
def test_measures_prints_and_writes(folder, tmp_path, model, methods, passes):
    out = {name: tmp_path / name for name in ("out.json", "plot.png", "sheet.png")}
    result = bench(
        "--model", str(folder / model), "--methods", methods, "--limit", "4", "--concurrency",
        "1,4", "--json", str(out["out.json"]), "--plot", str(out["plot.png"]), "--sheet",
        str(out["sheet.png"]),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = ContinuousReport.model_validate_json(out["out.json"].read_text())
    assert [run.batch for run in report.runs] == [1, 1, 1, 4, 4, 4]
    for run, wanted in zip(report.runs[3:], passes, strict=True):
        assert run.pictures == 4
        assert run.pictures_per_second > 0
        if wanted is not None:
            assert run.passes_per_picture == wanted
        assert (run.acceptance is None) == (not run.label.startswith("cspd"))
    assert "accepted" in result.output
    for name in ("plot.png", "sheet.png"):
        assert out[name].read_bytes().startswith(b"\x89PNG")
    assert json.loads(out["out.json"].read_text())["settings"]["pictures"] == 4


@pytest.mark.parametrize(
    ("model", "methods", "message"),
    [
        (
            ".",
            "jacobi",
            "measures none, cspd and, of masked models, plain:iterations=N, not jacobi",
        ),
        (".", "plain:iterations=4", "iterations is for masked models: remove it"),
        (".", "cspd:window=0", "window=0"),
        (".", "cspd:windows=2", "windows"),
        (".", 'cspd:rule="best"', "rule"),
        (".", 'cspd:contexts="own"', "contexts is for masked models"),
        ("masked", "cspd:aligned=false", "aligned is for causal models"),
        ("masked", 'cspd:contexts="all"', "contexts"),
        ("masked", "plain:iterations=65", "1 to 64"),
        ("draft", "none", "has no draft/config.json"),
    ],
)
def test_bad_input_is_one_sentence(folder, model, methods, message):
    refused(bench("--model", str(folder / model), "--methods", methods), message)


def test_a_temperature_of_nothing_is_refused(folder):
    message = "it must be above 0, not 0.0"
    refused(bench("--model", str(folder), "--temperature", "0"), message)


@pytest.mark.slow
@pytest.mark.parametrize("model", [".", "masked"])
def test_guidance_changes_the_pictures(tmp_path, model):
    """Of the embedded models: heads that have learnt nothing say nothing to mix."""
    made = []
    for scale in ("1", "3"):
        out = tmp_path / f"{scale}.json"
        result = bench(
            "--model", str(LATENTS_MODEL / model), "--methods", "none", "--limit", "16",
            "--concurrency", "16", "--guidance-scale", scale, "--json", str(out),
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        report = ContinuousReport.model_validate_json(out.read_text())
        assert report.settings["guidance"] == float(scale)
        made.append(report.runs[0].distance)
    assert made[0] != made[1]


def refused(result, message: str) -> None:
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("kind", [".", "masked"])
def test_the_embedded_models_draw_what_is_asked_for(tmp_path, kind):
    out = tmp_path / "out.json"
    result = bench(
        "--model", str(LATENTS_MODEL / kind), "--methods", "none,cspd:window=4", "--limit", "60",
        "--concurrency", "60", "--json", str(out),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    for run in ContinuousReport.model_validate_json(out.read_text()).runs:
        assert run.accuracy > 0.7
        assert run.given_up == 0
        if run.acceptance is not None:
            assert 0.1 < run.acceptance < 0.99


def test_prepare_model_prints_the_folder():
    result = CliRunner().invoke(app, ["prepare-model", "--latents"])
    assert result.stdout.strip() == str(LATENTS_MODEL)
    refusal = CliRunner().invoke(app, ["prepare-model", "--latents", "--image"])
    assert refusal.exit_code == 2
    assert "stands alone" in refusal.stderr


def test_a_vae_reads_what_it_wrote(folder):
    vae = load_vae(folder)
    pictures = torch.rand(3, 1, 32, 32) * 2 - 1
    clean = vae.encode(pictures)
    assert clean.shape == (3, 64, 4)
    assert vae.decode(clean).shape == pictures.shape
    torch.manual_seed(0)
    noisy = vae.noisy(torch.zeros(1000, 64, 4))
    assert float(noisy.var()) == pytest.approx(0.15, abs=0.005)
    # Raster order: what is right of the middle is in the second half of a row.
    late = torch.zeros(1, 64, 4)
    late[0, 7] = 3
    changed = (vae.decode(late) - vae.decode(torch.zeros(1, 64, 4))).abs()[0, 0]
    assert changed[:8, 24:].mean() > changed[24:, :8].mean()
