"""Placements of a draft on two CPU cores: what each shard has to do, what it takes, what is lost.

    python benchmarks/easyspec_placements.py --draft DIR [--count] [--shape draft|wide]
        [--texts 1,16] [--levels 5] [--groups 2] [--turns 7] [--json OUT.json]

First it is counted, for a round of one pass over new text and ``levels - 1`` levels of a chain: the
bytes of weights and of keys and values that every shard reads, its floating-point operations, the
messages of home, and the weights on the critical path (``--count``: nothing else). Then it is
timed. Every placement on two processes of one core each is run in turns with the whole draft on one
core, and with the whole draft on both cores, so that a ratio is one of neighbours in time: medians
over the turns, with quartiles. Last, what fuzzy groups cost with a draft that would otherwise be
right: the drafted tokens that are, of recorded texts (SmolLM2-135M as its own draft).

``--shape wide`` times a random draft of fewer and wider layers instead, in which several texts
compute more than they read.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from vllm_specplus.bench.report import describe_run
from vllm_specplus.drafting.division import PLACEMENTS, ModelShare, layer_owner, share_of
from vllm_specplus.drafting.easyspec import LayerParallelExecutor, Parts, groups_of
from vllm_specplus.drafting.executor import PROMPT_CHUNK, DraftExecutor
from vllm_specplus.drafting.group import Group, join_store, open_store
from vllm_specplus.drafting.memory import fingerprint
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.shards import Plan, Shard, messages

CPU, SHARDS = torch.device("cpu"), 2
CONNECT = timedelta(seconds=120)
#: Tokens of each text when a round begins, those that a round adds, and rounds of a turn.
CONTEXT, GROWTH, ROUNDS = 64, 3, 4
#: Of the random draft: width, layers; proportions of Llama-3.
WIDE, WIDE_LAYERS = 2048, 6
FUZZY = ("attentions", "attentions_and_mlps")


# -- counting --------------------------------------------------------------------------------


def work_of(
    share: ModelShare, placement: str, rank: int, texts: int, levels: int, groups: int
) -> dict[str, float]:
    """What one shard does in a round."""
    weights = sum(
        parameter.nbytes
        for layer in share.layers
        for part in (layer.attention, layer.mlp)
        if part is not None
        for parameter in part.parameters()
    )
    head = 0 if share._head is None else share._head.nbytes
    size = share.dtype.itemsize
    rows = texts * (GROWTH + levels - 1)
    outputs = texts * levels
    slots = 2 * len(share.attention_layers) * share.kv_heads * share.head_dim
    queries = share.config.num_attention_heads // share.config.num_key_value_heads
    flops = 2 * weights / size * rows + 2 * head / size * outputs
    flops += 2 * slots * queries * CONTEXT * rows
    counted = messages(share.num_layers, groups, SHARDS, placement)
    of_round = counted["text"] + counted["output"]
    for _ in range(levels - 1):
        of_round += counted["level"]
    return {
        "weights_mb": (weights + head) / 1e6,
        "read_mb": (weights * levels + head * levels) / 1e6,
        "kv_mb": slots * size * CONTEXT * texts * levels / 1e6,
        "gflop": flops / 1e9,
        "messages": dict(of_round) if rank == 0 else {},
    }


def critical_mb(whole: DraftModel, placement: str, levels: int, groups: int) -> float:
    """Megabytes of weights that are read one after the other in a round, on whichever shard: what
    a round takes at least where reading them takes all the time, and messages none."""

    def of(part) -> int:
        return sum(parameter.nbytes for parameter in part.parameters())

    attention = max(of(each.attention) for each in whole.layers)
    mlps, head = sum(of(each.mlp) for each in whole.layers), whole._head.nbytes
    divided = 1 if placement in ("one_device", "attentions") else SHARDS
    text = level = whole.num_layers * attention
    if placement == "tensor_parallel":
        most = -(-whole.kv_heads // SHARDS) / whole.kv_heads
        text, level = most * text, most * level
    elif placement in FUZZY:
        owners = [
            [layer_owner(layer, whole.num_layers, groups, SHARDS) for layer in group]
            for group in groups_of(placement, whole.num_layers, groups)
        ]
        level = attention * sum(max(map(each.count, each)) for each in owners)
    return (text + (levels - 1) * level + levels * (mlps + head) / divided) / 1e6


def count(folder: str, texts: int, levels: int, groups: int, dtype: torch.dtype) -> dict:
    """Work of each shard, by placement, and what is on the critical path."""
    whole = DraftModel(folder, CPU, dtype)
    alone = critical_mb(whole, "one_device", levels, groups)
    found = {}
    for placement in PLACEMENTS:
        ranks = range(1 if placement == "one_device" else SHARDS)
        shards = [
            work_of(share_of(whole, placement, rank, SHARDS, groups), placement, rank, texts,
                    levels, groups)
            for rank in ranks
        ]  # fmt: skip
        critical = critical_mb(whole, placement, levels, groups)
        found[placement] = {"shards": shards, "critical_mb": critical, "bound": alone / critical}
    return found


def say_counts(counts: dict, texts: int) -> None:
    print(f"a round of {texts} texts, counted:")
    for placement, counted in counts.items():
        shards = counted["shards"]
        sent = ", ".join(f"{n} {kind}" for kind, n in sorted(shards[0]["messages"].items()))
        each = "; ".join(f"{s['read_mb']:.0f} MB, {s['gflop']:.2f} GFLOP" for s in shards)
        print(
            f"  {placement}: {each}; one after the other {counted['critical_mb']:.0f} MB, so at "
            f"most {counted['bound']:.2f} times as fast" + (f"; {sent}" if sent else "")
        )


# -- timing ----------------------------------------------------------------------------------


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


def time_turn(executor: DraftExecutor, texts: np.ndarray, levels: int) -> list[list[float]]:
    """Seconds of the passes of ROUNDS rounds that begin behind the first reading of the texts."""
    draft_chains(executor, list(texts[:, :CONTEXT]), levels)
    rounds = [
        draft_chains(executor, list(texts[:, : CONTEXT + GROWTH * (i + 1)]), levels)[1]
        for i in range(ROUNDS)
    ]
    forget(executor, len(texts))
    return rounds


@contextmanager
def on_cores(cores: set[int]):
    """This process on ``cores``, with a thread on each."""
    before, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
        torch.set_num_threads(threads)


def serve(order: str) -> None:
    """The other process: one core, one thread."""
    fields = json.loads(order)
    plan = Plan(**fields["plan"])
    os.sched_setaffinity(0, {fields["core"]})
    torch.set_num_threads(1)
    whole = DraftModel(plan.model, CPU, getattr(torch, plan.dtype))
    store = join_store("127.0.0.1", fields["port"], CONNECT)
    group = Group(1, SHARDS, store, CPU, CONNECT)
    with suppress(RuntimeError):  # home is gone
        Shard(plan, whole, group, None).serve()


def time_placement(
    folder: str, placement: str, plain: DraftExecutor, texts: np.ndarray, levels: int, groups: int,
    turns: int,
) -> dict:  # fmt: skip
    """Two shards of one core each, in turns with ``plain`` on one core and on both."""
    first, second = sorted(os.sched_getaffinity(0))[:2]
    dtype = str(plain.model.dtype).removeprefix("torch.")
    slots = len(texts) * (CONTEXT + GROWTH * (ROUNDS + 1) + levels + 32)
    plan = Plan(
        folder, fingerprint(folder), dtype, None, slots, levels, groups, SHARDS, placement
    )  # fmt: skip
    store = open_store(CONNECT)
    order = json.dumps({"plan": asdict(plan), "port": store.port, "core": second})
    command = [sys.executable, __file__, "--serve", order]
    owner = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        with on_cores({first}):  # gloo's threads stay where they are made
            group = Group(0, SHARDS, store, CPU, CONNECT)
        whole = DraftModel(folder, CPU, plain.model.dtype)
        shared = Shard(plan, whole, group, None).place(placement, slots)
        del whole
        ways = {"one core": (plain, {first}), "both cores": (plain, {first, second}),
                "shards": (shared, {first})}  # fmt: skip
        passes: dict[str, list] = {name: [] for name in ways}
        for turn in range(turns + 1):  # the first warms up
            for name, (executor, cores) in ways.items():
                with on_cores(cores):
                    before = group.counts.copy()
                    measured = time_turn(executor, texts, levels)
                    passes[name] += [measured] if turn else []
                    counted = group.counts - before
        group.close()
    finally:
        owner.kill()
        owner.wait()
    return summary(passes) | {
        "messages_per_turn": dict(counted),
        "messages_as_formula": counted
        == expected_messages(plain, placement, len(texts), levels, groups),
    }


def expected_messages(
    plain: DraftExecutor, placement: str, texts: int, levels: int, groups: int
) -> Counter[str]:
    """Of a turn: its rounds, and one before, whose texts may take several passes."""
    counted = messages(plain.model.num_layers, groups, SHARDS, placement)
    first, others = (-(-texts * rows // PROMPT_CHUNK) for rows in (CONTEXT, GROWTH))
    times = {
        "text": first + ROUNDS * others,
        "output": ROUNDS + 1,
        "level": (ROUNDS + 1) * (levels - 1),
    }
    total: Counter[str] = Counter()
    for kind, number in times.items():
        total.update({name: number * each for name, each in counted[kind].items()})
    return total


def summary(passes: dict[str, list]) -> dict:
    """Milliseconds of rounds and passes, ratios to one core turn by turn: medians, quartiles."""
    turns = {
        name: [statistics.median(sum(each) for each in turn) for turn in all_turns]
        for name, all_turns in passes.items()
    }
    report: dict = {}
    for name, all_turns in passes.items():
        every = [each for turn in all_turns for each in turn]
        report[name] = {
            "round_ms": spread([1e3 * sum(each) for each in every]),
            "text_ms": spread([1e3 * each[0] for each in every]),
            "level_ms": spread([1e3 * statistics.mean(each[1:]) for each in every]),
            "to_one_core": spread(
                [a / b for a, b in zip(turns[name], turns["one core"], strict=True)]
            ),
            "faster_than_one_core": spread(
                [b / a for a, b in zip(turns[name], turns["one core"], strict=True)]
            ),
        }
    return report


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return {"median": middle, "q1": low, "q3": high}


def random_draft(folder: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192, hidden_size=WIDE, intermediate_size=4 * WIDE,
        num_hidden_layers=WIDE_LAYERS, num_attention_heads=WIDE // 64,
        num_key_value_heads=WIDE // 256, max_position_embeddings=1024,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)


# -- what is lost ----------------------------------------------------------------------------


def accepted_per_round(executor: DraftExecutor, texts: list, levels: int, tokens: int) -> float:
    """Drafted tokens that were right, per round, where a text advances by those and one more."""
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


def lost(folder: str, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, dict]:
    """Accepted tokens per round by layers of a group, and their share of an exact draft's."""
    traces = np.load(args.traces)
    total = int(traces["count"])
    every = range(0, total, max(total // args.accepted_texts, 1))
    texts = [(traces[f"prompt_{i}"], traces[f"output_{i}"]) for i in every]
    texts = [text for text in texts if len(text[0]) < 600][: args.accepted_texts]
    model = DraftModel(folder, CPU, dtype)
    model.quicken()
    found: dict[str, dict] = {}
    for size in sorted({1, *args.groups}):
        groups = groups_of("attentions", model.num_layers, size)
        executor = LayerParallelExecutor(Parts(model, groups), 4096, args.levels)
        accepted = accepted_per_round(executor, texts, args.levels, args.tokens)
        found[str(size)] = {"accepted": accepted}
        found[str(size)]["kept"] = accepted / found["1"]["accepted"]
        print(f"groups of {size}: {accepted:.2f} of {args.levels} accepted a round "
              f"({found[str(size)]['kept']:.0%} of an exact draft's)", flush=True)  # fmt: skip
    return found


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--draft", help="folder of the draft; its own texts are the traces")
    parser.add_argument("--shape", choices=("draft", "wide"), default="draft")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--texts", type=numbers, default=[1, 16])
    parser.add_argument("--levels", type=int, default=5)
    parser.add_argument("--groups", type=numbers, default=[2])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--count", action="store_true", help="count, and time nothing")
    parser.add_argument("--traces", default="benchmarks/data/traces_smollm2.npz")
    parser.add_argument("--accepted-texts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def measure(folder: str, args: argparse.Namespace, result: dict, keep) -> None:
    dtype = getattr(torch, args.dtype)
    for count_of_texts in args.texts:
        for groups in args.groups:
            counts = count(folder, count_of_texts, args.levels, groups, dtype)
            result["counted"][f"groups of {groups}, {count_of_texts} texts"] = counts
            say_counts(counts, count_of_texts)
    keep()
    if args.count:
        return
    length = CONTEXT + GROWTH * ROUNDS
    plain = None
    for count_of_texts in args.texts:
        model = DraftModel(folder, CPU, dtype)
        model.quicken()
        slots = count_of_texts * (length + args.levels + 32)
        plain = DraftExecutor(model, slots, args.levels)
        rng = np.random.default_rng(0)
        texts = rng.integers(0, model.vocab_size, (count_of_texts, length)).astype(np.int32)
        for groups in args.groups:
            case = result["times"][f"groups of {groups}, {count_of_texts} texts"] = {}
            for placement in PLACEMENTS[1:]:
                case[placement] = found = time_placement(
                    folder, placement, plain, texts, args.levels, groups, args.turns
                )
                ratio = found["shards"]["faster_than_one_core"]
                print(
                    f"{count_of_texts} texts, groups of {groups}, {placement}: "
                    f"{found['shards']['round_ms']['median']:.1f} ms a round, "
                    f"{ratio['median']:.2f} times as fast as one core "
                    f"({ratio['q1']:.2f} to {ratio['q3']:.2f})",
                    flush=True,
                )
                keep()


def main() -> None:
    args = options().parse_args()
    if args.serve:
        serve(args.serve)
        return
    if args.shape == "draft" and not args.draft:
        raise SystemExit("--shape draft needs --draft, the folder of one")
    result: dict = {
        "shape": args.shape, "dtype": args.dtype, "levels": args.levels, "counted": {},
        "times": {}, "lost": {},
    }  # fmt: skip

    def keep() -> None:
        if args.json:
            content = describe_run(args.json.with_suffix(".log")) | result
            args.json.write_text(json.dumps(content, indent=1, default=str) + "\n")

    with tempfile.TemporaryDirectory() as made:
        folder = args.draft
        if args.shape == "wide":
            random_draft(made)
            folder = made
        measure(folder, args, result, keep)
        if args.shape == "draft" and not args.count:
            result["lost"] = lost(folder, getattr(torch, args.dtype), args)
    keep()


if __name__ == "__main__":
    main()
