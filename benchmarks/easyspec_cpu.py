"""EasySpec on two CPU cores: what layers in parallel save, and what fuzziness costs.

    python benchmarks/easyspec_cpu.py --draft DIR [--traces benchmarks/data/traces_smollm2.npz] \
        [--texts 16] [--tokens 48] [--levels 5] [--groups 1,2,4,8] [--json OUT.json]

What fuzziness costs: ``--draft`` drafts greedy chains for the recorded texts, as if they were
being decoded: after every round the text advances by what was accepted and one token more.
With the target itself as the draft (SmolLM2-135M has 30 layers) a plain draft is nearly always
right, so that what is lost is due to the groups alone.

What parallel layers save: a draft of random weights (16 layers of Llama-3.2-1B's proportions,
half as wide) is run in four ways, in turns: one process on one core, one process on both, two
layer-parallel shards with a core each, the second one placed by Ray, and two tensor-parallel
ranks with a core each. Median milliseconds of a round (its exact pass, its fuzzy passes) and
their ratio to one core.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from tensor_parallel_draft import TensorParallelExecutor

from vllm_specplus.bench.report import describe_run
from vllm_specplus.drafting.easyspec import LayerParallelExecutor, layers_of
from vllm_specplus.drafting.executor import DraftExecutor
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.placement import Placement
from vllm_specplus.drafting.shards import Plan, RemoteAttentions, messages

CPU, SLOTS = torch.device("cpu"), 4096
TIMED_ROUNDS, TURNS = 12, 5


def draft_chain(executor: DraftExecutor, text: np.ndarray, levels: int) -> tuple[list[int], list]:
    """The most probable ``levels`` tokens behind ``text``, and the seconds of each pass."""
    if not executor.room("text", len(text)):
        raise ValueError(f"a text of {len(text)} tokens does not fit the draft")
    start = time.perf_counter()
    logits = executor.begin(["text"], [text])[:, None]
    tokens, seconds = [], []
    for level in range(levels):
        token = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(int(token))
        seconds.append(time.perf_counter() - start)
        if level + 1 < levels:
            start = time.perf_counter()
            logits = executor.grow(torch.tensor([0]), token, torch.tensor([[level - 1]]))
    return tokens, seconds


def accepted_per_round(executor: DraftExecutor, texts: list, levels: int, tokens: int) -> float:
    """Drafted tokens that were right, per round."""
    right = rounds = 0
    for prompt, output in texts:
        whole, at = np.concatenate((prompt, output)), len(prompt) + 1
        while at < len(prompt) + min(tokens, len(output) - levels):
            drafted, _ = draft_chain(executor, whole[:at], levels)
            wrong = np.flatnonzero(np.array(drafted) != whole[at : at + levels])
            accepted = int(wrong[0]) if len(wrong) else levels
            right, rounds, at = right + accepted, rounds + 1, at + accepted + 1
        executor.forget("text")
    return right / rounds


def pin(pids: list[int], core: int) -> None:
    """All threads of these processes to one core."""
    for pid in pids:
        for thread in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(thread), {core})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def time_rounds(executor: DraftExecutor, text: np.ndarray, levels: int) -> list[tuple]:
    """(exact pass, mean fuzzy pass) of rounds that add two tokens to the text each."""
    draft_chain(executor, text[: -2 * TIMED_ROUNDS], levels)
    passes = []
    for left in range(2 * TIMED_ROUNDS - 2, -1, -2):
        _, seconds = draft_chain(executor, text[: len(text) - left], levels)
        passes.append((seconds[0], statistics.mean(seconds[1:])))
    executor.forget("text")
    return passes


def random_draft(folder: str) -> None:
    """Sizes that two tensor-parallel ranks can divide."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=1024, intermediate_size=4096, num_hidden_layers=16,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


