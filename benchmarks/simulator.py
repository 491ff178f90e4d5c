"""Replay of recorded texts against a table of step times: policies compared without an engine.

A discrete-event simulation of a serving engine. It runs the product's own proposer
(``--speculative-config``; Token Recycling if not given) and controller; what it replaces is
the target model, by

* texts that a real engine produced, with the most probable next ids of every row it
  verified (``record_traces.py`` writes them), and
* a table of measured step times by (requests in the batch, verified rows).

Simulated time is all there is: nothing here depends on how fast the simulation runs.

    python benchmarks/simulator.py --traces benchmarks/data/traces_smollm2.npz \
        --steps benchmarks/data/step_times_cpu.json [--loads 1,2,4,...] \
        [--requests 240] [--speculative-config JSON] [--json OUT] [--plot OUT]

It prints, for every number of requests in flight, tokens/s of no speculation, of fixed
budgets, and of the controller with each objective, where "throughput" stands against the best
fixed budget of that load, and percentiles of the time per token over the requests.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from vllm_specplus.config import MethodConfig, parse
from vllm_specplus.control.acceptance import label_nodes
from vllm_specplus.control.controller import Controller
from vllm_specplus.control.cost import CostCurve, CostProfile, StepCost, StepShape
from vllm_specplus.control.settings import FixedControl, GoodputControl
from vllm_specplus.metrics import Counters
from vllm_specplus.proposer import Proposer, Services
from vllm_specplus.registry import method_class
from vllm_specplus.step import Observation, StepContext
from vllm_specplus.tree import DraftBatch


@dataclass(frozen=True)
class Trace:
    """One request as a real engine answered it."""

    prompt: np.ndarray
    """int32 [P] token ids."""
    output: np.ndarray
    """int32 [T] token ids."""
    prompt_top_ids: np.ndarray
    """int32 [P, k] most probable next ids after each prompt token."""
    row_at: np.ndarray
    """int32 [L] output tokens known when the row below was verified."""
    row_tokens: np.ndarray
    row_previous: np.ndarray
    row_accepted: np.ndarray
    row_top_ids: np.ndarray
    """Rows the engine verified, rejected ones too: int32 [L], [L], bool [L], int32 [L, k]."""

    @cached_property
    def text_rows(self) -> tuple[np.ndarray, np.ndarray]:
        """The rows that are its text, int64 [M], and of each how many output tokens are known once
        it is verified, int64 [M]: by a step of the recorded engine several, one below the other."""
        rows = np.flatnonzero(self.row_accepted)
        at = self.row_at[rows]
        return rows, at + 1 + np.arange(len(rows)) - np.searchsorted(at, at)

    def rejected(self, known: int, tokens: np.ndarray, previous: np.ndarray) -> np.ndarray:
        """The rows int64 that the recorded engine rejected where ``known`` output tokens are known,
        of those of ``tokens`` int [N] behind ``previous`` int [N]."""
        step = self.row_at[np.searchsorted(self.row_at, known, side="right") - 1]
        first, end = np.searchsorted(self.row_at, (step, step + 1))
        pairs = _pairs(self.row_previous[first:end], self.row_tokens[first:end])
        drafted = np.isin(pairs, _pairs(previous, tokens))
        return first + np.flatnonzero(drafted & ~self.row_accepted[first:end])


def vocab_size(traces: Sequence[Trace]) -> int:
    """One more than the largest id in them."""
    return 1 + max(int(ids.max()) for t in traces for ids in (t.prompt, t.output, t.row_top_ids))


def _pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pairs of ids as one number each, int64."""
    return (first.astype(np.int64) << 32) + second


def load_traces(path: Path) -> list[Trace]:
    """Read what ``record_traces.py`` wrote (NumPy arrays only, no pickle)."""
    with np.load(path, allow_pickle=False) as data:
        count = int(data["count"])
        names = list(Trace.__dataclass_fields__)
        return [Trace(*(data[f"{name}_{i}"] for name in names)) for i in range(count)]


