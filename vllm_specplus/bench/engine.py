"""The child process that runs one engine: `python -m vllm_specplus.bench.engine`.

It reads an `EngineSetup` and then requests from standard input and answers on standard output
(see `protocol`); everything that vLLM prints goes to standard error, the log. With `--describe`
it answers with a `MachineInfo` and ends.
"""

import os
import select
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import psutil
from pydantic import BaseModel

from vllm_specplus.bench.dataset import Question, first_turn, turn_id
from vllm_specplus.bench.protocol import (
    ALIVE,
    REQUEST,
    Continue,
    DraftCounters,
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
    RequestResult,
    RoundRequest,
    RoundResult,
    ScoreRequest,
    ScoreResult,
)

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

# Enough to compile and to fill caches, without making the warm-up a second benchmark.
WARMUP_TOKENS = 32
# Longest sleep of an engine without requests, which is to give way to the others in time.
IDLE_S = 0.05

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "GOMP_CPU_AFFINITY",
    "GOMP_SPINCOUNT",
    "KMP_AFFINITY",
    "KMP_BLOCKTIME",
    "LD_PRELOAD",
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_NUM_OF_RESERVED_CPU",
)


@dataclass
class Trace:
    """What is observed of one request while it is answered; times are those of a `Clock`."""

    submitted: float
    token_ids: list[int]
    first: float = 0.0
    last: float = 0.0
    first_tokens: int = 0
    outputs: int = 0

    def observe(self, token_ids: Sequence[int], now: float) -> None:
        """Take the tokens that one engine step produced for the request."""
        if not token_ids:
            return
        if self.outputs == 0:
            self.first = now
            self.first_tokens = len(token_ids)
        self.last = now
        self.outputs += 1
        self.token_ids.extend(token_ids)

    def result(self, question_id: str) -> RequestResult:
        """Sum up a finished request."""
        later = len(self.token_ids) - self.first_tokens
        return RequestResult(
            question_id=question_id,
            token_ids=self.token_ids,
            first_tokens=self.first_tokens,
            steps=max(self.outputs - 1, 0),
            ttft_s=self.first - self.submitted,
            tpot_s=(self.last - self.first) / later if later else None,
            latency_s=self.last - self.submitted,
        )


class Clock:
    """Seconds, and what other processes did in them, without the pauses of a round in slices."""

    def __init__(
        self, slice_s: float | None = None, give_way: Callable[[], None] | None = None
    ) -> None:
        """`give_way` returns when it is this engine's turn again."""
        self._slice_s, self._give_way = slice_s, give_way
        self._started = self._turn = time.perf_counter()
        self._other_cpu_s = other_cpu_seconds()

    def now(self) -> float:
        """Seconds."""
        return time.perf_counter() - self._started

    def other_cpu_s(self) -> float:
        """CPU seconds of the machine that were not this engine's."""
        return other_cpu_seconds() - self._other_cpu_s

    def idle(self, seconds: float) -> None:
        """Let time pass in which there is nothing to do."""
        time.sleep(min(seconds, IDLE_S))

    def between_steps(self) -> None:
        """Pause if the slice is over."""
        paused = time.perf_counter()
        if self._slice_s is None or paused - self._turn < self._slice_s:
            return
        other = other_cpu_seconds()
        self._give_way()
        self._turn = time.perf_counter()
        self._started += self._turn - paused
        self._other_cpu_s += other_cpu_seconds() - other


Job = tuple[str, Any, "SamplingParams"]
"""Question id, prompt and sampling parameters, which must ask for delta outputs: each output then
holds the tokens of one engine step."""


def run_loop(
    engine: "LLMEngine",
    jobs: Iterable[Job],
    clock: Clock,
    in_flight: int | None = None,
    arrivals: Sequence[float] = (),
    following: Callable[[str, list[int]], Job | None] = lambda *_: None,
) -> list[RequestResult]:
    """Answer the jobs, `in_flight` at a time, a new request as soon as one has left; or, where that
    is None, each at its time of `arrivals`.

    `following` makes the next turn of a job that was answered with these tokens; it takes the place
    of the one before at once.
    """
    waiting, due = deque(jobs), deque(arrivals)
    traces: dict[str, Trace] = {}
    finished: list[RequestResult] = []

    def submit(job: Job, at: float) -> None:
        traces[job[0]] = Trace(submitted=at, token_ids=[])
        engine.add_request(*job)

    while waiting or traces:
        if in_flight is not None:
            while waiting and len(traces) < in_flight:
                submit(waiting.popleft(), clock.now())
        else:
            while waiting and due[0] <= clock.now():
                submit(waiting.popleft(), due.popleft())
            if not traces:
                clock.idle(due[0] - clock.now())
        outputs = engine.step() if traces else []
        now = clock.now()
        for output in outputs:
            completion, name = output.outputs[0], output.request_id
            traces[name].observe(completion.token_ids, now)
            if not output.finished:
                continue
            if completion.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"question {name} ended with {completion.finish_reason}")
            result = traces.pop(name).result(name)
            finished.append(result)
            turn = following(name, result.token_ids)
            if turn is not None:
                submit(turn, clock.now())
        clock.between_steps()
    return finished


