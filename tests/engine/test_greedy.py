"""Greedy text is the same, token for token, whatever was drafted (float32)."""

from __future__ import annotations

import math

import pytest

from tests.engine import harness

pytestmark = pytest.mark.engine


def hidden_truth(reference_file, **extra):
    return {"method": "hidden_truth", "reference": reference_file, **extra}


def run(tmp_path, engine, requests, spec, sabotage=None, repeats=1, **overrides):
    batches = [{"requests": requests}] * repeats
    return harness.run(
        tmp_path, engine | {"speculative_config": spec} | overrides, batches, sabotage
    )


def test_the_plain_run_exercises_what_it_should(plain):
    """Else the equality tests below would prove little."""
    assert plain["preemptions"] > 0
    long = [r["ids"][0] for r in plain["batches"][0] if len(r["ids"][0]) > 60]
    assert long
    assert all(len(set(text)) > len(text) // 3 for text in long)


@pytest.mark.parametrize("shape", ["tree", "random", "chain"])
def test_oracle_and_adversarial_drafts(
    tmp_path, tiny_engine, mixed_requests, plain, reference_file, shape
):
    spec = hidden_truth(reference_file, shape=shape, num_speculative_tokens=12)
    result = run(tmp_path, tiny_engine, mixed_requests, spec, repeats=2)
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    counters = result["counters"]
    assert result["preemptions"] > 0
    assert counters["draft_failures"] == 0
    if shape == "tree":
        assert counters["nodes_accepted"] > 200
        assert counters["kv_slots_moved"] > 200
    if shape == "random":
        assert counters["nodes_accepted"] < 0.02 * counters["nodes_drafted"]


def test_a_perfect_chain_takes_the_fewest_steps(
    tmp_path, tiny_engine, mixed_requests, plain, reference_file
):
    """ceil((T - 1) / (K + 1)) steps after the first token: no off-by-one at the bonus token."""
    texts = [out[0] for out in harness.ids(plain)]
    longest = max(range(len(texts)), key=lambda i: len(texts[i]))
    spec = hidden_truth(reference_file, shape="chain", num_speculative_tokens=5)
    result = run(tmp_path, tiny_engine, [mixed_requests[longest]], spec)
    assert harness.ids(result) == [[texts[longest]]]
    assert result["counters"]["request_steps"] == math.ceil((len(texts[longest]) - 1) / 6)


@pytest.mark.parametrize("kind", ["no_compaction", "no_depth"])
def test_negative_controls_are_noticed(
    tmp_path, tiny_engine, mixed_requests, plain, reference_file, kind
):
    spec = hidden_truth(reference_file, num_speculative_tokens=12)
    result = run(tmp_path, tiny_engine, mixed_requests, spec, sabotage=kind)
    assert harness.ids(result) != harness.ids(plain)


@pytest.mark.parametrize(
    "keys",
    [
        {"num_speculative_tokens": 16},
        {"num_speculative_tokens": 80, "tree": "2.2.2"},
        {"num_speculative_tokens": 1, "match_context": False, "pair_keys": False},
    ],
)
def test_token_recycling(tmp_path, tiny_engine, mixed_requests, plain, keys):
    spec = {"method": "token_recycling", "control": {"policy": "fixed"}, **keys}
    result = run(tmp_path, tiny_engine, mixed_requests, spec, repeats=2)
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    assert result["counters"]["nodes_accepted"] > 0  # the repeated batch is known text


def test_penalties_of_requests_that_are_preempted(tmp_path, tiny_engine, mixed_requests, plain):
    """Counts are kept from step to step, in batches whose requests come, go and come back; some ask
    for no penalty."""
    penalties = [{}, {"presence_penalty": 2.0}, {"frequency_penalty": 1.5},
                 {"repetition_penalty": 2.0, "frequency_penalty": -0.5}]  # fmt: skip
    requests = [
        [prompt, params | penalties[i % 4]] for i, (prompt, params) in enumerate(mixed_requests)
    ]
    engine = tiny_engine | {"disable_log_stats": False}
    batches = [{"requests": requests}] * 2
    want = harness.run(tmp_path, engine, batches)
    spec = {"method": "token_recycling", "num_speculative_tokens": 16}
    engine |= {"speculative_config": spec | {"control": {"policy": "fixed"}}}
    got = harness.run(tmp_path, engine, batches)
    for batch in range(2):
        assert harness.ids(got, batch) == harness.ids(want, batch)
    assert got["preemptions"] > 0
    assert got["counters"]["nodes_accepted"] > 20
    # The control: penalties change most of the texts that ask for one.
    same = [a == b for a, b in zip(harness.ids(want), harness.ids(plain), strict=True)]
    assert all(same[::4])
    assert sum(same) < len(same) / 2


def test_logits_that_are_not_finite_end_their_request_alone(tmp_path, tiny_engine, plain):
    """With an error, behind its text so far; the engine lives."""
    prompts = [[token, *range(20, 35)] for token in (7, 8, 7, 9)]
    limits = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    requests = [[p, limits | ({"max_tokens": 10} if i == 2 else {})] for i, p in enumerate(prompts)]
    batches = [{"requests": requests}] * 2
    want = harness.run(tmp_path, tiny_engine, batches)
    spec = {"method": "token_recycling", "num_speculative_tokens": 12}
    spec["control"] = {"policy": "fixed"}
    engine = tiny_engine | {"speculative_config": spec}
    got = harness.run(tmp_path, engine, batches, sabotage="nan_logits")
    for batch in range(2):
        first, *others = got["batches"][batch]
        assert first["finish"] == ["error"]
        text = first["ids"][0]
        assert 14 <= len(text) < 40  # a draft's last tokens may have been accepted before
        assert text == harness.ids(want, batch)[0][0][: len(text)]
        assert [each["ids"] for each in others] == harness.ids(want, batch)[1:]
        assert {each["finish"][0] for each in others} == {"length"}
    assert got["counters"]["nodes_accepted"] > 0


def test_a_cached_prompt_is_not_filled_up_with_drafts(tmp_path, tiny_engine):
    """vLLM does so for a request of which all but one token is cached."""
    prompt = list(range(20, 20 + 4 * 16 + 1))
    batches = [{"requests": [[prompt, {"temperature": 0, "max_tokens": 6}]]}] * 3
    spec = {"method": "token_recycling", "num_speculative_tokens": 12}
    spec["control"] = {"policy": "fixed"}
    engine = tiny_engine | {"disable_log_stats": False, "enable_prefix_caching": True}
    got = harness.run(tmp_path, engine | {"speculative_config": spec}, batches)
    assert got["drafted"][-1] == got["counters"]["nodes_drafted"] > 0
    assert harness.ids(got, 1) == harness.ids(got, 0)


def test_compiled(tmp_path, tiny_engine, mixed_requests, plain, reference_file):
    """torch.compile, vLLM's default."""
    spec = hidden_truth(reference_file, num_speculative_tokens=12)
    result = run(tmp_path, tiny_engine, mixed_requests, spec, enforce_eager=False)
    assert harness.ids(result) == harness.ids(plain)


def test_logprobs_are_those_of_plain_decoding(
    tmp_path, tiny_engine, mixed_requests, plain, reference_file
):
    requests = [r for r in mixed_requests if "logprobs" in r[1]]
    spec = hidden_truth(reference_file, num_speculative_tokens=12)
    result = run(tmp_path, tiny_engine, requests, spec)
    expected = [r for r in plain["batches"][0] if r["logprobs"][0]]
    assert len(requests) == len(expected) == 4
    for got, want in zip(result["batches"][0], expected, strict=False):
        assert len(got["logprobs"][0]) == len(want["logprobs"][0])
        for a, b in zip(got["logprobs"][0], want["logprobs"][0], strict=False):
            assert a.keys() == b.keys()
            assert all(a[t] == pytest.approx(b[t], abs=1e-3) for t in a)


def test_without_a_compiler(tmp_path, tiny_engine, mixed_requests, plain, reference_file):
    """The torch references stand in for the C++ kernels."""
    spec = hidden_truth(reference_file, num_speculative_tokens=12)
    result = run(tmp_path, tiny_engine, mixed_requests[:8], spec, sabotage="no_native_kernels")
    assert harness.ids(result) == harness.ids(plain)[:8]
    assert result["counters"]["kv_slots_moved"] > 0


def test_end_of_the_context_window(tmp_path, tiny_engine, mixed_requests, reference_file):
    """Texts that run into max_model_len end exactly there."""
    requests = [
        [p, {"temperature": 0, "max_tokens": 400, "ignore_eos": True}]
        for p, _ in mixed_requests[:6]
    ]
    engine = tiny_engine | {"max_model_len": 160, "max_num_batched_tokens": 160}
    requests = [r for r in requests if len(r[0]) < 150]
    expected = harness.run(tmp_path, engine, [{"requests": requests}])
    result = run(
        tmp_path, engine, requests, {"method": "token_recycling", "num_speculative_tokens": 12}
    )
    assert harness.ids(result) == harness.ids(expected)
    assert all(
        len(p) + len(out[0]) == 160
        for (p, _), out in zip(requests, harness.ids(result), strict=False)
    )


def test_failing_drafter_degrades_to_plain_decoding(tmp_path, tiny_engine, mixed_requests, plain):
    result = run(tmp_path, tiny_engine, mixed_requests, {"method": "broken"})
    assert harness.ids(result) == harness.ids(plain)
    assert result["counters"]["draft_failures"] > 0
    assert result["counters"]["nodes_drafted"] == 0
