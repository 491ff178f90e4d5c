"""What generating takes beside the weights, with and without a memory budget, at the same batch.

    python benchmarks/memory_budget.py --model DIR --dataset question.jsonl [--batch 8]
        [--budgets 0.024,0.016] [--questions 48] [--max-tokens 64] --json OUT

One engine at a time, on a CPU, whose memory the kernel counts: the process's resident memory is
read when the engine is warm and idle, its peak is reset, and questions are answered, ``--batch`` at
a time and sampled (temperature 0.7), so that logits have copies. Generation memory is
the peak beyond that, and the keys and values of the batch; the cache's pages that were not touched
are no memory yet. Speed is the median of three passes over fresh questions.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from pathlib import Path
from statistics import median

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from one_engine import ask_each, runner_of, save

from vllm_specplus.bench.dataset import load_dataset, pick
from vllm_specplus.control import memory

PASSES = 3


def resident(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at the peak."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found[1])


def measure(args: argparse.Namespace, config: dict | None) -> dict:
    from vllm import LLM, SamplingParams

    measured, warmup = pick(load_dataset(args.dataset).questions, PASSES * args.questions)
    llm = LLM(
        args.model, speculative_config=config, max_num_seqs=args.batch, max_model_len=2048,
        kv_cache_memory_bytes=1 << 30, enable_prefix_caching=False, seed=0,
    )  # fmt: skip
    params = SamplingParams(temperature=0.7, seed=0, max_tokens=args.max_tokens, ignore_eos=True)
    chats = [list(question.messages) for question in (*warmup, *measured)]
    count = len(warmup)
    llm.chat(chats[: 4 * args.batch], params, use_tqdm=False)
    idle = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    speeds = []
    for number in range(PASSES):
        first = count + number * args.questions
        start = time.perf_counter()
        out = llm.chat(chats[first : first + args.questions], params, use_tqdm=False)
        tokens = sum(len(each.outputs[0].token_ids) for each in out)
        speeds.append(tokens / (time.perf_counter() - start))
    model = llm.llm_engine.model_config
    dims = memory.ModelDimensions.from_config(model.hf_config.to_dict())
    longest = max(len(each.prompt_token_ids) for each in out) + args.max_tokens
    runner = runner_of(llm)
    terms = {}
    if config is not None:
        counters, controller = runner.drafter.counters, runner.drafter.controller
        terms = {
            "most_rows": controller.max_rows,
            "nodes_per_step": counters["nodes_drafted"] / counters["control_steps"],
            "held": runner.drafter.proposer.held_bytes(),
        }
    return {
        "tokens_per_s": median(speeds), "peak_beyond_idle": resident("VmHWM") - idle,
        "texts": memory.kv_bytes(dims, args.batch, longest, 16), **terms,
    }  # fmt: skip


def engines(args: argparse.Namespace) -> dict[str, dict | None]:
    plain: dict = {"method": "token_recycling"}
    budgets = {
        f"{budget} GB": plain | {"memory": {"budget_gb": float(budget)}}
        for budget in args.budgets.split(",")
    }
    return {"none": None, "default": plain} | budgets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--budgets", default="0.024,0.016")
    parser.add_argument("--questions", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=64)
    args, runs, about = ask_each(parser, engines, measure)
    for name, run in runs.items():
        print(name, run)
    save(args.json, about | {"runs": runs})


if __name__ == "__main__":
    main()