@dataclass(frozen=True)
class StepTimes:
    """Measured seconds of a step, on a grid of requests and drafted nodes per request."""

    requests: np.ndarray
    """int64 [A] ascending."""
    nodes: np.ndarray
    """float64 [B] nodes per request, ascending, from 0."""
    seconds: np.ndarray
    """float64 [A, B]."""
    prompt_row: float
    """Seconds that each row of a prompt in the same step adds."""

    @classmethod
    def load(cls, path: Path) -> StepTimes:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        requests, nodes, seconds = (
            np.array(content[name], float) for name in ("requests", "nodes", "seconds")
        )
        # Large batches are not measured at the largest trees: their rows exceed the cap.
        for line in seconds:
            for j in np.flatnonzero(np.isnan(line)):
                slope = (line[j - 1] - line[j - 2]) / (nodes[j - 1] - nodes[j - 2])
                line[j] = line[j - 1] + slope * (nodes[j] - nodes[j - 1])
        return cls(requests, nodes, seconds, float(content["prompt_row_seconds"]))

    def __call__(self, requests: int, rows: int, prompt_rows: int) -> float:
        """Bilinear in (requests, nodes per request); linear beyond the last request count."""
        per_request = (rows - requests) / requests
        column = [np.interp(per_request, self.nodes, line) for line in self.seconds]
        beyond = per_request - self.nodes[-1]
        if beyond > 0:
            slopes = (self.seconds[:, -1] - self.seconds[:, -2]) / (self.nodes[-1] - self.nodes[-2])
            column = column + beyond * slopes
        known = float(np.interp(requests, self.requests, column))
        past = requests - self.requests[-1]
        if past > 0:
            rise = (column[-1] - column[-2]) / (self.requests[-1] - self.requests[-2])
            known += past * rise
        return known + self.prompt_row * prompt_rows

    def profile(self) -> CostProfile:
        """What the profile at start would have measured: row counts at one request."""
        return CostProfile(CostCurve(1 + self.nodes.astype(np.int64), self.seconds[0]))


NOTHING = np.empty(0, np.int64)


@dataclass
class Running:
    """A request in the simulated batch."""

    name: str
    trace: Trace
    row: int
    started: float = 0.0
    read: int = 0
    """Tokens of its prompt that are read."""
    produced: int = 0
    shown: int = 0
    """Rows of its text shown to the proposer."""
    rejected: np.ndarray = field(default_factory=lambda: NOTHING)
    """Rows int64 that its last step rejected."""
    steps: int = 0
    """After its first token."""
    seconds: np.ndarray = field(default_factory=lambda: np.zeros(3))
    """float64 [3] of these: what they would have taken undrafted and without prompts, what
    others' prompts added, and what drafts did."""


