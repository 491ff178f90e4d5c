"""Our counters on their way to vLLM's ``/metrics``: through vLLM's own code, stage by stage, and
from servers with several front ends and several engines."""

from __future__ import annotations

import json
import pickle
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.executor.ray_utils import RayWorkerWrapper
from vllm.v1.metrics.perf import DebugPerfStats, PerfStats
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from tests.engine.test_serve import serving, vllm_serve
from vllm_specplus.engine.counts import (
    COUNTS,
    CountingPerfMetrics,
    StepCounts,
    hand_over,
    serve,
)
from vllm_specplus.engine.names import CONFIG_KEY
from vllm_specplus.metrics import COUNTERS, Counters

LABELS = ["model_name", "engine"]
ENGINES = {0: ["smol", "0"], 1: ["smol", "1"]}


class RemoteRunner:
    """Of a worker of Ray on another machine."""

    def __init__(self):
        self.counters = Counters()

    def execute_model(self, scheduler_output, tensors):
        return None

    def sample_tokens(self, grammar_output):
        self.counters.add("nodes_drafted", 5)
        self.counters.add("nodes_accepted", 2)
        self.counters.add("draft_seconds", 0.5)
        output = ModelRunnerOutput(["a"], {"a": 0}, sampled_token_ids=[[1, 2, 3]])
        return hand_over(output, self.counters)


def config(ours: bool = True):
    return SimpleNamespace(
        additional_config={CONFIG_KEY: {"config": {"method": "token_recycling"}}} if ours else None,
        speculative_config=object() if ours else None,
    )


@pytest.fixture
def shown():
    """Makes the front end's object as vLLM does, on a registry of its own; returns it and its
    samples."""

    def make(ours: bool = True):
        registry = CollectorRegistry()

        class Apart(CountingPerfMetrics):
            def _counter_cls(self, **fields):
                return Counter(registry=registry, **fields)

        return Apart(config(ours), LABELS, ENGINES), registry.get_sample_value

    return make


def delivered(stats):
    """The statistics as they are in the front end after vLLM's own serialisation."""

    frames = MsgpackEncoder().encode(EngineCoreOutputs(scheduler_stats=stats))
    return MsgpackDecoder(EngineCoreOutputs).decode(frames).scheduler_stats


def test_counts_of_a_worker_on_another_machine_reach_the_front_end(shown):
    """Nothing but the bytes of the steps' outputs comes from there."""
    wrapper = SimpleNamespace(
        setup_device_if_necessary=lambda: None, worker=SimpleNamespace(model_runner=RemoteRunner()),
        _is_intermediate_tensors=lambda output: False, _is_last_rank=lambda: True,
    )  # fmt: skip
    steps = [RayWorkerWrapper.execute_model_ray(wrapper, (None, None)) for _ in range(3)]
    front_end, value = shown()
    counts = StepCounts()
    for output in steps:
        counts.take(pickle.loads(pickle.dumps(output)))
        counts.own.add("memory_guard_trims")
        stats = SchedulerStats()
        counts.put(stats)
        front_end.observe(delivered(stats).perf_stats, engine_idx=1)
    idle = SchedulerStats()
    counts.put(idle)
    assert delivered(idle).perf_stats is None  # nothing happened, nothing is sent
    labels = {"model_name": "smol", "engine": "1", "method": "token_recycling"}
    assert value("vllm:specplus_nodes_drafted_total", labels) == 15
    assert value("vllm:specplus_nodes_accepted_total", labels) == 6
    assert value("vllm:specplus_draft_seconds_total", labels) == pytest.approx(1.5)
    assert value("vllm:specplus_memory_guard_trims_total", labels) == 3
    assert value("vllm:specplus_nodes_drafted_total", labels | {"engine": "0"}) == 0
    reason = {"reason": "structured_output"}
    assert value("vllm:specplus_chain_fallbacks_total", labels | reason) == 0


def test_loggers_for_ray_show_our_counters_too(monkeypatch):
    """Replicas of Ray Serve have those in the place of vLLM's own: by Ray's names, which know no
    colons, with the replica beside vLLM's labels."""
    pytest.importorskip("ray")
    from vllm.v1.metrics import ray_wrappers

    made: dict[str, list] = {}

    class RayCounter:
        def __init__(self, name, description, tag_keys):
            self._tag_keys, self._name = tag_keys, name

        def inc(self, value, tags):
            assert set(tags) == set(self._tag_keys)
            made.setdefault(self._name, []).append((value, tags))

    monkeypatch.setattr(ray_wrappers, "ray_metrics", SimpleNamespace(Counter=RayCounter))
    monkeypatch.setattr(ray_wrappers, "_get_replica_id", lambda: "r1")
    serve()
    logger = ray_wrappers.RayPrometheusStatLogger
    assert issubclass(logger._perf_metrics_cls, CountingPerfMetrics)
    front_end = logger._perf_metrics_cls(config(), LABELS, ENGINES)
    counts, stats = StepCounts(), SchedulerStats()
    counts.own.add("nodes_drafted", 5)
    counts.put(stats)
    front_end.observe(delivered(stats).perf_stats, engine_idx=1)
    labels = {"model_name": "smol", "engine": "1", "method": "token_recycling"}
    assert made == {"vllm_specplus_nodes_drafted": [(5.0, labels | {"ReplicaId": "r1"})]}


