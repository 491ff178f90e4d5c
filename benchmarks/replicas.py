"""Many replicas that share nothing, simulated: what they do, and what a controller of all sees.

    python benchmarks/replicas.py [--replicas 1000] [--in-flight 8] [--requests 120] [--json OUT]

Every replica is an engine of ``simulator.py``: recorded texts, measured step times, the product's
own proposer and controller, which decide by the load of their replica and nothing else. A router
spreads ``replicas * in-flight`` requests evenly or at random; replicas of the same load are alike,
so each load is simulated once and counted as often as it occurs. Printed and written are the tokens
per second of all replicas, undrafted and under the controller, how much is drafted where, and the
metrics that one scrape of all replicas brings: series, and bytes as Prometheus reads them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import simulator

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "benchmarks" / "data"


def routed(how: str, replicas: int, in_flight: int, seed: int = 0) -> Counter[int]:
    """How many replicas have how many requests."""
    if how == "evenly":
        return Counter({in_flight: replicas})
    places = np.random.default_rng(seed).integers(0, replicas, replicas * in_flight)
    return Counter(np.bincount(places, minlength=replicas).tolist())


def simulate(load: int, requests: int) -> dict[str, float]:
    """One replica with ``load`` requests at all times."""
    traces = simulator.load_traces(DATA / "traces_smollm2.npz")
    times = simulator.StepTimes.load(DATA / "step_times_cpu.json")
    longest = max(len(trace.prompt) + len(trace.output) for trace in traces)
    policies = {"none": simulator.fixed(0), "controller": simulator.goodput()}
    found = {}
    for name, policy in policies.items():
        vocab, texts = simulator.vocab_size(traces), simulator.varied(traces, requests, load)
        engine = simulator.Simulator(
            times, policy, vocab, load, longest + 1, config=simulator.DEFAULT
        )  # fmt: skip
        result = simulator.closed_loop(engine, texts, load)
        found[name] = result.tokens_per_second
        found["nodes_per_request"] = sum(result.nodes) / max(result.request_steps, 1)
    return found


def summed(loads: Counter[int], of_load: dict[int, dict[str, float]]) -> dict[str, float]:
    """All replicas together; those without a request do nothing."""
    busy = {load: count for load, count in loads.items() if load}
    total = {
        name: sum(count * of_load[load][name] for load, count in busy.items())
        for name in ("none", "controller")
    }
    nodes = [of_load[load]["nodes_per_request"] for load in busy for _ in range(busy[load])]
    return {
        "tokens_per_s": total["controller"],
        "tokens_per_s_none": total["none"],
        "to_none": total["controller"] / total["none"],
        "nodes_per_request": {
            f"p{q}": float(np.percentile(nodes, q)) for q in (5, 50, 95)
        },
        "least_and_most_in_flight": [min(loads), max(loads)],
    }  # fmt: skip


def scraped(replicas: int) -> dict[str, int]:
    """Our series and their bytes, by what one engine shows after every counter was counted."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client import Counter as PrometheusCounter
    from vllm.v1.metrics.stats import SchedulerStats

    from vllm_specplus.engine.counts import CountingPerfMetrics, StepCounts
    from vllm_specplus.engine.names import CONFIG_KEY
    from vllm_specplus.metrics import COUNTERS

    registry = CollectorRegistry()

    class Shown(CountingPerfMetrics):
        def _counter_cls(self, **fields):
            return PrometheusCounter(registry=registry, **fields)

    config = SimpleNamespace(
        additional_config={CONFIG_KEY: {"config": {"method": "token_recycling"}}},
        speculative_config=object(),
    )
    shown = Shown(config, ["model_name", "engine"], {0: ["model", "0"]})
    counts, stats = StepCounts(), SchedulerStats()
    for name in COUNTERS:
        counts.own.add(name, 10**6)
    counts.put(stats)
    shown.observe(stats.perf_stats, 0)
    lines = generate_latest(registry).decode().splitlines(keepends=True)
    ours = [line for line in lines if "vllm:specplus" in line and "_created" not in line]
    series = sum(not line.startswith("#") for line in ours)
    return {
        "series_per_engine": series,
        "series": replicas * series,
        "bytes": replicas * len("".join(ours)),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--in-flight", type=int, default=8, help="requests per replica, mean")
    parser.add_argument("--requests", type=int, default=120, help="that one simulated answers")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    loads = {how: routed(how, args.replicas, args.in_flight) for how in ("evenly", "at random")}
    every = sorted({load for each in loads.values() for load in each if load})
    of_load = {load: simulate(load, max(args.requests, 3 * load)) for load in every}
    result = {
        "command": " ".join(sys.argv),
        "replicas": args.replicas,
        "in_flight": args.in_flight,
        "by_load": of_load,
        "routed": {how: summed(each, of_load) for how, each in loads.items()},
        "metrics": scraped(args.replicas),
    }
    for how, each in result["routed"].items():
        print(
            f"requests spread {how}: {each['tokens_per_s']:.0f} tokens/s of {args.replicas} "
            f"replicas, {each['to_none']:.2f} of undrafted"
        )
    print(
        f"one scrape: {result['metrics']['series']} series of ours, "
        f"{result['metrics']['bytes'] / 1e6:.1f} MB"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
