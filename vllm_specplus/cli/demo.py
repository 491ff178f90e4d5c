"""``vllm-specplus demo``: the same prompts answered with and without the plugin."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shlex
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from vllm_specplus.cli.model import ModelError, prepare_model

if TYPE_CHECKING:
    from vllm import LLM

SPECULATIVE_CONFIG = {"method": "token_recycling"}
MAX_TOKENS = 128
WARM_UP = "Write a short story about a lighthouse keeper who finds a letter in a bottle."
PROMPTS = {
    "Summary": (
        "Summarize: The old library stood at the end of the street. Every morning the librarian "
        "opened the doors, lit the lamps and put the returned books back on the shelves. Children "
        "came after school, read until it was dark, and left with more books than they could carry."
    ),
    "Code": "Write a Python class for a bank account with deposit, withdraw and balance.",
    "List": "List the planets of the solar system in order, with one fact about each of them.",
    "Translation": "Translate to Spanish: Good morning. Where is the train station?",
    "Maths": "What is 12 times 15? Explain step by step.",
}

#: What an engine gets to -> how long that takes, in parts of the whole.
STARTED, ANSWERED = "engine started", "all answered"
STAGES = {"vLLM imported": 4.0, STARTED: 5.0, ANSWERED: 0.0} | dict.fromkeys(PROMPTS, 1.0)

#: Two candidates this close in log-probability are a tie for bfloat16, which cannot tell
#: logits between 16 and 32 apart if they differ by less than 0.125.
NEAR_TIE = 0.25
#: Per cent of the processors that others may use before the speeds mean little.
BUSY = 20


@dataclass(frozen=True)
class Answer:
    """What one engine made of one prompt. ``steps`` counts its forward passes."""

    prompt_tokens: list[int]
    tokens: list[int]
    text: str
    seconds: float
    steps: int


@dataclass(frozen=True)
class Difference:
    """Where two greedy answers part.

    ``gap`` is by how much plain decoding prefers its own token, in log-probability.
    """

    position: int
    plain: str
    specplus: str
    gap: float


def demo(
    model: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            file_okay=False,
            help="Folder of a chat model; SmolLM2-135M-Instruct, fetched once, if not given.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, where equal drafts give equal texts, or bfloat16, where near-ties are "
            "decided by rounding."
        ),
    ] = "float32",
) -> None:
    """Answer five prompts with and without the plugin; compare the texts and the speed."""
    from vllm_specplus.kernels.native import cache_dir  # imports torch: not at every command

    console = Console(highlight=False)
    try:
        path = str(model or prepare_model())
    except ModelError as error:
        console.print(f"[red]Error:[/] {escape(str(error))}")
        raise typer.Exit(1) from error
    if model is None:
        console.print("The model has 135 million parameters: quick to try, not clever.")
    if psutil.cpu_percent(interval=1) > BUSY:
        console.print("[yellow]Other programs keep this machine busy: distrust the speeds.[/]")
    log = cache_dir() / "demo.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    log.unlink(missing_ok=True)
    console.print(
        f"Two engines answer, one after the other, in {dtype} and without torch.compile, which "
        f"would make both wait minutes to save seconds here. vLLM's log: {escape(str(log))}"
    )
    try:
        specplus, plain, differences = _compared(console, log, path, dtype)
    except Exception as error:  # whatever vLLM raised in the other process
        console.print(f"[red]vLLM failed:[/] {escape(str(error))}")
        console.print(f"More in {escape(str(log))}. Is all well with `vllm-specplus doctor`?")
        raise typer.Exit(1) from error
    _report(console, plain, specplus, differences)
    serve = ["vllm", "serve", path, "--speculative-config", json.dumps(SPECULATIVE_CONFIG)]
    console.print("\nThe same in a server, in one line to paste:")
    console.print(shlex.join(serve), markup=False, soft_wrap=True)


def _compared(
    console: Console, log: Path, model: str, dtype: str
) -> tuple[list[Answer], list[Answer], list[Difference | None]]:
    """Return the answers with the plugin and without, and where they differ.

    The engines are forked, one after the other, from a process that has imported vLLM. Not at once:
    the first measures at its start what a step costs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm"])

    def answers(what: str, config: dict[str, Any] | None, others: list[Answer]) -> Any:
        with _written_to(log):  # the process that is forked from has the files of this one
            engine = _Engine(context, what, log, model, dtype, config)
        with engine:
            waiting.until(STARTED, engine)
            engine.connection.send(others)
            return waiting.until(ANSWERED, engine)

    with _Waiting(console) as waiting:
        specplus, _ = answers("with the plugin", SPECULATIVE_CONFIG, [])
        plain, differences = answers("without", None, specplus)
    return specplus, plain, differences


