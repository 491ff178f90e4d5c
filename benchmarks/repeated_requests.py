"""The same requests asked again with small edits, as agents and retries do.

    python benchmarks/repeated_requests.py --model DIR --dataset question.jsonl \
        --methods none,ngram,suffix,token_recycling,suffix_tree,rasd [--limit 40] \
        [--max-tokens 128] [--dtype bfloat16] [--edits 'typo,one word less'] [--json OUT]

For each method a fresh engine answers ``--limit`` questions one at a time, then the same
questions again, edited in one of the ways of ``EDITS``, with a fresh engine per way. Both
passes are timed. Greedy; what the first pass leaves in prefix caches is reset before the
second. ``kept`` is the share of the second answers' tokens that the first answers had at
the same place, up to the first difference: how far an edit leaves an answer as it was.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# As `bench` does: engine and client in one process, which leaves the cores to the engine.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from vllm_specplus.bench.dataset import load_dataset, pick
from vllm_specplus.bench.methods import parse_methods
from vllm_specplus.bench.report import describe_run


def word_missing(text: str) -> str:
    """A word in the middle is gone: often another question."""
    words = text.split(" ")
    del words[len(words) // 2]
    return " ".join(words)


def typo(text: str) -> str:
    """Two letters in the middle have changed places."""
    middle = len(text) // 2
    return text[:middle] + text[middle + 1] + text[middle] + text[middle + 2 :]


#: How a question is put first, and how again.
EDITS = {
    "retried": (str, str),
    "line break behind": (str, lambda text: f"{text}\n"),
    "another time in front": (lambda text: f"[10:32] {text}", lambda text: f"[10:47] {text}"),
    "thanks behind": (str, lambda text: f"{text} Thank you."),
    "typo": (str, typo),
    "one word more": (str, lambda text: f"Please: {text}"),
    "one word less": (str, word_missing),
}


def measure(job: dict) -> list[dict]:
    """One engine, both passes."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        job["model"], speculative_config=job["speculative_config"], max_model_len=2048,
        dtype=job["dtype"], kv_cache_memory_bytes=1 << 30, max_num_seqs=8,
        disable_log_stats=False, seed=0,
    )  # fmt: skip
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"])
    llm.chat([[{"role": "user", "content": "Say hello."}]], params, use_tqdm=False)
    passes, answers = [], []
    for change in EDITS[job["edit"]]:
        llm.reset_prefix_cache()
        before, start = drafts(llm), time.perf_counter()
        for question in job["questions"]:
            chat = [[{"role": "user", "content": change(question)}]]
            answers.append(llm.chat(chat, params, use_tqdm=False)[0].outputs[0].token_ids)
        seconds = time.perf_counter() - start
        tokens = sum(len(answer) for answer in answers[-len(job["questions"]) :])
        accepted = drafts(llm) - before
        passes.append(
            {
                "tokens": tokens,
                "tokens_per_s": tokens / seconds,
                # The first token of an answer comes from the prompt, not from a step.
                "tokens_per_step": (tokens - len(job["questions"]))
                / (tokens - len(job["questions"]) - accepted),
            }
        )
    llm.llm_engine.engine_core.shutdown()
    first, second = answers[: len(job["questions"])], answers[len(job["questions"]) :]
    kept = sum(common_prefix(a, b) for a, b in zip(first, second, strict=True))
    passes[1]["kept"] = kept / passes[1]["tokens"]
    return passes


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens agree, up to the first that differs."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def drafts(llm) -> int:
    """Draft tokens accepted so far."""
    values = [
        m.value for m in llm.get_metrics() if m.name == "vllm:spec_decode_num_accepted_tokens"
    ]
    return int(sum(values))


def run(job: dict, label: str) -> list[dict]:
    """:func:`measure` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--job"], input=json.dumps(job), capture_output=True,
        text=True, env=os.environ | {"VLLM_LOGGING_LEVEL": "ERROR"},
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"{label} failed:\n{done.stderr[-3000:]}")
    return json.loads(lines[0].removeprefix("RESULT "))


def main() -> None:
    if sys.argv[1:] == ["--job"]:
        print("RESULT " + json.dumps(measure(json.load(sys.stdin))))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--methods", default="none,ngram,suffix,token_recycling,suffix_tree,rasd")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--edits", default=",".join(EDITS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if unknown := set(args.edits.split(",")) - set(EDITS):
        parser.error(f"no such edits: {sorted(unknown)}; there are {', '.join(EDITS)}")
    measured, _ = pick(load_dataset(args.dataset).questions, args.limit)
    questions = [q.messages[-1]["content"] if q.messages else q.prompt for q in measured]
    questions = [q for q in questions if len(q) < 5000]
    results: dict[str, dict[str, list[dict]]] = {}
    for edit in args.edits.split(","):
        for spec in parse_methods(args.methods):
            job = {
                "model": args.model, "speculative_config": spec.speculative_config,
                "questions": questions, "max_tokens": args.max_tokens, "edit": edit,
                "dtype": args.dtype,
            }  # fmt: skip
            first, again = run(job, spec.label)
            results.setdefault(edit, {})[spec.label] = [first, again]
            print(
                f"{edit}, {spec.label}: first {first['tokens_per_s']:.1f} tokens/s, "
                f"{first['tokens_per_step']:.2f} a step; again {again['tokens_per_s']:.1f}, "
                f"{again['tokens_per_step']:.2f} ({again['kept']:.0%} of the answers kept)",
                flush=True,
            )
    if args.json:
        content = describe_run(args.json.with_suffix(".log"))
        content |= {"questions": len(questions), "passes": results}
        args.json.write_text(json.dumps(content, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
