"""Distillation: divergences, a tiny pair, and the draft that the package carries."""

from __future__ import annotations

import json

import pytest
import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from vllm_specplus.cli import model as cli_model
from vllm_specplus.cli.model import prepare_draft
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.training import distill

P, Q = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.2, 0.3, 0.5]])


@pytest.mark.parametrize(
    ("name", "value"),
    [("forward_kl", 0.2749), ("reverse_kl", 0.2749), ("jensen_shannon", 0.0664),
     ("total_variation", 0.3)],
)  # fmt: skip
def test_divergences(name, value):
    measure = distill.DIVERGENCES[name]
    assert float(measure(P, Q.log())) == pytest.approx(value, abs=1e-4)
    assert float(measure(P, P.log())) == pytest.approx(0.0, abs=1e-6)


def test_a_tiny_draft_learns_its_target(tmp_path):
    target = distill.load(save_draft(tmp_path, layers=3))
    texts = torch.randint(0, VOCAB, (16, 24)).tolist()
    draft = distill.make_draft(target, [0, 2], 64)
    before = distill.evaluate(draft.eval(), target, texts)
    frozen = target.lm_head.weight.clone()
    assert distill.train(draft, target, texts, ("forward_kl", "total_variation"), 0.1, seed=0) > 5
    after = distill.evaluate(draft, target, texts)
    assert after["temperature 1"] > before["temperature 1"] + 0.05
    assert torch.equal(target.lm_head.weight, frozen)
    assert all(name.startswith("model.") for name in distill.own_weights(draft))


def test_few_texts_leave_one_to_measure_on():
    """The least that is written, and what the embedded draft was made from."""
    for count, held_out in ((8, 1), (2500, 125)):
        measured, learnt = distill.hold_out([[i] for i in range(count)])
        assert len(measured) == held_out
        assert measured + learnt == [[i] for i in range(count)]


def test_the_embedded_draft_fits_its_target(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    target = tmp_path / "target"
    target.mkdir()
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 49152,
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    }  # fmt: skip
    (target / "config.json").write_text(json.dumps(config))
    embedding = torch.randn(49152, 576, dtype=torch.bfloat16)
    save_file({"model.embed_tokens.weight": embedding}, target / "model.safetensors")
    folder = prepare_draft(target)
    assert prepare_draft(target) == folder
    model = DraftModel(str(folder), torch.device("cpu"), torch.bfloat16, head_tokens=1000)
    assert model.num_layers == 2
    assert model.logits(model.embed(torch.tensor([[5]]))).shape == (1, 1, 1000)
    assert torch.equal(model.embed(torch.tensor([[7]]))[0, 0], embedding[7])
    # Layers of another version do not meet the folder of these.
    other = load_file(cli_model.DRAFT_LAYERS)
    other["model.norm.weight"] = other["model.norm.weight"] + 1
    monkeypatch.setattr(cli_model, "DRAFT_LAYERS", tmp_path / "other.safetensors")
    save_file(other, cli_model.DRAFT_LAYERS)
    assert prepare_draft(target) != folder
