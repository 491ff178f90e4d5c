"""Counters of the drafting engine on vLLM's ``/metrics``.

The worker that drafts runs in another process than the HTTP server. It counts in
a small memory-mapped file of float64; a collector in the front end reads the file
when Prometheus scrapes. Adding to a counter is one store: no lock, no message.
The file's name travels in the environment, not in the engine's config: vLLM hashes the
config to find its compiled graphs, and a new name would compile them anew at every start.
A driver worker on another machine than the front end (Ray, several nodes) simply leaves
the counters at zero.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from collections.abc import Iterator

import numpy as np
from prometheus_client import REGISTRY
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

#: name -> help. A name "family:label" is one value of a labelled counter.
COUNTERS = {
    "request_steps": "Decoding steps, counted once per request in the step.",
    "output_tokens": "Tokens that came out of these steps.",
    "nodes_drafted": "Draft nodes verified by the target model.",
    "nodes_accepted": "Draft nodes that became text.",
    "relaxed_tokens": "Of these, nodes that a lossy rule took in place of the draw.",
    "residuals_given_up": "Rejected latents that the bound on proposals replaced by the target's.",
    "kv_slots_moved": "Cache slots copied to compact an accepted path.",
    "draft_seconds": "Seconds spent learning from the step and drafting.",
    "control_seconds": "Seconds spent deciding how much to draft.",
    "verify_seconds": "Seconds spent sampling at every row and following the tree.",
    "compact_seconds": "Seconds spent moving accepted KV slots.",
    "chain_fallbacks:structured_output": "Requests drafted as a chain instead of a tree.",
    "chain_fallbacks:resumed": "Requests drafted as a chain instead of a tree.",
    "control_steps": "Steps in which the controller decided what to verify.",
    "undrafted_steps": "Of these, steps that verified nothing.",
    "probe_steps": "Of these, steps speculated only to see whether it pays again.",
    "nodes_grown": "Draft nodes the controller chose from.",
    "nodes_labelled": "Draft nodes the text proved right or wrong.",
    "expected_tokens": "Draft tokens the controller expected to be accepted.",
    "timed_steps": "Steps without prompts whose duration was predicted and measured.",
    "predicted_step_seconds": "Seconds the cost model predicted for these steps.",
    "measured_step_seconds": "Seconds these steps took.",
    "memory_guard_trims": "Drafts shortened because cache blocks or token budget ran short.",
    "draft_group_rebuilds": "Times the processes of a layer-parallel draft were started anew.",
    "draft_layer_changes": "Times self-speculation chose other layers of the target.",
    "draft_failures": "Steps whose drafting failed; they went on undrafted.",
}
_INDEX = {name: i for i, name in enumerate(COUNTERS)}


#: Names the counter file of the engine that is being started. vLLM hands variables that
#: begin with its name on to workers on Ray.
VARIABLE = "VLLM_SPECPLUS_COUNTERS"


class Counters:
    """The writer's side. ``path`` None or unreachable: counts for this process only."""

    def __init__(self, path: str | None = None):
        if path is not None and os.path.exists(path):
            # As a plain array: indexing np.memmap itself costs microseconds.
            self.values = np.asarray(np.memmap(path, np.float64, "r+", shape=len(COUNTERS)))
        else:
            self.values = np.zeros(len(COUNTERS))

    def add(self, name: str, amount: float = 1.0) -> None:
        self.values[_INDEX[name]] += amount

    def __getitem__(self, name: str) -> float:
        return float(self.values[_INDEX[name]])

    def as_dict(self) -> dict[str, float]:
        return dict(zip(COUNTERS, self.values.tolist(), strict=False))


class _Collector:
    """The reader's side: all engines this front end started."""

    def __init__(self):
        self.files: dict[str, str] = {}  # path -> method

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        totals: dict[str, dict[str, float]] = {}
        for path, method in list(self.files.items()):  # publish() may run meanwhile
            engine = totals.setdefault(method, dict.fromkeys(COUNTERS, 0.0))
            for name, value in Counters(path).as_dict().items():
                engine[name] += value
        families: dict[str, CounterMetricFamily] = {}
        for name, text in COUNTERS.items():
            family, _, reason = name.partition(":")
            labels = ["method", "reason"] if reason else ["method"]
            metric = families.setdefault(
                family, CounterMetricFamily(f"vllm:specplus_{family}", text, labels=labels)
            )
            for method, engine in totals.items():
                metric.add_metric([method, reason] if reason else [method], engine[name])
        yield from families.values()
        ratio = GaugeMetricFamily(
            "vllm:specplus_tokens_per_step",
            "Output tokens per request and decoding step since start.",
            labels=["method"],
        )
        for method, engine in totals.items():
            steps = engine["request_steps"]
            ratio.add_metric([method], engine["output_tokens"] / steps if steps else 0.0)
        yield ratio


_collector: _Collector | None = None


def publish(method: str) -> str:
    """Create a counter file for a new engine, show it on ``/metrics`` and name it in the
    environment of the processes the engine will start; its path."""
    global _collector
    if _collector is None:
        _collector = _Collector()
        REGISTRY.register(_collector)
    handle, path = tempfile.mkstemp(prefix="vllm-specplus-", suffix=".counters")
    os.write(handle, bytes(8 * len(COUNTERS)))
    os.close(handle)
    _collector.files[path] = method
    os.environ[VARIABLE] = path
    atexit.register(_remove, path)
    return path


def _remove(path: str) -> None:
    if _collector is not None:
        _collector.files.pop(path, None)
    if os.environ.get(VARIABLE) == path:
        del os.environ[VARIABLE]
    if os.path.exists(path):
        os.unlink(path)
