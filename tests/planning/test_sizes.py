"""Sizes are those of the models, and what cannot be counted is said in a sentence."""

from __future__ import annotations

import random

import pytest

from tests.planning.shapes import LLAMA_8B, LLAMA_70B, QWEN_30B, config, save
from vllm_specplus.planning.sizes import Shape, check_attention, weight_bits


def test_a_folder_without_weights_is_enough(tmp_path):
    assert Shape.of(save(tmp_path, LLAMA_70B)) == LLAMA_70B


@pytest.mark.parametrize(
    ("shape", "billions"), [(LLAMA_8B, 8.03), (LLAMA_70B, 70.6), (QWEN_30B, 30.5)]
)
def test_parameters_are_those_of_the_names(shape, billions):
    assert shape.parameters == pytest.approx(billions * 1e9, rel=0.005)
    assert shape.weight_bytes == 2 * shape.parameters


def test_a_multimodal_model_has_the_sizes_of_its_text(tmp_path):
    save(tmp_path, LLAMA_8B, text_config=config(LLAMA_70B))
    assert Shape.of(tmp_path) == LLAMA_70B


@pytest.mark.parametrize(
    "keys",
    [
        {"num_experts": 128, "moe_intermediate_size": 768},
        {"num_local_experts": 128, "intermediate_size": 768},
        {"n_routed_experts": 128, "moe_intermediate_size": 768, "n_shared_experts": 0},
    ],
)
def test_experts_by_the_names_that_families_give_them(tmp_path, keys):
    found = Shape.of(save(tmp_path, QWEN_30B, num_experts_per_tok=8, **keys))
    assert (found.experts, found.chosen, found.expert_width) == (128, 8, 768)
    assert found.decoder == QWEN_30B.decoder


def test_shared_experts_and_dense_layers(tmp_path):
    keys = {"n_routed_experts": 64, "moe_intermediate_size": 100, "num_experts_per_tok": 4}
    keys |= {"n_shared_experts": 2, "first_k_dense_replace": 3}
    found = Shape.of(save(tmp_path, LLAMA_8B, **keys))
    expert = 3 * 4096 * 100
    sparse = found.attention + 64 * expert + 2 * expert
    assert found.decoder == 3 * LLAMA_8B.layer + 29 * sparse


def test_experts_touched_are_those_that_rows_choose():
    rng, draws = random.Random(0), 300
    for rows in (1, 5, 40):
        distinct = 0
        for _ in range(draws):
            asked = {e for _ in range(rows) for e in rng.sample(range(128), 8)}
            distinct += len(asked)
        assert QWEN_30B.touched(rows) == pytest.approx(distinct / draws, rel=0.02)


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (None, 16),
        ({"quant_method": "fp8"}, 8),
        ({"quant_method": "awq", "bits": 4}, 4),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, 4),
    ],
)
def test_bits_of_a_weight(scheme, bits):
    assert weight_bits({"quantization_config": scheme}, "config.json") == bits


@pytest.mark.parametrize(
    "scheme",
    [
        {"quant_method": "new"},
        {"bits": "four"},
        {"bits": True},
        {"config_groups": {"a": {"weights": {"num_bits": 4}}, "b": {"weights": {"num_bits": 8}}}},
        [4],
    ],
)
def test_bits_that_nobody_says(scheme):
    with pytest.raises(ValueError, match="does not say how many bits a weight has: leave it out"):
        weight_bits({"quantization_config": scheme}, "config.json")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'"),
        ({"layers_block_type": ["attention", "mamba"]}, "'mamba'"),
    ],
)
def test_layers_that_keep_something_else(keys, said):
    with pytest.raises(ValueError, match=said):
        check_attention(keys, "config.json")


def test_windows_are_counted():
    check_attention({"layer_types": ["full_attention", "sliding_attention"]}, "config.json")
