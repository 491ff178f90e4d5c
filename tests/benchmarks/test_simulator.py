"""The simulator replays what was recorded, and shows policies what the engine would."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import simulator  # noqa: E402

DATA = ROOT / "benchmarks" / "data"
TIMES = simulator.StepTimes.load(DATA / "step_times_cpu.json")
VOCAB = 4000


@pytest.fixture(scope="module")
def traces():
    return simulator.load_traces(DATA / "traces_smollm2.npz")


def run(traces, policy, in_flight, noise=0.05):
    longest = max(len(t.prompt) + len(t.output) for t in traces)
    vocab = simulator.vocab_size(traces)
    world = simulator.Simulator(TIMES, policy, vocab, in_flight, longest + 1, noise)
    return simulator.closed_loop(world, simulator.workload(traces, in_flight), in_flight)


def test_plain_decoding_takes_what_the_table_says(traces):
    result = run(traces[:4], simulator.fixed(0), 1, noise=0.0)
    tokens = [len(t.output) for t in traces[:4]]
    assert result.tokens == sum(tokens) - 4  # the first token comes with the prompt
    prompts = sum(TIMES(1, 1, len(t.prompt)) for t in traces[:4])
    decoding = sum(n - 1 for n in tokens) * float(TIMES.seconds[0, 0])
    assert result.seconds == pytest.approx(prompts + decoding)


@pytest.mark.slow
def test_every_policy_makes_the_same_tokens(traces):
    results = [
        run(traces[:8], p, 4) for p in (simulator.fixed(0), simulator.fixed(8), simulator.goodput())
    ]
    assert len({result.tokens for result in results}) == 1
    assert all(len(result.seconds_per_token) == 12 for result in results)


def test_the_engine_recorded_here_is_reproduced(traces):
    """16 nodes, one request at a time: the steps the recorded engine needed."""
    result = run(traces, simulator.fixed(16), 1)
    engine = sum(len(np.unique(t.row_at)) for t in traces) - len(traces)
    assert result.request_steps == pytest.approx(engine, rel=0.08)


def test_nothing_is_shown_before_it_is_text(traces):
    """Where the recorded engine has verified several tokens at once, and the simulated one has
    not yet."""
    assert any((np.bincount(t.row_at[t.row_accepted]) > 2).any() for t in traces[:4])
    longest = max(len(t.prompt) + len(t.output) for t in traces)
    vocab = simulator.vocab_size(traces)
    world = simulator.Simulator(TIMES, simulator.fixed(1), vocab, 4, longest + 1)
    for trace in traces[:4]:
        world.admit(trace)
    world.step()  # reads the prompts
    while world.running:
        for r in world.running:
            rows = r.trace.text_rows[0][: r.shown]
            text = np.append(r.trace.prompt[-1], r.trace.output[: r.produced - 1])
            np.testing.assert_array_equal(r.trace.row_tokens[rows], text)
        world.step()


def test_rejected_rows_are_those_that_were_drafted_here_too():
    trace = simulator.Trace(
        prompt=np.array([7], np.int32), output=np.array([1, 2, 3], np.int32),
        prompt_top_ids=np.zeros((1, 8), np.int32),
        row_at=np.array([0, 1, 1, 1, 1], np.int32),
        row_tokens=np.array([7, 1, 2, 5, 6], np.int32),
        row_previous=np.array([0, 7, 1, 1, 5], np.int32),
        row_accepted=np.array([True, True, True, False, False]),
        row_top_ids=np.zeros((5, 8), np.int32),
    )  # fmt: skip
    assert trace.rejected(1, np.array([2, 5]), np.array([1, 1])).tolist() == [3]
    assert trace.rejected(2, np.array([5, 6]), np.array([2, 5])).tolist() == [4]
    assert trace.rejected(0, np.array([5]), np.array([1])).tolist() == []


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [1, 2, 4, 8, 16, 32, 64, 128, 256])
def test_goodput_is_never_slower_than_any_fixed_budget(traces, in_flight):
    """The claim of the controller, over the whole range of loads, if nothing but throughput
    counts."""
    ours = run(traces, simulator.goodput(objective="throughput"), in_flight).tokens_per_second
    for nodes in (0, 2, 4, 8, 16):
        other = run(traces, simulator.fixed(nodes), in_flight).tokens_per_second
        assert ours > 0.97 * other, f"{nodes} nodes"


@pytest.mark.slow
@pytest.mark.parametrize("in_flight", [4, 16, 64])
def test_the_slowest_requests_do_not_pay_for_throughput(traces, in_flight):
    """Of 1,200 requests, with the default objective; those of "throughput" do at 16 and 64. By five
    engines, since one that has answered a text often knows it."""
    longest = max(len(t.prompt) + len(t.output) for t in traces)
    vocab = simulator.vocab_size(traces)
    p99, rates = [], []
    for policy in (
        simulator.fixed(0),
        simulator.goodput(),
        simulator.goodput(objective="throughput"),
    ):
        results = []
        for seed in range(5):
            world = simulator.Simulator(TIMES, policy, vocab, in_flight, longest + 1)
            requests = simulator.varied(traces, 240, seed)
            results.append(simulator.closed_loop(world, requests, in_flight))
        p99.append(np.percentile(np.concatenate([r.seconds_per_token for r in results]), 99))
        rates.append(sum(r.tokens for r in results) / sum(r.seconds for r in results))
    none, ours, fast = p99
    assert ours < 1.05 * none
    assert in_flight == 4 or fast > 1.05 * none
    assert rates[1] > 1.02 * rates[0]


def test_open_loop_waits_for_arrivals(traces):
    longest = max(len(t.prompt) + len(t.output) for t in traces)
    vocab = simulator.vocab_size(traces)
    world = simulator.Simulator(TIMES, simulator.goodput(), vocab, 8, longest + 1)
    result = simulator.open_loop(world, traces[:20], rate=0.2)
    gaps = np.random.default_rng(0).exponential(5.0, 20)
    assert result.seconds > gaps.sum()
    assert np.mean(result.batches) < 1.5


def text_trace(kinds: str, rng) -> simulator.Trace:
    """A text of stretches of 400 tokens: "r"epeating a phrase of 20, or "x" random."""
    phrase = rng.integers(0, VOCAB, 20)
    parts = [np.tile(phrase, 20) if k == "r" else rng.integers(0, VOCAB, 400) for k in kinds]
    output = np.concatenate(parts).astype(np.int32)
    rows = len(output)
    top_ids = rng.integers(0, VOCAB, (rows, 8)).astype(np.int32)
    previous = np.concatenate(([-1], output[:-1])).astype(np.int32)
    return simulator.Trace(
        prompt=output[:1], output=output, prompt_top_ids=top_ids[:1],
        row_at=np.arange(1, rows + 1, dtype=np.int32), row_tokens=output, row_previous=previous,
        row_accepted=np.ones(rows, bool), row_top_ids=top_ids,
    )  # fmt: skip


@pytest.mark.parametrize("in_flight", [1, 8])
def test_a_change_of_traffic_is_followed_within_50_steps(in_flight):
    """Repetitive text turns random and back: the budget reaches its new level in time."""
    rng = np.random.default_rng(5)
    traces = [text_trace("rxxrr", rng) for _ in range(in_flight)]
    world = simulator.Simulator(TIMES, simulator.goodput(), VOCAB, in_flight, 2100)
    for trace in traces:
        world.admit(trace)
    position, nodes = [], []
    while world.running:
        first = world.running[0]
        position.append(first.produced)
        world.step()
        nodes.append(world.result.nodes[-1] / in_flight)
    position, nodes = np.array(position), np.array(nodes)

    def after(text_position, steps):
        start = int(np.searchsorted(position, text_position))
        return nodes[start + steps.start : start + steps.stop].mean()

    repetitive = nodes[(position > 200) & (position < 400)].mean()
    random = after(800, slice(-60, -10))
    assert repetitive > 6
    assert random < 0.15 * repetitive
    assert after(400, slice(50, 100)) < 0.25 * repetitive
    assert after(1220, slice(0, 50)) > 0.5 * repetitive  # once the phrase came back
    assert nodes[(position > 1400) & (position < 1900)].mean() > 0.75 * repetitive


def test_prompts_are_read_in_parts_where_a_step_has_a_budget(traces):
    """The same texts; a step reads so many tokens at most, and no prompt is read twice."""
    longest = max(len(t.prompt) + len(t.output) for t in traces)
    vocab = simulator.vocab_size(traces)
    prompts = sum(len(t.prompt) for t in traces[:8])
    read = {}
    for budget in (None, 64):
        rows = []
        times = replace(TIMES, prompt_row=0.001)
        world = simulator.Simulator(
            times, simulator.goodput(), vocab, 8, longest + 1, 0.0, step_tokens=budget
        )
        took = world.controller.step_took
        world.controller.step_took = lambda shape, seconds, rows=rows, took=took: (
            rows.append(shape.prompt_rows) or took(shape, seconds)
        )
        result = simulator.closed_loop(world, traces[:8], 8)
        assert result.tokens == sum(len(t.output) - 1 for t in traces[:8])
        read[budget] = rows
    assert sum(read[None]) == sum(read[64]) == prompts
    assert max(read[64]) <= 64
    assert np.count_nonzero(read[64]) >= prompts / 64
    assert np.count_nonzero(read[None]) == 1
