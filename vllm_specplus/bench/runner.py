"""Runs the methods side by side: which engine measures what, when.

Every combination of method, load and repeat sees every prompt once, in an engine that knows
nothing yet; otherwise drafters that remember (suffix trees, token recycling) would answer from
memory. It is the method's engine of before, which forgets what it has learnt (`Renew`), or a fresh
one, where it has ended or does not know how.

The questions are split into rounds, and the methods take turns:

* On the CPU platform the engines of all methods are alive together, and take turns within a
  round, every few seconds and between two steps, in an order that rotates from round to round. A
  machine that becomes slower so hits all methods alike. What passes between an engine's turns
  does not count. Engines whose turn it is not are stopped with SIGSTOP: an idle one would still
  burn CPU time, because OpenMP threads and vLLM's processes wait by spinning.
* On other devices, and with `sequential`, one engine is alive at a time, because each wants the
  device's memory for itself. It measures all its rounds at all loads, and the order
  rotates over the repeats.
"""

import os
import re
import select
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, TypeVar

import psutil
from pydantic import BaseModel

from vllm_specplus import preloads
from vllm_specplus.bench.dataset import Question, first_turn, split_rounds
from vllm_specplus.bench.loads import Load
from vllm_specplus.bench.methods import BASELINE, MethodSpec
from vllm_specplus.bench.protocol import (
    ALIVE,
    REPLY,
    Continue,
    EngineReady,
    EngineSetup,
    Failed,
    MachineInfo,
    MarginRequest,
    MarginResult,
    Paused,
    Prefix,
    Renew,
    Renewed,
    RoundRequest,
    RoundResult,
    ScoreRequest,
    ScoreResult,
)

ENGINE_MODULE = "vllm_specplus.bench.engine"

# Seconds that an engine gets to end by itself.
SHUTDOWN_S = 30.0
# Seconds of a turn: many steps, and short against the minutes in which a machine's speed drifts.
SLICE_S = 3.0
# Seconds between two looks at whether a silent engine process is still alive.
POLL_S = 1.0
LONGEST_ERROR = 400
# Share of the free memory that the engines alive together may plan with.
CPU_MEMORY_SHARE = 0.8

R = TypeVar("R", bound=BaseModel)
Notify = Callable[[str | None, int], None]
Stage = Literal["start", "measure", "margins", "scores"]
#: Stages after the measurement, without which it still stands.
AFTERWARDS = ("margins", "scores")


@dataclass(frozen=True)
class Plan:
    """What to measure. `warmup` has questions that are not in `measured`."""

    model: str
    methods: Sequence[MethodSpec]
    loads: Sequence[Load]
    measured: Sequence[Question]
    warmup: Sequence[Question]
    rounds: int
    repeat: int
    max_tokens: int
    temperature: float
    seed: int
    chat_template: bool
    engine_args: dict[str, Any]
    sequential: bool


@dataclass
class Session:
    """What one engine measured.

    `margins`: nats, by question, where it differs from `none`. `scores`: how far
    below the model's best tokens those of the answers are, nats on average, by question; of lossy
    methods and of `none` beside them.
    """

    method: MethodSpec
    load: Load
    repeat: int
    startup_s: float
    rounds: list[RoundResult] = field(default_factory=list)
    margins: dict[str, float] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)

    def answers(self) -> dict[str, list[int]]:
        """Token ids by question, and by later turns."""
        return {
            request.question_id: request.token_ids
            for result in self.rounds
            for request in result.requests
        }


@dataclass(frozen=True)
class Failure:
    """A method that could not be measured, or not entirely, at a load."""

    method: MethodSpec
    load: Load
    stage: Stage
    error: str
    log: Path


class EngineError(RuntimeError):
    """An engine process failed; `log` is where it wrote."""

    def __init__(self, message: str, log: Path) -> None:
        super().__init__(message)
        self.log = log


