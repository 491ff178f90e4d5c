"""An engine that bench has renewed is one that has just started."""

from __future__ import annotations

import pytest

from tests.engine import harness

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "token_recycling", "num_speculative_tokens": 8},
        {"method": "rasd", "num_speculative_tokens": 8},
        {"method": "draft_tree", "num_speculative_tokens": 6},
        {"method": "suffix"},
    ],
    ids=lambda spec: spec["method"],
)
def test_what_was_learnt_is_forgotten(tmp_path, tiny_engine, tiny_model, spec):
    """Texts, nodes and steps are those of the first time; without renewal they are others."""
    if spec["method"] == "draft_tree":
        spec = spec | {"model": tiny_model}
    if spec["method"] != "suffix":
        spec = spec | {"control": {"policy": "fixed"}}
    asked = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    requests = [[[*range(20 + i, 50 + i)], asked] for i in range(4)]
    batches = [{"requests": requests}, {"requests": requests, "renew": True}]
    engine = tiny_engine | {
        "speculative_config": spec, "disable_log_stats": False,
        "worker_extension_cls": "vllm_specplus.engine.renewal.Renewal",
    }  # fmt: skip
    got = harness.run(tmp_path, engine, [*batches, batches[0]])
    first, renewed, known = (
        now - before for now, before in zip(got["drafted"], [0, *got["drafted"]], strict=False)
    )
    assert harness.ids(got, 0) == harness.ids(got, 1) == harness.ids(got, 2)
    assert renewed == first > 0
    if spec["method"] == "draft_tree":  # learns nothing
        assert known == first
    else:
        assert known != first
    if spec["method"] != "suffix":
        one, two = got["counted"][:2]
        for name in ("request_steps", "nodes_drafted", "nodes_accepted", "output_tokens"):
            assert two[name] == 2 * one[name], name
        assert got["counters"]["draft_failures"] == 0
