"""Training an EAGLE head on a tiny target."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file

from tests.drafting.test_drafting import VOCAB, save_draft
from vllm_specplus.config import parse
from vllm_specplus.training import distill, eagle


def test_a_tiny_head_learns_its_target(tmp_path):
    folder = tmp_path / "target"
    target = distill.load(save_draft(folder, layers=2)).requires_grad_(False)
    texts = torch.randint(0, VOCAB, (16, 24)).tolist()
    out = tmp_path / "head"
    out.mkdir()
    head = eagle.start_head(target, out)
    before = eagle.evaluate(head, target, texts)
    frozen = target.lm_head.weight.clone()
    assert eagle.train(head, target, texts, 0.1, seed=0) > 5
    after = eagle.evaluate(head, target, texts)
    assert after["temperature 1"] > before["temperature 1"] + 0.05
    assert torch.equal(target.lm_head.weight, frozen)


def test_what_is_written_is_a_head(tmp_path):
    """With the texts of an earlier run; the method and vLLM's own ``eagle`` know its names."""
    target, out = tmp_path / "target", tmp_path / "head"
    save_draft(target, layers=2)
    texts = tmp_path / "texts.json"
    texts.write_text(json.dumps(torch.randint(0, VOCAB, (40, 12)).tolist()))
    eagle.main(target, out, texts, minutes=0.01)
    assert parse({"method": "eagle_tree", "model": str(out)}).model == str(out)
    names = load_file(out / "model.safetensors").keys()
    assert {name.split(".")[0] for name in names} == {"layers", "fc"}
    assert all(w.dtype == torch.bfloat16 for w in load_file(out / "model.safetensors").values())
