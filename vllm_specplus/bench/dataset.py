"""The questions of a benchmark: reading, picking and splitting them into rounds."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_specplus.bench import InputError

PROMPT_KEYS = ("turns", "messages", "prompt")

# A round ends when its last request ends, so concurrency falls off at its end. With at least
# this many questions per request in flight, most of the round runs at full concurrency.
QUESTIONS_PER_SLOT = 3


class Question(BaseModel):
    """One prompt: either raw text or the messages of a conversation's first turn."""

    model_config = ConfigDict(frozen=True)

    id: str
    category: str
    prompt: str | None = None
    messages: tuple[dict[str, str], ...] | None = None


@dataclass(frozen=True)
class Dataset:
    """The distinct questions of a file, and how many rows repeated an earlier prompt."""

    questions: list[Question]
    duplicates: int


def load_dataset(path: Path) -> Dataset:
    """Read a JSON-lines file of Spec-Bench, `{"prompt"}` or OpenAI `{"messages"}` rows.

    Rows that repeat an earlier prompt are dropped: a drafter that caches what it has seen would
    answer them from memory.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"cannot read the dataset {path}: {exc}") from exc

    ids: set[str] = set()
    prompts: set[str] = set()
    questions: list[Question] = []
    rows = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        rows += 1
        try:
            question = parse_row(json.loads(line), default_id=str(number))
        except json.JSONDecodeError as exc:
            raise InputError(f"{path}, line {number}: not valid JSON ({exc.msg})") from exc
        except InputError as exc:
            raise InputError(f"{path}, line {number}: {exc}") from exc
        if question.id in ids:
            raise InputError(f"{path}, line {number}: question_id {question.id} is used twice")
        ids.add(question.id)
        prompt = question.model_dump_json(include={"prompt", "messages"})
        if prompt not in prompts:
            prompts.add(prompt)
            questions.append(question)
    return Dataset(questions, duplicates=rows - len(questions))


def parse_row(row: Any, default_id: str) -> Question:
    """Turn one row of the file into a question; `default_id` serves rows without question_id."""
    if not isinstance(row, dict):
        raise InputError("a row must be a JSON object")
    given = [key for key in PROMPT_KEYS if key in row]
    if len(given) != 1:
        raise InputError(f"a row needs exactly one of {', '.join(PROMPT_KEYS)}")
    question_id = str(row.get("question_id", default_id))
    category = str(row.get("category", "all"))

    match given[0]:
        case "prompt":
            prompt = _text(row["prompt"], "prompt")
            return Question(id=question_id, category=category, prompt=prompt)
        case "turns":
            if not isinstance(row["turns"], list) or not row["turns"]:
                raise InputError("turns must be a non-empty list")
            messages = [{"role": "user", "content": _text(row["turns"][0], "turns[0]")}]
        case _:
            messages = _first_turn(row["messages"])
    return Question(id=question_id, category=category, messages=tuple(messages))


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name} must be a non-empty string")
    return value


def _first_turn(messages: Any) -> list[dict[str, str]]:
    """The messages up to and including the user's first one."""
    if not isinstance(messages, list):
        raise InputError("messages must be a list")
    turn: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise InputError(f"messages[{index}] must be an object with a role and a content")
        content = _text(message.get("content"), f"messages[{index}].content")
        turn.append({"role": message["role"], "content": content})
        if message["role"] == "user":
            return turn
    raise InputError("messages has no message of the user")


def pick(questions: Sequence[Question], limit: int) -> tuple[list[Question], list[Question]]:
    """Split into the questions to measure (at most `limit`) and the rest, for warming up.

    One question of every category in turn, in the order of the file: deterministic, even over
    the categories as far as they last, and a smaller limit picks a subset of a larger one's.
    At least one question is left for warming up.
    """
    if len(questions) < 2:
        raise InputError(
            "the dataset needs at least two different prompts: one is kept for warming up"
        )
    by_category: dict[str, list[Question]] = {}
    for question in questions:
        by_category.setdefault(question.category, []).append(question)
    ordered = [
        question
        for layer in zip_longest(*by_category.values())
        for question in layer
        if question is not None
    ]
    count = min(limit, len(ordered) - 1)
    return ordered[:count], ordered[count:]


def split_rounds(
    questions: Sequence[Question], rounds: int, concurrency: int
) -> list[list[Question]]:
    """Cut the questions into at most `rounds` consecutive parts of nearly equal size.

    There are fewer rounds when they would be too short to keep `concurrency` requests in flight.
    """
    fitting = len(questions) // (QUESTIONS_PER_SLOT * concurrency)
    count = max(1, min(rounds, fitting))
    bounds = [index * len(questions) // count for index in range(count + 1)]
    return [list(questions[start:end]) for start, end in pairwise(bounds)]
