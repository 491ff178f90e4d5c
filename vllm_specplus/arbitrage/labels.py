"""What a router learns from: steps that both models wrote behind the same text, and how good each
was.

    python -m vllm_specplus.arbitrage.labels --draft URL_OR_DIR --target URL_OR_DIR
        --questions questions.jsonl --out steps.jsonl [--reward URL_OR_DIR] [--samples 4]

At every step both write, a reward scores both answers up to there, and the better step is gone on
behind; the draft's where they are equal. The reward is a process reward model, a classifier whose
second label says "right" (``--reward``), or, for the questions of ``bench/arithmetic.py``, their
own check. Of several ``--samples`` of the target, drawn at ``--temperature``, the mean counts, and
the first goes on.

Lines are what ``vllm-specplus train router --data`` reads: the advantage of the target is kept as a
number, and what is a label of it, the recipe says. A run that was ended goes on with the questions
that are missing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vllm_specplus.arbitrage.build import Named, classifier, engine
from vllm_specplus.arbitrage.engines import (
    Classifier,
    Engine,
    EngineError,
    Refused,
    http_client,
)
from vllm_specplus.arbitrage.steps import SEPARATOR, End, Step, Writer, Written
from vllm_specplus.bench import InputError
from vllm_specplus.bench.arithmetic import Problem, read_problems, score
from vllm_specplus.bench.dataset import Question, load_dataset

log = logging.getLogger(__name__)

#: Scores the steps of an answer to a question so far, in [0, 1].
Reward = Callable[[Sequence[str]], Awaitable[float]]
#: Questions that are answered at a time.
AT_ONCE = 16


@dataclass(frozen=True)
class Pair:
    """The models whose steps are compared, and how they write."""

    draft: Engine
    target: Engine
    max_steps: int
    max_tokens: int
    samples: int = 1
    temperature: float = 0.0


async def compared(
    pair: Pair, question: str, prompts: dict[Writer, str], reward: Reward, special_tokens: bool
) -> list[dict[str, Any]]:
    """A row for each step of an answer: what was before it, the draft's step, and the scores of
    both models' steps."""
    steps: list[Step] = []
    rows: list[dict[str, Any]] = []
    left = pair.max_tokens
    while left > 0 and len(steps) < pair.max_steps:
        before = [step.text for step in steps]

        async def write(writer: Writer, left: int = left, text: str = "".join(before)) -> Written:
            engine = pair.draft if writer is Writer.DRAFT else pair.target
            sampling = {"temperature": 0.0}
            if writer is Writer.TARGET and pair.samples > 1:
                sampling = {"temperature": pair.temperature}
            return await engine.write(prompts[writer] + text, left, (), sampling, special_tokens)

        writers = [Writer.DRAFT, *[Writer.TARGET] * pair.samples]
        drafted, *by_target = await asyncio.gather(*map(write, writers))
        of_draft, *of_target = await asyncio.gather(
            *(reward([*before, each.text]) for each in (drafted, *by_target))
        )
        mean = sum(of_target) / len(of_target)
        rows.append({
            "problem": question,
            "steps": [{"writer": str(step.writer), "text": step.text} for step in steps],
            "candidate": drafted.text, "draft_score": of_draft, "target_score": mean,
        })  # fmt: skip
        better = (Writer.DRAFT, drafted) if of_draft >= mean else (Writer.TARGET, by_target[0])
        writer, written = better
        steps.append(Step(writer, written.text, written.tokens, written.end))
        left -= written.tokens
        if written.end is not End.SEPARATOR:
            break
    return rows


def rewards_of(judge: Classifier, question: str) -> Reward:
    """A process reward model's score of a question's steps."""

    async def reward(steps: Sequence[str]) -> float:
        return await judge.probability(f"{question}\n" + "".join(steps))

    return reward


def checks_of(problem: Problem) -> Reward:
    """The score of an arithmetic question's steps, by their own check."""

    async def reward(steps: Sequence[str]) -> float:
        return score(problem, steps)

    return reward


