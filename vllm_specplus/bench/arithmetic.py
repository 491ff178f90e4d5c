"""Arithmetic word questions whose answers, and every step of them, can be checked.

    python -m vllm_specplus.bench.arithmetic --count 500 --held-out --out questions.jsonl

A question tells of a number that some events change; its answer has one step for each event, and a
last one that names the result. Steps end with :data:`SEPARATOR`::

    Ann has 23 apples. She buys 14 more. She gives away 9. How many apples does she have?

    23 + 14 = 37.

    So there are 37 - 9 = 28 apples.

    The answer is 28.

How a step is worded is free, and what it computes is not: two models that have learnt from answers
of other wordings disagree about many tokens that do not matter. A twentieth of all questions, by a
hash of their text, is held out: the ones that are drawn to learn from and those to measure on have
none in common, whatever the seeds.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_specplus.bench import InputError

SEPARATOR = "\n\n"
#: Numbers stay in [0, MOST], what is added or taken away in [1, CHANGE], factors in [2, TIMES].
MOST, CHANGE, TIMES = 99, 30, 5
#: One of so many questions is held out.
HELD_OUT_SHARE = 20

NAMES = ("Ann", "Ben", "Eva", "Kim", "Max", "Tom", "Zoe", "Sam")
THINGS = ("apples", "books", "coins", "eggs", "pens", "shells", "stamps", "toys")
EVENTS = {
    "+": ("{} buys {} more.", "{} finds {} more.", "Then {} gets {} more."),
    "-": ("{} gives away {}.", "{} loses {}.", "Then {} sells {}."),
    "*": ("Now {} has {} times as many.",),
}
#: Wordings of a step, and of the last one. A dialect says how often each is used.
STEPS = (
    "{a} {op} {b} = {c}.",
    "So there are {a} {op} {b} = {c} {things}.",
    "Now it is {a} {op} {b} = {c}.",
)
LAST = ("The answer is {c}.", "So the answer is {c}.")
DIALECTS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "plain": ((0.6, 0.25, 0.15), (0.75, 0.25)),
    "wordy": ((0.2, 0.35, 0.45), (0.3, 0.7)),
}

EQUATION = re.compile(r"(\d+) ([+*-]) (\d+) = (\d+)")
#: A number that is no part of an equation, not of one that is being written either.
RESULT = re.compile(r"(?<![+*=-] )(?<!\d)\d+(?! ?[-+*=]|\d)")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Problem:
    """A question, and all that its answer has to say."""

    id: str
    text: str
    start: int
    """The number before any event."""
    events: tuple[tuple[str, int], ...]
    """What happens to it: ``+``, ``-`` or ``*``, and by how much."""
    things: str

    @property
    def totals(self) -> tuple[int, ...]:
        """The number after each event."""
        found, total = [], self.start
        for op, amount in self.events:
            total = {"+": total + amount, "-": total - amount, "*": total * amount}[op]
            found.append(total)
        return tuple(found)

    @property
    def equations(self) -> tuple[tuple[int, str, int, int], ...]:
        """What each step computes: (a, op, b, c) of ``a op b = c``."""
        before = (self.start, *self.totals)
        return tuple(
            (a, op, b, c) for a, (op, b), c in zip(before, self.events, self.totals, strict=False)
        )

    def to_row(self) -> dict[str, Any]:
        """As a row of a file of questions, which ``bench`` and ``train`` read too."""
        return {
            "id": self.id, "category": "arithmetic", "prompt": self.text,
            "reference": str(self.totals[-1]), "start": self.start,
            "events": [list(event) for event in self.events], "things": self.things,
        }  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What is to be said of an answer, perhaps an unfinished one."""

    finished: bool
    """Does it name a result?"""
    error: tuple[int, int] | None
    """Its first wrong characters, [first, behind]; what follows from them says nothing more."""

    @property
    def right(self) -> bool:
        return self.finished and self.error is None


def is_held_out(text: str) -> bool:
    """Is the question of this text one to measure on?"""
    return hashlib.sha256(text.encode()).digest()[0] % HELD_OUT_SHARE == 0


def problems(seed: int, held_out: bool, steps: Sequence[int] = (2, 3, 4)) -> Iterator[Problem]:
    """Different questions without end, of as many ``steps`` in turn, of the wanted kind."""
    rng = random.Random(f"arithmetic {seed} {tuple(steps)}")
    seen: set[str] = set()
    while True:
        problem = _draw(rng, steps[len(seen) % len(steps)])
        if problem.text not in seen and is_held_out(problem.text) == held_out:
            seen.add(problem.text)
            yield problem


