"""Drafts that are only watched: what is said of them is what verifying them would have brought."""

from __future__ import annotations

import numpy as np
import pytest

from tests.control.test_controller import World
from vllm_specplus.control.outcomes import DraftedTrees
from vllm_specplus.control.settings import (
    ControlChange,
    FixedControl,
    GoodputControl,
    ThresholdControl,
)


def run(steps: int, mode: str, requests: int = 2) -> World:
    world = World(GoodputControl(mode=mode), requests=requests)
    world.run(steps, 0.7)
    return world


def test_the_gain_that_is_predicted_is_the_one_that_comes():
    shadow, on = run(1500, "shadow"), run(1500, "on")
    assert (shadow.known == 10 + 1500).all()  # a token a step: nothing was verified
    c = shadow.counters
    tokens = c["shadow_tokens"] / c["shadow_request_steps"]
    predicted = tokens * c["shadow_plain_seconds"] / c["shadow_seconds"]
    speed = (on.tokens / on.clock) / (shadow.tokens / shadow.clock)
    assert speed > 1.5
    assert predicted == pytest.approx(speed, rel=0.1)
    assert c["shadow_request_steps"] == pytest.approx(2 * 1500, abs=40)


def test_a_shadow_teaches_what_drafts_are_worth():
    learnt, on = (
        run(1500, mode).controller.acceptance.tables(["new"]) for mode in ("shadow", "on")
    )
    assert learnt[0, :3, 0] == pytest.approx(on[0, :3, 0], abs=0.08)


def test_nothing_is_drafted_while_off():
    world = run(50, "off")
    assert world.counters["nodes_grown"] == 0
    assert (world.known == 10 + 50).all()


def test_trees_are_followed_as_far_as_the_text_goes():
    def i32(*values):
        return np.array(values, np.int32)

    text = np.zeros((2, 12), np.int32)
    text[0, 5:8] = 7, 8, 9
    trees = DraftedTrees(
        ["a", "b"], i32(5, 5), i32(7, 6, 8, 9, 7), i32(-1, -1, 0, 2, -1), i32(*[0] * 5),
        i32(0, 4, 5), np.zeros(2), np.array([True, True, True, False, True]),
    )  # fmt: skip
    rows = i32(0, -1)
    assert trees.gained(rows, text, i32(9, 9)).tolist() == [2, 0]  # the third was not chosen
    assert trees.gained(rows, text, i32(6, 9)).tolist() == [1, 0]  # no more is known
    trees.shadow = None
    assert trees.gained(rows, text, i32(8, 9)).tolist() == [2, 0]  # by what became of the text


def test_changes_are_those_of_a_running_server():
    slo = ControlChange(objective="slo", tpot_ms=20.0).of(GoodputControl())
    assert (slo.objective, slo.tpot_ms, slo.mode) == ("slo", 20.0, "on")
    fast = ControlChange(objective="throughput", mode="shadow").of(slo)
    assert (fast.objective, fast.tpot_ms, fast.mode) == ("throughput", None, "shadow")
    assert ControlChange().of(fast) == fast


@pytest.mark.parametrize(
    ("control", "change", "words"),
    [
        (GoodputControl(), {"objective": "slo"}, "needs a target"),
        (GoodputControl(), {"tpot_ms": 20.0}, "'tpot_ms' is a target"),
        (FixedControl(policy="fixed"), {"mode": "off"}, "policy 'fixed' stays as it is"),
        (ThresholdControl(policy="threshold"), {}, "policy 'threshold' stays as it is"),
    ],
)
def test_impossible_changes_are_refused(control, change, words):
    with pytest.raises(ValueError, match=words):
        ControlChange(**change).of(control)


def test_a_controller_follows_a_change():
    world = World(requests=2)
    world.run(100, 0.9)
    drafted = world.counters["nodes_grown"]
    world.controller.change(ControlChange(mode="off"))
    assert not world.run(50, 0.9).any()
    assert world.counters["nodes_grown"] == drafted
    world.controller.change(ControlChange(mode="on", objective="throughput"))
    assert world.run(50, 0.9)[10:].mean() > 4
