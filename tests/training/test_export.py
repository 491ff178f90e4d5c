"""What is written of a head, and who reads it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.drafting.test_drafting import VOCAB, save_draft
from vllm_specplus.config import parse
from vllm_specplus.drafting.eagle_checkpoint import read_config
from vllm_specplus.training.compact import output_layer
from vllm_specplus.training.export import (
    Eagle3Format,
    eagle3_config,
    eagle_config,
    layer_config,
    write_head,
)

IDS = torch.tensor([0, 3, 7, 50])


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return Path(save_draft(tmp_path_factory.mktemp("target"), layers=4))


def written(folder: Path, target: Path, output: torch.Tensor | None = None) -> Path:
    """A random EAGLE-3 head for ``target`` in ``folder``, its output layer the target's."""
    raw = json.loads((target / "config.json").read_text())
    hidden, mlp, wide = raw["hidden_size"], raw["intermediate_size"], raw["num_attention_heads"]
    dim = hidden // wide
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    weights = {
        "fc.weight": random(hidden, 3 * hidden),
        "norm.weight": random(hidden),
        "layer.hidden_norm.weight": random(hidden),
        "layer.input_layernorm.weight": random(hidden),
        "layer.post_attention_layernorm.weight": random(hidden),
        "layer.self_attn.q_proj.weight": random(wide * dim, 2 * hidden),
        "layer.self_attn.k_proj.weight": random(raw["num_key_value_heads"] * dim, 2 * hidden),
        "layer.self_attn.v_proj.weight": random(raw["num_key_value_heads"] * dim, 2 * hidden),
        "layer.self_attn.o_proj.weight": random(hidden, wide * dim),
        "layer.mlp.gate_proj.weight": random(mlp, hidden),
        "layer.mlp.up_proj.weight": random(mlp, hidden),
        "layer.mlp.down_proj.weight": random(hidden, mlp),
        **{f"fc_norm.{number}.weight": random(hidden) for number in range(3)},
        "lm_head.weight": output_layer(target)[IDS] if output is None else output,
        "d2t": IDS - torch.arange(4),
        "t2d": torch.isin(torch.arange(raw["vocab_size"]), IDS),
    }
    head = Eagle3Format(4, (0, 2, 3), 3, fc_norm=True)
    folder.mkdir(parents=True)
    write_head(folder, eagle3_config(raw, str(target), head), weights)
    return folder


def test_our_own_loader_reads_it(tmp_path, target):
    head = read_config(str(written(tmp_path / "head", target)))
    assert (head.generation, head.states, head.layer_ids) == (3, 3, (0, 2, 3))
    assert (head.norm_before_residual, head.norm_output) == (False, False)
    assert head.vocab_size == VOCAB
    config = parse({"method": "eagle_tree", "model": str(tmp_path / "head")})
    assert config.model == str(tmp_path / "head")


def test_names_and_types_are_those_of_speculators(tmp_path, target):
    weights = load_file(written(tmp_path / "head", target) / "model.safetensors")
    assert {name for name in weights if name.startswith("layer")} == {
        f"layers.0.{name}.weight"
        for name in (
            *(f"self_attn.{part}_proj" for part in "qkvo"),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
            "hidden_norm", "input_layernorm", "post_attention_layernorm",
        )
    }  # fmt: skip
    kinds = {"d2t": torch.int64, "t2d": torch.bool}
    assert {n: w.dtype for n, w in weights.items()} == {
        name: kinds.get(name, torch.bfloat16) for name in weights
    }
    assert weights["d2t"].tolist() == [0, 2, 5, 47]


def test_vllms_loader_reads_the_configuration(tmp_path, target):
    from vllm.transformers_utils.configs.speculators import SpeculatorsConfig

    folder = written(tmp_path / "head", target)
    raw = json.loads((folder / "config.json").read_text())
    assert SpeculatorsConfig.extract_vllm_speculative_config(raw) == {
        "method": "eagle3", "num_speculative_tokens": 3
    }  # fmt: skip
    config = SpeculatorsConfig.from_pretrained(folder)
    assert config.architectures == ["Eagle3LlamaForCausalLM"]
    assert config.eagle_aux_hidden_state_layer_ids == [0, 2, 3]
    assert (config.draft_vocab_size, config.vocab_size) == (4, VOCAB)
    assert (config.fc_norm, config.norm_before_residual, config.norm_output) == (True, False, False)
    raw_target = json.loads((target / "config.json").read_text())
    assert config.rope_parameters == raw_target["rope_parameters"]
    assert config.hidden_size == raw_target["hidden_size"]


def test_biases_of_a_target_are_none_of_its_heads():
    layer = layer_config({"hidden_size": 8, "attention_bias": True, "layer_types": ["x"] * 9})
    assert (layer["attention_bias"], layer["num_hidden_layers"]) == (False, 1)
    assert "layer_types" not in layer
    assert eagle_config({"vocab_size": 5})["architectures"] == ["EagleLlamaForCausalLM"]
