"""What a result of ``bench`` says follows from the requests and rounds that it holds."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from statistics import median

import numpy as np
import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def with_requests() -> dict[str, dict]:
    """Results by name whose runs hold every request; older ones hold rounds only."""
    found = {}
    for path in sorted(RESULTS.rglob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        runs = content.get("runs") if isinstance(content, dict) else None
        if isinstance(runs, list) and runs and all(run.get("answers") for run in runs):
            found[str(path.relative_to(RESULTS))] = content
    return found


def load(run: dict) -> float:
    """Requests in flight, or per second."""
    return run["concurrency"] or run["rate"]


def contradictions(report: dict) -> list[str]:
    """Where its figures are not those of its requests."""
    wrong = []
    none = {load(run): run for run in report["runs"] if run["method"] == "none"}
    for run in report["runs"]:
        where = f"{run['method']} at {load(run)}"
        answers, rounds = run["answers"], run["rounds"]
        for name in ("ttft_ms", "tpot_ms", "latency_ms"):
            values = [answer[name] for answer in answers if answer[name] is not None]
            computed = np.percentile(values, [50, 95, 99])
            if not np.allclose([run[name][p] for p in ("p50", "p95", "p99")], computed):
                wrong.append(f"{where}: {name}")
        made = Counter()
        for answer in answers:
            made[answer["repeat"], answer["round"]] += answer["tokens"]
        if made != {(each["repeat"], each["round"]): each["tokens"] for each in rounds}:
            wrong.append(f"{where}: tokens of a round")
        speeds = [each["tokens"] / each["wall_s"] for each in rounds]
        if not np.isclose(run["tokens_per_s"], median(speeds)):
            wrong.append(f"{where}: tokens_per_s")
        plain = [each["tokens"] / each["wall_s"] for each in none[load(run)]["rounds"]]
        ratios = [a / b for a, b in zip(speeds, plain, strict=True)]
        if run["method"] != "none" and not np.isclose(run["ratio_vs_none"], median(ratios)):
            wrong.append(f"{where}: ratio_vs_none")
    return wrong


@pytest.mark.parametrize("name", with_requests())
def test_figures_are_those_of_the_requests(name):
    assert contradictions(with_requests()[name]) == []


def test_a_request_that_was_changed_is_noticed():
    report = copy.deepcopy(next(iter(with_requests().values())))
    run = report["runs"][-1]
    run["answers"][0]["tokens"] += 1
    assert contradictions(report) == [f"{run['method']} at {load(run)}: tokens of a round"]
    run["answers"][0]["tokens"] -= 1
    for answer in run["answers"]:
        answer["tpot_ms"] = answer["tpot_ms"] and 1.01 * answer["tpot_ms"]
    assert contradictions(report) == [f"{run['method']} at {load(run)}: tpot_ms"]