class _Engine:
    """An engine in a process of its own, since vLLM keeps state for a process's life. It says how
    far it is, and answers when it is told to."""

    def __init__(self, context: Any, what: str, *job: Any):
        self.what = what
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, *job))
        self._process.start()
        theirs.close()

    def __enter__(self) -> _Engine:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):  # if it has no group yet
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()


class _Waiting:
    """Shows how far the engines are and how long they will take."""

    def __init__(self, console: Console):
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
                   TextColumn("left:"), TimeRemainingColumn())  # fmt: skip
        self._progress = Progress(*columns, console=console, speed_estimate_period=600)
        self._task = self._progress.add_task("", total=2 * sum(STAGES.values()))

    def __enter__(self) -> _Waiting:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def until(self, goal: str, engine: _Engine) -> Any:
        """Wait until the engine has reached it; return what it brings with it."""
        stage = ""
        while stage != goal:
            try:
                stage, brought = engine.connection.recv()
            except EOFError:
                raise RuntimeError("the engine's process has ended") from None
            if stage is None:
                raise RuntimeError(brought)
            self._progress.update(
                self._task, description=f"{engine.what}: {stage}", advance=STAGES[stage]
            )
        return brought


@contextmanager
def _written_to(log: Path) -> Iterator[None]:
    """Let what processes that are started meanwhile print go to ``log``."""
    kept = [os.dup(1), os.dup(2)]
    with log.open("a") as file:
        for descriptor in (1, 2):  # native code writes too: redirecting sys.stdout is not enough
            os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        for descriptor, old in enumerate(kept, start=1):
            os.dup2(old, descriptor)
            os.close(old)


def _serve(
    connection: Connection, log: Path, model: str, dtype: str, speculative_config: dict | None
) -> None:
    """Start an engine; when ``others``, answers of another, come, answer all prompts one at a time
    and say where the others differ. Sends what is reached, or None and what went wrong."""
    os.setpgrp()
    with log.open("a") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    try:
        import torch

        if not torch.cuda.is_available():
            # On a CPU a second process would compete with the engine for the cores.
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        connection.send(("vLLM imported", None))
        llm = LLM(
            model=model,
            enforce_eager=True,
            dtype=dtype,
            speculative_config=speculative_config,
            max_model_len=2048,
            # The default, a share of the machine's memory, fails on small machines.
            kv_cache_memory_bytes=512 << 20,
            disable_log_stats=False,
            seed=0,
        )
        _ask(llm, WARM_UP)
        connection.send((STARTED, None))
        others = connection.recv()
        answers = []
        for title, prompt in PROMPTS.items():
            answers.append(_ask(llm, prompt))
            connection.send((title, None))
        pairs = zip(answers, others, strict=False)
        connection.send((ANSWERED, (answers, [_difference(llm, *pair) for pair in pairs])))
    except Exception as error:
        traceback.print_exc()
        connection.send((None, str(error)))


