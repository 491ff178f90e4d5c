"""Accuracy against latency: who answers how, on fake servers that are right where they should."""

from __future__ import annotations

import asyncio
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.arbitrage.fakes import FakeModel, FakeRouter, script
from tests.arbitrage.serving import World
from vllm_specplus.bench.arithmetic import problems

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import arbitrage

PROBLEMS = list(itertools.islice(problems(0, True, steps=(2, 3)), 6))


def speaker(wrong_at: int | None):
    """A model that errs at one step, and goes on rightly from there."""

    def says(text: str) -> str:
        problem = next(each for each in PROBLEMS if each.text in text)
        steps = [
            f"{a} {op} {b} = {c + (i == wrong_at)}."
            for i, (a, op, b, c) in enumerate(problem.equations)
        ]
        return script(problem.text, *steps, f"The answer is {problem.totals[-1]}.")(text)

    return says


@pytest.fixture(scope="module")
def points() -> dict[tuple[str, float | None], arbitrage.Point]:
    """A router that always knows: the draft errs at the second step, and nowhere else."""
    world = World(
        FakeModel("small", speaker(1)), FakeModel("large", speaker(None)),
        FakeRouter(lambda text: 0.8 if text.count("Model ") == 2 else 0.1),
    )  # fmt: skip
    args = SimpleNamespace(max_tokens=500)

    async def run() -> list[arbitrage.Point]:
        async with world.arbiter() as arbiter:
            first = arbitrage.first_points([0.05, 0.5, 0.9])
            await arbitrage.answer(arbiter, first, PROBLEMS, args)
            drawn = arbitrage.random_points(first)
            await arbitrage.answer(arbiter, drawn, PROBLEMS, args)
            return first + drawn

    return {(point.policy, point.setting): point for point in asyncio.run(run())}


def right(point: arbitrage.Point) -> float:
    return sum(point.right) / len(point.right)


def test_every_policy_answers_every_question(points):
    assert {len(point.right) for point in points.values()} == {len(PROBLEMS)}
    assert right(points["draft", None]) == 0
    assert right(points["target", None]) == 1
    assert points["draft", None].escalated == 0
    assert points["target", None].escalated == 1


def test_the_router_the_reward_and_the_oracle_escalate_what_is_wrong(points):
    once = len(PROBLEMS) / len(points["router", 0.5].steps)
    for key in (("router", 0.5), ("rsd", 0.5), ("oracle", 1.0)):
        assert right(points[key]) == 1
        assert points[key].escalated == once
    assert right(points["router", 0.9]) == 0
    assert points["router", 0.05].escalated == 1


def test_the_drawn_router_has_the_routers_budgets(points):
    drawn = sorted(setting for policy, setting in points if policy == "random")
    assert drawn == sorted({points["router", each].escalated for each in (0.05, 0.5)})


def test_what_the_oracle_has_looked_at_takes_no_time(points):
    oracle = points["oracle", 1.0]
    looked = sum(step.seconds["router"] for step in oracle.steps)
    counted = sum(
        step.seconds.get("draft", 0) + step.seconds.get("target", 0) for step in oracle.steps
    )
    assert looked > 0
    assert sum(oracle.seconds) == pytest.approx(counted)


def test_figures(points):
    figures = points["router", 0.5].to_json(points["target", None])
    assert figures["right"] == 1
    assert figures["right_low"] < 1 == figures["right_high"]
    assert figures["asked"] == len(figures["answers"]) == len(PROBLEMS)
    assert figures["time_vs_target_low"] <= figures["time_vs_target"]
    assert figures["time_vs_target"] <= figures["time_vs_target_high"]
    same = points["target", None].to_json(points["target", None])
    assert same["time_vs_target"] == same["time_vs_target_low"] == same["time_vs_target_high"] == 1


def test_the_operating_point_is_the_fastest_that_is_good_enough():
    def point(policy: str, threshold: float, share: float, ratio: float) -> dict:
        return {
            "policy": policy, "threshold": threshold, "right": share, "time_vs_target": ratio,
            "time_vs_target_high": ratio, "escalated": 0.5,
        }  # fmt: skip

    points = [
        point("target", -1, 0.8, 1.0), point("router", 0.1, 0.81, 0.9),
        point("router", 0.5, 0.785, 0.65), point("router", 0.9, 0.7, 0.4),
    ]  # fmt: skip
    best = arbitrage.operating_point(points)
    assert (best["threshold"], best["reached"]) == (0.5, True)
    points[2]["time_vs_target"] = 0.75
    assert arbitrage.operating_point(points)["reached"] is False
    assert arbitrage.operating_point([points[0], points[3]]) is None
