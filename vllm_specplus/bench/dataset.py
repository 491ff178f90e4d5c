"""The questions of a benchmark: reading, picking and splitting them into rounds."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from vllm_specplus.bench import InputError

PROMPT_KEYS = ("turns", "messages", "conversations", "prompt")
#: ShareGPT's names of those who talk.
SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
    "bard": "assistant", "bing": "assistant", "system": "system",
}  # fmt: skip

#: Between a question's id and the number of a later turn.
TURN = "::turn "

# A round ends when its last request ends, so concurrency falls off at its end. With at least
# this many questions per request in flight, most of the round runs at full concurrency.
QUESTIONS_PER_SLOT = 3


class Question(BaseModel):
    """What is asked: raw text or the messages up to the user's first, and what the user says later,
    each after the answer before it."""

    model_config = ConfigDict(frozen=True)

    id: str
    category: str
    prompt: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    later: tuple[tuple[dict[str, str], ...], ...] = ()
    """Messages of the later turns; who answers them is the model, not the file."""
    max_tokens: int | None = None
    """Most tokens of each answer, where that is less than what all questions get."""

    def turn_ids(self) -> list[str]:
        """Ids of its turns; the first is the question's own."""
        return [self.id, *(turn_id(self.id, number) for number in range(1, len(self.later) + 1))]


def turn_id(question_id: str, number: int) -> str:
    """The id of a later turn, counted from 0."""
    return f"{question_id}{TURN}{number + 1}"


def first_turn(turn: str) -> str:
    """The question of a turn's id."""
    return turn.rpartition(TURN)[0] or turn


@dataclass(frozen=True)
class Dataset:
    """The distinct questions of a file, and how many rows repeated an earlier prompt."""

    questions: list[Question]
    duplicates: int


def load_dataset(path: Path, later_turns: bool = False) -> Dataset:
    """Read the questions of a file: JSON lines, a JSON array, or parquet (which SPEED-Bench has).

    A row is one of Spec-Bench or SPEED-Bench (`turns`), of ShareGPT (`conversations`), OpenAI
    `{"messages"}` or `{"prompt"}`, with its own `max_tokens` if it has that key. Of a conversation
    the first turn is asked; with `later_turns` all of them. Rows that repeat an earlier prompt are
    dropped: a drafter that caches what it has seen would answer them from memory.
    """
    ids: set[str] = set()
    prompts: set[str] = set()
    questions: list[Question] = []
    rows = 0
    for where, row in _rows(path):
        rows += 1
        try:
            question = parse_row(row, default_id=where.rpartition(" ")[2], later_turns=later_turns)
        except InputError as exc:
            raise InputError(f"{path}, {where}: {exc}") from exc
        if question.id in ids:
            raise InputError(f"{path}, {where}: question_id {question.id} is used twice")
        ids.add(question.id)
        prompt = question.model_dump_json(include={"prompt", "messages"})
        if prompt not in prompts:
            prompts.add(prompt)
            questions.append(question)
    return Dataset(questions, duplicates=rows - len(questions))


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Each row of a file and where it is, as "line 3"."""
    if path.suffix == ".parquet":
        try:
            import pyarrow.parquet
        except ImportError as exc:
            raise InputError(
                f"{path}: parquet needs pyarrow: pip install 'vllm-specplus[datastore]'"
            ) from exc
        try:
            rows = pyarrow.parquet.read_table(path).to_pylist()
        except (OSError, pyarrow.ArrowInvalid) as exc:
            raise InputError(f"cannot read the dataset {path}: {exc}") from exc
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise InputError(f"cannot read the dataset {path}: {exc}") from exc
    if path.suffix == ".json" and text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as exc:
            raise InputError(f"{path}, line {exc.lineno}: not valid JSON ({exc.msg})") from exc
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield f"line {number}", json.loads(line)
        except json.JSONDecodeError as exc:
            raise InputError(f"{path}, line {number}: not valid JSON ({exc.msg})") from exc


def parse_row(row: Any, default_id: str, later_turns: bool = False) -> Question:
    """Turn one row of the file into a question; `default_id` serves rows without an id."""
    if not isinstance(row, dict):
        raise InputError("a row must be a JSON object")
    given = [key for key in PROMPT_KEYS if row.get(key) is not None]
    if len(given) != 1:
        raise InputError(f"a row needs exactly one of {', '.join(PROMPT_KEYS)}")
    question_id = str(row.get("question_id", row.get("id", default_id)))
    category = str(row.get("category", "all"))
    max_tokens = row.get("max_tokens")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise InputError("max_tokens must be a whole number of at least 1")
    common = {"id": question_id, "category": category, "max_tokens": max_tokens}

    match given[0]:
        case "prompt":
            prompt = _text(row["prompt"], "prompt")
            return Question(**common, prompt=prompt)
        case "turns":
            if not isinstance(row["turns"], list) or not row["turns"]:
                raise InputError("turns must be a non-empty list")
            messages = [{"role": "user", "content": turn} for turn in row["turns"]]
        case "conversations":
            messages = _messages(row["conversations"], "conversations", "from", "value")
        case _:
            messages = _messages(row["messages"], "messages", "role", "content")
    first, *later = _turns(messages, given[0])
    return Question(**common, messages=first, later=later if later_turns else ())


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name} must be a non-empty string")
    return value


def _messages(messages: Any, key: str, role: str, content: str) -> list[dict[str, str]]:
    """OpenAI's messages from a list whose objects name role and content so."""
    if not isinstance(messages, list):
        raise InputError(f"{key} must be a list")
    found = []
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get(role), str):
            raise InputError(f"{key}[{index}] must be an object with a {role} and a {content}")
        who = message[role]
        if role == "from":
            if who not in SHAREGPT_ROLES:
                raise InputError(f"{key}[{index}]: from is {who!r}, not one of {_known()}")
            who = SHAREGPT_ROLES[who]
        text = message.get(content)
        if who != "assistant":
            _text(text, f"{key}[{index}].{content}")
        found.append({"role": who, "content": text})
    return found


def _known() -> str:
    return ", ".join(SHAREGPT_ROLES)


def _turns(messages: Sequence[dict[str, Any]], key: str) -> list[tuple[dict[str, str], ...]]:
    """The messages of each turn: up to and including one of the user, or the last before an answer
    (results of tools). The file's own answers are left out, but for what it lets the assistant say
    before the user's first word."""
    turns: list[tuple[dict[str, str], ...]] = []
    turn: list[dict[str, str]] = []
    for index, message in enumerate(messages):
        answer = message["role"] == "assistant" and bool(turns)
        if not answer:
            content = _text(message["content"], f"{key}[{index}]")
            turn.append({"role": message["role"], "content": content})
        if turn and (answer or message["role"] == "user"):
            turns.append(tuple(turn))
            turn = []
    if not turns:
        raise InputError(f"{key} has no message of the user")
    return [*turns, tuple(turn)] if turn else turns


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
