"""Retrieved drafts in the real engine: same texts, whatever the datastore holds."""

from __future__ import annotations

import numpy as np
import pytest

from tests.datastores import build_datastore
from tests.engine import harness
from tests.engine.conftest import VOCAB
from tests.engine.test_greedy import run

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def datastore(tmp_path_factory, plain) -> str:
    """What plain decoding will say, beside other continuations of the same beginnings."""
    rng = np.random.default_rng(11)
    documents = []
    for r in plain["batches"][0]:
        text = r["prompt"][-20:] + r["ids"][0]
        documents.append(text)
        cut = int(rng.integers(1, len(text)))
        documents.append(text[:cut] + rng.integers(3, VOCAB, 30).tolist())
    folder = tmp_path_factory.mktemp("retrieval") / "store"
    return str(build_datastore(folder, documents, VOCAB, 1500))


def config(method: str, datastore: str) -> dict:
    keys: dict = {"method": method, "num_speculative_tokens": 16, "control": {"policy": "fixed"}}
    rest = {"method": "rest", "datastore": datastore}
    if method == "rest":
        return keys | rest
    if method == "rasd":
        keys["sources"] = ["token_recycling", rest, "suffix_tree"]
    return keys


@pytest.mark.parametrize("method", ["rest", "suffix_tree", "rasd"])
def test_texts_stay_the_same(tmp_path, tiny_engine, mixed_requests, plain, datastore, method):
    """Chunked prefill, prefix caching, preemption, penalties; the second time from memory."""
    result = run(tmp_path, tiny_engine, mixed_requests, config(method, datastore), repeats=2)
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    assert result["preemptions"] > 0
    # Random text repeats itself nowhere: what is right comes from the datastore, or from
    # the first time.
    assert counters["output_tokens"] > 1.5 * counters["request_steps"]


def test_under_the_controller(tmp_path, tiny_engine, mixed_requests, plain, datastore):
    spec = config("rasd", datastore) | {"control": {"policy": "goodput"}}
    result = run(tmp_path, tiny_engine, mixed_requests, spec, repeats=2)
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    assert result["counters"]["nodes_labelled"] > 500


@pytest.mark.parametrize(
    ("method", "damage"), [("rest", "truncate"), ("rasd", "truncate"), ("rest", "overwrite")]
)
def test_a_datastore_damaged_under_the_engine(
    tmp_path, tiny_engine, mixed_requests, plain, method, damage
):
    """From then on it drafts nothing, with a warning and a count; texts stay the same."""
    documents = [r["prompt"][-20:] + r["ids"][0] for r in plain["batches"][0]]
    store = build_datastore(tmp_path / "store", documents, VOCAB)
    engine = tiny_engine | {"speculative_config": config(method, str(store))}
    batches = [
        {"requests": mixed_requests},
        {"requests": mixed_requests, damage: str(store / "order.bin")},
    ]
    result = harness.run(tmp_path, engine, batches)
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    counters = result["counters"]
    assert counters["draft_failures"] > 10
    assert counters["nodes_accepted"] > 200


def test_a_datastore_of_another_model_is_refused_at_start(tmp_path, tiny_engine, mixed_requests):
    store = build_datastore(tmp_path / "store", [[1, 2, 3]], VOCAB + 1)
    spec = {"method": "rest", "datastore": str(store)}
    with pytest.raises(RuntimeError, match=f"vocabulary of {VOCAB + 1}, the model's has {VOCAB}"):
        run(tmp_path, tiny_engine, mixed_requests[:1], spec)


def test_salts_travel_with_the_requests(tmp_path, tiny_engine, mixed_requests, plain):
    """Repeating under another salt finds nothing; under the same one, everything."""
    requests = [
        [p, s | {"extra_args": {"specplus": {"cache_salt": "a"}}}] for p, s in mixed_requests
    ]
    other = [[p, s | {"extra_args": {"specplus": {"cache_salt": "b"}}}] for p, s in mixed_requests]
    engine = tiny_engine | {"speculative_config": config("suffix_tree", "")}
    accepted = {}
    for name, second in (("same", requests), ("other", other)):
        result = harness.run(tmp_path, engine, [{"requests": requests}, {"requests": second}])
        assert harness.ids(result) == harness.ids(plain)
        assert harness.ids(result, 1) == harness.ids(plain, 1)
        accepted[name] = result["counters"]["nodes_accepted"]
    assert accepted["other"] < 0.3 * accepted["same"]
