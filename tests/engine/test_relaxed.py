"""Lossy acceptance rules in the real engine."""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine import harness

pytestmark = pytest.mark.engine

TOP_K, MARGIN = 8, 3.0


def test_what_is_accepted_is_what_the_rule_allows(
    tmp_path, tiny_engine, tiny_model, mixed_requests, plain
):
    """Greedy, checked token by token against the model's distribution; requests that must be
    verified losslessly, in the same batch, read as without speculation."""
    import torch
    from transformers import LlamaForCausalLM

    config = {
        "method": "token_recycling", "num_speculative_tokens": 24, "allow_lossy": True,
        "acceptance": {"rule": "top_k_margin", "top_k": TOP_K, "margin": MARGIN},
        "control": {"policy": "fixed"},
    }  # fmt: skip
    strict = {"extra_args": {"specplus": {"lossless": True}}}
    requests = [
        [prompt, params | strict if i % 2 else params]
        for i, (prompt, params) in enumerate(mixed_requests)
    ]
    engine = tiny_engine | {"speculative_config": config}
    result = harness.run(tmp_path, engine, [{"requests": requests}])
    assert result["counters"]["relaxed_tokens"] > 20
    # Odd ones asked for it; every request with penalties or logprobs is odd.
    assert harness.ids(result)[1::2] == harness.ids(plain)[1::2]
    llama = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ranks, below = [], []
    for request in result["batches"][0][::2]:
        prompt, tokens = request["prompt"], request["ids"][0]
        with torch.inference_mode():
            rows = llama(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        mine = rows[torch.arange(len(tokens)), tokens]
        ranks += (rows > mine[:, None]).sum(-1).tolist()
        below += (rows.max(-1).values - mine).tolist()
    ranks, below = np.array(ranks), np.array(below)
    assert ranks.max() < TOP_K
    assert below.max() < MARGIN + 1e-3
    # Only what was relaxed is not the most probable token (some is cut off at max_tokens).
    relaxed = result["counters"]["relaxed_tokens"]
    assert 0.7 * relaxed < (ranks > 0).sum() <= relaxed


@pytest.mark.parametrize("states", ["after_norm", "before_norm"])
def test_a_judge_reads_the_states_of_the_nodes(
    tmp_path, tiny_engine, tiny_model, mixed_requests, states
):
    """With a head that likes some tokens, by a direction of their hidden states: every token that
    is not the model's own choice has a score above the threshold, by a plain forward pass."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    weight, bias = torch.randn(128), torch.zeros(1)
    save_file({"weight": weight, "bias": bias}, tmp_path / "head", {"states": states})
    config = {
        "method": "token_recycling", "num_speculative_tokens": 24, "allow_lossy": True,
        "acceptance": {"rule": "judge", "head": str(tmp_path / "head"), "threshold": 0.9},
        "control": {"policy": "fixed"},
    }  # fmt: skip
    requests = [
        [prompt, {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True}]
        for prompt, _ in mixed_requests
    ]
    engine = tiny_engine | {"speculative_config": config}
    result = harness.run(tmp_path, engine, [{"requests": requests}])
    assert result["counters"]["relaxed_tokens"] > 50
    llama = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    before = []
    llama.model.norm.register_forward_pre_hook(lambda _, given: before.append(given[0]))
    others = 0
    for request in result["batches"][0]:
        prompt, tokens = request["prompt"], request["ids"][0]
        with torch.inference_mode():
            out = llama(torch.tensor([prompt + tokens]), output_hidden_states=True)
        rows = out.logits[0, len(prompt) - 1 : -1]
        read = before[-1] if states == "before_norm" else out.hidden_states[-1]
        scores = torch.sigmoid(read[0, len(prompt) :] @ weight + bias)
        own = rows.argmax(-1) == torch.tensor(tokens)
        others += int((~own).sum())
        assert (scores[~own] > 0.9 - 1e-3).all()
    relaxed = result["counters"]["relaxed_tokens"]
    assert 0.7 * relaxed < others <= relaxed
