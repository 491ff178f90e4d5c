"""A target on one core and its draft on another: what drafting while verifying brings.

    python benchmarks/overlap_cpu.py --json OUT.json [--target DIR] [--draft DIR] [--texts 12]
        [--tokens 96] [--levels 4] [--width 3] [--turns 3] [--dtype bfloat16] [--cores 0,1]

One text after the other is answered greedily, by an engine on the first core: undrafted, by
``draft_tree`` with trees and with chains, and with the same draft on the second core, which goes on
while the target verifies (``"overlap": true``) and as PEARL has it (``"paper"``). Beside them
undrafted and ``draft_tree`` on both cores, which is what else a second core can be used for. All
draft as many levels in every step. Each way has an engine of its own in every turn; what is given
is the median over turns and texts, with the least and the most of the turns' medians.

The target is the demo's model and the draft the embedded one, if none are named.
"""

from __future__ import annotations

import json
import os
import sys

if "--one" in sys.argv:  # before a library counts the cores
    os.sched_setaffinity(0, json.loads(sys.argv[sys.argv.index("--one") + 1])["config"]["cores"])

import argparse
import hashlib
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
from one_engine import ask_each, save

TRACES = Path(__file__).parent / "data" / "traces_smollm2.npz"
#: Of texts that are asked before any is timed.
UNTIMED = 2


def ways(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Cores and speculative config of each way."""
    first, second = (int(core) for core in args.cores.split(","))
    draft = {"method": "draft_tree", "model": args.draft, "control": {"policy": "fixed"}}
    tree = draft | {"shape": "topk", "width": args.width}
    tree |= {"num_speculative_tokens": args.width * args.levels}
    chain = draft | {"shape": "chain", "num_speculative_tokens": args.levels}
    ahead = {"draft_cores": str(second)}
    one, both = [first], [first, second]
    found: dict[str, dict[str, Any]] = {
        "none, one core": {"cores": one, "spec": None},
        "none, both cores": {"cores": both, "spec": None},
    }
    for shape, config in (("trees", tree), ("chains", chain)):
        found |= {
            f"{shape}, one core": {"cores": one, "spec": config},
            f"{shape}, both cores": {"cores": both, "spec": config},
            f"{shape}, overlap": {"cores": one, "spec": config | ahead | {"overlap": True}},
            f"{shape}, paper": {"cores": one, "spec": config | ahead | {"overlap": "paper"}},
        }
    return found


def engines(args: argparse.Namespace) -> dict[str, dict | None]:
    """Every way in every turn."""
    own = ways(args)
    return {f"{name} #{turn}": own[name] for turn in range(args.turns) for name in own}


def measure(args: argparse.Namespace, config: dict | None) -> dict[str, Any]:
    """Tokens per second of every text, what was drafted, and a digest of what was said."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from vllm_specplus.testing.engine import counters_of

    assert config is not None
    llm = LLM(
        args.target, speculative_config=config["spec"], dtype=args.dtype, max_model_len=2048,
        max_num_seqs=1, kv_cache_memory_bytes=1 << 29, seed=0, enable_prefix_caching=False,
    )  # fmt: skip
    traces = np.load(TRACES)
    every = range(0, int(traces["count"]), max(int(traces["count"]) // (args.texts + UNTIMED), 1))
    texts = [traces[f"prompt_{i}"][:512].tolist() for i in every][: args.texts + UNTIMED]
    params = SamplingParams(
        temperature=0, max_tokens=args.tokens, ignore_eos=True, detokenize=False
    )
    speeds, said, before = [], hashlib.sha1(), None
    for number, text in enumerate(texts):
        if number == UNTIMED:
            before = llm.collective_rpc(counters_of)[0] or {}
        begin = time.perf_counter()
        asked = TokensPrompt(prompt_token_ids=text)
        (output,) = llm.generate([asked], params, use_tqdm=False)
        if number >= UNTIMED:
            speeds.append(args.tokens / (time.perf_counter() - begin))
            said.update(str(list(output.outputs[0].token_ids)).encode())
    after = llm.collective_rpc(counters_of)[0] or {}
    counted = {name: value - before.get(name, 0) for name, value in after.items()}
    llm.llm_engine.engine_core.shutdown()
    return {"tokens_per_s": speeds, "said": said.hexdigest()[:12], "counters": counted}


def summary(turns: list[dict[str, Any]], reference: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one way, beside the ``reference``'s turns."""
    medians = [statistics.median(turn["tokens_per_s"]) for turn in turns]
    ratios = [
        statistics.median(
            own / other
            for own, other in zip(turn["tokens_per_s"], base["tokens_per_s"], strict=True)
        )
        for turn, base in zip(turns, reference, strict=True)
    ]
    found: dict[str, Any] = {
        "tokens_per_s": statistics.median(medians), "tokens_per_s_min": min(medians),
        "tokens_per_s_max": max(medians), "ratio": statistics.median(ratios),
        "ratio_min": min(ratios), "ratio_max": max(ratios),
        "texts": sorted({turn["said"] for turn in turns}),
    }  # fmt: skip
    counted = [turn["counters"] for turn in turns if turn["counters"].get("request_steps")]
    if counted:
        steps = sum(each["request_steps"] for each in counted)

        def total(name: str) -> float:
            return sum(each[name] for each in counted)

        found |= {
            "tokens_per_step": total("output_tokens") / steps,
            "drafted_per_step": total("nodes_drafted") / steps,
            "foreseen": total("outcomes_foreseen") / steps, "late": total("late_drafts") / steps,
            "drafting_ms_per_step": 1e3 * total("draft_seconds") / steps,
        }  # fmt: skip
    return found


def main() -> None:
    from vllm_specplus.cli.model import prepare_draft, prepare_model

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target")
    parser.add_argument("--draft")
    parser.add_argument("--texts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--width", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cores", default="0,1", help="the target's, the draft's")
    known, _ = parser.parse_known_args()
    target = known.target or str(prepare_model())
    draft = known.draft or str(prepare_draft(Path(target)))
    parser.set_defaults(target=target, draft=draft)
    args, answers, about = ask_each(parser, engines, measure)
    turns = {
        name: [answers[f"{name} #{turn}"] for turn in range(args.turns)] for name in ways(args)
    }
    report: dict[str, Any] = about | {"levels": args.levels, "width": args.width, "ways": {}}
    for name, own in turns.items():
        shape = name.split(",")[0]
        # Without overlap, on as many cores for the target.
        reference = turns["none, one core" if shape == "none" else f"{shape}, one core"]
        report["ways"][name] = summary(own, reference)
        speed, ratio = report["ways"][name]["tokens_per_s"], report["ways"][name]["ratio"]
        print(f"{name}: {speed:.1f} tokens/s, {ratio:.2f} of {shape} on one core", flush=True)
    save(args.json, report)


if __name__ == "__main__":
    main()
