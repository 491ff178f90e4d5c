"""The messages between the benchmark and its engine processes: one JSON object per line.

The parent writes one `EngineSetup`, reads `EngineReady`, and then writes requests, each of which
is answered before the next. `Renew` makes the engine one that has just started, for the rounds of
another concurrency. A round in slices is answered by `Paused` after each of them, and goes
on with `Continue`. Instead of any answer a `Failed` may come, and the process ends.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, TypeAdapter

from vllm_specplus.bench.dataset import Question

#: Environment variable with the descriptor of a pipe that is open as long as the benchmark lives.
ALIVE = "VLLM_SPECPLUS_BENCH_ALIVE"


class MachineInfo(BaseModel):
    """What an engine process sees of its machine before any engine starts."""

    kind: Literal["machine"] = "machine"
    device_type: str
    device_name: str | None
    versions: dict[str, str]
    threads: dict[str, str | int | None]
    in_process: bool


class EngineSetup(BaseModel):
    """Everything an engine process needs to start.

    `measured` and `warmup` are disjoint; `warmup` has enough for the largest concurrency that the
    engine will be renewed for.
    """

    model: str
    speculative_config: dict[str, Any] | None
    engine_args: dict[str, Any]
    measured: list[Question]
    warmup: list[Question]
    concurrency: int
    max_tokens: int
    temperature: float
    seed: int
    chat_template: bool


class EngineReady(BaseModel):
    """The engine has started and warmed up. `startup_s`: seconds to build the engine."""

    kind: Literal["ready"] = "ready"
    startup_s: float


class Renew(BaseModel):
    """Forget what was learnt, by draft methods and the prefix cache, and warm up again."""

    kind: Literal["renew"] = "renew"
    concurrency: int


class Renewed(BaseModel):
    """`done` False: not all of it is known how to forget, and another engine has to be started."""

    kind: Literal["renewed"] = "renewed"
    done: bool


class RoundRequest(BaseModel):
    """Answer these questions and measure: with the concurrency of the set-up or last renewal, or
    each when it arrives.

    `slice_s`: seconds after which to pause, between two engine steps; None: not at all.
    `arrivals`: seconds from the round's start.
    """

    kind: Literal["round"] = "round"
    question_ids: list[str]
    slice_s: float | None = None
    arrivals: list[float] | None = None


class Paused(BaseModel):
    """A slice of a round is over; the engine does nothing until it is told to `Continue`."""

    kind: Literal["paused"] = "paused"


class Continue(BaseModel):
    """The next slice of the round. What passed since `Paused` is not counted."""

    kind: Literal["continue"] = "continue"


class RequestResult(BaseModel):
    """One answered question, or a later turn of one.

    `first_tokens` came with the first output; the others came in `steps` engine steps.
    Times are in seconds from the request's arrival: to the first token, per token after it (None
    if there is none), and to the last.
    """

    question_id: str
    token_ids: list[int]
    first_tokens: int
    steps: int
    ttft_s: float
    tpot_s: float | None
    latency_s: float | None = None


class DraftCounters(BaseModel):
    """vLLM's counters of drafts, draft tokens and drafts accepted down to each depth."""

    drafts: int
    draft_tokens: int
    accepted_per_depth: list[int]


class RoundResult(BaseModel):
    """One measured round.

    `other_cpu_share`: share of all the machine's cores that other processes kept busy meanwhile.
    `peak_rss_bytes`: the sum of the peaks of the engine's processes since they started.
    `gpu_bytes`: device memory in use on the engine's GPUs when the round ended.
    """

    kind: Literal["round"] = "round"
    wall_s: float
    other_cpu_share: float
    requests: list[RequestResult]
    drafts: DraftCounters | None
    peak_rss_bytes: int
    gpu_bytes: int | None


class Prefix(BaseModel):
    """A question and the first tokens of an answer to it."""

    question_id: str
    token_ids: list[int]


class MarginRequest(BaseModel):
    """Measure how close the best two next tokens are after each prefix. Not timed."""

    kind: Literal["margins"] = "margins"
    prefixes: list[Prefix]


class MarginResult(BaseModel):
    """log p(best) - log p(second best) of the next token, in nats, for each prefix."""

    kind: Literal["margins"] = "margins"
    nats: list[float]


class ScoreRequest(BaseModel):
    """Measure how far answers are from what the model itself prefers. Not timed."""

    kind: Literal["scores"] = "scores"
    answers: list[Prefix]


class ScoreResult(BaseModel):
    """Mean of log p(best token) - log p(token), in nats, over each answer's tokens.

    Not the mean of -log p: a text that repeats itself is probable, however it got there.
    """

    kind: Literal["scores"] = "scores"
    nats: list[float]


class Failed(BaseModel):
    """The engine process gives up; its log has the traceback."""

    kind: Literal["failed"] = "failed"
    error: str


AnyRequest = Renew | RoundRequest | Continue | MarginRequest | ScoreRequest
AnyReply = (
    MachineInfo | EngineReady | Renewed | Paused | RoundResult | MarginResult | ScoreResult | Failed
)

REQUEST: TypeAdapter[AnyRequest] = TypeAdapter(Annotated[AnyRequest, Field(discriminator="kind")])
REPLY: TypeAdapter[AnyReply] = TypeAdapter(Annotated[AnyReply, Field(discriminator="kind")])
