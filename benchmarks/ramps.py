"""Load that steps and load that comes in bursts: does anybody wait longer than undrafted meanwhile?

    python benchmarks/ramps.py --model DIR --dataset question.jsonl [--methods token_recycling]
        [--steps 1,32,1] [--seconds 20] [--rate 4] [--max-tokens 40] --json OUT

Every method's engine, one at a time, gets the same requests at the same times: first so many in
flight as ``--steps`` says, each for ``--seconds``, then bursts at ``--rate`` per second on average
(Gamma arrivals, shape 0.25). Of every request is written down when it ended and its time per token
behind the first one. p99 of these over the requests that end within windows of 10 seconds is
compared with that of no speculation in the same window; ``none`` is run before and after, so that
its own spread is known.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
from one_engine import ask_each, by_label, save

from vllm_specplus.bench.dataset import load_dataset, pick
from vllm_specplus.bench.engine import Engine, configure_process
from vllm_specplus.bench.methods import parse_engine_args
from vllm_specplus.bench.protocol import EngineSetup

WINDOW_S = 10.0
SHAPE = 0.25
#: Requests that a window is told from.
FEWEST = 20


class Driver:
    """Feeds an engine and writes down (end, seconds per token) of every request."""

    def __init__(self, engine: Engine, names: list[str], max_tokens: int):
        self._engine, self._loop = engine, engine.llm.llm_engine
        self._names, self._max_tokens = deque(names), max_tokens
        self._made: dict[str, list] = {}
        """When a request's first tokens came, and how many have come since."""
        self._start = time.perf_counter()
        self.requests: list[tuple[float, float]] = []
        self.running = 0

    def now(self) -> float:
        return time.perf_counter() - self._start

    def submit(self) -> None:
        name = self._names.popleft()
        job = self._engine._job(name, self._engine.prompts[name], self._max_tokens)
        self._loop.add_request(*job)
        self.running += 1

    def step(self) -> None:
        for output in self._loop.step():
            now, name = self.now(), output.request_id
            made = self._made.setdefault(name, [now, -len(output.outputs[0].token_ids)])
            made[1] += len(output.outputs[0].token_ids)
            if output.finished:  # the same question may come again
                first, tokens = self._made.pop(name)
                if tokens:
                    self.requests.append((now, (now - first) / tokens))
                self.running -= 1

    def steps(self, levels: list[int], seconds: float) -> None:
        for number, level in enumerate(levels):
            while self.now() < (number + 1) * seconds:
                while self.running < level:
                    self.submit()
                self.step()
        while self.running:
            self.step()

    def bursts(self, arrivals: np.ndarray) -> None:
        due = deque((self.now() + arrivals).tolist())
        while due or self.running:
            while due and due[0] <= self.now():
                due.popleft()
                self.submit()
            if self.running:
                self.step()
            else:
                time.sleep(min(max(due[0] - self.now(), 0.0), 0.05))


def measure(args: argparse.Namespace, config: dict | None) -> dict:
    configure_process()
    levels = [int(n) for n in args.steps.split(",")]
    measured, warmup = pick(load_dataset(args.dataset).questions, args.limit)
    setup = EngineSetup(
        model=args.model, speculative_config=config, engine_args=parse_engine_args(args.engine_arg),
        measured=measured, warmup=warmup, concurrency=4, max_tokens=args.max_tokens,
        temperature=0, seed=0, chat_template=True,
    )  # fmt: skip
    engine = Engine(setup)
    engine.warm_up()
    names = [question.id for question in measured]
    rng = np.random.default_rng(0)
    gaps = rng.gamma(SHAPE, 1 / (SHAPE * args.rate), int(args.rate * 3 * args.seconds))
    found = {}
    for kind in ("steps", "bursts"):
        engine.llm.reset_prefix_cache()
        driver = Driver(engine, names * 3, args.max_tokens)
        if kind == "steps":
            driver.steps(levels, args.seconds)
        else:
            driver.bursts(np.cumsum(gaps))
        found[kind] = driver.requests
    return found


def windows(requests: list[tuple[float, float]]) -> dict[int, tuple[int, float]]:
    """Requests that ended and their p99 milliseconds per token, of every window."""
    times = np.array(requests)
    number = (times[:, 0] // WINDOW_S).astype(int)
    return {
        int(n): (int((number == n).sum()), float(1e3 * np.percentile(times[number == n, 1], 99)))
        for n in np.unique(number)
    }


def compare(found: dict[str, dict]) -> Iterator[dict]:
    """Every window of all runs but the first, which is of none, beside its own."""
    seen = {
        name: {kind: windows(requests) for kind, requests in runs.items()}
        for name, runs in found.items()
    }
    for kind, method in itertools.product(("steps", "bursts"), list(seen)[1:]):
        for number, (count, p99) in seen[method][kind].items():
            few, plain = seen["none"][kind].get(number, (0, 0.0))
            if min(few, count) >= FEWEST:
                yield {
                    "load": kind, "method": method, "from_s": number * WINDOW_S,
                    "requests": count, "none_requests": few, "p99_ms": p99, "none_p99_ms": plain,
                    "ratio": p99 / plain,
                }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--methods", default="token_recycling")
    parser.add_argument("--steps", default="1,32,1")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=4.0)
    parser.add_argument("--limit", type=int, default=400)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--engine-arg", action="append", default=[])
    args, found, about = ask_each(
        parser, lambda args: by_label(f"none,{args.methods},none"), measure
    )
    table = list(compare(found))
    again = {(w["load"], w["from_s"]): w["p99_ms"] for w in table if w["method"] == "none again"}
    for line in table:
        # None where too few requests of the second engine ended.
        of_again = again.get((line["load"], line["from_s"]))
        line["ratio_to_again"] = of_again and line["p99_ms"] / of_again
        print(line)
    save(args.json, about | {"windows": table})


if __name__ == "__main__":
    main()
