"""What a datastore costs by its size: building, memory, and queries.

    python benchmarks/datastore_scaling.py --model DIR --corpus FOLDER [--corpus ...] \
        [--glob '**/*.py'] [--sizes 1,3,10,30,100] [--json OUT] [--plot OUT]

Tokenises the corpora up to the largest size (million tokens), and builds a datastore of
every size out of it. Queries are the method's own: places of the corpus, with a wrong token
in front so that matches have all lengths, one request per step and 32 per step; the pages
of the files are in memory, as they are in a server that has run for a while.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from vllm_specplus.bench.report import describe_run
from vllm_specplus.retrieval.corpus import Corpus

QUERIES = 2000


def measure_build(job: dict) -> dict:
    """In a process of its own, so that its peak of memory is known."""
    from transformers import AutoTokenizer

    from vllm_specplus.retrieval import build

    corpus = Corpus.find([Path(p) for p in job["corpora"]], job["glob"], "text")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    wanted = int(job["millions"] * 1e6)

    class Beginning(Corpus):
        """As much of the corpus as makes the wanted number of tokens."""

        def pieces(self):
            for piece in super().pieces():
                if beginning.tokens >= wanted:
                    return
                yield piece

    beginning = Progress()
    start = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = build.build(
        Path(job["store"]), Beginning(corpus.files, "text"), tokenizer, job["model"],
        len(tokenizer), progress=beginning,
    )  # fmt: skip
    return {
        "tokens": manifest.num_tokens,
        "shards": len(manifest.shards),
        "bytes": sum(manifest.sizes().values()),
        "build_seconds": time.perf_counter() - start,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rss_before_mb": before / 1024,
    }


class Progress:
    """Counts tokens."""

    tokens = 0

    def __call__(self, size: int, tokens: int) -> None:
        self.tokens += tokens


def measure_queries(job: dict) -> dict:
    import psutil

    from vllm_specplus.proposer import Services
    from vllm_specplus.proposers.rest import LONGEST, Rest, RestConfig
    from vllm_specplus.retrieval.datastore import Datastore, verify
    from vllm_specplus.step import bare_step

    verify(job["store"])  # reads every page, as the engine's start does
    store = Datastore.open(job["store"])
    proposer = Rest(RestConfig(datastore=job["store"]), Services(store.manifest.vocab_size))
    proposer.warm_up()
    rng = np.random.default_rng(0)
    out = {}
    for requests in (1, 32):
        seconds = []
        lengths = []
        for _ in range(QUERIES // requests):
            texts = np.zeros((requests, 64), np.int32)
            for text in texts:
                place = int(rng.integers(100, len(store.tokens)))
                text[:] = store.tokens[place - 64 : place]
                text[text >= store.manifest.vocab_size] = 0
                # Longest match of 2 to LONGEST: the token before it is not the corpus's.
                text[63 - int(rng.integers(2, LONGEST + 1))] = rng.integers(1, 1000)
            step = bare_step(proposer.sources, texts, 32)
            start = time.perf_counter()
            draft = proposer.propose(step)
            seconds.append((time.perf_counter() - start) / requests)
            lengths.append(len(draft.tokens) / requests)
        micro = 1e6 * np.array(seconds[5:])
        out[f"{requests} per step"] = {
            "microseconds_median": float(np.median(micro)),
            "microseconds_p99": float(np.percentile(micro, 99)),
            "nodes": float(np.mean(lengths)),
        }
    memory = psutil.Process().memory_full_info()
    out["private_mb"] = memory.uss / 1e6
    return out


def child(kind: str, job: dict) -> dict:
    done = subprocess.run(
        [sys.executable, __file__, "--job", kind, json.dumps(job)],
        stdout=subprocess.PIPE,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        sys.exit(f"measuring {kind} failed")
    return json.loads(lines[0].removeprefix("RESULT "))


def plot(rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = [row["tokens"] / 1e6 for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4))
    for kind in ("1 per step", "32 per step"):
        left.plot(
            sizes, [r["queries"][kind]["microseconds_median"] for r in rows], "o-", label=kind
        )
        left.plot(
            sizes,
            [r["queries"][kind]["microseconds_p99"] for r in rows],
            "o:",
            label=f"{kind}, p99",
        )
    left.axhline(100, color="grey", linewidth=1)
    left.set_ylabel("query, microseconds per request")
    left.set_ylim(0)
    left.legend()
    right.plot(sizes, [r["build"]["build_seconds"] for r in rows], "o-", label="build, s")
    right.plot(sizes, [r["build"]["peak_rss_mb"] for r in rows], "s-", label="build, peak MB")
    right.plot(sizes, [r["build"]["bytes"] / 1e6 for r in rows], "^-", label="on disk, MB")
    right.set_yscale("log")
    right.legend()
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xlabel("million tokens")
        axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    if len(sys.argv) == 4 and sys.argv[1] == "--job":
        kinds = {"build": measure_build, "queries": measure_queries}
        print("RESULT " + json.dumps(kinds[sys.argv[2]](json.loads(sys.argv[3]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", action="append", required=True)
    parser.add_argument("--glob", default="**/*.py")
    parser.add_argument("--sizes", default="1,3,10,30,100")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    rows = []
    for millions in map(float, args.sizes.split(",")):
        folder = Path(tempfile.mkdtemp(prefix="datastore-scaling-"))
        job = {
            "model": args.model, "corpora": args.corpus, "glob": args.glob,
            "millions": millions, "store": str(folder / "store"),
        }  # fmt: skip
        build = child("build", job)
        queries = child("queries", job)
        shutil.rmtree(folder)
        rows.append({"tokens": build["tokens"], "build": build, "queries": queries})
        print(
            f"{build['tokens'] / 1e6:.1f} million tokens, {build['shards']} shards: "
            f"built in {build['build_seconds']:.1f} s, peak {build['peak_rss_mb']:.0f} MB; query "
            + ", ".join(
                f"{q['microseconds_median']:.1f} us (p99 {q['microseconds_p99']:.1f}), {kind}"
                for kind, q in queries.items()
                if isinstance(q, dict)
            ),
            flush=True,
        )
    if args.json:
        content = describe_run(args.json.with_suffix(".log")) | {"sizes": rows}
        args.json.write_text(json.dumps(content, indent=1, default=str) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
