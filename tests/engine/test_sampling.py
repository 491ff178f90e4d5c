"""Sampled text: exact distribution, and the same text for the same seed."""

from __future__ import annotations

import numpy as np
import pytest

from tests.datastores import build_datastore
from tests.engine import harness
from vllm_specplus.testing import distribution
from vllm_specplus.testing.distribution import chi_square
from vllm_specplus.testing.models import build_model

pytestmark = pytest.mark.engine

VOCAB, TOKENS, SAMPLES = 32, 3, 20_000


@pytest.fixture(scope="module")
def small_vocab_model(tmp_path_factory) -> str:
    return build_model(tmp_path_factory.mktemp("small"), VOCAB, 0.12)


def joint_probabilities(model: str, prompt: list[int], top_k: int) -> dict[tuple, float]:
    return distribution.joint_probabilities(model, prompt, top_k, TOKENS)


@pytest.mark.parametrize(
    ("method", "policy", "sabotage"),
    [
        ("token_recycling", "fixed", None),
        pytest.param(
            "token_recycling",
            "goodput",
            None,
            marks=pytest.mark.full(
                "vllm_specplus/control/*.py",
                "vllm_specplus/samplers/lossless.py",
                "vllm_specplus/engine/verify.py",
            ),
        ),
        ("rasd", "fixed", None),
        ("token_recycling", "fixed", "first_draft_wins"),
    ],
)
def test_joint_distribution(tmp_path, small_vocab_model, method, policy, sabotage):
    """Three tokens in one go, drafted as trees by a warm Token Recycling matrix; and by it
    fused with suffix trees and a datastore."""
    keys = {}
    if method == "rasd":
        rng = np.random.default_rng(0)
        documents = rng.integers(0, VOCAB, (200, 30)).tolist()
        store = build_datastore(tmp_path / "store", documents, VOCAB)
        rest = {"method": "rest", "datastore": str(store)}
        keys = {"sources": ["token_recycling", "suffix_tree", rest]}
    prompt = [5, 9, 17, 3, 21]
    engine = {
        "model": small_vocab_model, "skip_tokenizer_init": True, "dtype": "float32",
        "enforce_eager": True, "max_model_len": 64, "max_num_seqs": 256,
        "max_num_batched_tokens": 4096,
        "speculative_config": {
            "method": method, "num_speculative_tokens": 10, "control": {"policy": policy}, **keys,
        },
    }  # fmt: skip
    params = {"temperature": 1.0, "top_k": 6, "max_tokens": TOKENS + 1, "ignore_eos": True}
    batch = {"prompt": prompt, "params": params | {"detokenize": False}, "repeat": SAMPLES}
    if policy == "goodput":
        # How much is drafted is not to depend on the machine; of 256 requests it would be little.
        sabotage, engine["max_num_seqs"] = "fixed_prices", 16
    result = harness.run(tmp_path, engine, [batch], sabotage)
    enough = 0.3 * SAMPLES if policy == "fixed" else 100
    assert result["counters"]["nodes_accepted"] > enough
    texts = [tuple(out[0][:TOKENS]) for out in harness.ids(result)]
    p = chi_square(joint_probabilities(small_vocab_model, prompt, 6), texts)
    if sabotage == "first_draft_wins":
        assert p < 1e-9
    else:
        assert p > 1e-3


def test_a_seed_gives_the_same_text_with_and_without_drafts(
    tmp_path, tiny_engine, mixed_requests, reference_file
):
    """Top-p, top-k, min-p, biases, penalties and n > 1 in one batch, beside unseeded neighbours."""
    requests = []
    for i, (prompt, _) in enumerate(mixed_requests[:16]):
        params = {"temperature": 0.9, "top_p": 0.8, "max_tokens": 40, "ignore_eos": True}
        params |= {"seed": 100 + i, "detokenize": False}
        if i % 4 == 0:
            params["n"] = 2
        if i % 4 == 1:
            params |= {"top_k": 20, "presence_penalty": 0.5}
        if i % 4 == 2:
            params |= {"min_p": 0.02, "min_tokens": 8, "stop_token_ids": [5, 6, 7]}
        if i % 4 == 3:
            params["logit_bias"] = {str(token): 3.0 for token in range(10, 40)}
        requests.append([prompt, params])
    # Stock vLLM on the CPU stops at a seeded request whose prompt is read in chunks.
    whole_prompts = {
        "long_prefill_token_threshold": 0, "max_num_batched_tokens": 4096,
        "num_gpu_blocks_override": 400,
    }  # fmt: skip
    plain = harness.run(tmp_path, tiny_engine | whole_prompts, [{"requests": requests}])
    neighbours = [[p, {"temperature": 1.0, "max_tokens": 20}] for p, _ in requests[:4]]
    for spec in (
        {"method": "token_recycling", "num_speculative_tokens": 12},
        {"method": "token_recycling", "num_speculative_tokens": 3, "tree": "best_first"},
    ):
        result = harness.run(
            tmp_path,
            tiny_engine | {"speculative_config": spec},
            [{"requests": neighbours}, {"requests": requests + neighbours}],
        )
        assert harness.ids(result, 1)[: len(requests)] == harness.ids(plain)
        assert result["counters"]["nodes_drafted"] > 0
