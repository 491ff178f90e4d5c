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
#: The forms of the papers, but for their lengths.
SWIFT = {
    "method": "layer_skip", "search": "swift", "shape": "caterpillar",
    "num_speculative_tokens": 20, "stop": {"rule": "confidence", "threshold": 0.1},
}  # fmt: skip
DRAFT_AND_VERIFY = {
    "method": "layer_skip", "skip_attention": [1], "skip_mlp": [1], "shape": "chain",
    "num_speculative_tokens": 8, "stop": {"rule": "adaptive_confidence", "threshold": 0.1},
}  # fmt: skip
DEL = EARLY | {"shape": "chain", "stop": {"rule": "tau"}}
FUSED = {
    "method": "rasd",
    "sources": ["token_recycling", {"method": "layer_skip", "num_speculative_tokens": 6}],
    "num_speculative_tokens": 16,
}


full = pytest.mark.full(
    "vllm_specplus/drafting/*.py", "vllm_specplus/engine/target_layers.py",
    "vllm_specplus/proposers/draft_tree.py", "vllm_specplus/proposers/early_exit.py",
    "vllm_specplus/proposers/layer_skip.py",
)  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        pytest.param({"method": "layer_skip", "num_speculative_tokens": 9}, marks=full),
        SWIFT,
        pytest.param(DRAFT_AND_VERIFY, marks=full),
        pytest.param(EARLY | {"shape": "rsd_s", "statistics": "replay"}, marks=full),
        pytest.param(EARLY | {"shape": "rsd_s"}, marks=full),
        DEL,
        FUSED,
    ],
    ids=["paired", "swift", "draft_and_verify", "replay", "verification", "del", "rasd"],
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


@pytest.mark.parametrize(
    "family",
    ["llama", "qwen3", *(pytest.param(name, marks=full) for name in ("qwen2", "mistral"))],
)
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


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            {"method": "layer_skip", "shape": "rsd_s", "num_speculative_tokens": 6}, marks=full
        ),
        # Below 0.5 tokens are drawn that end a draft, and others that do not.
        SWIFT | {"num_speculative_tokens": 9},
        pytest.param(DRAFT_AND_VERIFY | {"num_speculative_tokens": 3}, marks=full),
        pytest.param(DEL | {"num_speculative_tokens": 3}, marks=full),
    ],
    ids=["rsd_s", "swift", "draft_and_verify", "del"],
)  # fmt: skip
def test_sampled_text_has_the_targets_distribution(tmp_path, config):
    target = build_model(tmp_path, 32, 0.12)
    engine = {
        "model": target, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 64, "max_num_seqs": 256, "max_num_batched_tokens": 4096,
        "speculative_config": config | {"control": FIXED},
    }  # fmt: skip
    prompt, samples = [5, 9, 17, 3, 21], 8_000
    params = {"temperature": 1.0, "top_k": 6, "max_tokens": TOKENS + 1, "ignore_eos": True}
    batch = {"prompt": prompt, "params": params | {"detokenize": False}, "repeat": samples}
    result = harness.run(tmp_path, engine, [batch])
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 0.3 * samples
    texts = [tuple(out[0][:TOKENS]) for out in harness.ids(result)]
    assert chi_square(joint_probabilities(target, prompt, 6), texts) > 1e-3


#: Tokens of two kinds of traffic, which never mix.
CODE, DIALOGUE = range(3, 31), range(31, 59)
LAYERS, KNOWS_CODE, KNOWS_DIALOGUE = 6, 1, 4


def of_two_kinds(path: Path) -> str:
    """A target in which one layer's MLP knows what follows the tokens of code, the next ones in
    turn, and another's those of dialogue; all else does nothing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    size = 64
    config = AutoConfig.for_model(
        "llama", vocab_size=size, hidden_size=2 * size, intermediate_size=size,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    known, unknown = torch.eye(size), torch.zeros(size, size)
    with torch.no_grad():
        # The first half of a state is the token, the second half what follows.
        model.model.embed_tokens.weight.copy_(torch.cat((known, unknown), 1))
        model.lm_head.weight.copy_(torch.cat((unknown, known), 1))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.gate_proj.weight.copy_(torch.cat((known, unknown), 1))
            layer.mlp.up_proj.weight.copy_(torch.cat((known, unknown), 1))
            layer.mlp.down_proj.weight.zero_()
        for number, kind in ((KNOWS_CODE, CODE), (KNOWS_DIALOGUE, DIALOGUE)):
            for token in kind:
                down = model.model.layers[number].mlp.down_proj.weight
                down[size + following(token), token] = 2 / (2 * size)
    model.save_pretrained(path)
    return str(path)


def following(token: int) -> int:
    kind = CODE if token in CODE else DIALOGUE
    return kind[(token - kind[0] + 1) % len(kind)]


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        # All inner blocks but one may be left out, and which, depends on the traffic.
        ({"method": "layer_skip", "skip_share": 0.9, "shape": "chain"}, 2),
        ({"method": "early_exit", "exit_layers": [2, 5], "shape": "chain"}, 1),
    ],
    ids=["layer_skip", "early_exit"],
)
def test_drafts_follow_traffic_that_changes(tmp_path, tiny_engine, config, changes):
    """Code, then dialogue: what drafts has to change, and does; the text is what it would be."""
    params = {"temperature": 0.0, "max_tokens": 160, "ignore_eos": True, "detokenize": False}
    batches = [
        {"requests": [[[kind[5 * i]], params] for i in range(4)]}
        for kind in (CODE, DIALOGUE, DIALOGUE)
    ]
    config = config | {"num_speculative_tokens": 5, "control": FIXED}
    engine = {"model": of_two_kinds(tmp_path / "model"), "speculative_config": config}
    result = harness.run(tmp_path, tiny_engine | engine, batches)
    for batch, answers in zip(batches, result["batches"], strict=True):
        for (prompt, _), answer in zip(batch["requests"], answers, strict=True):
            text = list(prompt)
            for _ in range(160):
                text.append(following(text[-1]))
            assert answer["ids"][0] == text[1:]
    assert result["counters"]["draft_failures"] == 0
    counted = result["counted"]
    drafted = [each["nodes_drafted"] for each in counted]
    accepted = [each["nodes_accepted"] for each in counted]
    last = (accepted[2] - accepted[1]) / (drafted[2] - drafted[1])
    assert last > 0.95
    assert result["counters"]["draft_layer_changes"] >= changes
    assert (result["counters"]["draft_layer_searches"] > 0) == (config["method"] == "layer_skip")
