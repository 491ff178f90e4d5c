"""Tiny random models, and requests in which everything happens that complicates a batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

VOCAB = 512
#: Of the sampling check: a vocabulary whose texts can be enumerated, and what is drawn.
FEW_TOKENS, PROMPT, TOP_K, DRAWN = 32, [5, 9, 17, 3, 21], 6, 3


def build_model(path: Path, vocab: int = VOCAB, spread: float = 0.25, family: str = "llama") -> str:
    """Write a small random model in float32, without a tokenizer; returns its folder.

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


def engine_arguments(model: str) -> dict[str, Any]:
    """Arguments of an engine that reads prompts in chunks (48 tokens), caches prefixes, and
    preempts (80 small pages)."""
    return {
        "model": model,
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


def mixed_requests() -> list[list[Any]]:
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


def sampling_arguments(model: str) -> dict[str, Any]:
    """Arguments of an engine that answers many short requests at once."""
    return {
        "model": model, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 64, "max_num_seqs": 256, "max_num_batched_tokens": 4096,
    }  # fmt: skip


def sampling_batch(samples: int) -> dict[str, Any]:
    """One prompt ``samples`` times; a token more than is looked at, so that the last one that is
    may be drafted."""
    params = {"temperature": 1.0, "top_k": TOP_K, "max_tokens": DRAWN + 1, "ignore_eos": True}
    return {"prompt": PROMPT, "params": params | {"detokenize": False}, "repeat": samples}
