"""Benchmarks that are the bench of engines of several kinds."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_specplus.bench.loads import Load
from vllm_specplus.bench.methods import parse_methods

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import against_commit
import preloads

MACHINE = SimpleNamespace(device_type="cpu")


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"number {i}"}) + "\n" for i in range(20)))
    return ["--model", "model", "--dataset", str(path), "--limit", "12"]


def benchmark(cls, plan, tmp_path, **keys):
    return cls(plan, MACHINE, tmp_path, lambda *_: None, lambda _: None, **keys)


def test_the_code_of_two_commits(dataset, tmp_path):
    args = against_commit.options().parse_args([*dataset, "--commit", "HEAD", "--rounds", "3"])
    (method,) = parse_methods("token_recycling")
    plan = against_commit.plan(args, method, 1)
    assert plan.loads == [Load(in_flight=1)]
    run = benchmark(against_commit.Comparison, plan, tmp_path, checkout=tmp_path)
    folders = [run._process_options(each)["cwd"] for each in plan.methods]
    assert folders == [tmp_path, against_commit.ROOT]
    with pytest.raises(SystemExit, match="one round at 16 in flight"):
        against_commit.plan(args, method, 16)


def test_engines_with_and_without_a_library(dataset, tmp_path, monkeypatch):
    args = preloads.options().parse_args(dataset)
    assert (args.rounds, args.limit, args.methods) == (4, 12, "none,token_recycling")
    sets = {"nothing": "", "libx": "/lib/libx.so"}
    runs = []

    class Stopped(Exception):
        pass

    def start(run):
        runs.append(run)
        raise Stopped

    monkeypatch.setattr(preloads.Comparison, "run", start)
    monkeypatch.setattr(preloads, "describe_machine", lambda log: MACHINE)
    with pytest.raises(Stopped):
        preloads.measure(args, sets, parse_methods("none")[0])
    (run,) = runs
    given = [run._process_options(each)["variables"] for each in run.plan.methods]
    assert given == [{"LD_PRELOAD": ""}, {"LD_PRELOAD": "/lib/libx.so"}]
