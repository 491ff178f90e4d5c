"""One request's numbers never reach another's."""

from __future__ import annotations

import pytest

from tests.engine import harness

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def steady() -> list:
    prompts = [list(range(30 + i, 60 + 3 * i)) for i in range(3)]
    greedy = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
    seeded = greedy | {"temperature": 1.0, "seed": 4}
    penalised = greedy | {"repetition_penalty": 1.3, "logprobs": 2}
    return [list(each) for each in zip(prompts, (greedy, seeded, penalised), strict=True)]


def test_a_steady_request_beside_hostile_ones(tmp_path, tiny_engine, steady):
    """200 of them, with numbers at every bound, refused, in error or aborted at any step: what the
    steady ones say is what they say alone, and the engine lives."""
    want = harness.ids(harness.run(tmp_path, tiny_engine, [{"requests": steady}]))
    job = {"hostile": 200, "steady": steady, "seed": 1}
    spec = {"method": "rasd", "num_speculative_tokens": 8, "control": {"policy": "fixed"}}
    engine = tiny_engine | {"speculative_config": spec}
    got = harness.run(tmp_path, engine, [job, {"requests": steady}])
    beside, after = got["batches"]
    assert [each["ids"] for each in after] == want
    assert len(beside["steady"]) >= 3
    for i, ids in enumerate(beside["steady"]):
        assert ids == want[i % 3][0]
    # The control: enough of them got in, and enough did not.
    assert beside["refused"] > 20
    assert beside["aborted"] > 20
    assert sum(beside["finish"].values()) > 10
    assert got["counters"]["draft_failures"] == 0
    assert got["counters"]["nodes_accepted"] > 0