def _draw(rng: random.Random, count: int) -> Problem:
    name, things = rng.choice(NAMES), rng.choice(THINGS)
    start = total = rng.randint(3, 60)
    sentences, events = [f"{name} has {start} {things}."], []
    for _ in range(count):
        ops = [op for op, fits in (("+", total < MOST), ("-", total > 1)) if fits]
        if 2 <= total <= MOST // 2:
            ops.append("*")
        op = rng.choice(ops)
        room = {"+": MOST - total, "-": total, "*": MOST // max(total, 1)}[op]
        amount = (
            rng.randint(2, min(room, TIMES)) if op == "*" else rng.randint(1, min(room, CHANGE))
        )
        total = {"+": total + amount, "-": total - amount, "*": total * amount}[op]
        sentences.append(rng.choice(EVENTS[op]).format(name, amount))
        events.append((op, amount))
    sentences.append(f"How many {things} does {name} have?")
    text = " ".join(sentences)
    identity = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Problem(identity, text, start, tuple(events), things)


def answer(problem: Problem, rng: random.Random, dialect: str) -> str:
    """A right answer in the words of a dialect."""
    steps, last = DIALECTS[dialect]
    sentences = [
        rng.choices(STEPS, steps)[0].format(a=a, op=op, b=b, c=c, things=problem.things)
        for a, op, b, c in problem.equations
    ]
    sentences.append(rng.choices(LAST, last)[0].format(c=problem.totals[-1]))
    return SEPARATOR.join(sentences)


def check(problem: Problem, text: str) -> Verdict:
    """Reads an answer to its first error.

    Every equation has to be the one of its event (factors and summands may be swapped); the first
    number behind the last one has to be the result. A number that stands in no equation before is
    not looked at.
    """
    end = 0
    found = EQUATION.finditer(text)
    for a, op, b, c in problem.equations:
        each = next(found, None)
        if each is None:
            break
        end = each.end()
        given = (int(each[1]), each[2], int(each[3]), int(each[4]))
        swapped = op != "-" and given[:3] == (b, op, a)
        wanted = (given[:3] if swapped else (a, op, b)) + (c,)
        wrong = [i for i in range(4) if given[i] != wanted[i]]
        if wrong:
            return Verdict(True, each.span(wrong[0] + 1))
    else:
        if (more := next(found, None)) is not None:
            return Verdict(True, more.span())
    result = RESULT.search(text, end)
    if result is None:
        return Verdict(False, None)
    return Verdict(True, None if int(result[0]) == problem.totals[-1] else result.span())


def score(problem: Problem, steps: Sequence[str]) -> float:
    """How good an answer is up to here, as a process reward model says it: 1 if none of its steps
    is wrong and each has brought it on, else 0."""
    text = "".join(steps)
    verdict = check(problem, text)
    if verdict.error is not None:
        return 0.0
    if len(steps) > len(problem.events):
        return float(verdict.finished)
    return float(len(EQUATION.findall(text)) >= len(steps))


def final_number(text: str) -> float | None:
    """The last number of an answer, whoever wrote it; what stands behind ``####``, if that is
    there."""
    numbers = NUMBER.findall(text.rpartition("####")[2])
    return float(numbers[-1].replace(",", "")) if numbers else None


def read_problems(path: Path) -> list[Problem]:
    """The questions of a file that :meth:`Problem.to_row` has written; InputError for another."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            events = tuple((str(op), int(amount)) for op, amount in row["events"])
            found.append(Problem(row["id"], row["prompt"], row["start"], events, row["things"]))
        except (KeyError, TypeError, ValueError):
            raise InputError(
                f"{path}, line {number} is no arithmetic question: write the file with "
                f"python -m vllm_specplus.bench.arithmetic"
            ) from None
    return found


def main(
    out: Annotated[Path, typer.Option(help="File of JSON lines to write.")],
    count: Annotated[int, typer.Option(min=1, help="Questions.")] = 500,
    held_out: Annotated[bool, typer.Option("--held-out", help="To measure on.")] = False,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Write arithmetic questions with their results."""
    drawn = problems(seed, held_out)
    lines = [json.dumps(next(drawn).to_row()) for _ in range(count)]
    out.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
