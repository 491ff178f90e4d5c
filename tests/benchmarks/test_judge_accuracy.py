"""Speed against accuracy: which engines are compared, what is right, and rules at equal speed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.drafting.test_drafting import save_draft
from vllm_specplus.bench.arithmetic import problems
from vllm_specplus.config import parse

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import judge_accuracy


def test_all_engines_can_be_started(tmp_path):
    save_file({"weight": torch.ones(64), "bias": torch.zeros(1)}, tmp_path / "head")
    draft = save_draft(tmp_path / "draft")
    args = SimpleNamespace(draft=draft, nodes=8, head=str(tmp_path / "head"))
    engines = judge_accuracy.engines(args)
    parsed = [parse(config) for config in engines.values() if config is not None]
    assert len(parsed) == len(engines) - 1
    assert sum(each.lossless for each in parsed) == 2
    assert {json.loads(label)["rule"] for label in engines} >= set(judge_accuracy.SETTINGS)


def test_what_is_right_is_what_the_file_can_say(tmp_path):
    problem = next(problems(0, True))
    path = tmp_path / "arithmetic.jsonl"
    path.write_text(f"{json.dumps(problem.to_row())}\n" * 1)
    chats, (right,) = judge_accuracy.asked(path, 10)
    assert chats == [[{"role": "user", "content": problem.text}]]
    assert not right(f"The answer is {problem.totals[-1] + 1}.")
    rows = [
        {"question_id": 1, "category": "math_reasoning", "turns": ["a?"],
         "reference": ["4 + 3 = <<4+3=7>>7\n#### 1,007"]},
        {"question_id": 2, "category": "writing", "turns": ["b?"]},
        {"question_id": 3, "category": "writing", "turns": ["c?"], "reference": ["fine"]},
    ]  # fmt: skip
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (chat,), (right,) = judge_accuracy.asked(path, 10)
    assert chat[0]["content"] == "a?"
    assert right("So it is 1007.")
    assert not right("So it is 1007, no, 7.")


def point(rule: str, speed: float, right: float, **keys) -> dict:
    return {"rule": rule, "keys": keys, "speed": speed, "right": right}


@pytest.mark.parametrize(
    ("speed", "right"),
    [(1.0, 0.8), (1.25, 0.75), (1.5, 0.7), (1.75, 0.6), (2.0, 0.5), (2.1, None), (0.5, 0.8)],
)
def test_accuracy_between_settings(speed, right):
    """A setting that is slower and no better than another does not count."""
    points = [
        point("typical", 1.0, 0.8), point("typical", 1.5, 0.7), point("typical", 2.0, 0.5),
        point("typical", 1.2, 0.4),
    ]  # fmt: skip
    found = judge_accuracy.at_speed(points, speed, "speed")
    assert found is None if right is None else found == pytest.approx(right)


def test_rules_at_the_judges_speed():
    points = [
        point("judge", 1.5, 0.75), point("judge", 3.0, 0.1, threshold=0.1),
        point("typical", 1.0, 0.8), point("typical", 2.0, 0.6), point("kl_judge", 1.2, 0.8),
    ]  # fmt: skip
    found = judge_accuracy.compared(points, "speed")
    assert (found["speed"], found["judge"]) == (1.5, 0.75)
    assert found["typical"] == pytest.approx(0.7)
    assert found["kl_judge"] is None
    assert found["top_k_margin"] is None
