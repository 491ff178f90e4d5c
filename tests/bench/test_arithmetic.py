"""Arithmetic questions: what is right, where an answer goes wrong, and what is held out."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from typer.testing import CliRunner

from vllm_specplus.bench import InputError, arithmetic
from vllm_specplus.bench.arithmetic import (
    DIALECTS,
    MOST,
    SEPARATOR,
    Problem,
    answer,
    check,
    final_number,
    problems,
    read_problems,
    score,
)
from vllm_specplus.bench.dataset import load_dataset

PROBLEM = Problem("x", "?", 23, (("+", 14), ("-", 9)), "apples")
RIGHT = "23 + 14 = 37.\n\nSo there are 37 - 9 = 28 apples.\n\nThe answer is 28."


def some(count: int, seed: int = 0, held_out: bool = False) -> list[Problem]:
    return list(itertools.islice(problems(seed, held_out), count))


def test_answers_of_all_dialects_are_right_at_every_step():
    rng = random.Random(0)
    for problem, dialect in itertools.product(some(200), DIALECTS):
        text = answer(problem, rng, dialect)
        assert check(problem, text).right
        steps = [f"{step}{SEPARATOR}" for step in text.split(SEPARATOR)]
        assert len(steps) == len(problem.events) + 1
        assert all(score(problem, steps[: i + 1]) == 1 for i in range(len(steps)))
        assert final_number(text) == problem.totals[-1]


def test_numbers_stay_small_and_come_from_the_text():
    for problem in some(300):
        assert all(0 <= total <= MOST for total in problem.totals)
        told = [int(word.strip(".")) for word in problem.text.split() if word.strip(".").isdigit()]
        assert told == [problem.start, *(amount for _, amount in problem.events)]


def test_any_other_number_is_found_where_it_stands():
    """A right answer in which one number is another: the error is that number, or, of a result that
    an equation has no word on, the sentence's."""
    rng = random.Random(1)
    for problem in some(60):
        text = answer(problem, rng, "plain")
        for place in arithmetic.NUMBER.finditer(text):
            wrong = f"{text[: place.start()]}{int(place[0]) + 1}{text[place.end() :]}"
            verdict = check(problem, wrong)
            assert not verdict.right
            begin, end = verdict.error
            assert begin == place.start()
            assert wrong[begin:end] == str(int(place[0]) + 1)


@pytest.mark.parametrize(
    ("text", "finished", "error"),
    [
        (RIGHT, True, None),
        ("14 + 23 = 37.\n\n37 - 9 = 28.\n\nThe answer is 28.", True, None),
        ("23 + 14 = 37.\n\n9 - 37 = 28.", True, "9"),  # differences are not turned round
        ("23 - 14 = 9.", True, "-"),
        ("23 + 14 = 37.\n\n", False, None),
        ("23 + 14 = 37.\n\n37 - 9", False, None),
        ("I do not know.", False, None),
        ("The answer is 28", True, None),
        ("The answer is 27.", True, "27"),
        (RIGHT.replace("The answer is 28", "28 + 0 = 28"), True, "28 + 0 = 28"),
    ],
)
def test_verdicts(text, finished, error):
    verdict = check(PROBLEM, text)
    found = verdict.error and text[slice(*verdict.error)]
    assert (verdict.finished, found) == (finished, error)
    assert verdict.right == (finished and error is None)


def test_steps_that_bring_nothing_score_nothing():
    steps = ["23 + 14 = 37.\n\n", "Hm.\n\n", "37 - 9 = 28.\n\n"]
    assert score(PROBLEM, steps[:1]) == 1
    assert score(PROBLEM, steps[:2]) == 0
    assert score(PROBLEM, [steps[0], steps[2], "Well.\n\n"]) == 0
    assert score(PROBLEM, ["23 + 14 = 38.\n\n"]) == 0


def test_what_is_held_out_is_drawn_by_no_seed():
    learnt = {problem.text for seed in (0, 1) for problem in some(1500, seed)}
    measured = {problem.text for seed in (0, 1) for problem in some(100, seed, held_out=True)}
    assert len(measured) > 150
    assert not learnt & measured


def test_the_last_number_of_an_answer():
    assert final_number("So 3 + 4 = 7, or 1,234.50 in all.") == 1234.5
    assert final_number("it is 12\n#### 1000") == 1000
    assert final_number("-3") == -3
    assert final_number("none") is None


def test_files_of_questions(tmp_path):
    path = tmp_path / "questions.jsonl"
    assert CliRunner().invoke(app(), ["--out", str(path), "--count", "7"]).exit_code == 0
    assert read_problems(path) == some(7)
    (first, *_) = load_dataset(path).questions
    assert (first.category, first.prompt) == ("arithmetic", some(1)[0].text)
    path.write_text(json.dumps({"prompt": "what is a"}))
    with pytest.raises(InputError, match="line 1 is no arithmetic question: write the file with"):
        read_problems(path)


def app():
    import typer

    command = typer.Typer()
    command.command()(arithmetic.main)
    return command