def test_the_number_of_series_does_not_depend_on_what_is_served():
    """A thousand replicas are a thousand times as many series, and no more."""
    registry = CollectorRegistry()

    class Apart(CountingPerfMetrics):
        def _counter_cls(self, **fields):
            return Counter(registry=registry, **fields)

    def series() -> set[tuple[str, ...]]:
        samples = (sample for family in registry.collect() for sample in family.samples)
        return {(s.name, *sorted(s.labels.items())) for s in samples if s.name.endswith("_total")}

    front_end, counts = Apart(config(), LABELS, ENGINES), StepCounts()
    before = series()
    ours = {each for each in before if each[0].startswith("vllm:specplus_")}
    assert len(ours) == len(ENGINES) * len(COUNTERS)
    for step in range(50):
        for name in COUNTERS:
            counts.own.add(name, step + 1)
        stats = SchedulerStats()
        counts.put(stats)
        front_end.observe(delivered(stats).perf_stats, engine_idx=step % 2)
    assert series() == before


def test_vllms_own_performance_counters_stay(shown):
    """Both ways: ours are added to its statistics, and it counts as if ours were not there."""
    from vllm.v1.metrics.stats import SchedulerStats

    counts = StepCounts()
    counts.own.add("memory_guard_trims", 4)
    debug = DebugPerfStats(context_breakdown={"decode": 9})
    stats = SchedulerStats(perf_stats=PerfStats(num_flops_per_gpu=7, debug_stats=debug))
    counts.put(stats)
    front_end, value = shown()
    arrived = delivered(stats).perf_stats
    front_end.observe(arrived, 0)
    assert arrived.debug_stats.context_breakdown["decode"] == 9
    labels = {"model_name": "smol", "engine": "0"}
    assert value("vllm:estimated_flops_per_gpu_total", labels) == 7
    ours = labels | {"method": "token_recycling"}
    assert value("vllm:specplus_memory_guard_trims_total", ours) == 4


def test_an_engine_without_a_method_of_ours_has_no_counter_of_ours(shown):

    front_end, value = shown(ours=False)
    front_end.observe(PerfStats(num_flops_per_gpu=3), 0)
    labels = {"model_name": "smol", "engine": "0"}
    assert value("vllm:estimated_flops_per_gpu_total", labels) == 3
    assert not front_end._counters


def test_output_without_requests_is_left_alone():
    """It is one object for all steps and engines of a process."""
    from vllm_specplus.engine.counts import hand_over

    hand_over(EMPTY_MODEL_RUNNER_OUTPUT, Counters())
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, COUNTS)
    assert hand_over(None, Counters()) is None


def samples(url: str) -> dict[str, dict[str, float]]:
    """Counters of speculation by name, and then by engine."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "spec" in sample.name and "model_name" in sample.labels:
                engine = found.setdefault(sample.name, {})
                index = sample.labels["engine"]
                engine[index] = engine.get(index, 0.0) + sample.value
    return found


def ask(url: str, prompt: list[int]) -> None:
    """On a connection of its own: the kernel deals them out to the front ends."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 96, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body | {"ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=600) as answer:
        assert answer.status == 200


@pytest.mark.engine
@pytest.mark.full(
    "vllm_specplus/metrics.py", "vllm_specplus/engine/counts.py",
    "vllm_specplus/engine/scheduler.py",
)  # fmt: skip
def test_our_counters_are_vllms(tiny_model, tmp_path):
    """With two front ends and two engines at once, which holds for either alone: engine by engine,
    at every front end."""
    servers = engines = 2
    spec = {"method": "token_recycling", "num_speculative_tokens": 6}
    command = vllm_serve(
        tiny_model, "--served-model-name", "tiny", "--skip-tokenizer-init", "--dtype", "float32",
        "--kv-cache-memory-bytes", str(1 << 24), "--max-num-seqs", "4",
        "--api-server-count", str(servers), "--data-parallel-size", str(engines),
        "--speculative-config", json.dumps(spec | {"control": {"policy": "fixed"}}),
    )  # fmt: skip
    with serving(command, tmp_path / "log") as url:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda i: ask(url, [5, 7, 3 + i % 2, 9]), range(12)))
        scrapes = [samples(url) for _ in range(4)]
    for scrape in scrapes:
        assert scrape == scrapes[0]  # whichever front end answers
        drafted = scrape["vllm:specplus_nodes_drafted_total"]
        accepted = scrape["vllm:specplus_nodes_accepted_total"]
        assert drafted == scrape["vllm:spec_decode_num_draft_tokens_total"]
        assert accepted == scrape["vllm:spec_decode_num_accepted_tokens_total"]
        assert set(drafted) == {str(i) for i in range(engines)}
        assert all(0 < accepted[i] < drafted[i] for i in drafted)
        steps, tokens = (
            scrape[f"vllm:specplus_{x}_total"] for x in ("request_steps", "output_tokens")
        )
        assert tokens == {i: steps[i] + accepted[i] for i in steps}
        assert 12 * 95 <= sum(tokens.values()) <= 12 * (95 + 6)
