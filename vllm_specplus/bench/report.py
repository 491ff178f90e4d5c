"""What the sessions of a benchmark amount to: the numbers of the table and of the JSON file.

Throughput is the median over rounds (of all repeats), with the smallest and the largest: one
disturbed round does not move a median. Ratios are medians too, of the ratios *within* rounds: two
methods answer the same questions in a round and, on the CPU platform, in turns of some seconds,
so that what varies between rounds cancels out. A ratio is therefore not exactly the quotient of
two medians. Its interval is the bootstrap's over the rounds: 95 % of the medians of as many rounds,
drawn with replacement, are in it. A ratio whose interval has 1 inside is noise until more rounds
say otherwise.
"""

import os
import platform
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import psutil
from pydantic import BaseModel

from vllm_specplus import __version__
from vllm_specplus.bench.dataset import first_turn
from vllm_specplus.bench.loads import Load
from vllm_specplus.bench.methods import BASELINE, MethodSpec
from vllm_specplus.bench.protocol import DraftCounters, MachineInfo, RequestResult
from vllm_specplus.bench.runner import Failure, Session, describe_machine, find_differences
from vllm_specplus.bench.tails import Tails, compare

#: Of a bootstrap: resamples, and values below which there is none.
RESAMPLES, FEWEST = 2000, 3

Origin = Literal["baseline", "vllm", "specplus"]


class RoundReport(BaseModel):
    """One round: generated tokens, wall-clock seconds, and the ratio to `none` in this round.

    `other_cpu_share`: share of all the machine's cores that other processes kept busy meanwhile.
    """

    repeat: int
    round: int
    tokens: int
    wall_s: float
    tokens_per_s: float
    ratio_vs_none: float | None
    other_cpu_share: float


class DifferenceReport(BaseModel):
    """An answer that is not the baseline's.

    `position` is the index of the first token that differs; `margin_nats` is by how much the
    baseline's model preferred its best next token there, log p(best) - log p(second best). Close
    to 0 it is a tie, decided by rounding errors.
    """

    question_id: str
    repeat: int
    position: int
    margin_nats: float | None


class AnswerReport(BaseModel):
    """One request: what all other numbers are computed from. Times are in milliseconds."""

    question_id: str
    repeat: int
    round: int
    tokens: int
    steps: int
    ttft_ms: float
    tpot_ms: float | None
    latency_ms: float | None


class Percentiles(BaseModel):
    """Of all requests, in milliseconds."""

    p50: float
    p95: float
    p99: float


