"""The matrix survives a restart: saved at shutdown, loaded at start."""

from __future__ import annotations

import pytest

from tests.engine import harness

pytestmark = pytest.mark.engine


def test_saved_matrix_makes_a_hot_start(tmp_path, tiny_engine, mixed_requests, plain):
    """One request, served cold, then by a new engine that loads what the first learned."""
    texts = [out[0] for out in harness.ids(plain)]
    longest = max(range(len(texts)), key=lambda i: len(texts[i]))
    batches = [{"requests": [mixed_requests[longest]]}]
    matrix = str(tmp_path / "matrix.safetensors")
    spec = {"method": "token_recycling", "num_speculative_tokens": 16}
    cold, hot = (
        harness.run(tmp_path, tiny_engine | {"speculative_config": spec | keys}, batches)
        for keys in ({"save_matrix": matrix}, {"load_matrix": matrix})
    )
    assert harness.ids(cold) == harness.ids(hot) == [[texts[longest]]]
    assert hot["counters"]["request_steps"] < 0.8 * cold["counters"]["request_steps"]
