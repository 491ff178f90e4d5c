"""Is any method slower than at an earlier commit? Both in one run, taking turns.

    python benchmarks/against_commit.py --commit REV --model DIR --draft DIR \\
        --dataset question.jsonl --methods token_recycling,suffix_tree,draft_tree \\
        --concurrency 1,16 --out benchmarks/results/against_commit.json

The earlier code is checked out beside this one and runs in engines of its own; at every number of
requests in flight the engines of one method, before and now, answer the same questions in turns of
a few seconds. Reported is the ratio of throughputs, per round and in all; a ratio is called slower
or faster only where the rounds agree: where 1 is outside the 95 % interval of their mean.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from vllm_specplus.bench.dataset import load_dataset, pick, split_rounds
from vllm_specplus.bench.loads import Load
from vllm_specplus.bench.methods import MethodSpec, parse_concurrencies, parse_methods
from vllm_specplus.bench.runner import Benchmark, Plan, Session, describe_machine
from vllm_specplus.compat import vllm_version

ROOT = Path(__file__).resolve().parents[1]
BEFORE, NOW = "before", "now"


class Comparison(Benchmark):
    """Every method twice: with the code of a checkout, and with this one's."""

    def __init__(self, *args, checkout: Path, **kwargs):
        super().__init__(*args, **kwargs)
        self._before = checkout

    def _process_options(self, method: MethodSpec) -> dict[str, Any]:
        return {"cwd": self._before if method.label.endswith(BEFORE) else ROOT}


def throughputs(session: Session) -> np.ndarray:
    """Tokens per second of every round, float64 [rounds]."""
    return np.array(
        [sum(len(r.token_ids) for r in each.requests) / each.wall_s for each in session.rounds]
    )


def compare(before: Session, now: Session) -> dict:
    """How much faster it is now, and whether the rounds agree about that."""
    ratios = throughputs(now) / throughputs(before)
    count = len(ratios)
    half = float(student.ppf(0.975, count - 1) * ratios.std(ddof=1) / np.sqrt(count))
    mean = float(ratios.mean())
    answers, others = now.answers(), before.answers()
    return {
        "ratio": mean,
        "half_width": half,
        "verdict": "slower" if mean + half < 1 else "faster" if mean - half > 1 else "equal",
        "rounds": [float(each) for each in ratios],
        "tokens_per_s": [float(np.median(throughputs(each))) for each in (before, now)],
        "startup_s": [before.startup_s, now.startup_s],
        "equal_answers": sum(answers[q] == others[q] for q in answers),
        "answers": len(answers),
    }


def run_options(about: str, **defaults: Any) -> argparse.ArgumentParser:
    """Options of a run that compares engines, with ``defaults`` for some."""
    parser = argparse.ArgumentParser(description=about.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--methods", default="token_recycling,suffix_tree,rasd")
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--enforce-eager", action="store_true", help="compile nothing: starts fast")
    parser.add_argument("--out")
    parser.set_defaults(**defaults)
    return parser


def options() -> argparse.ArgumentParser:
    parser = run_options(__doc__)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--draft", help="model of the methods that need one")
    parser.add_argument("--concurrency", default="1,16")
    return parser


def plan_of(
    args: argparse.Namespace, methods: list[MethodSpec], in_flight: int, **engine_args: Any
) -> Plan:
    """All methods' engines side by side, greedy, as the options say."""
    measured, warmup = pick(load_dataset(Path(args.dataset)).questions, args.limit)
    return Plan(
        model=args.model, methods=methods, loads=[Load(in_flight=in_flight)], measured=measured,
        warmup=warmup, rounds=args.rounds, repeat=1, max_tokens=args.max_tokens, temperature=0.0,
        seed=0, chat_template=True, sequential=False,
        engine_args={
            "dtype": args.dtype, "max_model_len": 2048, "enforce_eager": args.enforce_eager,
            **engine_args,
        },
    )  # fmt: skip


def plan(args: argparse.Namespace, method: MethodSpec, concurrency: int) -> Plan:
    """One method at one number of requests in flight, twice."""
    config = method.speculative_config
    if config is not None and method.name in ("draft_tree", "easyspec"):
        config = {"model": args.draft} | config
    both = [MethodSpec(f"{method.label} {when}", method.name, config) for when in (BEFORE, NOW)]
    both_times = plan_of(args, both, concurrency)
    if len(split_rounds(both_times.measured, args.rounds, concurrency)) < 2:
        raise SystemExit(
            f"--limit {args.limit} is one round at {concurrency} in flight, which has no interval: "
            f"ask more questions"
        )
    return both_times


def setting(args: argparse.Namespace) -> dict:
    """What was run where, without the paths of this machine."""
    commits = [
        subprocess.run(
            ["git", "-C", str(ROOT), "rev-parse", "--short", each],
            check=True, capture_output=True, text=True,
        ).stdout.strip()
        for each in (args.commit, "HEAD")
    ]  # fmt: skip
    here = vars(args) | {
        "vllm": vllm_version(), "machine": platform.machine(), "cores": os.cpu_count(),
        "before": commits[0], "now": commits[1],
    }  # fmt: skip
    names = {key: here[key] and Path(here[key]).name for key in ("model", "draft", "dataset")}
    return {key: value for key, value in (here | names).items() if key != "out"}


def main() -> None:
    args = options().parse_args()
    document: dict = {"setting": setting(args), "methods": {}}
    with tempfile.TemporaryDirectory() as folder:
        checkout, logs = Path(folder) / "before", Path(folder) / "logs"
        logs.mkdir()
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(checkout), args.commit], check=True)
        try:
            machine = describe_machine(logs / "describe.log")
            for method in parse_methods(args.methods):
                for concurrency in parse_concurrencies(args.concurrency):
                    run = Comparison(
                        plan(args, method, concurrency), machine, logs,
                        lambda *_: None, lambda _: None, checkout=checkout,
                    )  # fmt: skip
                    run.run()
                    if run.failures:
                        raise SystemExit("\n".join(each.error for each in run.failures))
                    found = compare(*sorted(run.sessions, key=lambda s: s.method.label))
                    document["methods"].setdefault(method.label, {})[str(concurrency)] = found
                    print(
                        f"{method.label} at {concurrency}: {found['ratio']:.3f} "
                        f"±{found['half_width']:.3f} {found['verdict']}, "
                        f"{found['equal_answers']} of {found['answers']} answers equal",
                        flush=True,
                    )
                    if args.out:  # as they come: a run that is cut short leaves what it has
                        Path(args.out).write_text(json.dumps(document, indent=1) + "\n")
        finally:
            subprocess.run([*git, "remove", "--force", str(checkout)], check=True)


if __name__ == "__main__":
    main()