class Objectives(BaseModel):
    """What a request is to keep, in milliseconds; None: nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def kept_by(self, answer: AnswerReport) -> bool:
        """Whether a request keeps all of them."""
        pairs = ((answer.ttft_ms, self.ttft_ms), (answer.tpot_ms, self.tpot_ms))
        return all(most is None or value is None or value <= most for value, most in pairs)


class RunReport(BaseModel):
    """One method at one load, over all repeats and rounds.

    `concurrency` requests were in flight, or `rate` of them came per second.
    `ratio_vs_none_interval`: see the module; None with fewer than three rounds.
    `ttft_vs_none`, `tpot_vs_none`: how the percentiles compare with those of `none`, over the
    requests of both; None of fewer than a hundred.
    `slo_attainment`: share of the requests that kept the objectives, None where there are none.
    `tokens_per_step`: generated tokens after the first output, per engine step and request.
    `drafted_per_draft`, `acceptance_per_depth`: vLLM's own counters. They leave out steps without
    a draft; the k-th acceptance is the share of drafts of which at least k tokens were accepted.
    `identical_share`: answers with exactly the baseline's tokens, None for the baseline itself
    and for sampled answers.
    `nats_below_best`: how far below the model's best token those of the answers are, in nats on
    average; of methods with a lossy acceptance rule and of `none`, to compare.
    `peak_rss_bytes`: memory of the engine's processes (on the CPU platform the weights and the
    KV cache used so far). `gpu_bytes`: all memory in use on the engine's GPUs.
    `startup_s`: median seconds to build the engine, compilation included if it was not cached.
    """

    method: str
    origin: Origin
    speculative_config: dict[str, Any] | None
    concurrency: int | None
    rate: float | None = None
    burstiness: float = 1.0
    requests: int
    tokens: int
    tokens_per_s: float
    tokens_per_s_min: float
    tokens_per_s_max: float
    ratio_vs_none: float | None
    ratio_vs_none_min: float | None
    ratio_vs_none_max: float | None
    ratio_vs_none_interval: tuple[float, float] | None = None
    ratio_vs_best_native: float | None
    best_native: str | None
    tokens_per_step: float | None
    tokens_per_step_by_category: dict[str, float | None]
    drafted_per_draft: float | None
    acceptance_per_depth: list[float] | None
    identical_share: float | None
    nats_below_best: float | None = None
    differences: list[DifferenceReport]
    ttft_ms_median: float
    ttft_ms_p99: float
    tpot_ms_median: float | None
    tpot_ms_p99: float | None
    ttft_ms: Percentiles | None = None
    tpot_ms: Percentiles | None = None
    latency_ms: Percentiles | None = None
    ttft_vs_none: Tails | None = None
    tpot_vs_none: Tails | None = None
    slo_attainment: float | None = None
    peak_rss_bytes: int
    gpu_bytes: int | None
    startup_s: float
    rounds: list[RoundReport]
    answers: list[AnswerReport] = []

    @property
    def load(self) -> Load:
        """How its requests came."""
        return Load(in_flight=self.concurrency, rate=self.rate, burstiness=self.burstiness)


class FailureReport(BaseModel):
    """A method that failed: while it started, was measured, or gave the margins of ties."""

    method: str
    load: str
    stage: str
    error: str
    log: str


class ReportHead(BaseModel):
    """What was run, where and how; the head of every JSON file."""

    model: str
    versions: dict[str, str]
    machine: dict[str, Any]
    command: str
    settings: dict[str, Any]

    def save(self, path: Path) -> None:
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


class BenchReport(ReportHead):
    """The JSON file."""

    runs: list[RunReport]
    failures: list[FailureReport]


def build_runs(
    sessions: Sequence[Session],
    ours: Collection[str],
    categories: Mapping[str, str],
    temperature: float,
    objectives: Objectives | None = None,
) -> list[RunReport]:
    """Sum up the sessions per load and method, in the order of their first appearance.

    `ours` are the names of this plugin's methods; `categories` maps questions to categories.
    """
    groups: dict[Load, dict[str, list[Session]]] = defaultdict(lambda: defaultdict(list))
    for session in sessions:
        groups[session.load][session.method.label].append(session)

    runs = []
    for group in groups.values():
        speeds = {label: round_speeds(members) for label, members in group.items()}
        natives = [
            label for label, members in group.items() if origin(members[0].method, ours) == "vllm"
        ]
        best_native = max(natives, key=lambda label: median(speeds[label].values()), default=None)
        for label, members in group.items():
            runs.append(
                _build_run(
                    members,
                    origin=origin(members[0].method, ours),
                    ratios=paired_ratios(speeds[label], speeds.get(BASELINE)),
                    best_native=best_native,
                    native_ratios=paired_ratios(speeds[label], speeds.get(best_native)),
                    baseline=group.get(BASELINE, []),
                    categories=categories,
                    temperature=temperature,
                    objectives=objectives or Objectives(),
                )
            )
    return runs


def origin(method: MethodSpec, ours: Collection[str]) -> Origin:
    """Who provides a method."""
    if method.name == BASELINE:
        return "baseline"
    return "specplus" if method.name in ours else "vllm"


RoundKey = tuple[int, int]


def round_speeds(sessions: Iterable[Session]) -> dict[RoundKey, float]:
    """Tokens per second by repeat and round."""
    return {
        (session.repeat, number): count_tokens(result.requests) / result.wall_s
        for session in sessions
        for number, result in enumerate(session.rounds)
    }


def paired_ratios(
    speeds: Mapping[RoundKey, float], reference: Mapping[RoundKey, float] | None
) -> dict[RoundKey, float]:
    """Ratios within the rounds that both have; empty without a reference."""
    if reference is None:
        return {}
    return {key: speed / reference[key] for key, speed in speeds.items() if key in reference}


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the median; None of fewer than three values."""
    if len(values) < FEWEST:
        return None
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(np.asarray(values)[drawn], axis=1), [2.5, 97.5])
    return float(low), float(high)


def count_tokens(requests: Iterable[RequestResult]) -> int:
    """Tokens generated for the requests."""
    return sum(len(request.token_ids) for request in requests)


def tokens_per_step(requests: Iterable[RequestResult]) -> float | None:
    """Tokens after the first output per step that produced them; None if there were none.

    A quotient of sums: every step counts the same, however long its request is.
    """
    tokens = steps = 0
    for request in requests:
        tokens += len(request.token_ids) - request.first_tokens
        steps += request.steps
    return tokens / steps if steps else None


