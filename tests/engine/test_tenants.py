"""What one tenant gets does not tell of another: vLLM's ``cache_salt`` divides all that is learnt.

The same questions are asked under one fresh salt before anybody else has said anything, and under
another after a neighbour has asked them too, and much else. Drafts, acceptance and steps are equal,
to the node. Under the neighbour's own salt they are not: there is something to be seen.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.engine import harness
from tests.engine.conftest import VOCAB

pytestmark = pytest.mark.engine

#: What a step drafts, and what became of it; the rest of the counters are seconds.
COUNTED = ("nodes_drafted", "nodes_accepted", "nodes_grown", "nodes_labelled", "request_steps",
           "output_tokens", "control_steps", "expected_tokens")  # fmt: skip
METHODS = ["token_recycling", "suffix_tree", "rasd"]


@pytest.fixture(scope="module")
def questions() -> list:
    """Prompts that say some things twice; the answers are what the model makes of them."""
    rng = np.random.default_rng(23)
    prompts = [rng.integers(3, VOCAB, int(rng.integers(20, 90))).tolist() for _ in range(6)]
    return [prompt + prompt[:15] for prompt in prompts]


def under(salt: str | None, prompts: list, key: str = "cache_salt") -> dict:
    """A batch of greedy requests of one tenant, by vLLM's key or by ours."""
    requests = []
    for prompt in prompts:
        params: dict = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}
        given: dict = {"prompt_token_ids": prompt}
        if salt and key == "cache_salt":
            given["cache_salt"] = salt
        elif salt:
            params["extra_args"] = {"specplus": {"cache_salt": salt}}
        requests.append([given, params | {"detokenize": False}])
    return {"requests": requests}


def growth(result: dict, batch: int) -> dict:
    after = result["counted"][batch]
    before = result["counted"][batch - 1] if batch else dict.fromkeys(after, 0)
    return {name: after[name] - before[name] for name in COUNTED}


@pytest.mark.parametrize("method", METHODS)
def test_a_neighbour_changes_nothing(tmp_path, tiny_engine, questions, method):
    others = [prompt[::-1] for prompt in questions]
    engine = tiny_engine | {
        "num_gpu_blocks_override": 400,
        "speculative_config": {
            "method": method, "num_speculative_tokens": 16, "control": {"policy": "fixed"},
        },
    }  # fmt: skip
    result = harness.run(
        tmp_path,
        engine,
        [
            under("alone", questions),
            under("neighbour", questions),
            under("neighbour", others),
            under(None, questions),
            under("our key", questions, key="specplus"),
            under("later", questions),
            under("neighbour", questions),
        ],
    )
    alone, later, neighbours = growth(result, 0), growth(result, 5), growth(result, 6)
    assert alone["nodes_drafted"] > 0
    assert later == pytest.approx(alone, rel=1e-12)  # what is summed up is rounded
    assert neighbours["nodes_accepted"] > 2 * alone["nodes_accepted"]
    assert neighbours["request_steps"] < alone["request_steps"]
    assert growth(result, 1) == pytest.approx(alone, rel=1e-12)
    assert harness.ids(result, 5) == harness.ids(result, 0) == harness.ids(result, 6)