class Engine:
    """One vLLM engine, its prompts as token ids, and what can be measured with it."""

    def __init__(self, setup: EngineSetup) -> None:
        from vllm import LLM

        started = time.perf_counter()
        self.llm: LLM = LLM(
            model=setup.model,
            speculative_config=setup.speculative_config,
            # vllm serve's default, and the source of the draft counters.
            disable_log_stats=False,
            worker_extension_cls="vllm_specplus.engine.renewal.Renewal",
            **setup.engine_args,
        )
        self.startup_s = time.perf_counter() - started
        self.setup = setup
        self.concurrency = setup.concurrency
        questions = [*setup.measured, *setup.warmup]
        self.questions = {question.id: question for question in questions}
        self.prompts = {question.id: self._encode_first(question) for question in questions}
        ids = (name for question in questions for name in question.turn_ids())
        self.numbers = {name: number for number, name in enumerate(ids)}
        self.room = self.llm.llm_engine.model_config.max_model_len - setup.max_tokens
        for name, prompt in self.prompts.items():
            if len(prompt) > self.room:
                raise ValueError(
                    f"question {name} has {len(prompt)} tokens, but max_model_len minus "
                    f"--max-tokens leaves room for {self.room}"
                )

    def _encode_first(self, question: Question) -> list[int]:
        """Token ids of a question's first turn; encoding it is not part of what is measured."""
        tokenizer = self.llm.get_tokenizer()
        if question.messages is None:
            return tokenizer.encode(question.prompt)
        if not self.setup.chat_template:
            return tokenizer.encode(question.messages[-1]["content"])
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {self.setup.model} has no chat template; "
                "--no-chat-template sends the questions as raw text"
            )
        return self._encode(question.messages)

    def _encode(self, messages: Sequence[dict[str, str]]) -> list[int]:
        tokenizer = self.llm.get_tokenizer()
        text = tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        # The template has already written the special tokens.
        return tokenizer.encode(text, add_special_tokens=False)

    def _answer(
        self,
        question_ids: Sequence[str],
        max_tokens: int,
        clock: Clock,
        arrivals: Sequence[float] | None = None,
    ) -> list[RequestResult]:
        jobs = [self._job(name, self.prompts[name], max_tokens) for name in question_ids]
        talks = {name: list(self.questions[name].messages or ()) for name in question_ids}
        # Turn id -> (question id, number of the turn).
        turns = {
            name: (question, number)
            for question in question_ids
            for number, name in enumerate(self.questions[question].turn_ids())
        }

        def following(name: str, answer: list[int]) -> Job | None:
            question_id, number = turns[name]
            question, talk = self.questions[question_id], talks[question_id]
            if number == len(question.later):
                return None
            said = self.llm.get_tokenizer().decode(answer, skip_special_tokens=True)
            talk += [{"role": "assistant", "content": said}, *question.later[number]]
            prompt, following_id = self._encode(talk), turn_id(question_id, number + 1)
            # A talk that has become too long ends.
            if len(prompt) > self.room:
                return None
            return self._job(following_id, prompt, max_tokens)

        in_flight = self.concurrency if arrivals is None else None
        return run_loop(self.llm.llm_engine, jobs, clock, in_flight, arrivals or (), following)

    def _job(self, name: str, prompt: list[int], max_tokens: int) -> Job:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        (rendered,) = self.llm.renderer.render_cmpl([TokensPrompt(prompt_token_ids=prompt)])
        own = self.questions[first_turn(name)].max_tokens
        params = SamplingParams(
            temperature=self.setup.temperature,
            max_tokens=max_tokens if own is None else min(own, max_tokens),
            # One seed per question, so that sampled answers do not depend on the order.
            seed=self.setup.seed + self.numbers[name] if self.setup.temperature > 0 else None,
            output_kind=RequestOutputKind.DELTA,
        )
        return name, rendered, params

    def warm_up(self) -> None:
        """Run every code path once on questions that are not measured: twice the concurrency, so
        that requests also join and leave a full batch."""
        self._answer(
            [question.id for question in self.setup.warmup[: 2 * self.concurrency]],
            min(WARMUP_TOKENS, self.setup.max_tokens),
            Clock(),
        )

    def renew(self, concurrency: int) -> bool:
        """Become an engine that has just started and warmed up; False if that is not possible."""
        if not (self.llm.reset_prefix_cache() and all(self.llm.collective_rpc("renew_drafts"))):
            return False
        self.concurrency = concurrency
        self.warm_up()
        return True

    def measure(self, request: RoundRequest, give_way: Callable[[], None]) -> RoundResult:
        """Answer one round's questions and time it."""
        before = read_draft_counters(self.llm)
        clock = Clock(request.slice_s, give_way)
        requests = self._answer(
            request.question_ids, self.setup.max_tokens, clock, request.arrivals
        )
        wall_s = clock.now()
        return RoundResult(
            wall_s=wall_s,
            other_cpu_share=max(0.0, clock.other_cpu_s() / (wall_s * psutil.cpu_count())),
            requests=requests,
            drafts=subtract(read_draft_counters(self.llm), before),
            peak_rss_bytes=peak_rss_bytes(),
            gpu_bytes=gpu_bytes(self.llm.llm_engine.vllm_config.parallel_config.world_size),
        )

    def margins(self, prefixes: Sequence[Prefix]) -> MarginResult:
        """Distance in nats between the two most probable tokens after each prefix."""
        from vllm import SamplingParams, TokensPrompt

        outputs = self.llm.generate(
            [
                TokensPrompt(prompt_token_ids=self.prompts[prefix.question_id] + prefix.token_ids)
                for prefix in prefixes
            ],
            SamplingParams(temperature=0, max_tokens=1, logprobs=2),
            use_tqdm=False,
        )
        nats = []
        for output in outputs:
            best, second, *_ = sorted(
                (entry.logprob for entry in output.outputs[0].logprobs[0].values()), reverse=True
            )
            nats.append(best - second)
        return MarginResult(nats=nats)

    def scores(self, answers: Sequence[Prefix]) -> ScoreResult:
        """How far below the best token those of each answer are, in nats on average."""
        from vllm import SamplingParams, TokensPrompt

        # One token is generated, which must have room behind the answer.
        longest = self.llm.llm_engine.model_config.max_model_len - 1
        texts = [
            (self.prompts[answer.question_id] + answer.token_ids)[:longest] for answer in answers
        ]
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=text) for text in texts],
            SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1),
            use_tqdm=False,
        )
        nats = []
        for answer, text, output in zip(answers, texts, outputs, strict=True):
            first = len(self.prompts[answer.question_id])
            below = []
            for i in range(first, len(text)):
                # The token itself, and the best one.
                entries = output.prompt_logprobs[i]
                best = max(entry.logprob for entry in entries.values())
                below.append(best - entries[text[i]].logprob)
            nats.append(sum(below) / len(below) if below else 0.0)
        return ScoreResult(nats=nats)

    def close(self) -> None:
        """End vLLM's own processes and free the device."""
        self.llm.llm_engine.engine_core.shutdown()


