"""What a datastore costs by the number of additions it was made by, for the same text.

    python benchmarks/datastore_adds.py --model DIR --corpus FOLDER [--glob '**/*.py'] \
        [--tokens 1000000] [--adds 1,10,100,1000] [--json OUT]

Cuts the beginning of a corpus into as many parts as there are additions, stores them one after the
other, and asks as `datastore_scaling.py` does. Merged shards make the time of a look-up one of the
tokens and not of the additions.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from datastore_scaling import measure_queries

from vllm_specplus.bench.report import describe_run
from vllm_specplus.retrieval import build
from vllm_specplus.retrieval.corpus import Corpus
from vllm_specplus.retrieval.datastore import read_manifest


def beginning(corpus: Corpus, tokenizer, tokens: int) -> str:
    """Returns text of about so many tokens."""
    parts, count = [], 0
    for piece in corpus.pieces():
        parts.append(piece.text)
        count += len(tokenizer.encode(piece.text, add_special_tokens=False))
        if count >= tokens:
            return "".join(parts)
    sys.exit(f"the corpus has {count} tokens only")


def in_additions(text: str, adds: int, folder: Path, tokenizer, name: str) -> dict:
    """Stores the text in so many additions and returns what they and the look-ups cost."""
    store, seconds = folder / "store", []
    ends = np.linspace(0, len(text), adds + 1).astype(int)
    for number, (begin, end) in enumerate(pairwise(ends)):
        part = folder / f"{number}.txt"
        part.write_text(text[begin:end], encoding="utf-8")
        start = time.perf_counter()
        build.build(
            store, Corpus.find([part], "*", ""), tokenizer, name, len(tokenizer), append=True
        )
        seconds.append(time.perf_counter() - start)
    manifest = read_manifest(store)
    return {
        "adds": adds,
        "tokens": manifest.num_tokens,
        "shards": len(manifest.shards),
        "bytes": sum(file.stat().st_size for file in store.iterdir()),
        "add_seconds": {
            "median": float(np.median(seconds)),
            "p99": float(np.percentile(seconds, 99)),
            "total": sum(seconds),
        },
        "queries": measure_queries({"store": str(store)}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", type=Path, action="append", required=True)
    parser.add_argument("--glob", default="**/*.py")
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--adds", default="1,10,100,1000")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = beginning(Corpus.find(args.corpus, args.glob, "text"), tokenizer, args.tokens)
    rows = []
    for adds in map(int, args.adds.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(in_additions(text, adds, Path(folder), tokenizer, args.model))
        one = rows[-1]["queries"]["1 per step"]
        print(
            f"{adds} additions: {rows[-1]['shards']} shards, {rows[-1]['bytes'] / 1e6:.1f} MB; "
            f"look-up {one['microseconds_median']:.1f} us (p99 {one['microseconds_p99']:.1f})",
            flush=True,
        )
    if args.json:
        content = describe_run(args.json.with_suffix(".log")) | {"additions": rows}
        args.json.write_text(json.dumps(content, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
