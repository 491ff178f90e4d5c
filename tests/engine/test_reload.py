"""Weights that change under a running engine: what drafts were made of changes with them."""

from __future__ import annotations

import pytest

from tests.engine import harness
from vllm_specplus.testing.models import VOCAB, build_model

pytestmark = pytest.mark.engine

METHODS = (
    {"method": "token_recycling", "num_speculative_tokens": 12},
    {"method": "layer_skip", "num_speculative_tokens": 6, "skip_mlp": [1]},
)


@pytest.mark.parametrize("spec", METHODS, ids=lambda spec: spec["method"])
def test_texts_and_drafts_are_those_of_the_new_weights(
    tmp_path, tiny_engine, mixed_requests, plain, spec
):
    other = build_model(tmp_path / "other", VOCAB, 0.3)
    want = harness.run(tmp_path, tiny_engine | {"model": other}, [{"requests": mixed_requests}])
    assert harness.ids(want) != harness.ids(plain)
    spec = spec | {"control": {"policy": "fixed"}}
    batches = [{"requests": mixed_requests}, {"requests": mixed_requests, "weights": other}]
    got = harness.run(tmp_path, tiny_engine | {"speculative_config": spec}, batches)
    assert harness.ids(got) == harness.ids(plain)
    assert harness.ids(got, 1) == harness.ids(want)
    first, both = got["counted"]
    assert both["nodes_accepted"] > first["nodes_accepted"] > 0
    assert both["draft_failures"] == 0
