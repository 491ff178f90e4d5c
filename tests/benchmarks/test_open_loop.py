"""benchmarks/open_loop.py without an engine: arrivals, prompts, flags, numbers."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from vllm_specplus.bench import InputError
from vllm_specplus.bench.dataset import Question

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "open_loop.py"


@pytest.fixture(scope="module")
def open_loop():
    spec = importlib.util.spec_from_file_location("open_loop", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_arrivals_depend_on_the_seed_alone_and_keep_the_rate(open_loop):
    times = open_loop.arrivals(1000, 4.0, seed=1)
    assert times == open_loop.arrivals(1000, 4.0, seed=1) == sorted(times)
    assert times != open_loop.arrivals(1000, 4.0, seed=2)
    assert times[-1] == pytest.approx(250)
    # The same pattern at half the rate.
    assert open_loop.arrivals(1000, 2.0, seed=1) == pytest.approx([2 * t for t in times])
    # Exponential gaps: the deviation is as large as the mean.
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert pstdev(gaps) == pytest.approx(fmean(gaps), rel=0.1)


def questions(count: int) -> list[Question]:
    return [Question(id=str(i), category="ab"[i % 2], prompt=f"question {i}") for i in range(count)]


def test_no_prompt_is_sent_twice_and_the_parts_have_the_same_mix(open_loop):
    parts, warmup = open_loop.deal(questions(30), parts=3, size=8, seed=0)
    sent = [question.id for part in [*parts, warmup] for question in part]
    assert len(set(sent)) == len(sent) == 30
    for part in parts:
        assert Counter(question.category for question in part) == {"a": 4, "b": 4}
    assert open_loop.deal(questions(30), 3, 8, seed=0) == (parts, warmup)


def test_too_few_prompts(open_loop):
    with pytest.raises(InputError, match="need 25 different prompts; the dataset has 24"):
        open_loop.deal(questions(24), parts=3, size=8, seed=0)


def test_engine_args_become_flags(open_loop):
    text = '{"max_model_len": null, "enforce_eager": true, "async_scheduling": false, "a": {"b":1}}'
    assert open_loop.parse_engine_args(text) == [
        "--kv-cache-memory-bytes", "1073741824", "--enforce-eager", "--no-async-scheduling",
        "--a", '{"b": 1}',
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("parse", "text", "error"),
    [
        ("parse_rates", "1,x", "needs numbers"),
        ("parse_rates", "1,0", "different numbers above 0"),
        ("parse_rates", "nan", "different numbers above 0"),
        ("parse_rates", "1,1.0", "different numbers"),
        ("parse_engine_args", "{", "not valid JSON"),
        ("parse_engine_args", "[]", "JSON object"),
        ("parse_engine_args", '{"port": 1}', "port is set by the benchmark itself"),
        ("parse_engine_args", '{"speculative-config": 1}', "is set by the benchmark itself"),
    ],
)
def test_bad_input(open_loop, parse, text, error):
    with pytest.raises(InputError, match=error):
        getattr(open_loop, parse)(text)


def test_bad_input_ends_the_script_with_one_line():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--model", "m", "--dataset", "/nowhere"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("Error: cannot read the dataset /nowhere: ")
    assert len(done.stderr.splitlines()) == 1


def measured(open_loop, method: str, repeat: int, value: float, rate: float = 1.0):
    metrics = dict.fromkeys(open_loop.METRICS, value)
    return {"method": method, "repeat": repeat, "rate": rate, **metrics}


def test_ratios_are_those_of_the_same_repeat(open_loop):
    values = [("none", 0, 10.0), ("ours", 0, 5.0), ("ours", 1, 12.0), ("none", 1, 16.0)]
    rows = open_loop.summarize([measured(open_loop, *value) for value in values])
    assert [(row["rate"], row["method"]) for row in rows] == [(1.0, "none"), (1.0, "ours")]
    none, ours = (row["mean_tpot_ms"] for row in rows)
    assert none["median"] == 13.0
    assert none["repeats"] == [10.0, 16.0]
    assert none["ratios_vs_none"] == [1.0, 1.0]
    assert ours["ratios_vs_none"] == [0.5, 0.75]
    assert ours["ratio_vs_none"] == 0.625
    assert ours["noise"] == none["noise"] == 1.6


def test_a_baseline_that_is_missing_or_not_repeated(open_loop):
    runs = [measured(open_loop, "ours", 0, 5.0), measured(open_loop, "ours", 0, 4.0, rate=0.5)]
    rows = open_loop.summarize(runs)
    assert [row["rate"] for row in rows] == [0.5, 1.0]
    assert rows[0]["p99_ttft_ms"]["ratio_vs_none"] is rows[0]["p99_ttft_ms"]["noise"] is None
    rows = open_loop.summarize([*runs, measured(open_loop, "none", 0, 10.0)])
    assert rows[1]["output_throughput"]["ratio_vs_none"] == 0.5
    assert rows[1]["output_throughput"]["noise"] is None
    open_loop.print_summary(rows)


def test_plot(open_loop, tmp_path):
    pytest.importorskip("matplotlib")
    runs = [
        measured(open_loop, method, repeat, 10.0 + repeat, rate)
        for method in ("none", "ours")
        for repeat in (0, 1)
        for rate in (0.5, 1.0)
    ]
    open_loop.save_plot(open_loop.summarize(runs), "title", tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
