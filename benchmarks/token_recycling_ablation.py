"""What each part of our Token Recycling brings, and the acceptance tables it ships with.

    python benchmarks/token_recycling_ablation.py --model DIR --dataset question.jsonl \
        [--limit 24] [--max-tokens 128] [--variants "paper;ours"] [--json OUT.json]

One engine, one request at a time; for every variant a fresh matrix (the cold start of
a server) and an empty prefix cache. Prints tokens per step, tokens/s (only comparable
within one run on a quiet machine) and, for the last variant, the acceptance of a child
given that its parent was accepted, by source and rank.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections import defaultdict

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

PLAIN = {"pair_keys": False, "match_context": False}
VARIANTS = (
    {f"paper's rows, {n} nodes": {"num_speculative_tokens": n} | PLAIN for n in (4, 8, 16, 40, 80)}
    | {
        "paper's template 2.2.2": {"num_speculative_tokens": 80, "tree": "2.2.2"},
        "paper's rows, seeded from the prompt, 8": {
            "num_speculative_tokens": 8,
            "seed_from_prompt": True,
        }
        | PLAIN,
        "pair keys, 8": {"num_speculative_tokens": 8, "match_context": False},
        "match, 8": {"num_speculative_tokens": 8, "pair_keys": False},
    }
    | {f"ours, {n} nodes": {"num_speculative_tokens": n} for n in (2, 3, 4, 6, 8, 12, 16, 40, 80)}
)


class Meter:
    """Counts, per source, the nodes whose parent was accepted and how many were too."""

    def __init__(self, proposer):
        self.seen, self.hit = defaultdict(int), defaultdict(int)
        self._proposer, self._propose = proposer, proposer.propose
        self._drafted = None
        proposer.propose = self.propose

    def propose(self, step):
        accepted = step.observation.accepted
        if self._drafted is not None:
            parents, sources = self._drafted
            for i in range(min(len(accepted) - 1, len(parents))):
                if accepted[parents[i] + 1]:
                    name = self._proposer.sources[sources[i]].name
                    self.seen[name] += 1
                    self.hit[name] += bool(accepted[i + 1])
        drafts = self._propose(step)
        self._drafted = drafts.parents.copy(), drafts.sources.copy()
        return drafts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--limit", type=int, default=24)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--variants", default="", help="substrings, separated by ;")
    parser.add_argument("--json")
    args = parser.parse_args()

    import vllm
    from vllm import LLM, SamplingParams

    from vllm_specplus.control.controller import Controller
    from vllm_specplus.control.settings import FixedControl
    from vllm_specplus.plugin import register

    register()
    with open(args.dataset) as f:
        questions = [json.loads(line)["turns"][0][:3000] for line in f]
    stride = max(len(questions) // args.limit, 1)
    chats = [[{"role": "user", "content": q}] for q in questions[::stride][: args.limit]]
    llm = LLM(
        model=args.model, max_model_len=2048, kv_cache_memory_bytes=1 << 29,
        speculative_config={
            "method": "token_recycling", "num_speculative_tokens": 80,
            "control": {"policy": "fixed"},
        },
    )  # fmt: skip
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    from vllm_specplus.proposers.token_recycling import TokenRecycling, TokenRecyclingConfig

    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)
    llm.chat([[{"role": "user", "content": "Hello"}]], params, use_tqdm=False)
    wanted = [w for w in args.variants.split(";") if w]
    results = []
    for name, keys in VARIANTS.items():
        if wanted and not any(w in name for w in wanted):
            continue
        proposer = TokenRecycling(TokenRecyclingConfig(**keys), runner.drafter.proposer.services)
        runner.drafter.proposer = proposer
        runner.drafter.controller = Controller(
            FixedControl(policy="fixed"), proposer.sources, 80, 1 << 16, runner.drafter.counters
        )
        runner.num_spec_tokens = keys["num_speculative_tokens"]
        llm.reset_prefix_cache()
        meter = Meter(proposer)
        before, start, tokens = runner.drafter.counters.as_dict(), time.perf_counter(), 0
        for chat in chats:
            output = llm.chat([chat], params, use_tqdm=False)[0].outputs[0]
            tokens += len(output.token_ids)
        seconds = time.perf_counter() - start
        after = runner.drafter.counters.as_dict()
        delta = {key: after[key] - before[key] for key in after}
        steps = delta["request_steps"]
        row = {
            "variant": name, "tokens": tokens, "tokens_per_s": tokens / seconds,
            "tokens_per_step": delta["output_tokens"] / steps,
            "nodes_per_step": delta["nodes_drafted"] / steps,
            "step_ms": 1e3 * seconds / steps,
            "draft_ms": 1e3 * delta["draft_seconds"] / steps,
            "verify_ms": 1e3 * delta["verify_seconds"] / steps,
            "compact_ms": 1e3 * delta["compact_seconds"] / steps,
        }  # fmt: skip
        results.append(row)
        print(
            f"{name:28} {row['tokens_per_step']:.3f} tokens/step {row['tokens_per_s']:6.1f} tok/s"
            f" {row['nodes_per_step']:5.1f} nodes {row['step_ms']:5.1f} ms/step (draft"
            f" {row['draft_ms']:.2f} verify {row['verify_ms']:.2f} kv {row['compact_ms']:.2f})",
            flush=True,
        )
    acceptance = {
        name: {"seen": meter.seen[name], "accepted": meter.hit[name] / meter.seen[name]}
        for name in sorted(meter.seen)
    }
    for name, value in acceptance.items():
        print(f"{name:14} {value['accepted']:.3f} of {value['seen']}")
    if args.json:
        with open(args.json, "w") as f:
            json.dump(
                {
                    "command": " ".join(sys.argv), "vllm": vllm.__version__,
                    "machine": platform.processor() or platform.machine(),
                    "cpus": os.cpu_count(), "limit": args.limit, "max_tokens": args.max_tokens,
                    "variants": results, "acceptance": acceptance,
                },
                f, indent=1,
            )  # fmt: skip


if __name__ == "__main__":
    main()
