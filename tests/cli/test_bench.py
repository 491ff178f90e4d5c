"""`vllm-specplus bench` without an engine: input, pairing of the engines, arithmetic, output."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_specplus.bench import InputError, report, runner
from vllm_specplus.bench import engine as engine_module
from vllm_specplus.bench.compare import compare, read_report
from vllm_specplus.bench.dataset import Question, load_dataset, pick, split_rounds
from vllm_specplus.bench.engine import Clock, other_cpu_seconds, run_loop
from vllm_specplus.bench.loads import Load, parse_loads
from vllm_specplus.bench.methods import (
    MethodSpec,
    parse_concurrencies,
    parse_engine_args,
    parse_methods,
)
from vllm_specplus.bench.protocol import (
    DraftCounters,
    MachineInfo,
    MarginResult,
    Paused,
    Renewed,
    RequestResult,
    RoundRequest,
    RoundResult,
    ScoreResult,
)
from vllm_specplus.bench.render import losses, print_report, save_plot
from vllm_specplus.bench.report import BenchReport, Objectives, bootstrap_interval, build_runs
from vllm_specplus.bench.runner import (
    Benchmark,
    EngineError,
    EngineProcess,
    Plan,
    Session,
    error_line,
    first_difference,
)
from vllm_specplus.cli.main import app
from vllm_specplus.cli.model import IMAGE_MODEL

OURS = {"token_recycling"}
MACHINE = MachineInfo(
    device_type="cpu", device_name=None, versions={"vllm": "0.32.0"}, threads={}, in_process=True
)


def write_rows(path: Path, rows: list) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def questions(**counts: int) -> list[Question]:
    """`counts` questions per category, category after category."""
    return [
        Question(id=f"{category}{number}", category=category, prompt=f"{category} {number}")
        for category, count in counts.items()
        for number in range(count)
    ]


# --- dataset ---------------------------------------------------------------------------------


def test_reads_all_three_kinds_of_rows(tmp_path):
    path = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"question_id": 81, "category": "writing", "turns": ["first", "second"]},
            {"prompt": "raw text"},
            {
                "messages": [
                    {"role": "system", "content": "be brief"},
                    {"role": "user", "content": "hello"},
                    {"role": "assistant", "content": "hi"},
                    {"role": "user", "content": "more"},
                ]
            },
        ],
    )
    spec_bench, raw, chat = load_dataset(path).questions
    assert (spec_bench.id, spec_bench.category) == ("81", "writing")
    assert spec_bench.messages == ({"role": "user", "content": "first"},)
    assert (raw.id, raw.category, raw.prompt, raw.messages) == ("2", "all", "raw text", None)
    assert [message["content"] for message in chat.messages] == ["be brief", "hello"]


def test_reads_sharegpts_array(tmp_path):
    path = tmp_path / "sharegpt.json"
    talk = [("human", "hello"), ("gpt", "hi"), ("human", "more"), ("gpt", "")]
    row = {"id": "a_1", "conversations": [{"from": who, "value": what} for who, what in talk]}
    path.write_text(json.dumps([row]))
    (question,) = load_dataset(path).questions
    assert (question.id, question.later) == ("a_1", ())
    assert question.messages == ({"role": "user", "content": "hello"},)
    (question,) = load_dataset(path, later_turns=True).questions
    assert question.later == (({"role": "user", "content": "more"},),)
    assert question.turn_ids() == ["a_1", "a_1::turn 2"]


def test_reads_speed_benchs_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    path = tmp_path / "test.parquet"
    row = {"question_id": "q1", "category": "coding", "turns": ["first", "second"],
           "multiturn": True, "difficulty": None}  # fmt: skip
    parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    (question,) = load_dataset(path, later_turns=True).questions
    assert (question.id, question.category) == ("q1", "coding")
    assert [turn[0]["content"] for turn in (question.messages, *question.later)] == row["turns"]


def test_turns_of_an_agent_end_where_the_model_answers(tmp_path):
    said = [("system", "s"), ("assistant", "hi"), ("user", "u"), ("assistant", None),
            ("tool", "t1"), ("tool", "t2"), ("assistant", "a"), ("user", "v"),
            ("tool", "last")]  # fmt: skip
    row = {"messages": [{"role": role, "content": content} for role, content in said]}
    path = write_rows(tmp_path / "rows.jsonl", [row])
    (question,) = load_dataset(path, later_turns=True).questions
    turns = [[m["content"] for m in turn] for turn in (question.messages, *question.later)]
    assert turns == [["s", "hi", "u"], ["t1", "t2"], ["v"], ["last"]]


def test_repeated_prompts_are_dropped(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}])
    data = load_dataset(path)
    assert [question.id for question in data.questions] == ["1", "2"]
    assert data.duplicates == 1


def test_a_row_may_say_how_long_its_answer_is(tmp_path):
    rows = [{"prompt": "a", "max_tokens": 7}, {"turns": ["b"], "max_tokens": 9}, {"prompt": "c"}]
    found = load_dataset(write_rows(tmp_path / "rows.jsonl", rows)).questions
    assert [question.max_tokens for question in found] == [7, 9, None]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "x"', "line 1: not valid JSON"),
        ("[]", "line 1: a row must be a JSON object"),
        ('{"text": "x"}', "exactly one of turns, messages, conversations, prompt"),
        ('{"prompt": "x", "turns": ["y"]}', "exactly one of"),
        ('{"prompt": " "}', "prompt must be a non-empty string"),
        ('{"turns": []}', "turns must be a non-empty list"),
        ('{"turns": [3]}', "turns[0] must be a non-empty string"),
        ('{"messages": "hello"}', "messages must be a list"),
        ('{"messages": ["hello"]}', "messages[0] must be an object"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "messages[0].content"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "no message of the user"),
        ('{"conversations": [{"from": "me", "value": "x"}]}', "from is 'me', not one of human,"),
        ('{"conversations": [{"from": "human", "value": ""}]}', "conversations[0].value must be"),
        ('{"question_id": 1, "prompt": "x"}\n{"question_id": 1, "prompt": "y"}', "used twice"),
        ('{"prompt": "x", "max_tokens": 0}', "max_tokens must be a whole number of at least 1"),
        ('{"prompt": "x", "max_tokens": true}', "max_tokens must be a whole number"),
    ],
)
def test_bad_rows_are_named(tmp_path, row, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(row)
    with pytest.raises(InputError, match=re.escape(message)):
        load_dataset(path)


def test_pick_is_even_over_categories_and_nested():
    pool = questions(a=10, b=2, c=10)
    measured, warmup = pick(pool, 8)
    assert [question.id for question in measured] == [
        *("a0", "b0", "c0"),
        *("a1", "b1", "c1"),
        *("a2", "c2"),  # b has run out
    ]
    assert {question.id for question in measured + warmup} == {question.id for question in pool}
    assert pick(pool, 5)[0] == measured[:5]


def test_pick_keeps_a_question_for_warming_up():
    measured, warmup = pick(questions(a=3), 48)
    assert (len(measured), len(warmup)) == (2, 1)
    with pytest.raises(InputError, match="at least two"):
        pick(questions(a=1), 48)


@pytest.mark.parametrize(
    ("count", "rounds", "concurrency", "sizes"),
    [
        (48, 4, 1, [12, 12, 12, 12]),
        (50, 4, 1, [12, 13, 12, 13]),
        (48, 4, 8, [24, 24]),  # 12 questions would be too few for 8 at a time
        (5, 4, 8, [5]),
    ],
)
def test_rounds(count, rounds, concurrency, sizes):
    pool = questions(a=count)
    parts = split_rounds(pool, rounds, concurrency)
    assert [len(part) for part in parts] == sizes
    assert [question for part in parts for question in part] == pool


# --- methods and arguments -------------------------------------------------------------------


def test_methods():
    none, ngram, suffix, ours = parse_methods(
        "none,ngram:num_speculative_tokens=4, suffix,"
        'token_recycling:num_speculative_tokens=8:tree=2.2.2:sizes=[1,2]:name="a,b"'
    )
    assert none == MethodSpec("none", "none", None)
    assert ngram.speculative_config == {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_min": 2,
        "prompt_lookup_max": 4,
    }
    assert suffix == MethodSpec("suffix", "suffix", {"method": "suffix"})
    assert ours.name == "token_recycling"
    assert ours.speculative_config == {
        "method": "token_recycling",
        "num_speculative_tokens": 8,
        "tree": "2.2.2",
        "sizes": [1, 2],
        "name": "a,b",
    }


def test_the_baseline_may_be_compared_with_itself():
    specs = parse_methods("none,suffix,none")
    assert [spec.label for spec in specs] == ["none", "suffix", "none again"]
    assert specs[2].speculative_config is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("none,", "does not start with the name of a method"),
        ("ngram:num_speculative_tokens", "expected key=value"),
        ("ngram:=4", "expected key=value"),
        ("ngram:num_speculative_tokens=", "expected key=value"),
        ("none:x=1", "none takes no keys"),
        ("ngram:method=suffix", "the key method is set"),
        ("ngram,suffix,ngram", "names ngram twice"),
        ("none,none,none", "names none twice"),
    ],
)
def test_bad_methods(text, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_methods(text)


def test_engine_args_are_typed():
    args = parse_engine_args(["dtype=float32", "max_model_len=512", "enforce_eager=true"])
    assert args == {"dtype": "float32", "max_model_len": 512, "enforce_eager": True}
    with pytest.raises(InputError, match="speculative_config is set by the benchmark"):
        parse_engine_args(['speculative_config={"method": "ngram"}'])


def test_concurrencies():
    assert parse_concurrencies("1,8") == [1, 8]
    for text, message in [
        ("0", "at least 1"),
        ("1,x", "whole numbers"),
        ("", "whole numbers"),
        ("2,2", "twice"),
    ]:
        with pytest.raises(InputError, match=message):
            parse_concurrencies(text)


# --- measuring -------------------------------------------------------------------------------


class FakeEngine:
    """Answers every request with the given chunks, one per step; a step takes one second."""

    def __init__(self, chunks: dict[str, list[list[int]]]) -> None:
        self.chunks = chunks
        self.running: dict[str, list[list[int]]] = {}
        self.most_running = 0
        self.seconds = 100.0

    def add_request(self, request_id, prompt, params):
        self.running[request_id] = list(self.chunks[request_id])
        self.most_running = max(self.most_running, len(self.running))

    def step(self):
        self.seconds += 1.0
        outputs = []
        for request_id in list(self.running):
            tokens = self.running[request_id].pop(0)
            finished = not self.running[request_id]
            if finished:
                del self.running[request_id]
            completion = SimpleNamespace(
                token_ids=tokens, finish_reason="length" if finished else None
            )
            outputs.append(
                SimpleNamespace(request_id=request_id, outputs=[completion], finished=finished)
            )
        return outputs

    # As a `Clock`:
    def now(self):
        return self.seconds

    def between_steps(self):
        pass

    def idle(self, seconds):
        self.seconds += seconds


def test_closed_loop_times_and_counts_steps():
    engine = FakeEngine({"a": [[1], [2, 3], [], [4]], "b": [[9]], "c": [[5], [6, 7, 8]]})
    jobs = [(name, None, None) for name in "abc"]
    results = {result.question_id: result for result in run_loop(engine, jobs, engine, 2)}
    assert engine.most_running == 2
    a, b, c = results["a"], results["b"], results["c"]
    assert (a.token_ids, a.first_tokens, a.steps) == ([1, 2, 3, 4], 1, 2)
    assert a.tpot_s == pytest.approx(1.0)  # 3 tokens in 3 seconds, the empty step included
    assert (b.token_ids, b.steps, b.tpot_s) == ([9], 0, None)
    # c enters when b has left; its first token comes one second later.
    assert (c.ttft_s, c.steps, c.tpot_s) == (pytest.approx(1.0), 1, pytest.approx(1 / 3))


def test_closed_loop_refuses_aborted_answers():
    engine = FakeEngine({"a": [[1]]})
    step = engine.step

    def aborted():
        outputs = step()
        outputs[0].outputs[0].finish_reason = "abort"
        return outputs

    engine.step = aborted
    with pytest.raises(RuntimeError, match="question a ended with abort"):
        run_loop(engine, [("a", None, None)], engine, 1)


def test_requests_of_an_open_loop_come_at_their_time():
    """Whatever is in flight; times count from there, though a step may have been under way."""
    engine = FakeEngine({"a": [[1], [2], [3]], "b": [[4]], "c": [[5], [6]]})
    engine.seconds = 0.0
    jobs = [(name, None, None) for name in "abc"]
    found = {each.question_id: each for each in run_loop(engine, jobs, engine, None, [0.5, 0.7, 9])}
    assert engine.most_running == 2
    assert found["a"].ttft_s == pytest.approx(1.0)
    assert found["b"].ttft_s == pytest.approx(1.8)  # came at 0.7, in the middle of a step
    assert (found["c"].ttft_s, found["c"].latency_s) == pytest.approx((1.0, 2.0))


def test_a_later_turn_waits_for_the_answer_and_keeps_its_place():
    engine = FakeEngine({"a": [[1], [2]], "a::turn 2": [[3]], "b": [[4]], "c": [[5]]})
    asked = []

    def following(name, answer):
        asked.append((name, answer))
        return ("a::turn 2", None, None) if name == "a" else None

    jobs = [(name, None, None) for name in "abc"]
    found = run_loop(engine, jobs, engine, 1, following=following)
    assert [each.question_id for each in found] == ["a", "a::turn 2", "b", "c"]
    assert asked == [("a", [1, 2]), ("a::turn 2", [3]), ("b", [4]), ("c", [5])]


def test_loads():
    assert [str(load) for load in parse_loads(None, None, 1.0)] == ["1 in flight"]
    loads = parse_loads("8", "0.5,2", 0.2)
    assert [load.short for load in loads] == ["8", "0.5/s", "2/s"]
    assert parse_loads(None, "2", 1.0) == [Load(rate=2.0)]
    assert loads[0].arrivals(5, 0) is None
    times = loads[2].arrivals(100, 3)
    assert times[-1] == pytest.approx(50)
    assert times == sorted(times)
    assert times == loads[2].arrivals(100, 3)
    calm = Load(rate=2.0).arrivals(100, 3)
    # Bursts: many come together, so that the gaps vary more.
    assert np.std(np.diff(times)) > 1.5 * np.std(np.diff(calm))
    for rate, message in [("0", "above 0"), ("x", "needs numbers"), ("1,1", "different")]:
        with pytest.raises(InputError, match=message):
            parse_loads(None, rate, 1.0)
    with pytest.raises(InputError, match="--burstiness must be above 0"):
        parse_loads(None, "1", 0.0)


def request(question_id: str, tokens: list[int], steps: int, ttft_s=0.1, tpot_s=0.01):
    return RequestResult(
        question_id=question_id,
        token_ids=tokens,
        first_tokens=1,
        steps=steps,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
    )


def measured_round(
    wall_s: float, *requests: RequestResult, drafts=None, rss=1 << 30, other_cpu_share=0.0
) -> RoundResult:
    return RoundResult(
        wall_s=wall_s,
        other_cpu_share=other_cpu_share,
        requests=list(requests),
        drafts=drafts,
        peak_rss_bytes=rss,
        gpu_bytes=None,
    )


def spec(text: str) -> MethodSpec:
    return parse_methods(text)[0]


class FakeProcess:
    """Stands in for `EngineProcess`.

    `fails` names the kind of answer that a method does not get to, and `stale` those that cannot
    be renewed; `events` records who ran when, and `awake` which engines are not stopped.
    """

    events: list
    fails: dict[str, str]
    awake: set
    pauses: bool
    stale: Sequence[str]

    @classmethod
    def make(
        cls, fails: dict[str, str] | None = None, pauses: bool = False, stale: Sequence[str] = ()
    ) -> type:
        own = {"events": [], "fails": fails or {}, "awake": set(), "pauses": pauses}
        own["stale"] = stale
        return type("Process", (cls,), own)

    def __init__(self, log, *arguments, cwd=None):
        self.log = log
        self.awake.add(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.awake.discard(self)
        self.events.append(("close", self.name))

    def send(self, message):
        self.message = message
        if hasattr(message, "speculative_config"):
            self.setup = message
            self.name = (message.speculative_config or {"method": "none"})["method"]
            seen = {question.id for question in message.measured}
            assert seen.isdisjoint(question.id for question in message.warmup)

    def receive(self, reply, *others):
        assert self.awake == {self}, "exactly the engine that is asked must run"
        if self.fails.get(self.name) == reply.__name__:
            raise EngineError("out of luck", self.log)
        if reply is RoundResult:
            if isinstance(self.message, RoundRequest):
                self.round = self.message
                if self.pauses and self.round.slice_s:
                    self.events.append(("pause", self.name))
                    return Paused()
            ids = self.round.question_ids
            self.events.append(("round", self.name, tuple(ids)))
            answer = [1, 2, 3] if self.name != "suffix" else [1, 2, 4]
            return measured_round(1.0, *(request(name, answer, 2) for name in ids))
        if reply is MarginResult:
            self.events.append(("margins", self.name, len(self.message.prefixes)))
            return MarginResult(nats=[0.25] * len(self.message.prefixes))
        if reply is ScoreResult:
            answers = self.message.answers
            self.events.append(("scores", self.name, len(answers)))
            return ScoreResult(nats=[float(sum(answer.token_ids)) for answer in answers])
        if reply is Renewed:
            self.events.append(("renew", self.name, self.message.concurrency))
            return Renewed(done=self.name not in self.stale)
        self.events.append(("start", self.name))
        return SimpleNamespace(startup_s=1.0)

    def suspend(self):
        self.awake.discard(self)

    def resume(self):
        self.awake.add(self)

    def kill(self):
        self.awake.discard(self)
        self.events.append(("kill", self.name))


TWO_LOADS = (Load(in_flight=1), Load(in_flight=2))


def run_plan(
    monkeypatch, tmp_path, *, fails=None, pauses=False, stale=(), device="cpu", **changes
) -> tuple:
    process = FakeProcess.make(fails, pauses, stale)
    monkeypatch.setattr(runner, "EngineProcess", process)
    pool = questions(a=8)
    plan = Plan(
        **{
            "model": "model",
            "methods": parse_methods("none,ngram,suffix"),
            "loads": [Load(in_flight=1)],
            "measured": pool[:6],
            "warmup": pool[6:],
            "rounds": 2,
            "repeat": 1,
            "max_tokens": 8,
            "temperature": 0.0,
            "seed": 0,
            "chat_template": True,
            "engine_args": {},
            "sequential": False,
            **changes,
        }
    )
    settled = []
    machine = MACHINE.model_copy(update={"device_type": device})
    benchmark = Benchmark(
        plan,
        machine,
        tmp_path,
        lambda what, count: settled.append(count),
        lambda so_far: process.events.append(("save", len(so_far.sessions))),
    )
    benchmark.run()
    return benchmark, process.events, sum(settled)


def test_methods_take_turns_on_cpu(monkeypatch, tmp_path):
    benchmark, events, settled = run_plan(monkeypatch, tmp_path)
    first, second = ("a0", "a1", "a2"), ("a3", "a4", "a5")
    assert events == [
        *[("start", name) for name in ("none", "ngram", "suffix")],
        *[("round", name, first) for name in ("none", "ngram", "suffix")],
        *[("round", name, second) for name in ("ngram", "suffix", "none")],
        ("margins", "none", 6),
        ("save", 3),
        *[("close", name) for name in ("suffix", "ngram", "none")],
    ]
    assert settled == 3 * 6
    suffix = benchmark.sessions[2]
    assert suffix.margins == dict.fromkeys(first + second, 0.25)
    assert benchmark.engine_args["gpu_memory_utilization"] <= 0.8 / 3 + 1e-3


def test_engines_take_turns_within_a_round(monkeypatch, tmp_path):
    benchmark, events, settled = run_plan(monkeypatch, tmp_path, pauses=True, rounds=1)
    names, everything = ("none", "ngram", "suffix"), ("a0", "a1", "a2", "a3", "a4", "a5")
    assert events[3:9] == [
        *[("pause", name) for name in names],
        *[("round", name, everything) for name in names],
    ]
    assert [len(session.rounds) for session in benchmark.sessions] == [1, 1, 1]
    assert settled == 3 * 6


def test_every_concurrency_is_saved_when_it_is_done(monkeypatch, tmp_path):
    _, events, _ = run_plan(monkeypatch, tmp_path, loads=TWO_LOADS, fails={"suffix": "EngineReady"})
    assert [event for event in events if event[0] == "save"] == [("save", 2), ("save", 4)]


def test_engines_serve_all_concurrencies_as_if_just_started(monkeypatch, tmp_path):
    benchmark, events, settled = run_plan(
        monkeypatch, tmp_path, loads=TWO_LOADS, repeat=2, methods=parse_methods("none,suffix")
    )
    starts = [event for event in events if event[0] in ("start", "renew", "close")]
    turns = [(2, "none", "suffix"), (1, "suffix", "none"), (2, "suffix", "none")]
    assert starts == [
        ("start", "none"),
        ("start", "suffix"),
        *[("renew", name, number) for number, *names in turns for name in names],
        ("close", "suffix"),
        ("close", "none"),
    ]
    assert settled == 2 * 2 * 2 * 6
    assert [(s.load.in_flight, s.repeat) for s in benchmark.sessions] == [
        (1, 0), (1, 0), (2, 0), (2, 0), (1, 1), (1, 1), (2, 1), (2, 1)
    ]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_engine_that_cannot_forget_is_replaced(monkeypatch, tmp_path, device):
    methods = parse_methods("none,suffix")
    benchmark, events, _ = run_plan(
        monkeypatch, tmp_path, loads=TWO_LOADS, stale=["suffix"], methods=methods,
        device=device, temperature=1.0,
    )  # fmt: skip
    assert events.count(("start", "none")) == 1
    assert events.count(("start", "suffix")) == 2
    assert events.count(("kill", "suffix")) == 1
    assert len(benchmark.sessions) == 4


def test_an_engine_that_died_is_started_for_the_next_concurrency(monkeypatch, tmp_path):
    benchmark, events, settled = run_plan(
        monkeypatch, tmp_path, loads=TWO_LOADS, fails={"suffix": "RoundResult"}
    )
    assert events.count(("start", "suffix")) == 2
    assert [failure.load for failure in benchmark.failures] == list(TWO_LOADS)
    assert settled == 2 * 3 * 6


def test_rounds_end_when_every_engine_has_died(monkeypatch, tmp_path):
    fails = dict.fromkeys(("none", "ngram", "suffix"), "RoundResult")
    benchmark, _, settled = run_plan(monkeypatch, tmp_path, fails=fails)
    assert [failure.stage for failure in benchmark.failures] == ["measure"] * 3
    assert benchmark.sessions == []
    assert settled == 3 * 6


def test_a_single_engine_is_not_interrupted(monkeypatch, tmp_path):
    _, events, _ = run_plan(monkeypatch, tmp_path, pauses=True, methods=parse_methods("none"))
    assert all(event[0] != "pause" for event in events)


def test_pauses_do_not_count(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(engine_module, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def give_way():
        now[0] += 100.0

    clock = Clock(3.0, give_way)
    for passes, seen in ((2.0, 2.0), (2.0, 4.0), (2.0, 6.0), (1.5, 7.5)):
        now[0] += passes
        clock.between_steps()
        assert clock.now() == pytest.approx(seen)
    assert now[0] == 50.0 + 7.5 + 2 * 100.0


def test_one_engine_at_a_time_on_gpu_in_rotating_order(monkeypatch, tmp_path):
    benchmark, events, _ = run_plan(
        monkeypatch, tmp_path, device="cuda", repeat=2, methods=parse_methods("none,suffix")
    )
    starts = [event for event in events if event[0] in ("start", "close", "margins")]
    one = [("start", "none"), ("close", "none")]
    other = [("start", "suffix"), ("close", "suffix")]
    judge = [("start", "none"), ("margins", "none", 6), ("close", "none")]
    assert starts == [*one, *other, *judge, *other, *one, *judge]
    assert benchmark.engine_args == {}


def test_sampled_answers_are_not_compared(monkeypatch, tmp_path):
    _, events, _ = run_plan(monkeypatch, tmp_path, temperature=1.0)
    assert all(event[0] != "margins" for event in events)


def test_the_users_memory_settings_are_kept(monkeypatch, tmp_path):
    benchmark, _, _ = run_plan(
        monkeypatch, tmp_path, engine_args={"kv_cache_memory_bytes": 1 << 28}
    )
    assert benchmark.engine_args == {"kv_cache_memory_bytes": 1 << 28}


def test_a_method_that_cannot_start_is_tried_once(monkeypatch, tmp_path):
    benchmark, events, settled = run_plan(
        monkeypatch, tmp_path, fails={"ngram": "EngineReady"}, loads=TWO_LOADS
    )
    assert events.count(("kill", "ngram")) == 1
    assert [(f.method.label, f.stage, f.error) for f in benchmark.failures] == [
        ("ngram", "start", "out of luck")
    ]
    measured = [(s.method.label, s.load.in_flight) for s in benchmark.sessions]
    assert measured == [("none", 1), ("suffix", 1), ("none", 2), ("suffix", 2)]
    assert settled == 3 * 2 * 6


def test_a_method_that_dies_later_is_left_out(monkeypatch, tmp_path):
    benchmark, _, settled = run_plan(monkeypatch, tmp_path, fails={"none": "RoundResult"})
    assert [(f.method.label, f.stage) for f in benchmark.failures] == [("none", "measure")]
    assert [session.method.label for session in benchmark.sessions] == ["ngram", "suffix"]
    assert settled == 3 * 6


def test_missing_margins_do_not_cost_the_measurement(monkeypatch, tmp_path):
    benchmark, _, _ = run_plan(monkeypatch, tmp_path, fails={"none": "MarginResult"})
    assert [failure.stage for failure in benchmark.failures] == ["margins"]
    assert len(benchmark.sessions) == 3


LOSSY = 'suffix:acceptance={"rule":"typical"}'


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_answers_of_lossy_methods_are_scored_by_the_model(monkeypatch, tmp_path, device):
    benchmark, events, _ = run_plan(
        monkeypatch, tmp_path, methods=parse_methods(f"none,ngram,{LOSSY}"), device=device
    )
    scored = [event for event in events if event[0] == "scores"]
    assert scored == [("scores", "none", 6)] * 2  # by the baseline's engine, its own too
    none, ngram, lossy = benchmark.sessions
    assert set(none.scores.values()) == {6.0}
    assert set(lossy.scores.values()) == {7.0}
    assert ngram.scores == {}
    runs = build_runs(benchmark.sessions, OURS, {f"a{i}": "a" for i in range(6)}, 0.0)
    assert [run.nats_below_best for run in runs] == [6.0, None, 7.0]
    (line,) = losses(runs)
    assert "is LOSSY" in line
    assert "7.000 nats below the model's best one on average, none's 6.000" in line


def test_missing_scores_do_not_cost_the_measurement(monkeypatch, tmp_path):
    benchmark, _, _ = run_plan(
        monkeypatch, tmp_path, methods=parse_methods(f"none,{LOSSY}"),
        fails={"none": "ScoreResult"},
    )  # fmt: skip
    assert [failure.stage for failure in benchmark.failures] == ["scores"]
    assert len(benchmark.sessions) == 2


# --- the child process -----------------------------------------------------------------------


def fake_engine(tmp_path: Path, monkeypatch, code: str) -> EngineProcess:
    """An `EngineProcess` whose child runs `code` in a process group of its own."""
    (tmp_path / "fake_engine.py").write_text("import os, sys\nos.setpgrp()\n" + code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(runner, "ENGINE_MODULE", "fake_engine")
    return EngineProcess(tmp_path / "engine.log")


def test_a_suspended_engine_does_not_run(tmp_path, monkeypatch):
    answer = MarginResult(nats=[1.0]).model_dump_json()
    code = f"for line in sys.stdin: print({answer!r}, flush=True)"
    with fake_engine(tmp_path, monkeypatch, code) as engine:
        engine.send(answer_request := MarginResult(nats=[]))
        assert engine.receive(MarginResult).nats == [1.0]
        status = Path(f"/proc/{engine._process.pid}/stat")
        engine.suspend()
        deadline = time.monotonic() + 5
        while (state := status.read_text().split()[2]) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state == "T"
        engine.send(answer_request)
        engine.resume()
        assert engine.receive(MarginResult).nats == [1.0]


def test_a_failed_engine_reports_its_root_cause(tmp_path, monkeypatch):
    code = (
        "print('x ValueError: no memory left', file=sys.stderr, flush=True)\n"
        """print('{"kind": "failed", "error": "See root cause above"}', flush=True)"""
    )
    with (
        fake_engine(tmp_path, monkeypatch, code) as engine,
        pytest.raises(EngineError, match="ValueError: no memory left") as caught,
    ):
        engine.receive(RoundResult)
    assert caught.value.log == tmp_path / "engine.log"


def test_a_killed_engine_is_noticed_though_a_descendant_holds_its_pipe(tmp_path, monkeypatch):
    code = (
        "import signal, time\n"
        "if os.fork() == 0: time.sleep(60)\n"
        "else: os.kill(os.getpid(), signal.SIGKILL)"
    )
    started = time.monotonic()
    with (
        fake_engine(tmp_path, monkeypatch, code) as engine,
        pytest.raises(EngineError, match="SIGKILL"),
    ):
        engine.receive(RoundResult)
    assert time.monotonic() - started < 30
    deadline = time.monotonic() + 5
    while (alive := living_members(engine._process.pid)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive


def living_members(group: int) -> list[int]:
    """Processes of a group that have not ended (who has ended may wait to be reaped)."""
    alive = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(process.pid)
    return alive


def test_error_line_is_short_and_without_pydantics_trailers(tmp_path):
    error = (
        "ValidationError: 1 validation error for X\n  bad value [type=value_error, input_value=1]"
        "\n    For further information visit https://errors.pydantic.dev/2/v/value_error"
    )
    assert error_line(error, tmp_path) == "ValidationError: 1 validation error for X bad value"
    assert len(error_line("word " * 1000, tmp_path)) <= 400


def test_first_difference():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2, 3], [1, 2]) == 2


# --- arithmetic ------------------------------------------------------------------------------


def session(text: str, *rounds: RoundResult, concurrency=1, repeat=0, **margins: float) -> Session:
    load = Load(in_flight=concurrency)
    return Session(spec(text), load, repeat, startup_s=5.0, rounds=list(rounds), margins=margins)


@pytest.fixture
def sessions() -> list[Session]:
    """Two rounds of 12 tokens for each of two questions (24 tokens)."""
    same = list(range(12))
    other = [*range(6), 99, *range(7, 12)]

    def rounds(seconds, steps, tokens_b=same, drafts=None):
        return [
            measured_round(
                wall_s,
                request(f"a{number}", same, steps),
                request(f"b{number}", tokens_b, 2 * steps),
                drafts=drafts,
                rss=number << 30,
            )
            for number, wall_s in enumerate(seconds, start=1)
        ]

    counters = DraftCounters(drafts=10, draft_tokens=40, accepted_per_depth=[8, 4, 0])
    return [
        session("none", *rounds([4.0, 8.0], 11)),
        session("ngram", *rounds([3.0, 4.0], 5, drafts=counters)),
        session("suffix", *rounds([8.0, 8.0], 11)),
        session("token_recycling", *rounds([2.0, 2.0], 4, other), b1=0.5, b2=0.1),
    ]


CATEGORIES = {"a1": "a", "a2": "a", "b1": "b", "b2": "b"}


def test_speeds_and_paired_ratios(sessions):
    runs = {run.method: run for run in build_runs(sessions, OURS, CATEGORIES, 0.0)}
    ours = runs["token_recycling"]
    assert ours.tokens_per_s == pytest.approx(12.0)
    assert (ours.requests, ours.tokens) == (4, 48)
    # 24 tokens in 2 s against 4 s and 8 s.
    assert ours.ratio_vs_none == pytest.approx(3.0)
    assert (ours.ratio_vs_none_min, ours.ratio_vs_none_max) == pytest.approx((2.0, 4.0))
    assert [round_.ratio_vs_none for round_ in ours.rounds] == pytest.approx([2.0, 4.0])
    # ngram is the best of vLLM's: 3 s and 4 s.
    assert ours.best_native == "ngram"
    assert ours.ratio_vs_best_native == pytest.approx((1.5 + 2.0) / 2)
    assert runs["ngram"].ratio_vs_best_native == pytest.approx(1.0)
    none = runs["none"]
    assert (none.tokens_per_s, none.tokens_per_s_min, none.tokens_per_s_max) == pytest.approx(
        (4.5, 3.0, 6.0)
    )
    assert {name: run.origin for name, run in runs.items()} == {
        "none": "baseline",
        "ngram": "vllm",
        "suffix": "vllm",
        "token_recycling": "specplus",
    }


def test_tokens_per_step_and_acceptance(sessions):
    runs = {run.method: run for run in build_runs(sessions, OURS, CATEGORIES, 0.0)}
    ours = runs["token_recycling"]
    # 11 tokens after the first, in 4 (a) and 8 (b) steps.
    assert ours.tokens_per_step == pytest.approx(22 / 12)
    assert ours.tokens_per_step_by_category == pytest.approx({"a": 11 / 4, "b": 11 / 8})
    assert ours.acceptance_per_depth is None
    assert runs["ngram"].acceptance_per_depth == pytest.approx([0.8, 0.4, 0.0])
    assert runs["ngram"].drafted_per_draft == pytest.approx(4.0)
    assert runs["ngram"].peak_rss_bytes == 2 << 30


def test_identical_share_and_margins(sessions):
    runs = {run.method: run for run in build_runs(sessions, OURS, CATEGORIES, 0.0)}
    assert runs["none"].identical_share is None
    assert runs["ngram"].identical_share == 1.0
    ours = runs["token_recycling"]
    assert ours.identical_share == pytest.approx(0.5)
    assert [(d.question_id, d.position, d.margin_nats) for d in ours.differences] == [
        ("b1", 6, 0.5),
        ("b2", 6, 0.1),
    ]
    sampled = build_runs(sessions, OURS, CATEGORIES, 1.0)
    assert all(run.identical_share is None and not run.differences for run in sampled)


def test_latency_percentiles():
    requests = [request(f"a{i}", [1, 2], 1, ttft_s=i / 1000, tpot_s=i / 500) for i in range(101)]
    requests.append(request("one", [1], 0, ttft_s=0.05, tpot_s=None))
    categories = {item.question_id: "a" for item in requests}
    (run,) = build_runs([session("none", measured_round(1.0, *requests))], OURS, categories, 0.0)
    assert (run.ttft_ms_median, run.tpot_ms_median) == pytest.approx((50.0, 100.0))
    assert run.tpot_ms_p99 == pytest.approx(198.0)


def test_every_number_follows_from_the_answers():
    """What a reader of the file can compute again."""
    slow = request("b1", [1, 2, 3], 2, ttft_s=0.3, tpot_s=0.05)
    (run,) = build_runs(
        [session("none", measured_round(2.0, request("a1", [1, 2], 1), slow))], OURS, CATEGORIES,
        0.0, Objectives(ttft_ms=200, tpot_ms=50),
    )  # fmt: skip
    assert [each.model_dump() for each in run.answers] == [
        {"question_id": "a1", "repeat": 1, "round": 1, "tokens": 2, "steps": 1, "ttft_ms": 100.0,
         "tpot_ms": 10.0, "latency_ms": None},
        {"question_id": "b1", "repeat": 1, "round": 1, "tokens": 3, "steps": 2, "ttft_ms": 300.0,
         "tpot_ms": 50.0, "latency_ms": None},
    ]  # fmt: skip
    assert run.slo_attainment == 0.5
    assert run.ttft_ms.p50 == pytest.approx(200.0)


def test_intervals_hold_the_ratio_that_is_there():
    """In 100 series of 12 rounds with noise of 5 %, most intervals hold the true median."""
    rng, inside = np.random.default_rng(5), 0
    for _ in range(100):
        low, high = bootstrap_interval(rng.normal(1.3, 0.05, 12).tolist())
        inside += low <= 1.3 <= high
    assert 85 <= inside < 100
    assert bootstrap_interval([1.0, 2.0]) is None


def test_what_is_inside_noise_is_called_that(sessions):
    def three(text, seconds):
        rounds = [measured_round(s, request(f"a{i}", [1, 2], 1)) for i, s in enumerate(seconds)]
        return session(text, *rounds)

    categories = {f"a{i}": "a" for i in range(3)}
    group = [three("none", [1.0, 1.0, 1.0]), three("ngram", [0.9, 1.1, 1.0]),
             three("suffix", [0.5, 0.6, 0.5])]  # fmt: skip
    text = printed(build_report(build_runs(group, OURS, categories, 0.0)))
    assert "0.91–1.11 noise" in text
    assert text.count("noise") == 2  # the caption's, and ngram's
    assert "1.67–2.00" in text


def test_a_later_turn_is_not_compared_where_the_one_before_was_answered_otherwise():
    def talk(text, first, second):
        later = request("a1::turn 2", second, 1)
        return session(text, measured_round(1.0, request("a1", first, 1), later))

    group = [talk("none", [1, 2], [3, 4]), talk("ngram", [1, 9], [5, 6]),
             talk("suffix", [1, 2], [3, 9])]  # fmt: skip
    runs = build_runs(group, OURS, {"a1": "a"}, 0.0)
    found = [[(d.question_id, d.position) for d in run.differences] for run in runs]
    assert found == [[], [("a1", 1)], [("a1::turn 2", 1)]]


def report_file(path: Path, seconds: Sequence[float], **settings) -> Path:
    rounds = [
        measured_round(s, request(f"a{i}", [1, 2], 1, tpot_s=s)) for i, s in enumerate(seconds)
    ]
    runs = build_runs(
        [session("none", *rounds)], OURS, {f"a{i}": "a" for i in range(len(seconds))}, 0.0
    )
    build_report(runs).model_copy(update={"settings": settings}).save(path)
    return path


def test_two_files_are_compared_pair_by_pair(tmp_path):
    before = report_file(tmp_path / "before.json", [1.0, 2.0, 4.0, 8.0], limit=4)
    after = report_file(tmp_path / "after.json", [0.5, 1.0, 2.0, 4.1], limit=4)
    same = report_file(tmp_path / "same.json", [1.1, 1.9, 4.1, 7.9], limit=5)
    (found,) = compare(read_report(before), read_report(after))
    assert found.speed.ratio == pytest.approx(2.0)
    assert not found.speed.is_noise
    assert found.later_tokens.ratio == pytest.approx(0.5)
    assert found.later_tokens.pairs == 4
    (found,) = compare(read_report(before), read_report(same))
    assert found.speed.is_noise
    result = CliRunner().invoke(app, ["bench", "--compare", str(before), str(same)])
    assert result.exit_code == 0
    assert "noise" in result.stdout
    assert "Not the same: limit: 4 in the first file, 5 in the second." in result.stdout


def test_files_that_cannot_be_compared_are_told_in_a_sentence(tmp_path):
    whole = report_file(tmp_path / "a.json", [1.0])
    other = tmp_path / "b.json"
    for content, sentence in [
        ("{}", "is no result of bench --json (model: Field required)"),
        ("[", "is no result of bench --json"),
        (whole.read_text().replace('"method": "none"', '"method": "ngram"'), "in common"),
    ]:
        other.write_text(content)
        result = CliRunner().invoke(app, ["bench", "--compare", str(whole), str(other)])
        assert result.exit_code == 2
        assert sentence in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_repeats_are_paired_with_their_own_baseline():
    tokens = [1, 2, 3]

    def one(text, repeat, wall_s, answer=tokens):
        return session(text, measured_round(wall_s, request("a1", answer, 2)), repeat=repeat)

    runs = build_runs(
        [
            one("none", 0, 1.0),
            one("ngram", 0, 0.5),
            one("none", 1, 3.0, [1, 2, 9]),
            one("ngram", 1, 1.0, [1, 2, 9]),
        ],
        OURS,
        CATEGORIES,
        0.0,
    )
    ngram = runs[1]
    assert [round_.ratio_vs_none for round_ in ngram.rounds] == pytest.approx([2.0, 3.0])
    assert ngram.identical_share == 1.0


def test_without_the_baseline_ratios_are_null(sessions):
    for run in build_runs(sessions[1:], OURS, CATEGORIES, 0.0):
        assert run.ratio_vs_none is None
        assert run.identical_share is None
        assert run.ratio_vs_best_native is not None


def test_concurrencies_are_compared_separately(sessions):
    runs = build_runs(
        [*sessions, session("ngram", measured_round(1.0, request("a1", [1, 2], 1)), concurrency=8)],
        OURS,
        CATEGORIES,
        0.0,
    )
    assert (runs[-1].concurrency, runs[-1].ratio_vs_none) == (8, None)
    assert runs[-1].best_native == "ngram"


# --- output ----------------------------------------------------------------------------------


def build_report(runs) -> BenchReport:
    return BenchReport(
        model="/models/tiny",
        versions={"vllm": "0.32.0"},
        machine={"device_name": None, "cpu_model": "some processor"},
        command="vllm-specplus bench",
        settings={},
        runs=runs,
        failures=[
            {
                "method": "eagle:x=[1]",
                "load": "1 in flight",
                "stage": "start",
                "error": "[no] such head",
                "log": "/tmp/eagle.log",
            }
        ],
    )


def printed(report: BenchReport) -> str:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    print_report(console, report)
    return console.export_text()


def test_tables_fit_into_80_columns_unabridged(sessions):
    text = printed(build_report(build_runs(sessions, OURS, CATEGORIES, 0.0)))
    assert "…" not in text
    long_label = "ngram:num_speculative_tokens=8:prompt_lookup_min=2:prompt_lookup_max=3"
    sessions.append(session(long_label, *sessions[1].rounds))
    assert "…" not in printed(build_report(build_runs(sessions, OURS, CATEGORIES, 0.0)))
    for expected in ("token_recycling", "3.00", "1.75", "50.0%", "0.80 0.40 0.00"):
        assert expected in text
    assert "eagle:x=[1], 1 in flight, failed (start): [no] such head" in text
    assert "log: /tmp/eagle.log" in text
    assert "No ratios" not in text


def test_the_table_says_when_there_are_no_ratios(sessions):
    text = printed(build_report(build_runs(sessions[1:], OURS, CATEGORIES, 0.0)))
    assert "No ratios: none was not measured" in text


def test_a_disturbed_machine_is_remarked_on(sessions):
    assert "not quiet" not in printed(build_report(build_runs(sessions, OURS, CATEGORIES, 0.0)))
    sessions[1].rounds[0].other_cpu_share = 0.4
    text = printed(build_report(build_runs(sessions, OURS, CATEGORIES, 0.0)))
    assert "other processes used 40% of its cores" in text.replace("\n", " ")


def test_cpu_time_of_others_is_told_from_our_own(monkeypatch):
    child = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=2.0, system=0.5))
    me = SimpleNamespace(
        cpu_times=lambda: SimpleNamespace(user=4.0, system=1.0),
        children=lambda recursive: [child],
    )
    machine = namedtuple("cpu", "user system idle iowait steal guest guest_nice")
    monkeypatch.setattr(psutil, "Process", lambda: me)
    monkeypatch.setattr(psutil, "cpu_times", lambda: machine(10.0, 2.0, 99.0, 5.0, 1.0, 3.0, 3.0))
    assert other_cpu_seconds() == pytest.approx(10.0 + 2.0 + 1.0 - 7.5)


@pytest.mark.parametrize("first", [0, 1])
def test_plot_is_a_png(sessions, tmp_path, first):
    path = tmp_path / "plot.png"
    save_plot(build_report(build_runs(sessions[first:], OURS, CATEGORIES, 0.0)), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 10_000


# --- command line ----------------------------------------------------------------------------


@pytest.fixture
def dataset(tmp_path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", [{"prompt": f"number {i}"} for i in range(8)])


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["bench", "--model", "some/model", *arguments])


def test_a_model_is_needed_to_run():
    result = CliRunner().invoke(app, ["bench"])
    assert (result.exit_code, "--model is needed" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--concurrency", "0"], "at least 1"),
        (["--concurrency", "one"], "whole numbers"),
        (["--methods", "none,ngram:8"], "expected key=value"),
        (["--methods", ""], "name of a method"),
        (["--engine-arg", "dtype"], "expected key=value"),
        (["--engine-arg", "model=x"], "set by the benchmark"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--max-tokens", "0"], "--max-tokens must be at least 1"),
        (["--repeat", "0"], "--repeat must be at least 1"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--temperature", "-1"], "--temperature must be at least 0"),
        (["--rate", "0"], "--rate needs different numbers above 0"),
        (["--rate", "1", "--burstiness", "0"], "--burstiness must be above 0"),
        (["--later-turns", "--no-chat-template"], "--later-turns needs the chat template"),
        (["--json", "/no/such/folder/out.json"], "does not exist"),
        (["--dataset", "/no/such/file.jsonl"], "cannot read the dataset"),
        (["--model", "/no/such/model"], "--model: the folder /no/such/model does not exist"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(monkeypatch, dataset, arguments, message):
    def forbidden(log):
        raise AssertionError("a process was started")

    monkeypatch.setattr("vllm_specplus.cli.bench.describe_machine", forbidden)
    result = invoke("--dataset", str(dataset), *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("Error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--dataset is needed for --task text"),
        (["--dataset", "rows.jsonl", "--task", "image"], "--dataset is for --task text: remove it"),
        (["--task", "image", "--max-tokens", "9"], "--max-tokens is for --task text: remove it"),
        (["--task", "image", "--sequential"], "--sequential is for --task text: remove it"),
        (["--guidance-scale", "2"], "--guidance-scale is for --task image-continuous: remove it"),
        (["--task", "image-continuous", "--engine-arg", "seed=1"], "is for --task text or image"),
        (["--sheet", "sheet.png"], "--sheet is for --task image or image-continuous"),
        (["--task", "image", "--sheet", "/no/such/a.png"], "--sheet: the folder /no/such does not"),
        (["--task", "image", "--concurrency", "1,2"], "--task image takes one --concurrency"),
        (["--task", "image"], "some/model has no classifier to judge pictures with"),
        (["--task", "image", "--model", str(IMAGE_MODEL), "--limit", "1"], "at least 2 pictures"),
        (["--task", "image", "--model", str(IMAGE_MODEL), "--methods", "none,ngram"], "not ngram"),
    ],
)
def test_what_a_task_needs_is_one_sentence(arguments, message):
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_messages_before_the_users_need_the_template(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages}, {"prompt": "x"}])
    result = invoke("--dataset", str(path), "--no-chat-template")
    assert result.exit_code == 2
    assert "--no-chat-template cannot send" in result.stderr


def test_writes_json_and_plot(monkeypatch, tmp_path, dataset):
    monkeypatch.setattr(runner, "EngineProcess", FakeProcess.make())
    monkeypatch.setattr("vllm_specplus.cli.bench.describe_machine", lambda log: MACHINE)
    out, plot = tmp_path / "out.json", tmp_path / "out.png"
    result = invoke(
        *("--dataset", str(dataset), "--methods", "none", "--methods", "suffix", "--limit", "6"),
        *("--rounds", "2", "--json", str(out), "--plot", str(plot)),
        *("--engine-arg", "max_model_len=512"),
    )
    assert result.exit_code == 0, result.output
    written = json.loads(out.read_text())
    assert set(written) == {
        *("model", "versions", "machine", "command", "settings", "runs", "failures"),
    }
    assert {"vllm", "vllm_specplus", "python"} <= written["versions"].keys()
    assert {"cpu_model", "cpu_cores", "threads"} <= written["machine"].keys()
    assert written["settings"]["engine_args"]["max_model_len"] == 512
    none, suffix = written["runs"]
    assert (none["method"], suffix["method"], suffix["concurrency"]) == ("none", "suffix", 1)
    assert suffix["ratio_vs_none"] == suffix["ratio_vs_best_native"] == 1.0
    assert suffix["tokens_per_step"] == 1.0
    assert suffix["identical_share"] == 0.0
    assert [item["margin_nats"] for item in suffix["differences"]] == [0.25] * 6
    BenchReport.model_validate(written)
    assert len(suffix["answers"]) == 6
    assert read_report(out).runs[0].load == Load(in_flight=1)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_result_says_of_what_commit_it_is(monkeypatch, tmp_path):
    module, commit = tmp_path / "vllm_specplus" / "bench" / "report.py", report.checked_out()
    module.parent.mkdir(parents=True)
    module.write_text("")
    monkeypatch.setattr(report, "__file__", str(module))
    assert report.checked_out() is None  # installed from a wheel
    git = ["git", "-C", str(tmp_path), "-c", "user.name=n", "-c", "user.email=e"]
    for what in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *what], check=True)
    clean = report.checked_out()
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    assert clean != commit
    module.write_text("changed")
    assert report.checked_out() == clean + "+"


def test_a_failed_method_is_shown_and_makes_the_exit_code_1(monkeypatch, tmp_path, dataset):
    monkeypatch.setattr(runner, "EngineProcess", FakeProcess.make({"ngram": "EngineReady"}))
    monkeypatch.setattr("vllm_specplus.cli.bench.describe_machine", lambda log: MACHINE)
    out = tmp_path / "out.json"
    result = invoke("--dataset", str(dataset), "--methods", "none,ngram", "--json", str(out))
    assert result.exit_code == 1
    assert "ngram, 1 in flight, failed (start): out of luck" in result.output
    written = json.loads(out.read_text())
    assert [run["method"] for run in written["runs"]] == ["none"]
    assert [failure["method"] for failure in written["failures"]] == ["ngram"]


def test_help_does_not_import_vllm_or_torch():
    code = (
        "import sys\n"
        "from vllm_specplus.cli.main import app\n"
        "app(['bench', '--help'], standalone_mode=False)\n"
        "sys.exit([name for name in ('vllm', 'torch', 'matplotlib') if name in sys.modules] or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "--methods" in result.stdout