class EngineProcess:
    """An engine's process, and the line-by-line conversation with it.

    It ends with this process, however that ends: it reads a pipe of which this process alone has
    the other end.
    """

    def __init__(
        self,
        log: Path,
        *arguments: str,
        cwd: Path | None = None,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """`cwd`: a checkout whose code the engine runs, by default the code of this process;
        `variables`: of its environment, besides or in the place of those here.
        """
        self.log = log
        alive, self._alive = os.pipe()
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", ENGINE_MODULE, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
                cwd=cwd,
                env=os.environ | preloads.environment() | (variables or {}) | {ALIVE: str(alive)},
                pass_fds=(alive,),
            )
        os.close(alive)

    def __enter__(self) -> "EngineProcess":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.resume()
        if kind is None and self._process.poll() is None:
            self._process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(SHUTDOWN_S)
        self.kill()
        self._process.stdout.close()
        os.close(self._alive)

    def send(self, message: BaseModel) -> None:
        """Write one message."""
        try:
            self._process.stdin.write(message.model_dump_json() + "\n")
            self._process.stdin.flush()
        except BrokenPipeError as exc:
            raise self._died() from exc

    def receive(self, *replies: type[R]) -> R:
        """Wait for one of these answers, however long it takes, as long as the process lives."""
        stdout = self._process.stdout
        while not select.select([stdout], [], [], POLL_S)[0]:
            # No end of file to wait for: a forked descendant may hold the pipe open.
            if self._process.poll() is not None:
                raise self._died()
        line = stdout.readline()
        if not line:
            raise self._died()
        message = REPLY.validate_json(line)
        if isinstance(message, Failed):
            raise EngineError(error_line(message.error, self.log), self.log)
        if not isinstance(message, replies):
            raise EngineError(f"unexpected answer of kind {message.kind}", self.log)
        return message

    def kill(self) -> None:
        """End the engine and all its processes at once."""
        # The whole group: vLLM's own processes may outlive the one that started them.
        self._signal(signal.SIGKILL)
        self._process.wait()

    def suspend(self) -> None:
        """Stop all the engine's threads and processes where they are."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue after `suspend`."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            # The group is gone, or the child has not made it yet.
            self._process.send_signal(number)

    def _died(self) -> EngineError:
        code = self._process.wait()
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return EngineError(
            error_line(f"the engine process ended with {reason}", self.log), self.log
        )


def error_line(error: str, log: Path) -> str:
    """The error on one line, with the root cause when vLLM only refers to it."""
    if "root cause" in error or "engine process ended" in error:
        causes = re.findall(
            r"^.*?\b([A-Z]\w*(?:Error|Exception): .+)$", log.read_text(errors="replace"), re.M
        )
        causes = [cause for cause in causes if "root cause" not in cause]
        if causes:
            error = f"{error} ({causes[0]})"
    # Pydantic appends the input and a link to every error.
    error = re.sub(r"\s*\[type=.*?For further information visit \S+", ";", error, flags=re.S)
    return shorten(error.rstrip(";"), LONGEST_ERROR, placeholder=" ...")


def describe_machine(log: Path) -> MachineInfo:
    """Ask a short-lived child for device and versions; raises `EngineError` without vLLM."""
    with EngineProcess(log, "--describe") as process:
        return process.receive(MachineInfo)


def effective_engine_args(plan: Plan, machine: MachineInfo, sequential: bool) -> dict[str, Any]:
    """The engines' arguments, with their memory divided among those alive together.

    vLLM plans with 92 % of the machine's memory, more than is free on a CPU machine in use. Only
    the size of the KV cache depends on it. On other devices, and when the user chose, nothing is
    added.
    """
    chosen = {"gpu_memory_utilization", "kv_cache_memory_bytes"} & plan.engine_args.keys()
    if machine.device_type != "cpu" or chosen or os.environ.get("VLLM_CPU_KVCACHE_SPACE"):
        return plan.engine_args
    memory = psutil.virtual_memory()
    alive = 1 if sequential else len(plan.methods)
    share = CPU_MEMORY_SHARE * memory.available / memory.total / alive
    return {**plan.engine_args, "gpu_memory_utilization": round(share, 3)}


def first_difference(reference: Sequence[int], tokens: Sequence[int]) -> int | None:
    """Index of the first token that differs (the shorter length if one is a prefix)."""
    for index, (expected, token) in enumerate(zip(reference, tokens, strict=False)):
        if expected != token:
            return index
    if len(reference) != len(tokens):
        return min(len(reference), len(tokens))
    return None


def find_differences(group: Sequence[Session], temperature: float) -> list[tuple[Session, Prefix]]:
    """The answers that differ from the baseline's, with the part that both have in common.

    Sampled answers are not compared: they are equal in distribution, not token by token.
    """
    baseline = next((session for session in group if session.method.name == BASELINE), None)
    if baseline is None or temperature > 0:
        return []
    references = baseline.answers()
    differences = []
    for session in group:
        parted: set[str] = set()
        for question_id, token_ids in session.answers().items():
            question = first_turn(question_id)
            if question in parted or question_id not in references:
                continue  # it was asked something else
            position = first_difference(references[question_id], token_ids)
            if position is not None:
                parted.add(question)
                common = references[question_id][:position]
                differences.append((session, Prefix(question_id=question_id, token_ids=common)))
    return differences


def rotated(items: Sequence[Any], count: int) -> list[Any]:
    """The items, starting from another one each time."""
    offset = count % len(items)
    return [*items[offset:], *items[:offset]]


@dataclass(frozen=True)
class Started:
    """An engine that is alive. `startup_s`: seconds to build it."""

    engine: EngineProcess
    startup_s: float


@dataclass
class Live:
    """A session whose engine is alive."""

    session: Session
    engine: EngineProcess


class Engines:
    """The engines that are alive, one per method at most; they end with the block."""

    def __init__(
        self,
        plan: Plan,
        engine_args: dict[str, Any],
        logs: Path,
        notify: Notify,
        process_options: Callable[[MethodSpec], dict[str, Any]],
    ) -> None:
        """`process_options`: keywords of `EngineProcess` for a method's engine."""
        self._plan, self._engine_args = plan, engine_args
        self._logs, self._notify, self._process_options = logs, notify, process_options
        self._stack = ExitStack()
        self._alive: dict[str, Started] = {}
        self._number = 0

    def __enter__(self) -> "Engines":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def alive(self, method: MethodSpec) -> "Started | None":
        """The method's engine, whatever it has learnt."""
        return self._alive.get(method.label)

    def ready(self, method: MethodSpec, load: Load) -> "Started":
        """An engine that is as if it had just started and warmed up, and stopped."""
        return self._renewed(method, load) or self.start(method, load)

    def _renewed(self, method: MethodSpec, load: Load) -> "Started | None":
        """The method's engine, if it is alive and can forget what it has learnt."""
        started = self.alive(method)
        if started is None:
            return None
        self._notify(f"{method.label}: renewing", 0)
        engine = started.engine
        try:
            engine.resume()
            engine.send(Renew(concurrency=load.slots))
            if engine.receive(Renewed).done:
                engine.suspend()
                return started
        except EngineError:
            pass
        self.lost(method)
        return None

    def start(self, method: MethodSpec, load: Load) -> "Started":
        """Start and warm up an engine, and leave it stopped."""
        self._notify(f"{method.label}: starting", 0)
        self._number += 1
        name = re.sub(r"[^\w.=-]+", "_", method.label)
        log = self._logs / f"{self._number:02}-{name}.log"
        engine = self._stack.enter_context(EngineProcess(log, **self._process_options(method)))
        plan = self._plan
        setup = EngineSetup(
            model=plan.model,
            speculative_config=method.speculative_config,
            engine_args=self._engine_args,
            measured=list(plan.measured),
            warmup=list(plan.warmup[: 2 * max(each.slots for each in plan.loads)]),
            concurrency=load.slots,
            max_tokens=plan.max_tokens,
            temperature=plan.temperature,
            seed=plan.seed,
            chat_template=plan.chat_template,
        )
        try:
            engine.send(setup)
            ready = engine.receive(EngineReady)
        except EngineError:
            engine.kill()
            raise
        engine.suspend()
        started = self._alive[method.label] = Started(engine, ready.startup_s)
        return started

    def lost(self, method: MethodSpec) -> None:
        """The method's engine is of no more use."""
        started = self._alive.pop(method.label, None)
        if started is not None:
            started.engine.kill()

    def end(self) -> None:
        """End all."""
        self._alive.clear()
        self._stack.close()