def nats_below_best(sessions: Iterable[Session]) -> float | None:
    """Of all scored answers together; None if there are none."""
    total = tokens = 0.0
    for session in sessions:
        for question_id, token_ids in session.answers().items():
            if question_id in session.scores:
                total += len(token_ids) * session.scores[question_id]
                tokens += len(token_ids)
    return total / tokens if tokens else None


def acceptance_per_depth(counters: Sequence[DraftCounters]) -> list[float] | None:
    """Share of the drafts that were accepted down to each depth."""
    drafts = sum(item.drafts for item in counters)
    if not drafts:
        return None
    depths = zip(*(item.accepted_per_depth for item in counters), strict=True)
    return [sum(accepted) / drafts for accepted in depths]


def _build_run(
    sessions: Sequence[Session],
    *,
    origin: Origin,
    ratios: Mapping[RoundKey, float],
    best_native: str | None,
    native_ratios: Mapping[RoundKey, float],
    baseline: Sequence[Session],
    categories: Mapping[str, str],
    temperature: float,
    objectives: Objectives,
) -> RunReport:
    """Sum up the ``sessions`` of one method at one load."""
    results = [result for session in sessions for result in session.rounds]
    requests = [request for result in results for request in result.requests]
    counters = [result.drafts for result in results if result.drafts is not None]
    drafts = sum(item.drafts for item in counters)
    gpu = [result.gpu_bytes for result in results if result.gpu_bytes is not None]
    speeds = round_speeds(sessions)
    identical_share, differences = _compare(sessions, baseline, origin, temperature)
    load, answers = sessions[0].load, _answers(sessions)
    kept = [objectives.kept_by(answer) for answer in answers]

    return RunReport(
        method=sessions[0].method.label,
        origin=origin,
        speculative_config=sessions[0].method.speculative_config,
        concurrency=load.in_flight,
        rate=load.rate,
        burstiness=load.burstiness,
        requests=len(requests),
        tokens=count_tokens(requests),
        tokens_per_s=median(speeds.values()),
        tokens_per_s_min=min(speeds.values()),
        tokens_per_s_max=max(speeds.values()),
        ratio_vs_none=median(ratios.values()) if ratios else None,
        ratio_vs_none_min=min(ratios.values(), default=None),
        ratio_vs_none_max=max(ratios.values(), default=None),
        ratio_vs_none_interval=bootstrap_interval(list(ratios.values())),
        ratio_vs_best_native=median(native_ratios.values()) if native_ratios else None,
        best_native=best_native,
        tokens_per_step=tokens_per_step(requests),
        tokens_per_step_by_category=_by_category(requests, categories),
        drafted_per_draft=sum(item.draft_tokens for item in counters) / drafts if drafts else None,
        acceptance_per_depth=acceptance_per_depth(counters),
        identical_share=identical_share,
        nats_below_best=nats_below_best(sessions),
        differences=differences,
        **_latencies(answers),
        **_tails(answers, _answers(baseline)),
        slo_attainment=sum(kept) / len(kept) if objectives != Objectives() else None,
        peak_rss_bytes=max(result.peak_rss_bytes for result in results),
        gpu_bytes=max(gpu, default=None),
        startup_s=median(session.startup_s for session in sessions),
        rounds=_rounds(sessions, speeds, ratios),
        answers=answers,
    )


def _by_category(
    requests: Iterable[RequestResult], categories: Mapping[str, str]
) -> dict[str, float | None]:
    groups: dict[str, list[RequestResult]] = defaultdict(list)
    for request in requests:
        groups[categories[first_turn(request.question_id)]].append(request)
    return {category: tokens_per_step(members) for category, members in groups.items()}


def _answers(sessions: Iterable[Session]) -> list[AnswerReport]:
    return [
        AnswerReport(
            question_id=request.question_id,
            repeat=session.repeat + 1,
            round=number + 1,
            tokens=len(request.token_ids),
            steps=request.steps,
            ttft_ms=1e3 * request.ttft_s,
            tpot_ms=None if request.tpot_s is None else 1e3 * request.tpot_s,
            latency_ms=None if request.latency_s is None else 1e3 * request.latency_s,
        )
        for session in sessions
        for number, result in enumerate(session.rounds)
        for request in result.requests
    ]


