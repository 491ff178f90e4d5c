"""The comparison of predictions with results: the committed file, its targets, its calibration."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import plan_check  # noqa: E402

from vllm_specplus.planning import devices, software  # noqa: E402
from vllm_specplus.planning.passes import Load, Machine  # noqa: E402
from vllm_specplus.planning.sizes import Shape  # noqa: E402

PLAIN = json.loads((ROOT / "benchmarks/data/plain_decoding.json").read_text())
COMMITTED = json.loads((ROOT / "benchmarks/results/plan/check.json").read_text())
A100 = devices.DEVICES["A100-80GB"]


@pytest.fixture(scope="module")
def found():
    return json.loads(json.dumps(plan_check.report()))


def close(a, b) -> bool:
    """Equal, numbers up to rounding."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(close, a, b))
    return a == pytest.approx(b, rel=1e-6) if isinstance(a, float) else a == b


def test_the_result_is_what_the_script_finds(found):
    assert close({"command": COMMITTED["command"]} | found, COMMITTED)


def test_the_targets_are_met(found):
    assert found["measured_here"]["median_error"] < 0.1
    assert found["published"]["median_error"] < 0.2


def test_every_miss_is_listed(found):
    lines = [line for part in found["lines"].values() for line in part]
    far = [line for line in lines if abs(line["predicted"] / line["measured"] - 1) > 0.2]
    assert found["misses"] == far
    assert len(lines) == found["measured_here"]["count"] + found["published"]["count"]


def test_every_closed_loop_is_compared_or_named():
    """A result that has tokens per step beside plain decoding and is left out has a reason."""
    compared = {file for files, _ in plan_check.SESSIONS.values() for file in files}
    left = set()
    for path in (ROOT / "benchmarks/results").rglob("*.json"):
        name = path.relative_to(ROOT / "benchmarks/results").with_suffix("").as_posix()
        document = json.loads(path.read_text())
        runs = document.get("runs") if isinstance(document, dict) else None
        if runs and isinstance(runs, list) and all("drafted_per_draft" in run for run in runs):
            left |= {name} - compared
    assert {name.split("/")[0] for name in left} <= {"serving"}


def calibrated(row: dict) -> float:
    """The constant that makes a plain step take what was published."""
    shape, ranks = Shape(*PLAIN["shapes"][row["model"]]), row["ranks"]
    seconds = row["ms"] / 1e3
    graphs = Machine(devices.DEVICES[row["device"]], software.VLLM)
    time = graphs.forward(shape, Load(1, 1, 64), ranks)
    match row["constant"]:
        case "MEMORY_SHARE":
            return software.MEMORY_SHARE * time.weights / (seconds - time.kernels)
        case "NVLINK":
            messages = 2 * shape.layers + 1
            moved = time.messages / messages - graphs.device.latency
            return (seconds - time.weights - time.kernels) / messages - moved
        case "VLLM.step":
            return seconds - time.total
        case "LAUNCH":
            eager = software.TRANSFORMERS
            layer = eager.attention_kernels + eager.mlp_kernels
            return seconds / (shape.layers * layer + eager.pass_kernels)
    raise AssertionError(row)


def test_constants_are_those_of_plain_decoding():
    values = {"MEMORY_SHARE": software.MEMORY_SHARE, "NVLINK": devices.NVLINK,
              "VLLM.step": software.VLLM.step, "LAUNCH": software.LAUNCH}  # fmt: skip
    for name, value in values.items():
        found = [calibrated(row) for row in PLAIN["calibration"] if row["constant"] == name]
        assert value == pytest.approx(sum(found) / len(found), rel=0.05), name


def test_prices_of_a_cpu_are_found_again():
    """Plain decoding at made-up speeds, by load: the speeds that explain it are those."""
    host = plan_check.host_prices()
    machine = plan_check.cpu(30e9, 200e9)
    prices = plan_check.Prices(machine, **host)
    runs = []
    for load in (1, 4, 16):
        run = {"concurrency": load, "requests": 10, "tokens": 600, "method": "none"}
        rows = plan_check.prompt_rows(run)
        row = machine.forward(plan_check.SMOLLM2, Load(1, 1, plan_check.CONTEXT))
        keyless = row.weights / load + row.arithmetic * (1 + rows * host["prompt"])
        runs.append(run | {"tokens_per_s": 1 / (keyless + host["request"])})
    found = plan_check.prices(plan_check.SMOLLM2, runs, host).machine.device
    assert found.bandwidth == pytest.approx(machine.device.bandwidth)
    assert found.flops == pytest.approx(machine.device.flops)
    slower = plan_check.scaled(prices, plan_check.SMOLLM2, runs[0] | {"tokens_per_s": 10.0})
    plain = slower.plain(plan_check.SMOLLM2, 1, plan_check.prompt_rows(runs[0]))
    assert plain == pytest.approx(0.1)
    assert replace(slower, machine=machine) == prices
