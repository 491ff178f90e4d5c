"""What speculation costs when it is configured but nothing is drafted.

    python benchmarks/idle_overhead.py --model DIR --dataset question.jsonl [--repeat 3]

Alternates fresh engines without speculation and with Token Recycling whose proposer
learns from every step and then drafts nothing; one request at a time, the same
questions. Prints tokens/s of each run and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def measure(args: argparse.Namespace) -> float:
    """Tokens/s of one engine."""
    from vllm import LLM, SamplingParams

    idle = args.child == "idle"
    llm = LLM(
        model=args.model,
        max_model_len=2048,
        kv_cache_memory_bytes=1 << 29,
        speculative_config={"method": "token_recycling"} if idle else None,
    )
    if idle:
        from vllm_specplus.proposers.token_recycling import TokenRecycling
        from vllm_specplus.tree import DraftBatch

        def learn_only(self, step):
            self._recycle(step.observation)
            return DraftBatch.empty(len(step.request_ids))

        TokenRecycling.propose = learn_only
    with open(args.dataset) as f:
        questions = [json.loads(line)["turns"][0][:1000] for line in f]
    chats = [[{"role": "user", "content": q}] for q in questions[:: len(questions) // 12][:12]]
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    llm.chat(chats[:1], params, use_tqdm=False)
    start, tokens = time.perf_counter(), 0
    for chat in chats[1:]:
        tokens += len(llm.chat([chat], params, use_tqdm=False)[0].outputs[0].token_ids)
    return tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--child", choices=["none", "idle"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(f"RESULT {measure(args)}")
        return
    speeds: dict[str, list[float]] = {"none": [], "idle": []}
    for _ in range(args.repeat):
        for mode in speeds:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--child", mode],
                capture_output=True,
                text=True,
                check=True,
            )
            line = next(x for x in done.stdout.splitlines() if x.startswith("RESULT"))
            speeds[mode].append(float(line.split()[1]))
            print(f"{mode}: {speeds[mode][-1]:.1f} tokens/s", flush=True)
    ratio = statistics.median(speeds["idle"]) / statistics.median(speeds["none"])
    print(f"idle / none: {ratio:.3f}")


if __name__ == "__main__":
    main()