def read_draft_counters(llm: "LLM") -> DraftCounters | None:
    """vLLM's draft counters since the engine started; None when it does not draft."""
    from vllm.v1.metrics.reader import Vector

    values = {
        metric.name: metric.values if isinstance(metric, Vector) else metric.value
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode_")
    }
    if not values:
        return None
    return DraftCounters(
        drafts=values["vllm:spec_decode_num_drafts"],
        draft_tokens=values["vllm:spec_decode_num_draft_tokens"],
        accepted_per_depth=values["vllm:spec_decode_num_accepted_tokens_per_pos"],
    )


def subtract(after: DraftCounters | None, before: DraftCounters | None) -> DraftCounters | None:
    """What was counted between two readings."""
    if after is None or before is None:
        return None
    return DraftCounters(
        drafts=after.drafts - before.drafts,
        draft_tokens=after.draft_tokens - before.draft_tokens,
        accepted_per_depth=[
            late - early
            for late, early in zip(after.accepted_per_depth, before.accepted_per_depth, strict=True)
        ],
    )


def other_cpu_seconds() -> float:
    """CPU time that the machine has spent on anything but this engine's processes.

    Time that a hypervisor gave to other guests counts: it was not ours either.
    """
    machine = psutil.cpu_times()
    # Linux counts guest time as user time too.
    idle_or_counted = ("idle", "iowait", "guest", "guest_nice")
    busy = sum(value for name, value in machine._asdict().items() if name not in idle_or_counted)
    me = psutil.Process()
    own = 0.0
    for process in [me, *me.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            own += times.user + times.system
    return busy - own


def peak_rss_bytes() -> int:
    """Sum of the peak resident sizes of this process and its descendants."""
    me = psutil.Process()
    total = 0
    for process in [me, *me.children(recursive=True)]:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # A descendant that ended meanwhile.
        for line in status.splitlines():
            if line.startswith("VmHWM:"):
                total += int(line.split()[1]) * 1024
    return total


def gpu_bytes(world_size: int) -> int | None:
    """Memory in use on the engine's NVIDIA GPUs, by whatever process; None without them.

    Asked of the driver: the workers may be other processes, and a CUDA context of our own would
    itself take memory.
    """
    from vllm.platforms import current_platform
    from vllm.utils.import_utils import import_pynvml

    if not current_platform.is_cuda():
        return None
    pynvml = import_pynvml()
    pynvml.nvmlInit()
    try:
        return sum(
            pynvml.nvmlDeviceGetMemoryInfo(
                pynvml.nvmlDeviceGetHandleByIndex(
                    current_platform.device_id_to_physical_device_id(rank)
                )
            ).used
            for rank in range(world_size)
        )
    finally:
        pynvml.nvmlShutdown()


def configure_process() -> bool:
    """Choose where vLLM's engine core runs; return whether it is inside this process.

    On the CPU platform it runs here unless the user decided otherwise, because on few cores the
    front-end process would fight with the OpenMP threads of the engine.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    return not envs.VLLM_ENABLE_V1_MULTIPROCESSING


def describe() -> MachineInfo:
    """Device, versions and thread settings, found without starting an engine."""
    in_process = configure_process()
    import torch
    import vllm
    from vllm.platforms import current_platform

    threads: dict[str, str | int | None] = {name: os.environ.get(name) for name in THREAD_VARIABLES}
    threads["torch.get_num_threads"] = torch.get_num_threads()
    if preloaded := os.environ.get("LD_PRELOAD"):  # which libraries, not where they are
        threads["LD_PRELOAD"] = ":".join(Path(each).name for each in preloaded.split(":"))
    return MachineInfo(
        device_type=current_platform.device_type,
        device_name=None if current_platform.is_cpu() else current_platform.get_device_name(),
        versions={"vllm": vllm.__version__, "torch": torch.__version__},
        threads=threads,
        in_process=in_process,
    )


def serve(requests: TextIO, send: Callable[[BaseModel], None]) -> None:
    """Start the engine of the first line and answer the following ones until the input ends."""
    setup = EngineSetup.model_validate_json(requests.readline())
    configure_process()
    engine = Engine(setup)
    engine.warm_up()
    send(EngineReady(startup_s=engine.startup_s))

    def give_way() -> None:
        send(Paused())
        Continue.model_validate_json(requests.readline())

    for line in requests:
        request = REQUEST.validate_json(line)
        if isinstance(request, Renew):
            send(Renewed(done=engine.renew(request.concurrency)))
        elif isinstance(request, MarginRequest):
            send(engine.margins(request.prefixes))
        elif isinstance(request, ScoreRequest):
            send(engine.scores(request.answers))
        else:
            send(engine.measure(request, give_way))
    engine.close()


def end_with_parent() -> None:
    """End this process and all it started when the benchmark is gone, even in the middle of a
    round or suspended: the pipe that it holds open is closed then.

    A process of another group waits for that, since the benchmark stops this one as a whole.
    """
    alive = os.environ.pop(ALIVE, None)
    if alive is None:  # started by hand
        return
    group, engine = os.getpgrp(), os.pidfd_open(os.getpid())
    if os.fork():
        os.close(int(alive))
        os.close(engine)
        return
    os.setpgid(0, 0)
    os.closerange(0, 3)
    gone, _, _ = select.select([int(alive), engine], [], [])
    if int(alive) in gone:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)
    os._exit(0)


def main() -> None:
    """Answer on what was standard output, after pointing standard output at the log."""
    # A process group of its own, which the benchmark stops and continues as one.
    os.setpgrp()
    end_with_parent()
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def send(message: BaseModel) -> None:
        answers.write(message.model_dump_json() + "\n")
        answers.flush()

    try:
        if sys.argv[1:] == ["--describe"]:
            send(describe())
        else:
            serve(sys.stdin, send)
    except Exception as exc:
        traceback.print_exc()
        send(Failed(error=f"{type(exc).__name__}: {exc}"))
        sys.exit(1)


if __name__ == "__main__":
    main()
