"""Where a run's texts come from: a file of the user's, the target, or both."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from vllm_specplus.training.data import Data, Language, Prompt, read_data
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.folder import RunFolder, write_text
from vllm_specplus.training.splits import HeldOut
from vllm_specplus.training.texts import Text, load_texts, prompt_id, to_line
from vllm_specplus.training.writer import Job, write_prompts

#: Tokens of a question and its answer, as the target writes them if it asks itself: a little less
#: than there are, so that the budget is reached.
PER_TEXT = 140
#: Share of the texts that is measured on where no file is given, and most of them.
MEASURED, MOST_MEASURED = 0.05, 200
#: Seconds between looks at what was written.
LOOK = 0.5


@dataclass(frozen=True)
class Wanted:
    """What texts a run wants."""

    target: Path
    data: Path | None
    tokens: int
    """Most tokens that the target writes, prompts included."""
    length: int
    """Most tokens of a text."""
    seed: int
    ray: bool


def gather(
    wanted: Wanted, folder: RunFolder, language: Language, held_out: HeldOut, console: Console
) -> None:
    """Writes the run's file of texts, unless it is there."""
    if folder.texts.exists():
        return
    data = Data()
    if wanted.data:
        data = read_data(wanted.data, language, held_out)
        if data.held_out:
            some = ", ".join(data.held_out[:5]) + (", ..." if len(data.held_out) > 5 else "")
            console.print(
                f"{len(data.held_out)} rows of {wanted.data} ask questions that are held out, and "
                f"are left out: {some}", markup=False,
            )  # fmt: skip
    texts = data.texts
    if data.prompts or not wanted.data:
        texts = texts + written_by_target(wanted, folder, data.prompts, console)
    keep(folder.texts, texts, wanted.length)


def gather_measured(
    path: Path, wanted: Wanted, folder: RunFolder, language: Language, console: Console
) -> HeldOut:
    """Writes the file of texts that the run measures on, greedy answers to the questions of
    ``path``, unless it is there; returns what must not be learnt from because of it."""
    nothing = HeldOut(frozenset(), frozenset())
    data = read_data(path, language, nothing)
    if not folder.measured_texts.exists():
        texts = data.texts
        if data.prompts:
            file, out = folder.path / "measured_questions.jsonl", folder.path / "measuring.jsonl"
            write_prompts(file, data.prompts)
            job = Job(
                model=str(wanted.target), prompts=str(file), out=str(out), tokens=sys.maxsize,
                length=wanted.length, temperatures=(0.0,), seed=wanted.seed, ray=wanted.ray,
            )  # fmt: skip
            texts = texts + do(job, folder, "answers to measure on", None, console)
        keep(folder.measured_texts, texts, wanted.length)
    prompts = [prompt_id(each.tokens) for each in data.prompts]
    prompts += [prompt_id(text.tokens[: text.start]) for text in data.texts if text.start]
    return nothing.and_also(data.wordings, prompts)


def written_by_target(
    wanted: Wanted, folder: RunFolder, prompts: Sequence[Prompt], console: Console
) -> list[Text]:
    """The target's own answers to prompts, or without any to questions that it asks itself."""
    if prompts:
        write_prompts(folder.questions, prompts)
    job = Job(
        model=str(wanted.target), prompts=str(folder.questions),
        out=str(folder.path / "writing.jsonl"), tokens=wanted.tokens, length=wanted.length,
        ask=0 if prompts else max(wanted.tokens // PER_TEXT, 8), seed=wanted.seed, ray=wanted.ray,
    )  # fmt: skip
    return do(job, folder, "texts of the target", wanted.tokens, console)


def do(job: Job, folder: RunFolder, what: str, tokens: int | None, console: Console) -> list[Text]:
    """Has a job done by a process of its own, and returns all that it has written."""
    order, out, log = folder.path / "job.json", Path(job.out), folder.path / "writer.log"
    write_text(order, job.model_dump_json() + "\n")
    command = [sys.executable, "-m", "vllm_specplus.training.writer", str(order)]
    with log.open("wb") as told, Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=tokens)
        process = subprocess.Popen(
            command, stdout=told, stderr=subprocess.STDOUT, pass_fds=folder.lock
        )
        try:
            while process.poll() is None:
                time.sleep(LOOK)
                bar.update(task, completed=count_tokens(out))
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise TrainingError(failure(log))
    texts = load_texts(out) if out.exists() else []
    out.unlink(missing_ok=True)
    order.unlink()
    return texts


def failure(log: Path) -> str:
    """What to tell of a writer that has failed: its own sentence, or its last line."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    own = [line for line in lines if line.startswith("Error: ")]
    if own:
        return own[-1].removeprefix("Error: ")
    last = lines[-1][:200] if lines else "it was ended from outside"
    return f"the target's texts could not be written ({last}): see {log}"


def count_tokens(path: Path) -> int:
    """Tokens of the whole lines of a file that is being written."""
    if not path.exists():
        return 0
    with path.open("rb") as file:
        return sum(line.count(b",") - 2 for line in file if line.endswith(b"\n"))


def keep(path: Path, texts: Sequence[Text], length: int) -> None:
    """Writes those of the texts, cut to ``length``, that leave something to learn."""
    cut = (text.cut(length) for text in texts)
    teaching = [text for text in cut if len(text.tokens) > max(text.start, 1)]
    if not teaching:
        raise TrainingError(
            f"no text has anything behind its prompt within {length} tokens: raise --max-length, "
            f"or bring other texts with --data"
        )
    write_text(path, "".join(f"{to_line(text)}\n" for text in teaching))


def split(texts: Sequence[Text], seed: int) -> tuple[list[Text], list[Text]]:
    """Texts to measure on, about a twentieth, and those to learn from; texts of one prompt stay
    together. TrainingError if there are not two prompts."""
    groups: dict[str, list[Text]] = {}
    for text in texts:
        known = text.tokens[: text.start] or text.tokens
        groups.setdefault(prompt_id([seed, *known]), []).append(text)
    if len(groups) < 2:
        raise TrainingError(
            "there is one prompt in all: bring more, or texts to measure on with --measure"
        )
    count = min(max(round(MEASURED * len(texts)), 1), MOST_MEASURED)
    measured: list[Text] = []
    learnt: list[Text] = []
    *some, last = sorted(groups)  # in the order of hashes, which is any
    for name in some:
        (measured if len(measured) < count else learnt).extend(groups[name])
    learnt += groups[last]
    return measured, learnt


def summary(texts: Sequence[Text]) -> dict[str, int]:
    """How many texts and tokens there are, and how many of them the loss sees."""
    return {
        "texts": len(texts),
        "tokens": sum(len(text.tokens) for text in texts),
        "learnt tokens": sum(len(text.tokens) - max(text.start, 1) for text in texts),
    }
