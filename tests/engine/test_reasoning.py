"""Deployments with a reasoning parser, which all reasoning models have."""

from __future__ import annotations

import json

import pytest

from tests.engine import harness
from tests.engine.test_features import SCHEMA, chat

pytestmark = pytest.mark.engine

REQUESTS = [
    [chat(question), {"temperature": 0, "max_tokens": 90, "json_schema": SCHEMA}]
    for question in (
        "Tell me about Paris in one sentence",
        "Why is the sky blue?",
    )
]


@pytest.fixture(scope="module")
def engine() -> dict:
    from vllm_specplus.cli.model import prepare_model

    return {
        "model": str(prepare_model()), "enforce_eager": True, "max_model_len": 512,
        "dtype": "float32", "reasoning_parser": "first_sentence",
    }  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory, engine) -> dict:
    return harness.run(tmp_path_factory.mktemp("plain"), engine, [{"requests": REQUESTS}])


def test_reasoning_may_end_inside_a_draft(tmp_path, engine, plain):
    """The grammar of the answer begins there, and the draft goes on behind it."""
    reference = tmp_path / "reference.json"
    answers = plain["batches"][0]
    reference.write_text(json.dumps([[r["prompt"], r["ids"][0]] for r in answers]))
    for answer in answers:
        reasoning, end, content = answer["text"][0].partition(".")
        assert reasoning.strip()
        assert end
        assert content.lstrip().startswith("{")
    spec = {"method": "hidden_truth", "reference": str(reference), "shape": "chain",
            "num_speculative_tokens": 7}  # fmt: skip
    result = harness.run(tmp_path, engine | {"speculative_config": spec}, [{"requests": REQUESTS}])
    assert harness.ids(result) == harness.ids(plain)
    counters = result["counters"]
    assert counters["nodes_accepted"] > 100
    assert counters["draft_failures"] == 0


def test_a_thinking_budget_is_refused_for_its_request_alone(tmp_path, engine):
    spec = {"method": "token_recycling"}
    budget = [[REQUESTS[0][0], {"max_tokens": 4, "thinking_token_budget": 8}]]
    with pytest.raises(RuntimeError, match="thinking_token_budget does not work with a spec"):
        harness.run(tmp_path, engine | {"speculative_config": spec}, [{"requests": budget}])
