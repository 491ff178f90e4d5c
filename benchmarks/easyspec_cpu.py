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
ranks with a core each. For one text and for 16 at once: median milliseconds of a round (its
exact pass, its fuzzy passes) and their ratio to one core.
"""

from __future__ import annotations

import argparse
import itertools
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
TIMED_ROUNDS, TURNS = 8, 4
#: Requests at a time. The weights of one pass through the memory bus, which cores share; many
#: rows keep a core busy with what it has loaded.
BATCHES = (1, 16)


def draft_chains(
    executor: DraftExecutor, texts: list[np.ndarray], levels: int
) -> tuple[np.ndarray, list[float]]:
    """The most probable ``levels`` tokens behind each text, int64 [texts, levels], and the
    seconds of each pass."""
    names = [f"text {i}" for i in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        if not executor.room(name, len(text)):
            raise ValueError(f"a text of {len(text)} tokens does not fit the draft")
    start = time.perf_counter()
    logits = executor.begin(names, texts)[:, None]
    tokens, seconds = [], []
    for level in range(levels):
        token = logits[:, -1].argmax(-1, keepdim=True)
        tokens.append(token.numpy())
        seconds.append(time.perf_counter() - start)
        if level + 1 < levels:
            start = time.perf_counter()
            above = torch.full_like(token, level - 1)
            logits = executor.grow(torch.arange(len(texts)), token, above)
    return np.concatenate(tokens, 1), seconds


def forget(executor: DraftExecutor, texts: int) -> None:
    for i in range(texts):
        executor.forget(f"text {i}")


def accepted_per_round(executor: DraftExecutor, texts: list, levels: int, tokens: int) -> float:
    """Drafted tokens that were right, per round."""
    right = rounds = 0
    for prompt, output in texts:
        whole, at = np.concatenate((prompt, output)), len(prompt) + 1
        while at < len(prompt) + min(tokens, len(output) - levels):
            (drafted,), _ = draft_chains(executor, [whole[:at]], levels)
            wrong = np.flatnonzero(drafted != whole[at : at + levels])
            accepted = int(wrong[0]) if len(wrong) else levels
            right, rounds, at = right + accepted, rounds + 1, at + accepted + 1
        forget(executor, 1)
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


def time_rounds(executor: DraftExecutor, texts: np.ndarray, levels: int) -> list[tuple]:
    """(exact pass, mean fuzzy pass) of rounds that add two tokens to every text."""
    length = texts.shape[1]
    draft_chains(executor, list(texts[:, : length - 2 * TIMED_ROUNDS]), levels)
    passes = []
    for left in range(2 * TIMED_ROUNDS - 2, -1, -2):
        _, seconds = draft_chains(executor, list(texts[:, : length - left]), levels)
        passes.append((seconds[0], statistics.mean(seconds[1:])))
    forget(executor, len(texts))
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


def timings(folder: str, texts: np.ndarray, levels: int, group: int) -> dict[str, dict]:
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
                measured = time_rounds(executor, texts, levels)
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
    # Few tokens each, so that the first reading of many texts does not last.
    every_text = np.random.default_rng(0).integers(0, 8192, (max(BATCHES), 64)).astype(np.int32)
    for size, count in itertools.product([size for size in groups if size > 1], BATCHES):
        case = f"groups of {size}, {count} texts"
        result["times"][case] = timings(draft.name, every_text[:count], args.levels, size)
        for name, way in result["times"][case].items():
            if "round_ms" in way:
                print(
                    f"{case}, {name}: exact pass {way['exact_ms']:.1f} ms, fuzzy "
                    f"{way['fuzzy_ms']:.1f} ms, round {way['to_one_core']:.2f} of one core's",
                    flush=True,
                )
    if args.json:
        content = describe_run(args.json.with_suffix(".log")) | result
        args.json.write_text(json.dumps(content, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