def _ask(llm: LLM, prompt: str) -> Answer:
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS)
    steps, start = _steps(llm), time.perf_counter()
    (output,) = llm.chat([{"role": "user", "content": prompt}], params, use_tqdm=False)
    seconds = time.perf_counter() - start
    completion = output.outputs[0]
    return Answer(
        list(output.prompt_token_ids),
        list(completion.token_ids),
        completion.text.strip(),
        seconds,
        _steps(llm) - steps,
    )


def _steps(llm: LLM) -> int:
    """Engine steps so far: vLLM records the number of tokens of each in a histogram."""
    from vllm.v1.metrics.reader import Histogram

    name = "vllm:iteration_tokens_total"
    return sum(m.count for m in llm.get_metrics() if isinstance(m, Histogram) and m.name == name)


def _difference(llm: LLM, plain: Answer, specplus: Answer) -> Difference | None:
    """Find where the answers part and ask ``llm`` what it thinks of both tokens there."""
    from vllm import SamplingParams

    pairs = zip(plain.tokens, specplus.tokens, strict=False)
    position = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    if position is None:
        return None
    prompt = {"prompt_token_ids": plain.prompt_tokens + plain.tokens[:position]}
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    logprobs = {token: entry.logprob for token, entry in output.outputs[0].logprobs[0].items()}
    tokens = plain.tokens[position], specplus.tokens[position]
    preferred, other = (logprobs.get(token, -math.inf) for token in tokens)
    words = [llm.get_tokenizer().decode([token]) for token in tokens]
    return Difference(position, *words, gap=preferred - other)


def _report(
    console: Console,
    plain: list[Answer],
    specplus: list[Answer],
    differences: list[Difference | None],
) -> None:
    """Print the answers, where the texts differ, and the table of speeds."""
    for title, answer, difference in zip(PROMPTS, specplus, differences, strict=True):
        console.rule(title)
        console.print(Text(PROMPTS[title], style="dim"))
        console.print(Text(answer.text))
        if difference:
            console.print(Text(_explain(difference), style="yellow"))

    table = Table(title="One request at a time, greedy")
    table.add_column(no_wrap=True)
    for column in ("same text", "tokens", "per step", "plain tok/s", "tok/s", "speed-up"):
        table.add_column(column, justify="right")

    def add_row(title: str, same: str, plain: list[Answer], specplus: list[Answer]) -> None:
        tokens = sum(len(answer.tokens) for answer in specplus)
        per_step = tokens / sum(answer.steps for answer in specplus)
        before, after = _speed(plain), _speed(specplus)
        numbers = f"{tokens}", f"{per_step:.2f}", f"{before:.0f}", f"{after:.0f}"
        table.add_row(title, same, *numbers, f"{after / before:.2f}x")

    for title, old, new, difference in zip(PROMPTS, plain, specplus, differences, strict=True):
        add_row(title, "no" if difference else "yes", [old], [new])
    table.add_section()
    add_row("all", f"{differences.count(None)} of {len(differences)}", plain, specplus)
    console.print()
    console.print(table)
    gain = f"{_speed(specplus) / _speed(plain):.2f} times as many tokens per second"
    if not any(differences):
        console.print(f"All {len(plain)} answers are equal, token for token, at {gain}.")
        return
    console.print(
        f"{gain[0].upper()}{gain[1:]}. Texts part where two candidates nearly tie: several rows at "
        f"once round differently than one row does, in bfloat16 often, in float32 hardly ever."
    )


def _speed(answers: list[Answer]) -> float:
    """Tokens per second over all ``answers``."""
    return sum(len(answer.tokens) for answer in answers) / sum(a.seconds for a in answers)


def _explain(difference: Difference) -> str:
    """Say where the texts part and whether rounding accounts for it."""
    where = (
        f"Token {difference.position + 1} is {difference.specplus!r}, without the plugin "
        f"{difference.plain!r}: "
    )
    gap = abs(difference.gap)
    if gap <= NEAR_TIE:
        return where + f"a near-tie, {gap:.2f} apart in log-probability."
    return where + f"{gap:.2f} apart in log-probability. This is not rounding, please report it."
