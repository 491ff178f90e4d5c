"""Workloads for the retrieving methods: their questions, and the datastores they draw on.

    python benchmarks/retrieval_workloads.py --model DIR --dataset question.jsonl --out DIR

Writes to ``--out``, skipping what is there:

* ``answers.jsonl`` and the datastore ``answers``: what the model answers, greedily, to the
  questions of the dataset that ``bench --limit 48`` does not ask: a day of logs.
* ``code.jsonl`` and the datastore ``stdlib``: the first lines of Python's test files, to be
  continued; the standard library without its tests and installed packages.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from vllm_specplus.bench.dataset import Question, load_dataset, pick

#: As many questions as the benchmark measures, see the README.
MEASURED = 48
PROMPT_CHARACTERS = 1500


def answer(model: str, questions: list[Question], max_tokens: int) -> list[str]:
    """What the model says to each question, without speculation."""
    from vllm import LLM, SamplingParams

    llm = LLM(model, max_num_seqs=32, max_model_len=2048, kv_cache_memory_bytes=1 << 30)
    chats = [list(q.messages or [{"role": "user", "content": q.prompt}]) for q in questions]
    lengths = [len(llm.get_tokenizer().apply_chat_template(chat)) for chat in chats]
    fitting = [c for c, n in zip(chats, lengths, strict=True) if n + max_tokens < 2048]
    outputs = llm.chat(fitting, SamplingParams(temperature=0, max_tokens=max_tokens))
    return [output.outputs[0].text for output in outputs]


def code_prompts(count: int) -> list[dict]:
    """The beginnings of test files of this Python, whose library does not hold them."""
    folder = Path(sysconfig.get_path("stdlib")) / "test"
    files = sorted(p for p in folder.glob("test_*.py") if p.stat().st_size > 8000)
    if len(files) < count:
        sys.exit(f"{folder} holds {len(files)} large test files, {count} are needed")
    rows = []
    for path in files[:: len(files) // count][:count]:
        text = path.read_text(encoding="utf-8", errors="replace")
        end = text.index("\n", PROMPT_CHARACTERS) + 1
        rows.append({"question_id": path.stem, "category": "code", "prompt": text[:end]})
    return rows


def build(model: str, store: Path, inputs: list[Path], *options: str) -> None:
    command = [sys.executable, "-m", "vllm_specplus.cli.main", "datastore", "build", store]
    subprocess.run([*command, *inputs, "--tokenizer", model, *options], check=True)


def standard_library() -> list[Path]:
    """Modules and packages of the standard library, without tests."""
    skipped = {"test", "tests", "idlelib", "site-packages", "dist-packages", "__pycache__"}
    root = Path(sysconfig.get_path("stdlib"))
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not skipped & set(path.relative_to(root).parts)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--max-tokens", type=int, default=128)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    answers, code = args.out / "answers.jsonl", args.out / "code.jsonl"
    if not (args.out / "stdlib").exists():
        build(args.model, args.out / "stdlib", standard_library())
    if not code.exists():
        code.write_text("".join(json.dumps(row) + "\n" for row in code_prompts(40)))
    if not answers.exists():
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        _, others = pick(load_dataset(args.dataset).questions, MEASURED)
        texts = answer(args.model, others, args.max_tokens)
        answers.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    if not (args.out / "answers").exists():
        build(args.model, args.out / "answers", [answers])


if __name__ == "__main__":
    main()