def _latencies(answers: Sequence[AnswerReport]) -> dict[str, Any]:
    """The latency fields of a report."""
    found: dict[str, Any] = {}
    for name in ("ttft_ms", "tpot_ms", "latency_ms"):
        values = [value for answer in answers if (value := getattr(answer, name)) is not None]
        found[name] = percentiles(values) if values else None
    ttft, tpot = found["ttft_ms"], found["tpot_ms"]
    return found | {
        "ttft_ms_median": ttft.p50,
        "ttft_ms_p99": ttft.p99,
        "tpot_ms_median": tpot and tpot.p50,
        "tpot_ms_p99": tpot and tpot.p99,
    }


def _tails(answers: Sequence[AnswerReport], baseline: Sequence[AnswerReport]) -> dict[str, Any]:
    """The fields that compare percentiles with the baseline's."""

    def times(of: Sequence[AnswerReport], name: str) -> dict[tuple[int, str], float]:
        return {
            (answer.repeat, answer.question_id): value
            for answer in of
            if (value := getattr(answer, name)) is not None
        }

    return {
        f"{name}_vs_none": compare(times(answers, f"{name}_ms"), times(baseline, f"{name}_ms"))
        for name in ("ttft", "tpot")
    }


def _rounds(
    sessions: Iterable[Session],
    speeds: Mapping[RoundKey, float],
    ratios: Mapping[RoundKey, float],
) -> list[RoundReport]:
    return [
        RoundReport(
            repeat=session.repeat + 1,
            round=number + 1,
            tokens=count_tokens(result.requests),
            wall_s=result.wall_s,
            tokens_per_s=speeds[session.repeat, number],
            ratio_vs_none=ratios.get((session.repeat, number)),
            other_cpu_share=result.other_cpu_share,
        )
        for session in sessions
        for number, result in enumerate(session.rounds)
    ]


def percentiles(values: Sequence[float]) -> Percentiles:
    """What half, 95 % and 99 % of the values do not exceed, linearly interpolated."""
    half, most, nearly_all = np.percentile(values, [50, 95, 99]).tolist()
    return Percentiles(p50=half, p95=most, p99=nearly_all)


def _compare(
    sessions: Sequence[Session],
    baseline: Sequence[Session],
    origin: Origin,
    temperature: float,
) -> tuple[float | None, list[DifferenceReport]]:
    """Share of the answers that equal the baseline's of the same repeat, and the others."""
    if origin == "baseline" or temperature > 0:
        return None, []
    references = {session.repeat: session for session in baseline}
    compared = 0
    differences = []
    for session in sessions:
        reference = references.get(session.repeat)
        if reference is None:
            continue
        compared += len(session.answers())
        differences += [
            DifferenceReport(
                question_id=prefix.question_id,
                repeat=session.repeat + 1,
                position=len(prefix.token_ids),
                margin_nats=session.margins.get(prefix.question_id),
            )
            for _, prefix in find_differences([reference, session], temperature)
        ]
    if not compared:
        return None, []
    return 1 - len(differences) / compared, differences


def build_failures(failures: Iterable[Failure]) -> list[FailureReport]:
    """The failures as they go into the JSON file."""
    return [
        FailureReport(
            method=failure.method.label,
            load=str(failure.load),
            stage=failure.stage,
            error=failure.error,
            log=str(failure.log),
        )
        for failure in failures
    ]


def describe_run(log: Path) -> dict[str, Any]:
    """What every report of ``benchmarks/`` states: command, versions and machine.

    ``log``: file for what the process that looks at the machine prints.
    """
    machine = describe_machine(log)
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": describe_versions(machine),
        "machine": describe_hardware(machine),
    }


def describe_versions(machine: MachineInfo) -> dict[str, str]:
    """Versions of everything that matters for the numbers; of a checkout its commit too."""
    commit = checked_out()
    return {
        **machine.versions,
        "vllm_specplus": __version__,
        **({"commit": commit} if commit else {}),
        "python": platform.python_version(),
    }


def checked_out() -> str | None:
    """The commit of the code, with a plus sign where files differ from it; None of a wheel."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    git = ["git", "-C", str(root)]
    try:
        commit, changes = (
            subprocess.run([*git, *what], check=True, capture_output=True, text=True).stdout.strip()
            for what in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + "+" * bool(changes)


def describe_hardware(machine: MachineInfo) -> dict[str, Any]:
    """The machine that measured."""
    return {
        "device_type": machine.device_type,
        "device_name": machine.device_name,
        "cpu_model": cpu_model(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "threads": machine.threads,
    }


def cpu_model() -> str:
    """The processor's name as the kernel knows it, or else its architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
