"""Labels for judges, where nobody has marked errors by hand: ``train judge --data`` reads them.

    python -m vllm_specplus.training.judge_labels mistakes --model TARGET
        --questions questions.jsonl --out answers.jsonl
    python -m vllm_specplus.training.judge_labels swaps --target TARGET --draft DRAFT
        --questions questions.jsonl --out swaps.jsonl

``mistakes`` is Judge Decoding's data (arXiv 2501.19309): answers of mixed quality, written at
several temperatures, with their first error; asked of another model, too, the command adds to its
file. The authors have people look for errors; here the questions are those of
``bench/arithmetic.py``, which check every number.

``swaps`` is AutoJudge's (arXiv 2504.20039, Algorithm 1), for any questions with a result. Wherever
the draft's best token is not the one of the target's greedy answer, it takes its place, and the
target goes on behind it. Where that comes to the same result the token did not matter: the answer
goes on from there with it. Else it did, and the answer keeps the target's. Tokens that end texts
are left alone, since no judge accepts them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from vllm_specplus.bench import InputError
from vllm_specplus.bench.arithmetic import Problem, check, final_number, read_problems
from vllm_specplus.training.batch import collate
from vllm_specplus.training.data import Language, Prompt, language_of, read_data
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.folder import write_text
from vllm_specplus.training.language_model import LanguageModel, load_model
from vllm_specplus.training.sampling import end_tokens
from vllm_specplus.training.splits import committed
from vllm_specplus.training.texts import UNKNOWN, Text, prompt_id, to_line
from vllm_specplus.training.writer import Engine, request

app = typer.Typer(no_args_is_help=True, help="Labels for judges.")

#: Temperatures of answers of mixed quality, in turn.
TEMPERATURES = (0.0, 0.7, 1.0)
#: Texts that a draft reads side by side.
SIDE_BY_SIDE = 16

#: Goes on behind each text, to its end.
Write = Callable[[Sequence[tuple[int, ...]]], list[tuple[int, ...]]]
#: The draft's best token at every position behind the first, of each text.
Best = Callable[[Sequence[tuple[int, ...]]], list[list[int]]]
#: What a text comes to; None: to nothing.
Result = Callable[[Sequence[int]], Any]


@dataclass
class Search:
    """A question, and what has been tried in its answer."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    """The target's, with what did not matter swapped."""
    result: Any
    border: int
    """Index in prompt and answer from which on nothing was tried."""
    tried: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    """Texts that end with a swapped token, and 1 where it did not matter, else 0."""

    @property
    def text(self) -> tuple[int, ...]:
        return self.prompt + self.answer

    def mismatch(self, best: Sequence[int], ends: frozenset[int]) -> tuple[int, ...] | None:
        """The text up to the next token of which the draft thinks otherwise, with the draft's in
        its place; None: there is no more. ``best[i]`` is the draft's token at index ``i + 1``."""
        text = self.text
        for at in range(self.border, len(text)):
            token = best[at - 1]
            if token != text[at] and token not in ends and text[at] not in ends:
                self.border = at + 1
                return (*text[:at], token)
        return None

    def learn(self, swapped: tuple[int, ...], written: tuple[int, ...], result: Any) -> None:
        """What came of a swap: the target has ``written`` on, and it comes to ``result``."""
        same = result is not None and result == self.result
        self.tried.append((swapped, int(same)))
        if same:
            self.answer = (*swapped[len(self.prompt) :], *written)


def search(
    prompts: Sequence[tuple[int, ...]], write: Write, best: Best, result: Result,
    ends: frozenset[int], most: int,
) -> list[Search]:  # fmt: skip
    """Tries the draft's tokens in the target's answers, at most ``most`` in each; all questions
    side by side, a swap of each at a time. Answers without a result are left out."""
    searches = []
    for prompt, answer in zip(prompts, write(prompts), strict=True):
        came_to = result(answer)
        if came_to is not None:
            searches.append(Search(prompt, answer, came_to, len(prompt)))
    going = searches
    for _ in range(most):
        tokens = best([each.text for each in going])
        swaps = [(s, s.mismatch(row, ends)) for s, row in zip(going, tokens, strict=True)]
        trying = [(each, swapped) for each, swapped in swaps if swapped is not None]
        if not trying:
            break
        for (each, swapped), written in zip(
            trying, write([swapped for _, swapped in trying]), strict=True
        ):
            answer = (*swapped[len(each.prompt) :], *written)
            each.learn(swapped, written, result(answer))
        going = [each for each, _ in trying]
    return searches


def texts_of(searches: Iterable[Search]) -> Iterator[Text]:
    """A text for each swap, of which the last token alone is labelled: behind it there is no more
    to say."""
    for each in searches:
        name = prompt_id(each.prompt)
        for swapped, label in each.tried:
            labels = (*[UNKNOWN] * (len(swapped) - 1), label)
            yield Text(name, swapped, len(each.prompt), "given", labels)


