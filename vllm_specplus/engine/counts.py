"""Our counters on vLLM's ``/metrics``: they ride on what vLLM sends for every step anyway.

* The worker hands their values to the scheduler with the step's ``ModelRunnerOutput``, as an
  attribute: it goes wherever the output goes, from another machine too (Ray, several nodes).
* The scheduler adds what they grew by to its ``SchedulerStats``, which vLLM sends to one of the
  front ends. Of its fields only those of a declared type arrive; the one dictionary there by free
  names is ``perf_stats.debug_stats.context_breakdown``.
* vLLM's Prometheus logger of that front end hands ``perf_stats`` to an object of a class that it
  holds for loggers that replace it. Ours adds counters to it, which are like vLLM's own: with the
  same labels, one per engine, summed over the API servers by Prometheus's client.

Where vLLM makes no statistics (``--disable-log-stats``) we make none.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm.v1.metrics.perf import DebugPerfStats, PerfMetricsProm, PerfStats
from vllm.v1.metrics.stats import SchedulerStats

from vllm_specplus.engine.names import CONFIG_KEY
from vllm_specplus.metrics import COUNTERS, Counters, Increments

if TYPE_CHECKING:
    from vllm_specplus.engine.batch import Step

#: The attribute of a ``ModelRunnerOutput``, and what our keys in the dictionary begin with.
COUNTS = "specplus_counts"
PREFIX = "specplus:"


def hand_over(output: Any, counters: Counters, step: Step | None = None) -> Any:
    """The step's output, with the counters' values so far where it has requests: the output without
    any is one object of vLLM's for all steps. As a list of floats: Ray hands arrays over in its
    shared memory, and waits until nobody holds them. Requests that broke are told in vLLM's own
    field, for :class:`~vllm_specplus.engine.scheduler.GuardedScheduler`."""
    if getattr(output, "req_ids", None):
        setattr(output, COUNTS, counters.values.tolist())
        if step is not None and step.broken is not None and step.broken.any():
            names = (output.req_ids[i] for i in np.flatnonzero(step.broken))
            output.num_nans_in_logits = dict.fromkeys(names, 1)
    return output


class StepCounts:
    """The scheduler's side: sums what its worker and itself counted, and puts the increments into
    the statistics that go to a front end."""

    def __init__(self):
        self.own = Counters()
        self._worker = np.zeros(len(COUNTERS))
        self._increments = Increments()

    def take(self, output: Any) -> None:
        counts = getattr(output, COUNTS, None)
        if counts is not None:
            self._worker = np.array(counts)

    def put(self, stats: SchedulerStats) -> None:
        grown = self._increments.read(self._worker + self.own.values)
        if not grown:
            return
        if stats.perf_stats is None:
            stats.perf_stats = PerfStats()
        debug = stats.perf_stats.debug_stats
        if debug is None:
            debug = stats.perf_stats.debug_stats = DebugPerfStats(
                context_breakdown={}, num_flops_per_gpu_breakdown={},
                num_read_bytes_per_gpu_breakdown={}, num_write_bytes_per_gpu_breakdown={},
            )  # fmt: skip
        debug.context_breakdown.update({PREFIX + name: count for name, count in grown.items()})


class CountingPerfMetrics(PerfMetricsProm):
    """vLLM's performance counters, and ours where an engine runs a method of ours: every one with
    vLLM's labels and ``method``, and a ``reason`` where its name has one."""

    def __init__(self, vllm_config, labelnames, per_engine_labelvalues):
        super().__init__(vllm_config, labelnames, per_engine_labelvalues)
        self._counters: dict[int, dict[str, Any]] = {}
        ours = (vllm_config.additional_config or {}).get(CONFIG_KEY)
        if vllm_config.speculative_config is None or ours is None:
            return
        families: dict[str, Any] = {}
        for name, text in COUNTERS.items():
            family, _, reason = name.partition(":")
            labels = [*labelnames, "method", *(["reason"] if reason else [])]
            if family not in families:
                families[family] = self._counter_cls(
                    name=f"vllm:specplus_{family}", documentation=text, labelnames=labels
                )
            for engine, values in per_engine_labelvalues.items():
                values = [*values, ours["config"]["method"], *([reason] if reason else [])]
                counter = families[family].labels(*values)
                self._counters.setdefault(engine, {})[PREFIX + name] = counter

    def observe(self, perf_stats: PerfStats, engine_idx: int = 0) -> None:
        super().observe(perf_stats, engine_idx)
        counters = self._counters.get(engine_idx)
        debug = perf_stats.debug_stats
        if not counters or debug is None:
            return
        for name, count in (debug.context_breakdown or {}).items():
            if name in counters:
                counters[name].inc(count * Increments.UNIT)


def serve() -> None:
    """Let vLLM's Prometheus loggers of this process show our counters, and in a replica of Ray
    Serve its loggers for Ray. Harmless for engines without a method of ours; may be called
    again."""
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    PrometheusStatLogger._perf_metrics_cls = CountingPerfMetrics
    # To import Ray Serve for nothing would take seconds.
    if sys.modules.keys() & {"ray.serve", "vllm.v1.metrics.ray_wrappers"}:
        from vllm.v1.metrics.ray_wrappers import RayCounterWrapper, RayPrometheusStatLogger

        class CountingRayPerfMetrics(CountingPerfMetrics):
            _counter_cls = RayCounterWrapper

        RayPrometheusStatLogger._perf_metrics_cls = CountingRayPerfMetrics
