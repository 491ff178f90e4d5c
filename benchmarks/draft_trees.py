"""Tokens per step of draft-tree shapes and verification rules, at the same number of rows.

    python benchmarks/draft_trees.py --model DIR --draft DIR --dataset question.jsonl \\
        --out benchmarks/results/drafts/draft_trees.json

Every shape drafts ``--nodes`` nodes per step (policy "fixed"), ``--width`` in a level, for the
same questions at every temperature; the questions run in groups, whose tokens per step give
the mean and a 95 % confidence interval, and whose differences to the chain and to independent
paths are paired. Then what drafting costs: seconds per step and per node. Each shape runs in
an engine of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

COUNTED = ("request_steps", "output_tokens", "nodes_drafted", "draft_seconds", "verify_seconds")


#: Whose differences to the others are reported.
BASES = {
    "chain": "chain, token by token",
    "paths": "i.i.d. paths, recursive",
    "k_seq": "i.i.d. paths, k-SEQ",
}


def shapes(nodes: int, width: int) -> dict[str, dict]:
    """Label -> keys of the speculative config; ``nodes`` is a multiple of ``width``."""
    return {
        "chain, token by token": {"shape": "chain", "verification": "recursive"},
        "chain, block": {"shape": "chain", "verification": "block"},
        "i.i.d. paths, recursive": {"shape": "spectr", "verification": "recursive"},
        "i.i.d. paths, k-SEQ": {"shape": "spectr", "verification": "k_seq"},
        "RSD-C, recursive": {
            "shape": "rsd_c", "branching": [width] + [1] * (nodes // width - 1),
            "verification": "recursive",
        },
        "RSD-S, recursive": {"shape": "rsd_s", "verification": "recursive"},
        "RSD-S, traversal": {"shape": "rsd_s", "verification": "traversal"},
        "top-k": {"shape": "topk"},
    }  # fmt: skip


def chats(dataset: str, count: int) -> list[list[dict[str, str]]]:
    """``count`` of the first turns of a Spec-Bench file, from all of its parts."""
    with open(dataset) as f:
        every = [json.loads(line)["turns"][0][:1500] for line in f]
    chosen = every[:: len(every) // count][:count]
    return [[{"role": "user", "content": question}] for question in chosen]


def options(purpose: str) -> argparse.ArgumentParser:
    """What benchmarks of draft trees know."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--nodes", type=int, default=12)
    parser.add_argument("--width", type=int, default=3)
    parser.add_argument("--out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser


def measure(args: argparse.Namespace, keys: dict) -> dict[str, list]:
    """temperature -> one list of COUNTED per group of questions."""
    from vllm import LLM, SamplingParams

    width = {} if keys["shape"] in ("chain", "rsd_c") else {"width": args.width}
    llm = LLM(
        model=args.model,
        max_model_len=2048,
        kv_cache_memory_bytes=1 << 30,
        speculative_config={
            "method": "draft_tree", "model": args.draft, "num_speculative_tokens": args.nodes,
            "control": {"policy": "fixed"}, **width, **keys,
        },
    )  # fmt: skip

    def counters() -> np.ndarray:
        (values,) = llm.collective_rpc(lambda worker: worker.model_runner.drafter.counters)
        return np.array([values[name] for name in COUNTED])

    asked = chats(args.dataset, args.questions)
    groups = [asked[i :: args.groups] for i in range(args.groups)]
    out = {}
    for temperature in args.temperatures:
        params = SamplingParams(temperature=temperature, max_tokens=args.max_tokens)
        out[str(temperature)] = []
        for group in groups:
            before = counters()
            llm.chat(group, params, use_tqdm=False)
            out[str(temperature)].append((counters() - before).tolist())
    return out


def summary(groups: np.ndarray, bases: dict[str, np.ndarray]) -> dict[str, float]:
    """``groups`` and each base: float [G, COUNTED]."""
    steps, tokens, nodes, drafting, verifying = groups.sum(0)
    each = groups[:, 1] / groups[:, 0]
    half = 1.96 / np.sqrt(len(each))
    found = {"tokens_per_step": tokens / steps, "tokens_per_step_ci": half * each.std(ddof=1)}
    for name, base in bases.items():
        gain = each - base[:, 1] / base[:, 0]
        found |= {f"over_{name}": gain.mean(), f"over_{name}_ci": half * gain.std(ddof=1)}
    found |= {
        "draft_ms_per_node": 1e3 * drafting / nodes, "draft_ms_per_step": 1e3 * drafting / steps,
        "verify_ms_per_node": 1e3 * verifying / nodes,
    }  # fmt: skip
    return {name: float(value) for name, value in found.items()}


def main() -> None:
    parser = options(__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", help="labels; by default all")
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--groups", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 0.6, 1.0])
    args = parser.parse_args()
    every = shapes(args.nodes, args.width)
    if args.child:
        label, path = json.loads(args.child)
        Path(path).write_text(json.dumps(measure(args, every[label])))
        return
    raw = {}
    with tempfile.TemporaryDirectory() as folder:
        for label in args.shapes or every:
            path = f"{folder}/result.json"
            command = [sys.executable, *sys.argv, "--child", json.dumps([label, path])]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            raw[label] = json.loads(Path(path).read_text())
            print(f"measured: {label}", flush=True)
    measured = {name: label for name, label in BASES.items() if label in raw}
    results = {}
    for temperature in map(str, args.temperatures):
        bases = {name: np.array(raw[label][temperature]) for name, label in measured.items()}
        results[temperature] = {
            label: summary(np.array(of[temperature]), bases) for label, of in raw.items()
        }
    for temperature, rows in results.items():
        print(f"\ntemperature {temperature}, {args.nodes} nodes, {args.width} in a level")
        for label, row in rows.items():
            gains = "".join(
                f"   over {name} {row[f'over_{name}']:+.3f} ±{row[f'over_{name}_ci']:.3f}"
                for name in measured
            )
            print(
                f"  {label:24} {row['tokens_per_step']:.3f} ±{row['tokens_per_step_ci']:.3f}{gains}"
                f"   draft {row['draft_ms_per_node']:.2f} ms/node"
                f"   verify {row['verify_ms_per_node']:.2f} ms/node"
            )
    if args.out:
        from vllm_specplus.compat import vllm_version

        setting = {
            "command": " ".join(sys.argv), "vllm": vllm_version(),
            "machine": platform.machine(), "cores": os.cpu_count(),
            "nodes": args.nodes, "width": args.width,
            "questions": args.questions, "groups": args.groups,
            "max_tokens": args.max_tokens, "counted": COUNTED,
        }  # fmt: skip
        document = {"setting": setting, "summary": results, "groups": raw}
        Path(args.out).write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