@dataclass
class Result:
    """What a simulated run measured."""

    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    request_steps: int = 0
    nodes: list[int] = field(default_factory=list)
    """Verified nodes of every step."""
    batches: list[int] = field(default_factory=list)
    seconds_per_token: list[float] = field(default_factory=list)
    """Of every finished request, after its first token."""
    finished: list[Running] = field(default_factory=list)
    """Those requests."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        return self.tokens / self.request_steps


Policy = Callable[[Proposer, StepTimes], Controller | None]


def fixed(nodes: int) -> Policy:
    """Always that many nodes; 0 decodes plainly."""

    def make(proposer: Proposer, times: StepTimes) -> Controller | None:
        if not nodes:
            return None
        control = FixedControl(policy="fixed")
        return Controller(control, proposer.sources, nodes, 1 << 20, Counters())

    return make


def goodput(max_nodes: int = 32, **control) -> Policy:
    """The default policy, with these keys of ``control``; it starts from the profile of single
    requests and learns."""

    def make(proposer: Proposer, times: StepTimes) -> Controller:
        controller = Controller(
            GoodputControl(**control), proposer.sources, max_nodes, 1 << 20, Counters()
        )  # fmt: skip
        controller.cost = StepCost(times.profile())
        return controller

    return make


#: The objectives "throughput" and "latency" of the controller, among the policies.
OURS = ("goodput", "latency")

#: What is simulated if nothing is said: as many nodes as any policy asks for.
DEFAULT = parse({"method": "token_recycling", "num_speculative_tokens": 80})


class Simulator:
    """One engine. ``noise``: relative standard deviation of a step's time; ``step_tokens``: rows
    that a step may have, prompts being read in parts beyond it (vLLM's
    ``max_num_batched_tokens``)."""

    def __init__(
        self,
        times: StepTimes,
        policy: Policy,
        vocab_size: int,
        max_batch: int,
        max_len: int,
        noise: float = 0.05,
        seed: int = 0,
        config: MethodConfig = DEFAULT,
        step_tokens: int | None = None,
    ):
        self.step_tokens = step_tokens
        self.proposer = method_class(config.method)(config, Services(vocab_size))
        self.times = times
        self.controller = policy(self.proposer, times)
        self.texts = np.zeros((max_batch, max_len), np.int32)
        self.rng = np.random.default_rng(seed)
        self.noise = noise
        self.clock = 0.0
        self.running: list[Running] = []
        self.free = list(range(max_batch))
        self.drafts = DraftBatch.empty(0)
        self.result = Result()
        self._names = 0

    def admit(self, trace: Trace) -> None:
        """Start a request; its prompt is read from the next step on."""
        self._names += 1
        running = Running(f"request {self._names}", trace, self.free.pop())
        length = len(trace.prompt)
        self.texts[running.row, :length] = trace.prompt
        self.texts[running.row, length : length + len(trace.output)] = trace.output
        self.running.append(running)

    def step(self) -> list[Running]:
        """One engine step; returns the requests that finished in it."""
        result = self.result
        decoding = [r for r in self.running if r.produced]
        prompts, prompt_rows = self._read(len(decoding) + len(self.drafts.tokens))
        batch = [r for r in self.running if r.read]
        rows = len(batch) + len(self.drafts.tokens)
        tree = self.drafts.has_trees
        seconds = self.times(len(batch), rows, prompt_rows)
        plain = self.times(len(batch), len(batch), 0)
        reading = self.times.prompt_row * prompt_rows
        parts = np.array([plain, reading, seconds - plain - reading])
        seconds *= 1.0 + self.noise * float(self.rng.standard_normal())
        self.clock += max(seconds, 1e-6)

        accepted = self._accept(decoding)
        for r, more in zip(decoding, accepted, strict=True):
            result.tokens += min(more, len(r.trace.output) - r.produced)
            r.produced += more
            r.steps += 1
            r.seconds += parts
        for r in prompts:
            self._observe_prompt(r)
            r.produced, r.started = 1, self.clock
        context = sum(r.read + r.produced for r in batch)
        result.steps += 1
        result.request_steps += len(decoding)
        result.nodes.append(len(self.drafts.tokens))
        result.batches.append(len(batch))
        result.seconds = self.clock
        if self.controller is not None:
            shape = StepShape(len(batch), rows, context, prompt_rows, tree)
            self.controller.step_took(shape, seconds)

        finished = [r for r in self.running if r.produced >= len(r.trace.output)]
        for r in finished:
            if len(r.trace.output) > 1:
                result.seconds_per_token.append(
                    (self.clock - r.started) / (len(r.trace.output) - 1)
                )
                result.finished.append(r)
            self.free.append(r.row)
            self.proposer.forget(r.name)
            if self.controller is not None:
                self.controller.forget(r.name)
        self.running = [r for r in self.running if r.produced < len(r.trace.output)]
        self.drafts = self._draft()
        return finished

    def _read(self, rows: int) -> tuple[list[Running], int]:
        """Read prompts beside ``rows`` other rows: those that are read to their end by it, and how
        many rows that takes."""
        left = sys.maxsize if self.step_tokens is None else max(self.step_tokens - rows, 1)
        ended, prompt_rows = [], 0
        for r in self.running:
            part = min(len(r.trace.prompt) - r.read, left - prompt_rows)
            r.read += part
            prompt_rows += part
            if part and r.read == len(r.trace.prompt):
                ended.append(r)
        return ended, prompt_rows

    def _accept(self, decoding: list[Running]) -> list[int]:
        """Output tokens of each request: the drafted path that is in its text, plus one."""
        if not len(self.drafts.tokens):
            return [1] * len(decoding)
        out, start = [], 0
        for r, count in zip(decoding, self.drafts.counts.tolist(), strict=True):
            nodes = slice(start, start + count)
            start += count
            tokens, parents = self.drafts.tokens[nodes], self.drafts.parents[nodes]
            known = len(r.trace.prompt) + r.produced
            labels, depths = label_nodes(
                tokens, parents, self.texts[r.row], known,
                len(r.trace.prompt) + len(r.trace.output),
            )  # fmt: skip
            root = self.texts[r.row, known - 1]
            r.rejected = r.trace.rejected(
                r.produced, tokens, np.where(parents < 0, root, tokens[parents])
            )
            out.append(1 + int(depths[labels == 1].max(initial=0)))
        return out

    def _observe_prompt(self, r: Running) -> None:
        if not self.proposer.reads_prompt:
            return
        tokens = r.trace.prompt
        previous = np.concatenate(([-1], tokens[:-1])).astype(np.int32)
        kept = np.ones(len(tokens), bool)
        self.proposer.observe_prompt(
            Observation(tokens, previous, r.trace.prompt_top_ids, kept)
        )  # fmt: skip

    def _draft(self) -> DraftBatch:
        decoding = [r for r in self.running if r.produced]
        count = len(decoding)
        if self.controller is None or not decoding:
            return DraftBatch.empty(count)
        step = StepContext(
            request_ids=[r.name for r in decoding],
            token_ids=self.texts[[r.row for r in decoding]],
            num_tokens=np.array([len(r.trace.prompt) + r.produced for r in decoding], np.int32),
            max_nodes=np.full(count, self.controller.max_nodes, np.int32),
            chain_only=np.zeros(count, bool),
            observation=self._observe(decoding),
            num_prompt_tokens=np.array([len(r.trace.prompt) for r in decoding], np.int32),
        )
        self.controller.prepare(step)
        return self.controller.choose(step, self.proposer.propose(step))

    def _observe(self, decoding: list[Running]) -> Observation:
        """The rows that were verified since the last step: those of the texts, and of the rejected
        ones, those that the request's last tree had, too."""
        parts = []
        for r in decoding:
            rows, known = r.trace.text_rows
            end = int(np.searchsorted(known, r.produced, side="right"))
            parts.append((r.trace, np.concatenate((rows[r.shown : end], r.rejected))))
            r.shown, r.rejected = end, NOTHING
        return Observation(
            np.concatenate([t.row_tokens[rows] for t, rows in parts]),
            np.concatenate([t.row_previous[rows] for t, rows in parts]),
            np.concatenate([t.row_top_ids[rows] for t, rows in parts]),
            np.concatenate([t.row_accepted[rows] for t, rows in parts]),
        )