class TargetWriter:
    """vLLM's engine with the target, greedy."""

    def __init__(self, model: Path, length: int):
        self._engine, self._length = Engine(str(model), length, 0), length

    def __call__(self, texts: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        lines = [
            request(Prompt(str(i), text), 0.0, self._length - len(text))
            for i, text in enumerate(texts)
            if len(text) < self._length
        ]
        written: list[tuple[int, ...]] = [()] * len(texts)
        for row in map(json.loads, self._engine({"line": lines})["line"]):
            written[int(row["id"])] = tuple(row["tokens"][row["start"] :])
        return written


class DraftReader:
    """transformers' model with the draft."""

    def __init__(self, folder: Path):
        model = load_model(folder, "draft", torch.float32, torch.device("cpu"))
        self._model = LanguageModel(model, torch.float32)
        self.ends = frozenset(end_tokens(model))
        """Tokens that end texts."""

    @torch.inference_mode()
    def __call__(self, texts: Sequence[tuple[int, ...]]) -> list[list[int]]:
        found = []
        for at in range(0, len(texts), SIDE_BY_SIDE):
            some = texts[at : at + SIDE_BY_SIDE]
            batch = collate([Text("", text, 0, "given") for text in some])
            hidden = self._model.read(batch.tokens, batch.mask)
            for row, text in zip(hidden, some, strict=True):
                found.append(self._model.output(row[: len(text)]).argmax(-1).tolist())
        return found


def asked(questions: Path, language: Language) -> list[Prompt]:
    """The prompts of a file; TrainingError if it has none. Questions that are held out are not
    among them."""
    prompts = read_data(questions, language, committed()).prompts
    if not prompts:
        raise TrainingError(f"{questions} has answers already: bring questions alone")
    return prompts


def mine_swaps(
    target: Path, draft: Path, questions: Path, out: Path, length: int, most: int
) -> tuple[int, int]:
    """Writes the labels of ``swaps``; returns how many there are, and how many matter."""
    language = language_of(target)
    if language_of(draft).vocab != language.vocab:
        raise TrainingError(
            f"{draft} has another vocabulary than {target}: swapped tokens would be others, take "
            f"models of one tokenizer"
        )
    prompts = [each.tokens for each in asked(questions, language) if len(each.tokens) < length // 2]
    reader = DraftReader(draft)
    searches = search(
        prompts, TargetWriter(target, length), reader,
        lambda tokens: final_number(language.tokenizer.decode(tokens, skip_special_tokens=True)),
        reader.ends, most,
    )  # fmt: skip
    texts = list(texts_of(searches))
    write_text(out, "".join(f"{to_line(text)}\n" for text in texts))
    return len(texts), sum(text.labels[-1] == 0 for text in texts)


def mine_mistakes(model: Path, questions: Path, out: Path, length: int) -> tuple[int, int]:
    """Adds the labels of ``mistakes``; returns how many answers they are, and how many are wrong.
    Answers that name no result are left out: nobody knows where they go wrong."""
    problems = {each.id: each for each in read_problems(questions)}
    language = language_of(model)
    lines = [
        request(prompt, TEMPERATURES[i % len(TEMPERATURES)], length // 2)
        for i, prompt in enumerate(asked(questions, language))
    ]
    rows = []
    for row in map(json.loads, Engine(str(model), length, 0)({"line": lines})["line"]):
        problem, own = problems[row["id"]], row["tokens"][row["start"] :]
        answer = language.tokenizer.decode(own, skip_special_tokens=True)
        if (labelled := mistake(problem, answer)) is not None:
            rows.append(labelled)
    with out.open("a", encoding="utf-8") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)
    return len(rows), sum(row["error"] is not None for row in rows)


def mistake(problem: Problem, answer: str) -> dict[str, Any] | None:
    """An answer as a row for ``train judge``; None of one that is not finished."""
    verdict = check(problem, answer)
    if not verdict.finished or not answer.strip():
        return None
    error = None if verdict.error is None else list(verdict.error)
    return {"id": problem.id, "prompt": problem.text, "answer": answer, "error": error}


Questions = Annotated[Path, typer.Option(help="JSON lines, as bench --dataset reads them.")]
Out = Annotated[Path, typer.Option(help="File of JSON lines to write.")]
Length = Annotated[int, typer.Option(min=16, help="Most tokens of a question and its answer.")]


def told(mine: Callable[[], tuple[int, int]], what: str, bad: str) -> None:
    """Mines, and says what came of it, or what is wrong in a sentence."""
    try:
        count, wrong = mine()
    except (TrainingError, InputError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"{count} {what}, {wrong} {bad}")


@app.command()
def swaps(
    target: Annotated[Path, typer.Option()],
    draft: Annotated[Path, typer.Option()],
    questions: Questions,
    out: Out,
    length: Length = 512,
    most: Annotated[int, typer.Option(min=1, help="Swaps in an answer.")] = 64,
) -> None:
    """Try the draft's tokens in the target's answers (AutoJudge)."""
    told(
        lambda: mine_swaps(target, draft, questions, out, length, most),
        "swapped tokens", "of them change the result",
    )  # fmt: skip


@app.command()
def mistakes(
    model: Annotated[Path, typer.Option(help="Who answers.")],
    questions: Questions,
    out: Annotated[Path, typer.Option(help="File of JSON lines to add to.")],
    length: Length = 512,
) -> None:
    """Mark the first error of answers to arithmetic questions (Judge Decoding)."""
    told(lambda: mine_mistakes(model, questions, out, length), "answers", "of them wrong")


if __name__ == "__main__":
    app()
