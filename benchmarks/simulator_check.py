"""Does the simulator agree with the engine? The same requests, in both.

    python benchmarks/simulator_check.py --model DIR --dataset question.jsonl \
        --traces TRACES --steps STEPS [--loads 4,16,64] [--passes 3] [--most-tokens 64] --json OUT

``--traces`` and ``--steps`` are what ``record_traces.py`` wrote of this model, data set and
machine. In every pass each recorded question is asked once, its answer cut at another length, in a
closed loop; without speculation and with Token Recycling. Tokens per second and p99 of the time per
token of all passes together are compared.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
import simulator
from one_engine import ask_each, save

from vllm_specplus.bench.dataset import load_dataset, pick
from vllm_specplus.bench.engine import Clock, Engine, configure_process
from vllm_specplus.bench.protocol import EngineSetup

CONFIGS = {"none": None, "token_recycling": {"method": "token_recycling"}}
SHORTEST = 8
#: vLLM's ``max_num_batched_tokens``, of both.
STEP_TOKENS = 4096


def lengths(count: int, passes: int, most: int) -> np.ndarray:
    """Tokens of each answer, int64 [passes, count]."""
    return np.random.default_rng(0).integers(SHORTEST, most + 1, (passes, count))


def of_engine(args: argparse.Namespace, config: dict | None) -> dict:
    """{load: [tokens per second, times per token]}."""
    configure_process()
    count = len(simulator.load_traces(args.traces))
    measured, warmup = pick(load_dataset(args.dataset).questions, count)
    engine = Engine(
        EngineSetup(
            model=args.model, speculative_config=config,
            engine_args={
                "kv_cache_memory_bytes": 1 << 30, "max_model_len": 4096,
                "max_num_batched_tokens": STEP_TOKENS,
            },
            measured=measured, warmup=warmup, concurrency=args.loads[0],
            max_tokens=args.most_tokens, temperature=0, seed=0, chat_template=True,
        )
    )  # fmt: skip
    found = {}
    for load in args.loads:
        seconds, tokens, per_token = 0.0, 0, []
        for cut in lengths(count, args.passes, args.most_tokens):
            for question, most in zip(measured, cut.tolist(), strict=True):
                own = question.model_copy(update={"max_tokens": most})
                engine.questions[question.id] = own
            if not engine.renew(load):
                raise RuntimeError("the engine does not know how to forget")
            clock = Clock()
            names = [question.id for question in measured]
            answers = engine._answer(names, args.most_tokens, clock)
            seconds += clock.now()
            tokens += sum(len(answer.token_ids) for answer in answers)
            per_token += [answer.tpot_s for answer in answers if answer.tpot_s is not None]
        found[load] = [tokens / seconds, per_token]
    return found


def of_simulator(args: argparse.Namespace, name: str) -> dict:
    traces, times = simulator.load_traces(args.traces), simulator.StepTimes.load(args.steps)
    longest = max(len(t.prompt) + len(t.output) for t in traces)
    vocab = simulator.vocab_size(traces)
    policy = simulator.fixed(0) if name == "none" else simulator.goodput(objective="latency")
    found = {}
    for load in args.loads:
        seconds, tokens, per_token = 0.0, 0, []
        for cut in lengths(len(traces), args.passes, args.most_tokens):
            run = simulator.Simulator(
                times, policy, vocab, load, longest + 1, step_tokens=STEP_TOKENS
            )
            asked = [
                replace(t, output=t.output[:most])
                for t, most in zip(traces, cut.tolist(), strict=True)
            ]
            result = simulator.closed_loop(run, asked, load)
            seconds += result.seconds
            tokens += sum(len(trace.output) for trace in asked)
            per_token += result.seconds_per_token
        found[load] = [tokens / seconds, per_token]
    return found


def compare(args: argparse.Namespace, engines: dict[str, dict]) -> Iterator[dict]:
    for name, engine in engines.items():
        simulated = of_simulator(args, name)
        for load in args.loads:
            (rate, per_token), (guess, guessed) = engine[str(load)], simulated[load]
            p99, guess_p99 = (1e3 * float(np.percentile(x, 99)) for x in (per_token, guessed))
            yield {
                "method": name, "in_flight": load, "requests": len(per_token),
                "tokens_per_s": rate, "simulated_tokens_per_s": guess, "rate_ratio": guess / rate,
                "p99_ms": p99, "simulated_p99_ms": guess_p99, "p99_ratio": guess_p99 / p99,
            }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--steps", type=Path, required=True)
    parser.add_argument("--loads", type=lambda text: [int(n) for n in text.split(",")],
                        default=[4, 16, 64])  # fmt: skip
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--most-tokens", type=int, default=64)
    args, engines, about = ask_each(parser, lambda args: CONFIGS, of_engine)
    table = list(compare(args, engines))
    for line in table:
        print(line)
    save(args.json, about | {"loads": table})


if __name__ == "__main__":
    main()