def closed_loop(simulator: Simulator, traces: Sequence[Trace], in_flight: int) -> Result:
    """``in_flight`` requests at all times, until all traces are answered."""
    waiting = iter(traces)
    for trace in _take(waiting, in_flight):
        simulator.admit(trace)
    while simulator.running:
        for _ in simulator.step():
            for trace in _take(waiting, 1):
                simulator.admit(trace)
    return simulator.result


def open_loop(simulator: Simulator, traces: Sequence[Trace], rate: float, seed: int = 0) -> Result:
    """Poisson arrivals, ``rate`` per second."""
    gaps = np.random.default_rng(seed).exponential(1.0 / rate, len(traces))
    arrivals = deque(zip(np.cumsum(gaps).tolist(), traces, strict=True))
    while arrivals or simulator.running:
        if not simulator.running:
            simulator.clock = max(simulator.clock, arrivals[0][0])
        while arrivals and arrivals[0][0] <= simulator.clock and simulator.free:
            simulator.admit(arrivals.popleft()[1])
        simulator.step()
    return simulator.result


def _take(items: Iterator[Trace], count: int) -> list[Trace]:
    return [trace for _, trace in zip(range(count), items, strict=False)]


def workload(traces: Sequence[Trace], in_flight: int) -> list[Trace]:
    """Enough requests to keep ``in_flight`` busy for most of the run."""
    repeats = -(-max(3 * in_flight, len(traces)) // len(traces))
    return (list(traces) * repeats)[: max(3 * in_flight, len(traces))]


def varied(
    traces: Sequence[Trace], count: int, seed: int, most_tokens: int | None = None
) -> list[Trace]:
    """So many requests whose answers, cut anywhere up to ``most_tokens``, do not end together: a
    prompt is read in one step or another all the time, as of a server. No text comes again before
    all others have come: what is drafted would be known from the first time."""
    rng = np.random.default_rng(seed)
    rounds = -(-count // len(traces))
    order = np.concatenate([rng.permutation(len(traces)) for _ in range(rounds)])[:count]
    picked = [traces[i] for i in order]
    return [
        replace(trace, output=trace.output[: _cut(len(trace.output), most_tokens, rng)])
        for trace in picked
    ]


def _cut(length: int, most: int | None, rng: np.random.Generator) -> int:
    length = min(length, most or length)
    return int(rng.integers(min(8, length), length + 1))


def parts_of(result: Result, share: float) -> dict[str, float]:
    """What the slowest ``share`` of the requests have in common: means over them, times in
    milliseconds per token."""
    order = np.argsort(result.seconds_per_token)[::-1]
    slow = [result.finished[i] for i in order[: max(round(share * len(order)), 1)]]
    tokens = np.array([len(r.trace.output) - 1.0 for r in slow])
    plain, prompts, drafts = 1000 * np.mean([r.seconds for r in slow] / tokens[:, None], axis=0)
    return {
        "tokens": float(tokens.mean()),
        "tokens_per_step": float(np.mean(tokens / [r.steps for r in slow])),
        "plain_ms": float(plain), "prompts_ms": float(prompts), "drafts_ms": float(drafts),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--steps", type=Path, required=True)
    parser.add_argument("--loads", default="1,2,4,8,16,32,64,128,256")
    parser.add_argument("--fixed", default="2,4,8,16")
    parser.add_argument("--requests", type=int, default=240)
    parser.add_argument("--most-tokens", type=int, help="Cut answers at 8 to so many tokens.")
    parser.add_argument("--speculative-config", type=json.loads)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    traces, times = load_traces(args.traces), StepTimes.load(args.steps)
    loads = [int(n) for n in args.loads.split(",")]
    policies: dict[str, Policy] = {"none": fixed(0)}
    policies |= {f"fixed {n}": fixed(int(n)) for n in args.fixed.split(",")}
    policies["goodput"] = goodput(objective="throughput")
    policies["latency"] = goodput(objective="latency")
    config = parse(args.speculative_config) if args.speculative_config else DEFAULT
    longest = max(len(t.prompt) + len(t.output) for t in traces)
    vocab = vocab_size(traces)
    table = []

    def workload_of(load: int) -> list[Trace]:
        return varied(traces, args.requests, load, args.most_tokens)

    for load in loads:
        row = {"in_flight": load}
        for name, policy in policies.items():
            simulator = Simulator(times, policy, vocab, load, longest + 1, config=config)
            result = closed_loop(simulator, workload_of(load), load)
            median, p95, p99 = np.percentile(result.seconds_per_token, (50, 95, 99)) * 1000
            row[name] = {
                "p50_tpot_ms": median,
                "p95_tpot_ms": p95,
                "p99_tpot_ms": p99,
                "all": parts_of(result, 1.0),
                "slowest": parts_of(result, 0.02),
                "tokens_per_second": result.tokens_per_second,
                "tokens_per_step": result.tokens_per_step,
                "nodes_per_request": sum(result.nodes) / max(result.request_steps, 1),
            }
        rates = {name: row[name]["tokens_per_second"] for name in policies}
        best = max((name for name in rates if name not in OURS), key=rates.get)
        row["goodput_vs_none"] = rates["goodput"] / rates["none"]
        row["goodput_vs_best_fixed"] = rates["goodput"] / rates[best]
        row["best_fixed"] = best
        row["latency_vs_none"] = rates["latency"] / rates["none"]
        for name in OURS:
            row[name]["p99_vs_none"] = row[name]["p99_tpot_ms"] / row["none"]["p99_tpot_ms"]
        table.append(row)
        print(
            f"{load:4} in flight: "
            + "  ".join(f"{name} {rate:6.1f}" for name, rate in rates.items())
            + f"  goodput {row['goodput_vs_none']:.2f}x none,"
            f" {row['goodput_vs_best_fixed']:.2f}x {best}; p99 "
            + ", ".join(f"{name} {row[name]['p99_vs_none']:.2f}x" for name in OURS),
            flush=True,
        )
    if args.json:
        args.json.write_text(
            json.dumps(
                {"command": " ".join(sys.argv), "requests": args.requests, "loads": table}, indent=1
            )
            + "\n"
        )
    if args.plot:
        plot(table, list(policies), args.plot)


def plot(table: list[dict], policies: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    loads = [row["in_flight"] for row in table]
    figure, axes = plt.subplots(figsize=(7, 4))
    for name in policies:
        ratios = [
            row[name]["tokens_per_second"] / row["none"]["tokens_per_second"] for row in table
        ]
        style = {"linewidth": 2.5, "marker": "o"} if name in OURS else {"linestyle": "--"}
        axes.plot(loads, ratios, label=name, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [str(n) for n in loads])
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("tokens/s, relative to no speculation")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
