"""What a step takes, without an engine: which times count, and what a profile runs."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm_specplus.control.cost import StepKind, StepShape
from vllm_specplus.engine import clock
from vllm_specplus.engine.clock import StepClock, StepProfiler
from vllm_specplus.engine.profile_trees import profiled_step

SHAPE = StepShape(requests=1, rows=3, context=20)


def make_clock(drafting: float = 0.0):
    took = []
    drafter = SimpleNamespace(
        counters={"draft_seconds": drafting},
        controller=SimpleNamespace(step_took=lambda *args: took.append(args)),
    )
    return StepClock(drafter), drafter, took


def test_a_step_ends_where_the_next_one_begins(monkeypatch):
    times, drafter, took = make_clock(drafting=5.0)
    times.start(100.0, 5.0, {"a": 1, "b": 3}, SHAPE)
    drafter.counters["draft_seconds"] = 5.25
    monkeypatch.setattr(clock.time, "perf_counter", lambda: 101.0)
    times.stop({"b": 1})
    assert took == [(SHAPE, 0.75, 0.25)]


def test_an_idle_engine_teaches_nothing():
    """None of the step's requests goes on: the scheduler may have waited for new ones."""
    times, _, took = make_clock()
    times.start(100.0, 0.0, {"a": 1}, SHAPE)
    times.stop({"c": 1})
    times.stop({"a": 1})
    assert took == []


class OneRank:
    rank_in_group = 0

    def broadcast_object(self, value, src):
        return value


@pytest.fixture
def runs(monkeypatch):
    """Profiles with a "model" that only notes what it is asked to run."""
    monkeypatch.setattr(clock, "get_tp_group", OneRank)
    asked = []
    config = SimpleNamespace(
        model_config=SimpleNamespace(model="m", dtype=torch.float32, quantization=None),
        compilation_config=SimpleNamespace(
            mode=SimpleNamespace(name="NONE"), cudagraph_mode=SimpleNamespace(name="NONE")
        ),
        parallel_config=SimpleNamespace(tensor_parallel_size=1),
    )
    profiler = StepProfiler(config, torch.device("cpu"), lambda *what: asked.append(what))
    return profiler, asked


def test_every_kind_of_step_is_run(runs):
    profiler, asked = runs
    cost = profiler.profile(None, 40, trees=True)
    assert {kind for _, kind in asked} == {"plain", "chain", "tree"}
    assert max(rows for rows, _ in asked) == 40
    assert cost.predict(np.array([3]), 1, 20.0).shape == (1,)


def test_a_method_without_trees_runs_none(runs):
    profiler, asked = runs
    profiler.profile(None, 8, trees=False)
    assert {kind for _, kind in asked} == {"plain"}


def test_trees_cost_what_they_take_more_than_chains(runs, monkeypatch):
    """And chains, of as many rows as plain steps, what those cost: no request is counted twice."""
    profiler, _ = runs
    seconds = {"plain": 1.0, "chain": 3.0, "tree": 3.5}
    monkeypatch.setattr(profiler, "_time", lambda rows, kind: seconds[kind] + 0.01 * rows)
    profile = profiler.profile(None, 40, trees=True).profile
    assert profile.curve(StepKind.CHAIN)(8) == profile.plain(8) == pytest.approx(1.08)
    assert profile.curve(StepKind.TREE)(8) == pytest.approx(1.58)


def test_the_profile_is_kept(runs, tmp_path):
    profiler, asked = runs
    path = str(tmp_path / "cost.json")
    profiler.profile(path, 8, trees=True)
    asked.clear()
    profiler.profile(path, 8, trees=True)
    assert asked == []


def test_profiled_trees_branch_and_profiled_chains_do_not():
    """Two requests of four rows and a rest of two, as vLLM's dummy batch divides ten rows; padded
    requests have none."""
    starts = torch.tensor([0, 4, 8, 10, 10], dtype=torch.int32)
    common = SimpleNamespace(query_start_loc_cpu=starts)
    tree = profiled_step(common, "tree", serves_chains=False)
    assert tree.rows.parents.tolist() == [-1, 0, 0, 1, -1, 0, 0, 1, -1, 0]
    assert tree.rows.depths.tolist() == [0, 1, 1, 2, 0, 1, 1, 2, 0, 1]
    assert tree.tree_attention.all()
    chain = profiled_step(common, "chain", serves_chains=False)
    assert chain.rows.parents.tolist() == [-1, 0, 1, 2, -1, 0, 1, 2, -1, 0]
    assert not chain.tree_attention.any()
    assert profiled_step(common, "chain", serves_chains=True).tree_attention.all()
