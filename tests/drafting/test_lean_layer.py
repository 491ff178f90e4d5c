"""Lean layers compute what transformers' do, and only those of Llama's kind are taken over."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.drafting.test_drafting import VOCAB, save_draft
from vllm_specplus.drafting.executor import DraftExecutor
from vllm_specplus.drafting.lean_layer import LeanLayer
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.kernels import native

CPU = torch.device("cpu")
#: Sizes and switches of each family's, windows and biases among them.
LEAN = {
    "llama": {},
    "llama with a bias": {"attention_bias": True},
    "mistral": {"sliding_window": 24},
    "qwen2": {},
}


def rounds(model: DraftModel) -> list[torch.Tensor]:
    """Logits behind texts and of two levels."""
    run = DraftExecutor(model, 2000, 12)
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in (1, 30, 70)]
    names = ["a", "b", "c"]
    assert all(run.room(name, len(text)) for name, text in zip(names, texts, strict=True))
    out = [run.begin(names, texts)]
    for parents in ([[-1, -1]] * 3, [[0, 1]] * 3):
        tokens = torch.from_numpy(rng.integers(0, VOCAB, (3, 2)))
        out.append(run.grow(torch.arange(3), tokens, torch.tensor(parents)))
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LEAN)
def test_logits_are_those_of_transformers_layers(tmp_path, name, dtype):
    folder = save_draft(tmp_path, name.split()[0], **LEAN[name])
    plain, lean = (DraftModel(folder, CPU, dtype) for _ in range(2))
    if name == "llama with a bias":
        for layer in (*plain.layers, *lean.layers):
            layer.attention.v_proj.bias.data.copy_(torch.linspace(-1, 1, 32))
    lean.quicken()
    assert all(isinstance(each, LeanLayer) for each in lean.layers)
    for mine, theirs in zip(rounds(lean), rounds(plain), strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)
        else:  # roundings differ
            assert (mine - theirs).norm() < 0.05 * theirs.norm()


@pytest.mark.parametrize("family", ["gemma", "olmo2", "qwen3", "mixtral", "glm4"])
def test_other_layers_stay_as_they_are(tmp_path, family):
    model = DraftModel(save_draft(tmp_path, family), CPU, torch.float32)
    before = list(model.layers)
    model.quicken()
    assert model.layers == before


def test_weights_are_held_once(tmp_path):
    model = DraftModel(save_draft(tmp_path), CPU, torch.float32)
    attention = model.layers[0].attention
    model.quicken()
    held = {attention.q_proj.weight.untyped_storage().data_ptr()}
    assert held == {each.weight.untyped_storage().data_ptr()
                    for each in (attention.k_proj, attention.v_proj)}  # fmt: skip
    assert model.layers[0]._qkv.untyped_storage().data_ptr() in held


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [20, 64, 576])
def test_kernels_of_norms_and_rotary_positions(dtype, size):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

    torch.manual_seed(0)
    close = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.02}
    norm = LlamaRMSNorm(size, 1e-5).to(dtype)
    norm.weight.data.normal_(1, 0.3)
    rows = (3 * torch.randn(40, size)).to(dtype)
    with torch.inference_mode():
        out = native.rms_norm(rows, norm.weight, norm.variance_epsilon)
        torch.testing.assert_close(out, norm(rows), **close)

        both = torch.randn(40, 5, size).to(dtype)
        cos, sin = torch.randn(2, 40, size).to(dtype)
        expected, _ = apply_rotary_pos_emb(
            both[None, :, :3].transpose(1, 2),
            both[None, :, :1].transpose(1, 2),
            cos[None],
            sin[None],
        )
        rest = both[:, 3:].clone()
        native.rotate(both[:, :3], cos, sin)
        torch.testing.assert_close(both[:, :3], expected[0].transpose(0, 1), **close)
        assert torch.equal(both[:, 3:], rest)
