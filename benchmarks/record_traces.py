"""Record what the simulator replays: texts with their rows, and the times of real steps.

    python benchmarks/record_traces.py --model DIR --dataset question.jsonl \
        [--limit 48] [--max-tokens 128] [--batches 1,2,4,8,16,32,64] \
        --traces benchmarks/data/traces_smollm2.npz [--steps benchmarks/data/step_times_cpu.json]

One engine on a quiet machine. First every question alone, with 16 nodes per step, while
the proposer's observations are written down; then batches of each size, in which every
step drafts a random number of nodes per request, while the steps are timed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections import defaultdict
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np

from vllm_specplus.bench.dataset import load_dataset, pick

RECORDED_NODES = 16
NODE_CHOICES = (0, 1, 2, 4, 8, 16, 32)


class Recorder:
    """Writes down what a proposer is shown while one request is answered."""

    def __init__(self, proposer):
        self._propose, self._observe_prompt = proposer.propose, proposer.observe_prompt
        proposer.propose, proposer.observe_prompt = self.propose, self.observe_prompt
        self.start(0)

    def start(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length
        self.prompt_top_ids, self.rows = [], []
        self.known = prompt_length

    def observe_prompt(self, observation):
        self.prompt_top_ids.append(observation.top_ids)
        self._observe_prompt(observation)

    def propose(self, step):
        o = step.observation
        if self.known == self.prompt_length and not self.rows:
            self.prompt_top_ids.append(o.top_ids)  # the prompt's last row
        at = np.full(len(o.tokens), self.known - self.prompt_length, np.int32)
        self.rows.append((at, o.tokens, o.previous, o.accepted, o.top_ids))
        self.known = int(step.num_tokens[0])
        return self._propose(step)

    def trace(self, prompt, output) -> dict[str, np.ndarray]:
        at, tokens, previous, accepted, top_ids = (
            np.concatenate(column) for column in zip(*self.rows, strict=True)
        )
        return {
            "prompt": np.array(prompt, np.int32), "output": np.array(output, np.int32),
            "prompt_top_ids": np.concatenate(self.prompt_top_ids),
            "row_at": at, "row_tokens": tokens, "row_previous": previous,
            "row_accepted": accepted, "row_top_ids": top_ids,
        }  # fmt: skip


def record_texts(llm, runner, chats, max_tokens: int) -> dict[str, np.ndarray]:
    from vllm import SamplingParams

    recorder = Recorder(runner.drafter.proposer)
    runner.num_spec_tokens = RECORDED_NODES
    arrays = {"count": np.array(len(chats))}
    for i, chat in enumerate(chats):
        llm.reset_prefix_cache()
        tokenizer = llm.get_tokenizer()
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        recorder.start(len(tokenizer.encode(text, add_special_tokens=False)))
        params = SamplingParams(temperature=0, max_tokens=max_tokens)
        output = llm.chat([chat], params, use_tqdm=False)[0]
        trace = recorder.trace(output.prompt_token_ids, output.outputs[0].token_ids)
        if len(trace["prompt_top_ids"]) != len(trace["prompt"]):
            raise RuntimeError(f"question {i}: rows of the prompt are missing")
        arrays |= {f"{name}_{i}": array for name, array in trace.items()}
    return arrays


def time_steps(llm, runner, chats, batches: list[int]) -> dict:
    """Median seconds by (requests, nodes per request), and of a prompt row."""
    from vllm import SamplingParams

    controller = runner.drafter.controller
    rng = np.random.default_rng(0)
    steps = []

    def prepare(step):
        step.acceptance = controller.acceptance.tables(step.request_ids)
        np.minimum(step.max_nodes, rng.choice(NODE_CHOICES), out=step.max_nodes)

    controller.prepare = prepare
    controller.step_took = lambda shape, seconds, *_: steps.append((shape, seconds))
    runner.num_spec_tokens = max(NODE_CHOICES)
    for batch in batches:
        questions = [chats[i % len(chats)] for i in range(batch)]
        tokens = 600 if batch < 4 else 250
        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for _ in range(2):
            llm.reset_prefix_cache()
            llm.chat(questions, params, use_tqdm=False)
    cells, prompts = defaultdict(list), []
    for shape, seconds in steps:
        nodes = (shape.rows - shape.requests) / shape.requests
        nearest = min(NODE_CHOICES, key=lambda n: abs(n - nodes))
        if shape.prompt_rows:
            prompts.append((shape, seconds))
        elif abs(nearest - nodes) <= 0.05 * nearest:
            cells[shape.requests, nearest].append(seconds)
    table = [
        [float(np.median(cells[b, n])) if cells[b, n] else None for n in NODE_CHOICES]
        for b in batches
    ]
    return {
        "requests": batches,
        "nodes": list(NODE_CHOICES),
        "seconds": table,
        "samples": [[len(cells[b, n]) for n in NODE_CHOICES] for b in batches],
        "prompt_row_seconds": float(
            np.median([seconds / (s.prompt_rows + s.rows) for s, seconds in prompts])
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--batches", default="1,2,4,8,16,32,64")
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--steps", type=Path, help="Also time steps, and write this file.")
    args = parser.parse_args()

    import vllm
    from vllm import LLM

    measured, _ = pick(load_dataset(args.dataset).questions, args.limit)  # as `bench` does
    chats = [list(question.messages) for question in measured]
    batches = [int(n) for n in args.batches.split(",")]
    llm = LLM(
        model=args.model, max_model_len=4096, kv_cache_memory_bytes=2 << 30,
        max_num_seqs=max(batches),
        speculative_config={
            "method": "token_recycling", "num_speculative_tokens": 80,
            "control": {"policy": "fixed"}, "seed_from_prompt": True,  # to see its rows
        },
    )  # fmt: skip
    runner = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    from vllm import SamplingParams

    llm.chat([chats[0]], SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)  # warm up
    arrays = record_texts(llm, runner, chats, args.max_tokens)
    np.savez_compressed(args.traces, **arrays)
    if not args.steps:
        return
    times = time_steps(llm, runner, chats, batches)
    times |= {
        "command": " ".join(sys.argv), "vllm": vllm.__version__, "dtype": "bfloat16",
        "machine": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
    }  # fmt: skip
    args.steps.write_text(json.dumps(times, indent=1) + "\n")


if __name__ == "__main__":
    main()
