"""Which steps are slow, and who is in them: a trace of an engine's steps under load.

    python benchmarks/step_trace.py --model DIR --dataset question.jsonl --in-flight 16 \
        [--methods none,token_recycling] [--limit 160] [--max-tokens 40] [--engine-arg K=V ...] \
        --json OUT

One engine per method, one after the other, answers the same questions in a closed loop. Of every
step is written down how long it took, how many requests got tokens, how many tokens, how many
prompts were read and of how many tokens, and of a method of ours how many nodes it verified and
what the controller and the drafting took.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
from one_engine import ask_each, by_label, runner_of, save

from vllm_specplus.bench.dataset import load_dataset, pick
from vllm_specplus.bench.engine import Engine, configure_process
from vllm_specplus.bench.methods import parse_engine_args
from vllm_specplus.bench.protocol import EngineSetup

COLUMNS = (
    "began", "seconds", "requests", "tokens", "prompts", "prompt_tokens", "nodes", "control",
    "drafting", "verifying",
)  # fmt: skip

#: Share of the answers that are the slow ones.
SLOWEST = 0.05


class Steps:
    """Wraps an engine's ``step``; a row of ``COLUMNS`` for each."""

    def __init__(self, engine: Engine):
        self._llm, self._engine = engine.llm, engine
        self._step, engine.llm.llm_engine.step = engine.llm.llm_engine.step, self
        self._known: set[str] = set()
        self.rows: list[list[float]] = []
        self.answers: dict[str, list[float]] = {}

    def _counters(self) -> np.ndarray:
        drafter = getattr(runner_of(self._llm), "drafter", None)
        names = ("nodes_drafted", "control_seconds", "draft_seconds", "verify_seconds")
        if drafter is None:
            return np.zeros(len(names))
        return np.array([drafter.counters[name] for name in names])

    def __call__(self):
        before, began = self._counters(), time.perf_counter()
        outputs = self._step()
        now = time.perf_counter()
        nodes, control, drafting, verifying = self._counters() - before
        fresh, tokens, requests = [], 0, 0
        for output in outputs:
            count = len(output.outputs[0].token_ids)
            tokens, requests = tokens + count, requests + (count > 0)
            if count and output.request_id not in self._known:
                self._known.add(output.request_id)
                fresh.append(len(self._engine.prompts[output.request_id]))
                self.answers[output.request_id] = [now, now, count, 0]
            elif count:
                answer = self.answers[output.request_id]
                answer[1], answer[3] = now, answer[3] + 1
                answer[2] += count
        self.rows.append(
            [began, now - began, requests, tokens, len(fresh), sum(fresh), nodes, control, drafting,
             verifying]
        )  # fmt: skip
        return outputs


def measure(args: argparse.Namespace, config: dict | None) -> dict:
    configure_process()
    measured, warmup = pick(load_dataset(args.dataset).questions, args.limit)
    engine = Engine(
        EngineSetup(
            model=args.model, speculative_config=config,
            engine_args=parse_engine_args(args.engine_arg),
            measured=measured, warmup=warmup, concurrency=args.in_flight,
            max_tokens=args.max_tokens, temperature=0, seed=0, chat_template=True,
        )
    )  # fmt: skip
    engine.warm_up()
    steps = Steps(engine)
    from vllm_specplus.bench.engine import Clock

    engine._answer([question.id for question in measured], args.max_tokens, Clock())
    first = steps.rows[0][0]
    for row in steps.rows:
        row[0] -= first
    answers = {
        name: {"first": first_at - first, "last": last - first, "tokens": tokens, "steps": taken}
        for name, (first_at, last, tokens, taken) in steps.answers.items()
    }
    found = {"columns": COLUMNS, "steps": steps.rows, "answers": answers}
    return found | {"summary": summary(found, args.in_flight)}


def summary(found: dict, in_flight: int) -> dict:
    """Means over the kinds of steps of a full batch, times in milliseconds; and what the slowest
    answers have in common."""
    table = np.array(found["steps"], float)
    column = {name: table[:, i] for i, name in enumerate(COLUMNS)}
    full, read = column["requests"] >= in_flight - 1, column["prompts"] > 0
    drafted = column["nodes"] > 0
    kinds = {
        "plain": full & ~read & ~drafted, "drafted": full & ~read & drafted,
        "prompts": read & ~drafted, "prompts_drafted": read & drafted,
    }  # fmt: skip
    steps = {
        name: {
            "steps": int(chosen.sum()),
            "share_of_time": float(column["seconds"][chosen].sum() / column["seconds"].sum()),
            "ms": 1e3 * float(column["seconds"][chosen].mean()),
            "tokens": float(column["tokens"][chosen].mean()),
            "nodes": float(column["nodes"][chosen].mean()),
            "prompt_tokens": float(column["prompt_tokens"][chosen].mean()),
            **{
                f"{part}_ms": 1e3 * float(column[part][chosen].mean())
                for part in ("control", "drafting", "verifying")
            },
        }
        for name, chosen in kinds.items()
        if chosen.any()
    }
    answers = [each for each in found["answers"].values() if each["tokens"] > 1]
    per_token = [(each["last"] - each["first"]) / (each["tokens"] - 1) for each in answers]
    order = np.argsort(per_token)[::-1]
    ends = column["began"] + column["seconds"]

    def parts(chosen: np.ndarray) -> dict[str, float]:
        tokens, beside, read_ms = [], [], []
        for i in chosen:
            # The steps behind its first token, up to its last.
            here = (ends > answers[i]["first"] + 1e-9) & (ends <= answers[i]["last"] + 1e-9)
            tokens.append(answers[i]["tokens"])
            beside.append(int(column["prompts"][here].sum()) / answers[i]["tokens"])
            read_ms.append(1e3 * column["seconds"][here & read].sum() / (answers[i]["tokens"] - 1))
        return {
            "tokens": float(np.mean(tokens)), "prompts_per_token": float(np.mean(beside)),
            "ms_per_token": 1e3 * float(np.mean([per_token[i] for i in chosen])),
            "of_it_in_steps_with_prompts_ms": float(np.mean(read_ms)),
        }  # fmt: skip

    share = max(round(SLOWEST * len(order)), 1)
    return {"steps": steps, "all": parts(order), "slowest": parts(order[:share])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--methods", default="none,token_recycling")
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--limit", type=int, default=160)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--engine-arg", action="append", default=[])
    args, results, about = ask_each(parser, lambda args: by_label(args.methods), measure)
    save(args.json, about | {"methods": results}, indent=None)


if __name__ == "__main__":
    main()