def timings(folder: str, text: np.ndarray, levels: int, group: int) -> dict[str, dict]:
    plain = DraftExecutor(DraftModel(folder, CPU, torch.float32), SLOTS, levels)
    home = DraftModel(folder, CPU, torch.float32)
    home.keep_attention(layers_of(0, home.num_layers, group, 2), mlps=True)
    shared = LayerParallelExecutor(home, SLOTS, levels, group)
    plan = Plan(folder, "float32", shared.cache.pages, group, 2)
    placement = Placement(plan, CPU, None)
    shared.attentions = RemoteAttentions(home, shared.cache, plan, placement.group)
    divided = TensorParallelExecutor(plan, SLOTS, levels, free_port())
    pin([*placement.pids(), *(rank.pid for rank in divided.ranks)], 1)
    ways = {"one core": (plain, 1, {0}), "both cores": (plain, 2, {0, 1}),
            "two shards": (shared, 1, {0}), "tensor parallel": (divided, 1, {0})}  # fmt: skip
    passes: dict[str, list] = {name: [] for name in ways}
    counted = None
    try:
        for turn in range(TURNS + 1):  # the first warms up
            for name, (executor, threads, cores) in ways.items():
                torch.set_num_threads(threads)
                os.sched_setaffinity(0, cores)
                before = placement.group.counts.copy()
                measured = time_rounds(executor, text, levels)
                passes[name] += measured if turn else []
                if name == "two shards":
                    counted = placement.group.counts - before
    finally:
        os.sched_setaffinity(0, {0, 1})
        placement.close()
        divided.close()
    report = {}
    for name, times in passes.items():
        exact, fuzzy = (1e3 * statistics.median(part) for part in zip(*times, strict=True))
        report[name] = {
            "exact_ms": exact, "fuzzy_ms": fuzzy, "round_ms": exact + (levels - 1) * fuzzy,
        }  # fmt: skip
    for way in report.values():
        way["to_one_core"] = way["round_ms"] / report["one core"]["round_ms"]
    formula = messages(home.num_layers, group, 2)
    fuzzy_passes = (TIMED_ROUNDS + 1) * (levels - 1)
    report["messages"] = {
        "per_pass": {kind: dict(counts) for kind, counts in formula.items()},
        "fuzzy_passes": fuzzy_passes,
        "counted": dict(counted),
        "gathers_as_formula": counted["gather"] == fuzzy_passes * formula["fuzzy"]["gather"],
    }
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draft", required=True)
    parser.add_argument("--traces", default="benchmarks/data/traces_smollm2.npz")
    parser.add_argument("--texts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--levels", type=int, default=5)
    parser.add_argument("--groups", default="1,2,4,8")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    groups = [int(size) for size in args.groups.split(",")]
    traces = np.load(args.traces)
    every = range(0, int(traces["count"]), max(int(traces["count"]) // args.texts, 1))
    texts = [(traces[f"prompt_{i}"], traces[f"output_{i}"]) for i in every][: args.texts]
    texts = [text for text in texts if len(text[0]) < 600]
    result: dict = {"texts": len(texts), "levels": args.levels, "accepted": {}, "times": {}}
    model = DraftModel(args.draft, CPU, torch.float32)
    for size in groups:
        executor = LayerParallelExecutor(model, SLOTS, args.levels, size)
        accepted = accepted_per_round(executor, texts, args.levels, args.tokens)
        result["accepted"][size] = accepted
        kept = accepted / result["accepted"][groups[0]]
        print(f"groups of {size}: {accepted:.2f} of {args.levels} accepted a round ({kept:.0%})")
    draft = tempfile.TemporaryDirectory()
    random_draft(draft.name)
    text = np.random.default_rng(0).integers(0, 8192, 256).astype(np.int32)
    for size in groups:
        if size < 2:
            continue
        result["times"][size] = timings(draft.name, text, args.levels, size)
        for name, way in result["times"][size].items():
            if "round_ms" in way:
                print(
                    f"groups of {size}, {name}: exact pass {way['exact_ms']:.1f} ms, fuzzy "
                    f"{way['fuzzy_ms']:.1f} ms, round {way['to_one_core']:.2f} of one core's",
                    flush=True,
                )
    if args.json:
        content = describe_run(args.json.with_suffix(".log")) | result
        args.json.write_text(json.dumps(content, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
