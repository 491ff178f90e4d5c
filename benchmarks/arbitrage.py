"""Accuracy against latency of step-level speculation, beside what it has to beat.

    python benchmarks/arbitrage.py --draft URL_OR_DIR --target URL_OR_DIR --router URL_OR_DIR
        --questions questions.jsonl --json OUT [--limit 200] [--thresholds 0.1,0.3,0.5,0.7,0.9]

Every question is answered one at a time by every policy, in an order that turns with the questions,
each time with a cache salt of its own, so that nobody reads what another has cached:

* ``draft``, ``target``: one model alone, step by step;
* ``router`` at each threshold;
* ``random``: as many steps escalated as by the router at each threshold, drawn;
* ``rsd``: a step is escalated where the reward of the draft's is low (reward-guided speculation);
* ``oracle``: the target writes every step, unseen, and is taken where its reward is higher, at all
  such steps or at a share of them. The time of what is not taken does not count.

Seconds are those that the steps of an answer waited for draft, router and target. Questions are
those of ``bench/arithmetic.py``, whose check is also the reward.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from one_engine import save

from vllm_specplus.arbitrage.arbiter import Arbiter, Limits
from vllm_specplus.arbitrage.build import Named, arbiter
from vllm_specplus.arbitrage.routers import Drawn, RewardThreshold, Router
from vllm_specplus.arbitrage.steps import Job, Step, Writer, Written
from vllm_specplus.bench.arithmetic import Problem, check, read_problems, score
from vllm_specplus.bench.methods import parse_pairs
from vllm_specplus.bench.report import describe_run
from vllm_specplus.training.probe import wilson

#: What a router's operating point has to reach: the target's accuracy less, at so much of its time.
LESS, TIME = 0.02, 0.7
#: Resamplings of questions, for intervals of ratios of times.
RESAMPLED = 2000


class Oracle:
    """Knows both steps: escalates a ``share`` of those that the target improves."""

    def __init__(self, arbiter: Arbiter, problem: Problem, share: float, seed: int):
        self._arbiter, self._problem, self._share = arbiter, problem, share
        self._rng = random.Random(seed)

    async def score(self, job: Job, steps: Sequence[Step], candidate: Written) -> float:
        before = [step.text for step in steps]
        written = await self._arbiter.target.write(
            job.prompts[Writer.TARGET] + "".join(before), job.max_tokens, job.stop, job.sampling,
            job.special_tokens,
        )  # fmt: skip
        better = score(self._problem, [*before, written.text]) > score(
            self._problem, [*before, candidate.text]
        )
        return float(better and self._rng.random() < self._share)


@dataclass
class Point:
    """A policy at a setting, and its answers."""

    policy: str
    setting: float | None
    threshold: float
    right: list[bool] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)

    def router(self, arbiter: Arbiter, problem: Problem, learnt: Router, number: int) -> Router:
        """Who decides on the steps of the ``number``-th question."""
        if self.policy == "oracle":
            return Oracle(arbiter, problem, self.setting or 0.0, number)
        if self.policy == "rsd":
            return RewardThreshold(lambda job, steps: score(problem, steps))
        if self.policy == "random":
            return Drawn(number)
        return learnt

    def add(self, problem: Problem, steps: list[Step]) -> None:
        """An answer."""
        self.right.append(check(problem, "".join(step.text for step in steps)).right)
        self.steps += steps
        parts = ("draft", "target") if self.policy == "oracle" else ("draft", "router", "target")
        self.seconds.append(sum(step.seconds.get(part, 0.0) for step in steps for part in parts))

    @property
    def escalated(self) -> float:
        """The share of steps that the target has written."""
        return sum(step.writer is Writer.TARGET for step in self.steps) / len(self.steps)

    def to_json(self, target: Point) -> dict[str, Any]:
        """Figures, beside those of the target alone."""
        count, right = len(self.right), sum(self.right)
        low, high = wilson(right, count)
        ratio_low, ratio_high = ratio_interval(self.seconds, target.seconds)
        tokens = {
            str(writer): sum(step.tokens for step in self.steps if step.writer is writer)
            for writer in Writer
        }
        return {
            "policy": self.policy, "setting": self.setting, "threshold": self.threshold,
            "asked": count, "right": right / count, "right_low": low, "right_high": high,
            "escalated": self.escalated, "steps": len(self.steps), "tokens": tokens,
            "seconds": statistics.mean(self.seconds),
            "time_vs_target": sum(self.seconds) / sum(target.seconds),
            "time_vs_target_low": ratio_low, "time_vs_target_high": ratio_high,
            "answers": [
                {"right": good, "seconds": seconds}
                for good, seconds in zip(self.right, self.seconds, strict=True)
            ],
        }  # fmt: skip


def ratio_interval(own: Sequence[float], target: Sequence[float]) -> tuple[float, float]:
    """A 95 % interval of the ratio of total seconds, over questions drawn again."""
    rng, count, ratios = random.Random(0), len(own), []
    for _ in range(RESAMPLED):
        chosen = rng.choices(range(count), k=count)
        ratios.append(sum(own[i] for i in chosen) / sum(target[i] for i in chosen))
    ratios.sort()
    return ratios[int(0.025 * RESAMPLED)], ratios[int(0.975 * RESAMPLED)]


def first_points(thresholds: Sequence[float]) -> list[Point]:
    """What needs no other's answers: both models, the router, RSD and the oracle."""
    return [
        Point("draft", None, 1.0),
        Point("target", None, -1.0),
        *(Point("router", each, each) for each in thresholds),
        Point("rsd", 0.5, 0.5),
        *(Point("oracle", share, 0.5) for share in (0.25, 0.5, 0.75, 1.0)),
    ]


