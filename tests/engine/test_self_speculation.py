"""Drafting with the target's own layers in the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import harness
from tests.engine.conftest import VOCAB, build_model
from tests.engine.test_sampling import TOKENS, chi_square, joint_probabilities

pytestmark = pytest.mark.engine

FIXED = {"policy": "fixed"}
CHAIN = {"shape": "chain", "num_speculative_tokens": 5, "control": FIXED}
SKIPS_ONE = {"method": "layer_skip", "skip_attention": [1], "skip_mlp": [1]}
EARLY = {"method": "early_exit", "exit_layers": [1, 2], "num_speculative_tokens": 6}
FUSED = {
    "method": "rasd",
    "sources": ["token_recycling", {"method": "layer_skip", "num_speculative_tokens": 6}],
    "num_speculative_tokens": 16,
}


@pytest.mark.parametrize(
    "config",
    [{"method": "layer_skip", "num_speculative_tokens": 9}, EARLY | {"shape": "rsd_s"}, FUSED],
    ids=lambda config: config["method"],
)
def test_greedy_text_is_the_same(tmp_path, tiny_engine, mixed_requests, plain, config):
    """Chunked prefill, prefix caching, preemption, penalties, and layers that change."""
    batches = [{"requests": mixed_requests}] * 2
    config = {"speculative_config": config | {"control": FIXED}}
    result = harness.run(tmp_path, tiny_engine | config, batches)
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 100


def idle(weights: Path, layer: int) -> None:
    """Let a layer add nothing to its input."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.{layer}.{name}.weight"].zero_()
    save_file(tensors, weights, {"format": "pt"})


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_without_a_layer_that_does_nothing_every_draft_is_right(tmp_path, tiny_engine, family):
    """The copied cache is the target's: every node of a greedy chain is accepted."""
    model = build_model(tmp_path / "model", VOCAB, 0.25, family)
    idle(Path(model) / "model.safetensors", layer=1)
    requests = [
        [[5 + i] * (1 + 30 * i), {"temperature": 0.0, "max_tokens": 61, "ignore_eos": True}]
        for i in range(4)
    ]
    engine = {"model": model, "max_model_len": 240, "num_gpu_blocks_override": 400}
    config = {"speculative_config": SKIPS_ONE | CHAIN}
    result = harness.run(tmp_path, tiny_engine | engine | config, [{"requests": requests}])
    counters = result["counters"]
    assert counters["request_steps"] == 4 * 10
    assert counters["nodes_accepted"] == counters["nodes_drafted"] == 4 * 50


def test_sampled_text_has_the_targets_distribution(tmp_path):
    target = build_model(tmp_path, 32, 0.12)
    engine = {
        "model": target, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 64, "max_num_seqs": 256, "max_num_batched_tokens": 4096,
        "speculative_config": {"method": "layer_skip", "shape": "rsd_s", "control": FIXED,
                               "num_speculative_tokens": 6},
    }  # fmt: skip
    prompt, samples = [5, 9, 17, 3, 21], 8_000
    params = {"temperature": 1.0, "top_k": 6, "max_tokens": TOKENS + 1, "ignore_eos": True}
    batch = {"prompt": prompt, "params": params | {"detokenize": False}, "repeat": samples}
    result = harness.run(tmp_path, engine, [batch])
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 0.5 * samples
    texts = [tuple(out[0][:TOKENS]) for out in harness.ids(result)]
    assert chi_square(joint_probabilities(target, prompt, 6), texts) > 1e-3
