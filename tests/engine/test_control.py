"""The controller in a real engine: same texts, its limits, its guard, its reactions."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.engine import harness
from tests.engine.test_greedy import hidden_truth, run

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    "control", [{"policy": "goodput"}, {"policy": "threshold", "threshold": 0.6}]
)
@pytest.mark.parametrize("method", ["token_recycling", "hidden_truth"])
def test_texts_stay_the_same(
    tmp_path, tiny_engine, mixed_requests, plain, reference_file, method, control
):
    spec = {"method": method, "num_speculative_tokens": 12, "control": control}
    if method == "hidden_truth":
        spec["reference"] = reference_file
    result = run(tmp_path, tiny_engine, mixed_requests, spec, repeats=2)
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    counters = result["counters"]
    assert counters["control_steps"] > 50
    assert counters["draft_failures"] == 0
    assert counters["nodes_labelled"] > 100
    if method == "hidden_truth":
        assert 0 < counters["nodes_drafted"] < counters["nodes_grown"]
    if control["policy"] == "goodput":
        assert counters["timed_steps"] > 20
        assert counters["predicted_step_seconds"] > 0
        assert counters["measured_step_seconds"] > 0


def test_a_request_decides_for_itself(tmp_path, tiny_engine, mixed_requests, plain, reference_file):
    """Limits differ within one batch; disabled requests are decoded plainly beside others."""

    def with_extra(controls):
        return [
            [p, s | {"extra_args": {"specplus": c}} if c is not None else s]
            for (p, s), c in zip(mixed_requests, controls, strict=True)
        ]

    off, some = {"enabled": False}, {"max_nodes": 2}
    mixed = [(off, some, None, {"max_nodes": 0})[i % 4] for i in range(len(mixed_requests))]
    spec = hidden_truth(reference_file, num_speculative_tokens=12, shape="chain")
    batches = [
        {"requests": with_extra([off] * len(mixed))},
        {"requests": with_extra(mixed)},
        {"requests": with_extra([some] * len(mixed))},
    ]
    alone = harness.run(tmp_path, tiny_engine | {"speculative_config": spec}, batches[:1])
    assert alone["counters"]["nodes_drafted"] == 0
    limited = harness.run(tmp_path, tiny_engine | {"speculative_config": spec}, batches[2:])
    steps = limited["counters"]["request_steps"]
    assert 0 < limited["counters"]["nodes_drafted"] <= 2 * steps
    together = harness.run(tmp_path, tiny_engine | {"speculative_config": spec}, batches[1:2])
    for result in (alone, limited, together):
        assert harness.ids(result) == harness.ids(plain)
    free = run(tmp_path, tiny_engine, mixed_requests, spec)["counters"]["nodes_drafted"]
    assert 0 < together["counters"]["nodes_drafted"] < free


def test_bad_controls_are_refused_when_the_request_comes(tmp_path, tiny_engine, mixed_requests):
    prompt, params = mixed_requests[0]
    bad = [[prompt, params | {"extra_args": {"specplus": {"max_nodes": 999}}}]]
    with pytest.raises(RuntimeError, match="specplus: 'max_nodes' is 999"):
        run(tmp_path, tiny_engine, bad, {"method": "token_recycling"})


def test_drafts_cause_no_preemption(tmp_path, tiny_engine):
    """Drafts that are never right, in a cache that is too small: the scheduler preempts
    exactly as in plain decoding. Without the guard it preempts many times more."""
    rng = np.random.default_rng(3)
    requests = [
        [
            rng.integers(3, 512, int(rng.integers(20, 100))).tolist(),
            {"temperature": 0.0, "max_tokens": 90, "ignore_eos": True, "detokenize": False},
        ]
        for _ in range(12)
    ]
    engine = tiny_engine | {"num_gpu_blocks_override": 60}
    plain = harness.run(tmp_path, engine, [{"requests": requests}])
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps([[r["prompt"], r["ids"][0]] for r in plain["batches"][0]]))
    spec = hidden_truth(str(reference), shape="random", num_speculative_tokens=80)
    guarded = run(tmp_path, engine, requests, spec)
    assert harness.ids(guarded) == harness.ids(plain)
    assert guarded["preemptions"] == plain["preemptions"]
    assert guarded["trims"] > 0
    assert guarded["counters"]["nodes_drafted"] > 1000
    careless = run(tmp_path, engine, requests, spec, "no_guard")
    assert harness.ids(careless) == harness.ids(plain)
    assert careless["preemptions"] > plain["preemptions"] + 3


def test_a_drop_of_acceptance_is_followed_within_50_steps(tmp_path, tiny_engine, mixed_requests):
    prompt = mixed_requests[0][0]
    requests = [[prompt, {"temperature": 0, "max_tokens": 400, "ignore_eos": True}]]
    engine = tiny_engine | {"num_gpu_blocks_override": 200}
    plain = harness.run(tmp_path, engine, [{"requests": requests}])
    (output,) = harness.ids(plain)[0]
    reference, record = tmp_path / "reference.json", tmp_path / "record.json"
    reference.write_text(json.dumps([[prompt, output]]))
    spec = {
        "method": "switching", "reference": str(reference), "record": str(record),
        "wrong": [140, 280], "control": {"policy": "goodput"},
    }  # fmt: skip
    result = run(tmp_path, engine, requests, spec, sabotage="fixed_prices")
    assert harness.ids(result) == [[output]]
    steps = np.array(json.loads(record.read_text()))
    place, nodes = steps[:, 0] - len(prompt), steps[:, 1]
    high = nodes[(place > 60) & (place < 140)].mean()
    first, back = np.searchsorted(place, [140, 280])
    assert high > 3
    assert nodes[first + 50 : back].mean() < 0.3 * high
    assert nodes[back + 1 : back + 51].max() >= 0.75 * high


def test_step_times_are_kept_in_a_file(tmp_path, tiny_engine, mixed_requests, plain):
    """Measured once, read the next time, refused for another model."""
    path = tmp_path / "cost.json"
    spec = {
        "method": "token_recycling",
        "control": {"policy": "goodput", "cost_file": str(path)},
    }
    requests = mixed_requests[:4]
    assert harness.ids(run(tmp_path, tiny_engine, requests, spec)) == harness.ids(plain)[:4]
    content = json.loads(path.read_text())
    assert content["key"]["dtype"] == "float32"
    for curve in content["curves"].values():
        curve["seconds"] = [2 * s for s in curve["seconds"]]
    path.write_text(json.dumps(content))
    assert harness.ids(run(tmp_path, tiny_engine, requests, spec)) == harness.ids(plain)[:4]
    assert json.loads(path.read_text()) == content  # read, not measured again
    with pytest.raises(RuntimeError, match=r"measured on something else .*dtype: 'float32'"):
        run(tmp_path, tiny_engine, requests, spec, dtype="bfloat16")


@pytest.mark.parametrize("method", ["token_recycling", "draft_tree"])
def test_speculation_is_switched_while_serving(
    tmp_path, tiny_engine, mixed_requests, plain, tiny_model, method
):
    """Off, watched, and on again with another objective: the same texts."""
    spec = {"method": method}
    if method == "draft_tree":
        spec |= {"model": tiny_model, "shape": "topk", "width": 3, "num_speculative_tokens": 9}
    batches = [
        {"requests": mixed_requests, "control": change}
        for change in (
            {"mode": "off"},
            {"mode": "shadow"},
            {"mode": "on", "objective": "throughput"},
        )
    ]
    engine = tiny_engine | {"speculative_config": spec}
    result = harness.run(tmp_path, engine, batches, "dear_looks")
    for i in range(3):
        assert harness.ids(result, i) == harness.ids(plain)
    off, shadow, on = result["counted"]
    assert off["nodes_drafted"] == off["nodes_grown"] == shadow["nodes_drafted"] == 0
    assert off["shadow_request_steps"] == 0
    assert off["unwatched_steps"] > 20
    assert shadow["unwatched_steps"] == off["unwatched_steps"]  # all are watched
    assert shadow["shadow_request_steps"] > 200
    assert shadow["shadow_tokens"] > shadow["shadow_request_steps"]
    assert shadow["shadow_seconds"] > shadow["shadow_plain_seconds"] > 0
    assert on["nodes_accepted"] > 0
    assert on["shadow_request_steps"] == shadow["shadow_request_steps"]
    assert on["draft_failures"] == 0