def random_points(points: Sequence[Point]) -> list[Point]:
    """A drawn router at each budget that the learnt one took."""
    shares = sorted({point.escalated for point in points if point.policy == "router"})
    return [Point("random", share, 1 - share) for share in shares if share > 0]


async def answer(
    arbiter: Arbiter, points: Sequence[Point], problems: Sequence[Problem], args: Any
) -> None:
    """Has every point answer every question."""
    learnt = arbiter.router
    for number, problem in enumerate(problems):
        messages = [{"role": "user", "content": problem.text}]
        prompts = {
            Writer.DRAFT: await arbiter.draft.chat_prompt(messages),
            Writer.TARGET: await arbiter.target.chat_prompt(messages),
        }
        turn = number % len(points)
        for point in (*points[turn:], *points[:turn]):
            arbiter.router = point.router(arbiter, problem, learnt, number)
            job = Job(
                problem=problem.text, prompts=prompts, max_tokens=args.max_tokens,
                threshold=point.threshold, sampling={"temperature": 0.0},
                cache_salt=uuid.uuid4().hex, special_tokens=False,
            )  # fmt: skip
            point.add(problem, [step async for step in arbiter.answer(job)])
    arbiter.router = learnt


def operating_point(points: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The router's fastest point that keeps the target's accuracy but for :data:`LESS`, and whether
    its time is within :data:`TIME`."""
    target = next(each for each in points if each["policy"] == "target")
    good = [
        each for each in points
        if each["policy"] == "router" and each["right"] >= target["right"] - LESS
    ]  # fmt: skip
    if not good:
        return None
    best = min(good, key=lambda each: each["time_vs_target"])
    keys = ("threshold", "right", "time_vs_target", "time_vs_target_high", "escalated")
    return {key: best[key] for key in keys} | {"reached": best["time_vs_target"] <= TIME}


async def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All points' figures."""
    problems = read_problems(args.questions)
    warm, asked = problems[: args.warm], problems[args.warm :][: args.limit]
    thresholds = [float(each) for each in args.thresholds.split(",")]
    named = [
        Named(place, parse_pairs(given, option))
        for place, given, option in (
            (args.draft, args.draft_arg, "--draft-arg"),
            (args.target, args.target_arg, "--target-arg"),
        )
    ]
    async with AsyncExitStack() as stack:
        parts = await stack.enter_async_context(arbiter(*named, args.router, Limits()))
        await answer(parts, first_points(thresholds), warm, args)
        points = first_points(thresholds)
        await answer(parts, points, asked, args)
        drawn = random_points(points)
        await answer(parts, drawn, asked, args)
    target = next(point for point in points if point.policy == "target")
    return [point.to_json(target) for point in itertools.chain(points, drawn)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("draft", "target", "router"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--warm", type=int, default=4, help="questions before those that count")
    parser.add_argument("--thresholds", default="0.05,0.1,0.2,0.3,0.5,0.7,0.9")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--draft-arg", action="append", default=[])
    parser.add_argument("--target-arg", action="append", default=[])
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    points = asyncio.run(run(args))
    for each in points:
        print(
            f"{each['policy']:8} {each['setting'] or '':6} escalated {each['escalated']:.2f}  "
            f"right {each['right']:.3f} ({each['right_low']:.3f}-{each['right_high']:.3f})  "
            f"{1e3 * each['seconds']:.0f} ms, {each['time_vs_target']:.2f} of the target's"
        )
    best = operating_point(points)
    print(best or "no threshold keeps the target's accuracy")
    with tempfile.TemporaryDirectory() as folder:
        about = describe_run(Path(folder, "machine.log"))
    save(args.json, {**about, "points": points, "operating_point": best})


if __name__ == "__main__":
    main()
