"""Speed against accuracy of relaxed acceptance rules, on questions with right answers.

    python benchmarks/judge_accuracy.py --model DIR --draft DIR --head head.safetensors
        --questions questions.jsonl --json OUT [--limit 300] [--nodes 16] [--temperature 0.3]

Rules that take nodes that were not drawn (``judge``, ``typical``, ``top_k_margin``) verify the
draft's greedy chain, ``kl_judge`` a drawn one; each at several settings, with a fixed number of
drafted tokens, in an engine of its own. ``none`` and both lossless chains are there for
comparison. All sample at one temperature, since ``kl_judge`` leaves greedy requests alone.

Questions are those of ``bench/arithmetic.py``, which are checked step by step, or any with a
``reference`` that ends with a number (of Spec-Bench, those of ``math_reasoning``), of which the
last number counts. At the speed of the judge's calibrated threshold the accuracy of every other
rule is read off a line between its nearest settings; where a rule is not as fast, there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from one_engine import ask_each, save

from vllm_specplus.bench.arithmetic import check, final_number, read_problems
from vllm_specplus.bench.dataset import load_dataset
from vllm_specplus.bench.methods import parse_pairs
from vllm_specplus.training.probe import wilson

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

#: Keys of a rule's settings, from strict to generous.
SETTINGS: dict[str, list[dict[str, float]]] = {
    "judge": [{}, *({"threshold": each} for each in (0.99, 0.9, 0.7, 0.5, 0.3, 0.1))],
    "typical": [{"epsilon": e, "delta": e**0.5} for e in (0.3, 0.09, 0.03, 0.01, 0.003)],
    "top_k_margin": [{"top_k": 5, "margin": m} for m in (0.3, 1.0, 2.0, 4.0, 6.0)],
    "kl_judge": [{"threshold": t, "sure": 1.0} for t in (0.5, 1.0, 2.0, 4.0, 8.0)],
}
COUNTED = ("request_steps", "output_tokens", "nodes_drafted", "relaxed_tokens")


def engines(args: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """Speculative configs by labels, which are JSON: a rule and its keys."""
    chain = {
        "method": "draft_tree", "model": args.draft, "num_speculative_tokens": args.nodes,
        "control": {"policy": "fixed"},
    }  # fmt: skip
    greedy, drawn = chain | {"shape": "topk", "width": 1}, chain | {"shape": "chain"}
    found: dict[str, dict[str, Any] | None] = {
        label("none"): None,
        label("lossless"): greedy,
        label("lossless, drawn"): drawn,
    }
    for rule, settings in SETTINGS.items():
        base = drawn if rule == "kl_judge" else greedy
        more = {"head": args.head} if rule == "judge" else {}
        for keys in settings:
            acceptance = {"rule": rule, **more, **keys}
            found[label(rule, keys)] = base | {"acceptance": acceptance, "allow_lossy": True}
    return found


def label(rule: str, keys: dict[str, float] | None = None) -> str:
    return json.dumps({"rule": rule, "keys": keys or {}})


def asked(path: Path, limit: int) -> tuple[list[list[dict[str, str]]], list[Any]]:
    """Conversations, and what says of each answer whether it is right."""
    questions = {each.id: each for each in load_dataset(path).questions}
    chats, checks = [], []
    if next(iter(questions.values())).category == "arithmetic":
        for problem in read_problems(path):
            chats.append([{"role": "user", "content": problem.text}])
            checks.append(lambda text, problem=problem: check(problem, text).right)
    else:
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            question = questions.get(str(row.get("question_id", row.get("id"))))
            reference = row.get("reference")
            first = reference[0] if isinstance(reference, list) and reference else reference
            result = final_number(first) if isinstance(first, str) else None
            if question is not None and result is not None:
                own = {"role": "user", "content": question.prompt}
                chats.append(list(question.messages or [own]))
                checks.append(lambda text, result=result: final_number(text) == result)
    return chats[:limit], checks[:limit]


def measure(args: argparse.Namespace, config: dict[str, Any] | None) -> dict[str, Any]:
    """Rounds of all questions in one engine."""
    from vllm import LLM, SamplingParams

    arguments = {"max_model_len": 512, "max_num_seqs": args.concurrency}
    llm = LLM(
        model=args.model, speculative_config=config,
        **(arguments | parse_pairs(args.engine_arg, "--engine-arg")),
    )  # fmt: skip
    chats, checks = asked(args.questions, args.limit)

    def counters() -> dict[str, int]:
        if config is None:
            return dict.fromkeys(COUNTED, 0)
        (values,) = llm.collective_rpc(lambda worker: worker.model_runner.drafter.counters)
        return {name: int(values[name]) for name in COUNTED}

    params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)

    def answers(some: Sequence[Any]) -> list[Any]:
        return llm.chat(list(some), params, use_tqdm=False)

    answers(chats[: args.concurrency])
    rounds = []
    for _ in range(args.rounds):
        before, began = counters(), time.perf_counter()
        outputs = answers(chats)
        seconds = time.perf_counter() - began
        texts = [each.outputs[0].text for each in outputs]
        rounds.append({
            "seconds": seconds,
            "tokens": sum(len(each.outputs[0].token_ids) for each in outputs),
            "right": sum(bool(right(text)) for right, text in zip(checks, texts, strict=True)),
            "counters": {name: value - before[name] for name, value in counters().items()},
        })  # fmt: skip
    return {"asked": len(chats), "rounds": rounds}


def summary(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    """Figures of a rule at a setting."""
    rounds = answer["rounds"]
    total = answer["asked"] * len(rounds)
    right = sum(each["right"] for each in rounds)
    low, high = wilson(right, total)
    counts = {key: sum(each["counters"][key] for each in rounds) for key in COUNTED}
    steps, tokens = counts["request_steps"], counts["output_tokens"]
    return {
        **json.loads(name), "asked": total, "right": right / total, "right_low": low,
        "right_high": high,
        "tokens_per_s": statistics.median(each["tokens"] / each["seconds"] for each in rounds),
        "answers_per_s": statistics.median(answer["asked"] / each["seconds"] for each in rounds),
        "tokens_per_step": tokens / steps if steps else 1.0,
        "relaxed_share": counts["relaxed_tokens"] / tokens if tokens else 0.0,
        "rounds": rounds,
    }  # fmt: skip


def at_speed(points: Sequence[dict[str, Any]], speed: float, key: str) -> float | None:
    """The accuracy of a rule at a speed, between its settings; None if it is not as fast. Faster
    settings that are also more accurate than slower ones stand for those."""
    ordered = sorted(points, key=lambda each: -each[key])
    best: list[dict[str, Any]] = []
    for each in ordered:
        if not best or each["right"] > best[-1]["right"]:
            best.append(each)
    if not best or best[0][key] < speed:
        return None
    for faster, slower in pairwise(best):
        if slower[key] <= speed <= faster[key]:
            share = (speed - slower[key]) / max(faster[key] - slower[key], 1e-12)
            return slower["right"] + share * (faster["right"] - slower["right"])
    return best[-1]["right"]


def compared(points: Sequence[dict[str, Any]], key: str) -> dict[str, Any]:
    """All rules at the speed of the judge's calibrated threshold."""
    judge = next(each for each in points if each["rule"] == "judge" and not each["keys"])
    others = {
        rule: at_speed([each for each in points if each["rule"] == rule], judge[key], key)
        for rule in SETTINGS
        if rule != "judge"
    }
    return {"speed": judge[key], "judge": judge["right"], **others}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--draft", required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.3)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--concurrency", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--engine-arg", action="append", default=[])
    args, answers, about = ask_each(parser, engines, measure)
    points = [summary(name, answer) for name, answer in answers.items()]
    none = next(each for each in points if each["rule"] == "none")
    for each in points:
        each["speed_vs_none"] = each["answers_per_s"] / none["answers_per_s"]
        print(
            f"{each['rule']:16} {json.dumps(each['keys']):40} right {each['right']:.3f} "
            f"({each['right_low']:.3f}-{each['right_high']:.3f})  {each['tokens_per_step']:.2f} "
            f"tokens per step, {each['speed_vs_none']:.2f} of none's speed"
        )
    equal = {key: compared(points, key) for key in ("speed_vs_none", "tokens_per_step")}
    print(json.dumps(equal, indent=1))
    settings = {
        key: value if isinstance(value, int | float) else str(value)
        for key, value in vars(args).items()
        if key not in ("json", "one")
    }
    save(args.json, {**about, "settings": settings, "points": points, "at_equal_speed": equal})


if __name__ == "__main__":
    main()