class Benchmark:
    """Carries out a plan; `sessions` and `failures` fill as it goes.

    `notify(what, settled)` tells what is being done (None: still the same), and how many questions
    were answered or given up since the last call. `save` is called whenever a load is done,
    so that a long run that is interrupted leaves what it has.
    """

    def __init__(
        self,
        plan: Plan,
        machine: MachineInfo,
        logs: Path,
        notify: Notify,
        save: "Callable[[Benchmark], None]",
    ) -> None:
        self.plan = plan
        self.sequential = plan.sequential or machine.device_type != "cpu"
        self.engine_args = effective_engine_args(plan, machine, self.sequential)
        self.sessions: list[Session] = []
        self.failures: list[Failure] = []
        self._notify = notify
        self._save = save
        self._unstartable: set[str] = set()
        self._engines = Engines(plan, self.engine_args, logs, notify, self._process_options)

    def run(self) -> None:
        """Measure everything. A method that fails leaves the others alone.

        One that could not start is not tried again. One that failed later loses its sessions at
        that load, so that what is reported has all its questions.
        """
        with self._engines:
            for repeat in range(self.plan.repeat):
                if self.sequential:
                    self._one_by_one(repeat)
                else:
                    self._together(repeat)

    def _drop_incomplete(self) -> None:
        incomplete = {
            (failure.method.label, failure.load)
            for failure in self.failures
            if failure.stage not in AFTERWARDS
        }
        self.sessions = [
            session
            for session in self.sessions
            if (session.method.label, session.load) not in incomplete
        ]

    def _together(self, repeat: int) -> None:
        """Measure with all methods' engines alive."""
        for load in self.plan.loads:
            live = self._ready(rotated(self.plan.methods, repeat), load, repeat)
            group = [item.session for item in self._take_turns(live, load)]
            self._judge(group, load)
            self._keep(group)

    def _one_by_one(self, repeat: int) -> None:
        """Measure with one engine alive, which has seen all loads when the next one starts."""
        groups: dict[Load, list[Session]] = {load: [] for load in self.plan.loads}
        for method in rotated(self.plan.methods, repeat):
            for load, group in groups.items():
                live = self._ready([method], load, repeat)
                group += [item.session for item in self._take_turns(live, load)]
            self._engines.end()
        for load, group in groups.items():
            self._judge(group, load)
        self._engines.end()
        self._keep([session for group in groups.values() for session in group])

    def _keep(self, sessions: Sequence[Session]) -> None:
        """Take in what was measured, and save it."""
        self.sessions += sessions
        self._drop_incomplete()
        self._save(self)

    def _ready(self, methods: Sequence[MethodSpec], load: Load, repeat: int) -> list[Live]:
        """Engines that are as if they had just started and warmed up, and stopped."""
        live = []
        for method in methods:
            if method.label in self._unstartable:
                self._notify(f"{method.label}: skipped", len(self.plan.measured))
                continue
            try:
                started = self._engines.ready(method, load)
            except EngineError as exc:
                self._unstartable.add(method.label)
                self._fail(method, load, "start", exc, len(self.plan.measured))
                continue
            session = Session(method, load, repeat, started.startup_s)
            live.append(Live(session, started.engine))
        return live

    def _process_options(self, method: MethodSpec) -> dict[str, Any]:
        """Keywords of `EngineProcess` for the method's engine."""
        return {}

    def _take_turns(self, live: list[Live], load: Load) -> list[Live]:
        """Measure every round with every engine; return the ones that lasted."""
        lasting = list(live)
        rounds = split_rounds(self.plan.measured, self.plan.rounds, load.slots)
        slice_s = SLICE_S if len(live) > 1 else None
        for number, questions in enumerate(rounds):
            start = RoundRequest(
                question_ids=[each.id for each in questions],
                slice_s=slice_s,
                arrivals=load.arrivals(len(questions), self.plan.seed + number),
            )
            turns = deque((item, start) for item in (rotated(lasting, number) if lasting else []))
            while turns:
                item, request = turns.popleft()
                session, engine = item.session, item.engine
                if request is start:
                    self._notify(
                        f"{session.method.label}: {load}, round {number + 1} of {len(rounds)}",
                        0,
                    )
                try:
                    engine.resume()
                    engine.send(request)
                    reply = engine.receive(RoundResult, Paused)
                    engine.suspend()
                except EngineError as exc:
                    self._engines.lost(session.method)
                    lasting.remove(item)
                    left = sum(len(later) for later in rounds[number:])
                    self._fail(session.method, load, "measure", exc, left)
                    continue
                if isinstance(reply, Paused):
                    turns.append((item, Continue()))
                else:
                    session.rounds.append(reply)
                    self._notify(None, len(questions))
        return lasting

    def _judge(self, group: Sequence[Session], load: Load) -> None:
        """What the baseline's engine, or another like it, says of the answers: the margins where
        they differ from its own, and how far it finds those of lossy methods."""
        baseline = next(
            (session.method for session in group if session.method.name == BASELINE), None
        )
        # What a later turn was asked, only the engine that answered it knows.
        differences = [
            (session, prefix)
            for session, prefix in find_differences(group, self.plan.temperature)
            if first_turn(prefix.question_id) == prefix.question_id
        ]
        lossy = any(session.method.lossy for session in group)
        if baseline is None or not (differences or lossy):
            return
        stage: Stage = "margins"
        try:
            started = self._engines.alive(baseline) or self._engines.start(baseline, load)
            started.engine.resume()
            if differences:
                self._add_margins(started.engine, differences)
            if lossy:
                stage = "scores"
                self._add_scores(started.engine, group)
            started.engine.suspend()
        except EngineError as exc:
            self._engines.lost(baseline)
            self._fail(baseline, load, stage, exc, 0)

    def _add_margins(
        self, judge: EngineProcess, differences: Sequence[tuple[Session, Prefix]]
    ) -> None:
        self._notify(f"measuring the margins of {len(differences)} differences", 0)
        judge.send(MarginRequest(prefixes=[prefix for _, prefix in differences]))
        result = judge.receive(MarginResult)
        for (session, prefix), nats in zip(differences, result.nats, strict=True):
            session.margins[prefix.question_id] = nats

    def _add_scores(self, judge: EngineProcess, group: Sequence[Session]) -> None:
        for session in group:
            if not session.method.lossy and session.method.name != BASELINE:
                continue
            self._notify(f"{session.method.label}: measuring its answers' distance", 0)
            answers = [
                Prefix(question_id=question_id, token_ids=token_ids)
                for question_id, token_ids in session.answers().items()
                if first_turn(question_id) == question_id
            ]
            judge.send(ScoreRequest(answers=answers))
            nats = judge.receive(ScoreResult).nats
            scored = (answer.question_id for answer in answers)
            session.scores = dict(zip(scored, nats, strict=True))

    def _fail(
        self, method: MethodSpec, load: Load, stage: Stage, exc: EngineError, left: int
    ) -> None:
        self.failures.append(Failure(method, load, stage, str(exc), exc.log))
        self._notify(f"{method.label}: failed", left)