def done_before(out: Path) -> set[str]:
    """Ids of the questions in a file; a line that was cut is taken off it."""
    if not out.exists():
        return set()
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        out.write_bytes(whole)
    return {json.loads(line)["id"] for line in whole.splitlines()}


def asked(questions: Path, limit: int) -> Iterator[tuple[Question, Problem | None]]:
    """The questions of a file, with what arithmetic ones are checked by."""
    loaded = load_dataset(questions).questions[:limit]
    by_id = {}
    if loaded and loaded[0].category == "arithmetic":
        by_id = {problem.id: problem for problem in read_problems(questions)}
    return ((each, by_id.get(each.id)) for each in loaded)


async def label(
    pair: Pair, judge: Classifier | None, questions: Path, out: Path, limit: int, chat: bool
) -> int:
    """Compares the models on all questions that are not in ``out``, in which all steps of one are
    written at once; returns how many steps there are. InputError or EngineError."""
    done, free, count = done_before(out), asyncio.Semaphore(AT_ONCE), 0

    async def one(question: Question, problem: Problem | None) -> None:
        nonlocal count
        own = {"role": "user", "content": question.prompt or ""}
        messages = list(question.messages or [own])
        text = "\n".join(each["content"] for each in messages if each["role"] == "user")
        if judge is not None:
            reward = rewards_of(judge, text)
        elif problem is not None:
            reward = checks_of(problem)
        else:
            raise InputError(
                f"nothing checks the answers of {questions}: name a process reward model by "
                f"--reward, or take questions of python -m vllm_specplus.bench.arithmetic"
            )
        async with free:
            prompts = dict.fromkeys(Writer, text)
            try:
                if chat:
                    for writer, model in ((Writer.DRAFT, pair.draft), (Writer.TARGET, pair.target)):
                        prompts[writer] = await model.chat_prompt(messages)
                rows = await compared(pair, text, prompts, reward, not chat)
            except Refused as error:
                log.warning("question %s is left out: %s", question.id, error)
                return
        lines = "".join(json.dumps({"id": question.id, **row}) + "\n" for row in rows)
        with out.open("a", encoding="utf-8") as file:
            file.write(lines)
        count += len(rows)

    await asyncio.gather(
        *(one(question, problem) for question, problem in asked(questions, limit)
          if question.id not in done)
    )  # fmt: skip
    return count


def main(
    draft: Annotated[str, typer.Option(help="A server's address, or a folder.")],
    target: Annotated[str, typer.Option(help="A server's address, or a folder.")],
    questions: Annotated[Path, typer.Option(help="JSON lines, as bench --dataset reads them.")],
    out: Annotated[Path, typer.Option(help="File of JSON lines; an ended run goes on.")],
    reward: Annotated[str | None, typer.Option(help="A process reward model.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions.")] = 30_000,
    chat: Annotated[bool, typer.Option("--chat/--no-chat", help="By chat templates.")] = True,
    samples: Annotated[int, typer.Option(min=1, help="Steps of the target each time.")] = 1,
    temperature: Annotated[float, typer.Option(min=0, help="Of several samples.")] = 0.7,
    max_steps: Annotated[int, typer.Option(min=1)] = 150,
    max_tokens: Annotated[int, typer.Option(min=1)] = 2048,
) -> None:
    """Have two models write the same steps, and score them."""

    async def run() -> int:
        async with http_client(os.environ.get("VLLM_API_KEY")) as http:
            with ExitStack() as open_engines:
                first, second = [
                    await engine(what, Named(place), SEPARATOR, http, open_engines)
                    for what, place in (("draft", draft), ("target", target))
                ]
                judge = None if reward is None else await classifier("reward model", reward, http)
                pair = Pair(first, second, max_steps, max_tokens, samples, temperature)
                return await label(pair, judge, questions, out, limit, chat)

    try:
        count = asyncio.run(run())
    except (EngineError, InputError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{count} steps in {out}")


if __name__ == "__main__":
    typer.run(main)
