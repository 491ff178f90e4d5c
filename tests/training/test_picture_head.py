"""An EAGLE head for an image model: its target's states, and that it learns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vllm_specplus.drafting.eagle_checkpoint import read_config
from vllm_specplus.image import llamagen
from vllm_specplus.image.llamagen import LlamaGen, LlamaGenConfig
from vllm_specplus.training import picture_head
from vllm_specplus.training.batch import collate
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.picture_head import PictureTarget, draw_pictures, load_llamagen
from vllm_specplus.training.texts import Text

CONFIG = LlamaGenConfig(
    codebook_size=12, codebook_dim=4, num_classes=3, grid_size=3, hidden_size=64,
    intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    guidance_scale=2.5,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    model = LlamaGen(CONFIG)
    for parameter in model.parameters():
        parameter.data *= 2  # surer than a model that has learnt nothing
    llamagen.save(out, model.state_dict() | {"codebook": torch.randn(12, 4)}, CONFIG)
    return out


def picture(label: int, codes: list[int]) -> Text:
    return Text(f"{label}", (CONFIG.label_token(label), *codes), 1, "target")


def test_states_and_logits_are_those_of_guidance(folder):
    """What the plain model says with guidance, code by code."""
    model = load_llamagen(folder)
    target = PictureTarget(model, torch.float32)
    texts = [picture(0, [1, 2, 3, 4, 5, 6, 7, 8, 9]), picture(2, [9, 0, 1, 11, 10, 3, 3, 2, 4])]
    states = target.states(collate(texts)).last
    codes = torch.tensor([text.tokens[1:] for text in texts])
    with torch.inference_mode():
        want = model.guided(codes, torch.tensor([0, 2]), 2.5)
    assert torch.allclose(target.output(states), want, atol=1e-4)


def test_pictures_are_drawn_from_the_guided_law(folder, monkeypatch):
    """The distributions of every place are those of the model without a cache."""
    model, seen = load_llamagen(folder), []
    own = torch.multinomial

    def noted(probs, count, generator):
        seen.append(probs)
        return own(probs, count, generator=generator)

    monkeypatch.setattr(torch, "multinomial", noted)
    labels = torch.tensor([1, 2])
    codes = draw_pictures(model, labels, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = model.guided(codes[:, :-1], labels, 2.5).softmax(-1)
    assert codes.shape == (2, 9)
    assert torch.allclose(torch.stack(seen, 1), want, atol=1e-5)


def test_greedy_goes_on_as_the_model_does(folder):
    model = load_llamagen(folder)
    target = PictureTarget(model, torch.float32)
    texts = [picture(1, [1, 2, 3, 4, 5, 6, 7, 8, 9])]
    probe = target.probe(texts)
    (group,) = probe.groups
    for row, place in enumerate(group.places.tolist()):
        codes = list(texts[0].tokens[1 : place + 1])
        for found in probe.truth[row].tolist():
            if len(codes) == 9:
                assert found == -1
                continue
            with torch.inference_mode():
                logits = model.guided(torch.tensor([codes]).long(), torch.tensor([1]), 2.5)
            assert found == int(logits[0, -1].argmax())
            codes.append(found)


def test_a_head_is_trained_beside_its_target(folder, tmp_path):
    import typer

    app = typer.Typer()
    app.command()(picture_head.main)
    arguments = ["--target", str(folder), "--out", str(tmp_path / "run"), "--pictures", "24"]
    done = CliRunner().invoke(app, [*arguments, "--epochs", "2"])
    assert done.exit_code == 0, done.output
    head = read_config(str(folder / "eagle"))
    assert (head.generation, head.target_hidden_size) == (1, 64)
    assert head.vocab_size == CONFIG.vocab_size
    measured = json.loads((tmp_path / "run" / "measured.json").read_text())
    assert measured["pictures"] == 23
    assert 0 < measured["tvd_acceptance"] <= 1
    again = CliRunner().invoke(app, [*arguments, "--epochs", "3"])
    assert again.exit_code == 1
    assert "holds a run with epochs 2, now it is 3" in again.output


def test_what_is_no_llamagen_is_told(tmp_path):
    with pytest.raises(TrainingError, match="is no LlamaGen of classes"):
        load_llamagen(tmp_path)
