from __future__ import annotations

import json

import numpy as np
import pytest

from tests.engine import harness

VOCAB = 512


def build_model(path, vocab: int, spread: float, family: str = "llama") -> str:
    """A small random model in float32, without a tokenizer.

    ``spread`` scales the weights: large values make greedy text varied (many
    distinct tokens), which shows errors that a repetitive text would hide.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(7)
    config = AutoConfig.for_model(
        family, vocab_size=vocab, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, initializer_range=spread,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        sliding_window=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).to(torch.float32).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    return build_model(tmp_path_factory.mktemp("tiny"), VOCAB, 0.25)


@pytest.fixture(scope="session")
def tiny_engine(tiny_model) -> dict:
    """Engine arguments in which everything that complicates a batch happens: chunked
    prefill (64 tokens a step), prefix caching, and preemption (64 small pages)."""
    return {
        "model": tiny_model,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "max_num_seqs": 32,
        "max_num_batched_tokens": 512,
        "long_prefill_token_threshold": 48,
        "block_size": 32,
        "num_gpu_blocks_override": 80,
        "disable_log_stats": False,
    }


@pytest.fixture(scope="session")
def mixed_requests() -> list:
    """32 requests: prompts of 1 to 200 tokens, some sharing a prefix, outputs of 1 to 90
    tokens, some with penalties, min_tokens, bad words or allowed tokens."""
    rng = np.random.default_rng(3)
    shared = rng.integers(3, VOCAB, 150).tolist()
    requests = []
    for i in range(32):
        length = int(rng.integers(1, 200))
        prompt = rng.integers(3, VOCAB, length).tolist()
        if i % 4 == 0:
            prompt = shared[: int(rng.integers(64, 150))] + prompt[:20]
        params = {
            "temperature": 0.0,
            "max_tokens": int(rng.integers(1, 90)),
            "ignore_eos": i % 3 != 0,
            "detokenize": False,
        }
        if i % 8 == 1:
            params |= {"repetition_penalty": 1.3, "presence_penalty": 0.4}
        if i % 8 == 3:
            params |= {"frequency_penalty": 0.6, "min_tokens": min(8, params["max_tokens"])}
            params["stop_token_ids"] = list(range(3, 60))
        if i % 8 == 5:
            params["allowed_token_ids"] = list(range(10, 300))
        if i % 8 == 7:
            params["logprobs"] = 3
        requests.append([prompt, params])
    return requests


@pytest.fixture(scope="session")
def plain(tmp_path_factory, tiny_engine, mixed_requests) -> dict:
    """The same requests without speculation, twice (the second time from the prefix cache)."""
    batches = [{"requests": mixed_requests}] * 2
    return harness.run(tmp_path_factory.mktemp("plain"), tiny_engine, batches)


@pytest.fixture(scope="session")
def reference_file(tmp_path_factory, plain) -> str:
    path = tmp_path_factory.mktemp("reference") / "reference.json"
    path.write_text(json.dumps([[r["prompt"], r["ids"][0]] for r in plain["batches"][0]]))
    return str(path)
