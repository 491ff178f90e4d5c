"""What do the libraries bring that vLLM's CPU worker wants preloaded?

    python benchmarks/preloads.py --model DIR --dataset question.jsonl \\
        --out benchmarks/results/serving/preloads.json

Engines of every method with nothing preloaded and with each library answer the same questions in
turns of a few seconds. Reported is the ratio of throughputs to the engine without, with the 95 %
interval of its mean over the rounds, and the share of the machine's time that others took: they
slow down threads that wait by spinning. ``--tcmalloc`` names a library that the loader does not
find.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from against_commit import compare, plan_of, run_options

from vllm_specplus import preloads
from vllm_specplus.bench.methods import MethodSpec, parse_methods
from vllm_specplus.bench.runner import Benchmark, Session, describe_machine
from vllm_specplus.compat import vllm_version

NOTHING = "nothing"


class Comparison(Benchmark):
    """Every method once per set of preloaded libraries, which its label ends with."""

    def __init__(self, *args, sets: dict[str, str], **kwargs):
        super().__init__(*args, **kwargs)
        self._sets = sets

    def _process_options(self, method: MethodSpec) -> dict[str, Any]:
        return {"variables": {preloads.VARIABLE: self._sets[method.label.split()[-1]]}}


def options() -> argparse.ArgumentParser:
    parser = run_options(__doc__, methods="none,token_recycling", limit=32, rounds=4)
    parser.add_argument("--tcmalloc", help="path of the library, if the loader does not find it")
    return parser


def sets_of(tcmalloc: str | None) -> dict[str, str]:
    """``LD_PRELOAD`` by what it holds."""
    libraries = [
        replace(each, path=tcmalloc) if tcmalloc and each.name == "libtcmalloc" else each
        for each in preloads.wanted()
    ]
    if missing := [each for each in libraries if not each.path]:
        raise SystemExit("\n".join(f"{each.name}: {each.install}" for each in missing))
    return {NOTHING: ""} | {each.name: each.path for each in libraries}


def measure(args: argparse.Namespace, sets: dict[str, str], method: MethodSpec) -> dict:
    """Return how every set compares with nothing preloaded."""
    by_set = [
        MethodSpec(f"{method.label} {each}", method.name, method.speculative_config)
        for each in sets
    ]
    plan = plan_of(args, by_set, 1, kv_cache_memory_bytes=256 << 20)
    with tempfile.TemporaryDirectory() as logs:
        machine = describe_machine(Path(logs) / "describe.log")
        run = Comparison(plan, machine, Path(logs), lambda *_: None, lambda _: None, sets=sets)
        run.run()
    if run.failures:
        raise SystemExit("\n".join(each.error for each in run.failures))
    sessions = {each.method.label.split()[-1]: each for each in run.sessions}
    nothing = sessions.pop(NOTHING)
    return {
        each: compare(nothing, session) | {"other_cpu_share": [others(nothing), others(session)]}
        for each, session in sessions.items()
    }


def others(session: Session) -> float:
    """Median share of the machine's time that other processes took in its rounds."""
    return statistics.median(each.other_cpu_share for each in session.rounds)


def main() -> None:
    args = options().parse_args()
    sets = sets_of(args.tcmalloc)
    names = {key: Path(getattr(args, key)).name for key in ("model", "dataset")}
    setting = vars(args) | names | {
        "vllm": vllm_version(), "machine": platform.machine(), "cores": os.cpu_count(),
        "preloads": {key: [Path(p).name for p in each.split(":")] for key, each in sets.items()},
    }  # fmt: skip
    left_out = ("out", "tcmalloc")
    setting = {key: each for key, each in setting.items() if key not in left_out}
    document: dict = {"setting": setting, "methods": {}}
    for method in parse_methods(args.methods):
        document["methods"][method.label] = found = measure(args, sets, method)
        for each, ratio in found.items():
            print(
                f"{method.label}, {each} preloaded: {ratio['ratio']:.3f} "
                f"±{ratio['half_width']:.3f} {ratio['verdict']}",
                flush=True,
            )
        if args.out:  # as they come: a run that is cut short leaves what it has
            Path(args.out).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
