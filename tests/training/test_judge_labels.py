"""Mining labels for judges: mistakes by checks, and swaps by what they come to."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tests.training.toy import WORDS, save_target
from vllm_specplus.bench.arithmetic import Problem
from vllm_specplus.training.data import labelled, language_of
from vllm_specplus.training.judge_labels import Search, asked, mistake, search, texts_of
from vllm_specplus.training.texts import from_row, to_line

PROMPT = (1, 2)
END = 0


class World:
    """A target that says 10, 20, 30 and their sum, whatever stands there; 11 and 31 are other words
    for 10 and 30, and 25 is wrong. A draft that always thinks of the other word."""

    def __init__(self):
        self.written: list[tuple[int, ...]] = []

    def write(self, texts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        self.written += texts
        return [self.answer(text[len(PROMPT) :]) for text in texts]

    @staticmethod
    def answer(begun: tuple[int, ...]) -> tuple[int, ...]:
        full = (*begun, *(10, 20, 30)[len(begun) :])[:3]
        total = 99 if 25 in full else 60
        return (*full, total, END)[len(begun) :]

    @staticmethod
    def best(texts: Sequence[tuple[int, ...]]) -> list[list[int]]:
        other = {10: 11, 11: 11, 20: 25, 30: 31, 60: 99, END: 5}
        return [[*(other.get(token, token) for token in text[1:]), 7] for text in texts]

    @staticmethod
    def result(tokens: Sequence[int]) -> int | None:
        return tokens[-2] if len(tokens) > 1 else None


def test_swaps_that_come_to_the_same_stay():
    """In the target's answer 10 20 30 60: 11 and 31 do not matter and stay, 25 does and is taken
    back, and the result itself is tried as well."""
    world = World()
    (found,) = search([PROMPT], world.write, world.best, world.result, frozenset({END}), 10)
    assert found.tried == [
        ((*PROMPT, 11), 1),
        ((*PROMPT, 11, 25), 0),
        ((*PROMPT, 11, 20, 31), 1),
        ((*PROMPT, 11, 20, 31, 99), 0),
    ]
    assert found.answer == (11, 20, 31, 60, END)
    # The target has written once for the question, and once for each swap.
    assert len(world.written) == 5


def test_by_a_naive_search():
    """Of several questions side by side it is what one question comes to alone."""
    prompts = [PROMPT, (3, 4), (5, 6)]

    def naive(prompt: tuple[int, ...]) -> list[tuple[tuple[int, ...], int]]:
        answer, tried, border = World.answer(()), [], len(prompt)
        right = World.result(answer)
        while True:
            text = prompt + answer
            best = World.best([text])[0]
            places = [
                at
                for at in range(border, len(text))
                if best[at - 1] != text[at] and END not in (best[at - 1], text[at])
            ]
            if not places:
                return tried
            border = places[0] + 1
            swapped = (*text[: places[0]], best[places[0] - 1])
            begun = swapped[len(prompt) :]
            other = (*begun, *World.answer(begun))
            tried.append((swapped, int(World.result(other) == right)))
            if tried[-1][1]:
                answer = other

    world = World()
    together = search(prompts, world.write, world.best, world.result, frozenset({END}), 10)
    assert [each.tried for each in together] == [naive(prompt) for prompt in prompts]


def test_swaps_are_bounded_and_answers_without_a_result_left_out():
    world = World()
    (found,) = search([PROMPT], world.write, world.best, world.result, frozenset({END}), 2)
    assert len(found.tried) == 2
    assert search([PROMPT], world.write, world.best, lambda _: None, frozenset(), 9) == []


def test_a_swap_that_comes_to_nothing_matters():
    found = Search(PROMPT, (10, 20), 60, 2)
    found.learn((*PROMPT, 11), (), None)
    assert found.tried == [((*PROMPT, 11), 0)]
    assert found.answer == (10, 20)


def test_the_last_token_of_each_text_is_labelled():
    world = World()
    searches = search([PROMPT], world.write, world.best, world.result, frozenset({END}), 10)
    texts = list(texts_of(searches))
    assert [text.labels[-1] for text in texts] == [1, 0, 1, 0]
    assert all(set(text.labels[:-1]) == {-1} for text in texts)
    assert {(text.id, text.start) for text in texts} == {(texts[0].id, 2)}
    assert [from_row(json.loads(to_line(text))) for text in texts] == texts


def test_mistakes_are_rows_of_training():
    problem = Problem("x", "How many?", 23, (("+", 14),), "apples")
    text = "23 + 14 = 38. The answer is 38."
    row = mistake(problem, text)
    assert row == {"id": "x", "prompt": "How many?", "answer": text, "error": [10, 12]}
    assert mistake(problem, "23 + 14 = 37. The answer is 37.")["error"] is None
    assert mistake(problem, "23 + 14 = 37.") is None


def test_questions_of_arithmetic_are_asked_as_prompts(tmp_path):
    language = language_of(save_target(tmp_path / "target"))
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"id": "x", "prompt": "what is a", "reference": "1"}))
    (prompt,) = asked(path, language)
    assert prompt.id == "x"
    assert WORDS.index("what") in prompt.tokens
    assert labelled("a b", {"error": None}, language)[1] == [1, 1]
