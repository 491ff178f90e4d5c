"""Are node probabilities right? Brier scores and reliability of what the controller believes.

    python benchmarks/calibration.py --model DIR --dataset question.jsonl \
        [--methods token_recycling,suffix_tree,rasd] [--limit 48] [--skip 48] [--max-tokens 64] \
        [--concurrency 4] --json OUT [--plot OUT]

One engine per method answers questions that nothing was tuned on (``--skip``: so many of the
first ones are left out). For every node that the text has decided, the probability that it was
given when it was drafted, if its parent was right, is compared with what it turned out to be. The
Brier score is the mean of (probability - outcome) squared; beside it stands that of the overall
share, which knows nothing of any node: skill is 1 - one / other.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import numpy as np
from one_engine import ask_each, by_label, save

from vllm_specplus.bench.dataset import load_dataset, pick
from vllm_specplus.control.acceptance import AcceptanceEstimator, label_nodes, look_up

BINS = 10


class Watch:
    """Writes down, of every node that a text has decided, what was believed and what came."""

    def __init__(self):
        self.believed, self.came = [], []
        self._learn = AcceptanceEstimator.learn
        watch = self

        def learn(estimator, *args):
            watch.look(estimator, *args)
            return watch._learn(estimator, *args)

        AcceptanceEstimator.learn = learn

    def look(
        self, estimator, tokens, parents, sources, starts, drafted_at, names, rows, texts, known,
        salts=None,
    ):  # fmt: skip
        # Nothing was learnt since the trees were drafted, so this is what was believed then.
        here = np.flatnonzero(rows >= 0)
        own = salts and [salts[r] for r in rows[here]]
        tables = estimator.tables([names[r] for r in here], own)
        for table, r in zip(tables, here, strict=True):
            nodes = slice(starts[r], starts[r + 1])
            whole = np.array([0, nodes.stop - nodes.start], np.int32)
            p, _ = look_up(parents[nodes], sources[nodes], whole, table[None])
            labels, _ = label_nodes(
                tokens[nodes], parents[nodes], texts[rows[r]], drafted_at[r], known[rows[r]]
            )
            self.believed.append(p[labels >= 0])
            self.came.append(labels[labels >= 0])

    def result(self) -> dict:
        p = np.concatenate(self.believed).astype(np.float64)
        y = np.concatenate(self.came).astype(np.float64)
        share = y.mean()
        column = np.minimum((p * BINS).astype(int), BINS - 1)
        counts = np.bincount(column, minlength=BINS)
        filled = counts > 0
        brier, base = np.mean((p - y) ** 2), share * (1 - share)
        return {
            "nodes": len(p), "accepted": float(share), "brier": float(brier),
            "brier_of_share": float(base), "skill": float(1 - brier / base),
            "mean_gap": float(np.average(
                np.abs(np.bincount(column, p, BINS) - np.bincount(column, y, BINS))[filled]
                / counts[filled], weights=counts[filled],
            )),
            "bins": [
                {
                    "from": i / BINS, "nodes": int(counts[i]),
                    "believed": float(p[column == i].mean()), "came": float(y[column == i].mean()),
                }
                for i in np.flatnonzero(filled).tolist()
            ],
        }  # fmt: skip


def measure(args: argparse.Namespace, config: dict) -> dict:
    """In this process: one engine, all questions."""
    from vllm import LLM, SamplingParams

    _, rest = pick(load_dataset(args.dataset).questions, args.skip)
    chats = [list(question.messages) for question in pick(rest, args.limit)[0]]
    watch = Watch()
    llm = LLM(
        args.model, speculative_config=config, enforce_eager=True, max_num_seqs=args.concurrency,
        max_model_len=4096, kv_cache_memory_bytes=1 << 30, seed=0,
    )  # fmt: skip
    llm.chat(chats, SamplingParams(temperature=0, max_tokens=args.max_tokens), use_tqdm=False)
    return watch.result()


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 5))
    axes.plot([0, 1], [0, 1], color="gray", linewidth=1)
    for name, result in results.items():
        bins = result["bins"]
        axes.plot(
            [each["believed"] for each in bins], [each["came"] for each in bins], marker="o",
            label=f"{name} (Brier {result['brier']:.3f})",
        )  # fmt: skip
    axes.set_xlabel("believed probability of a node whose parent is right")
    axes.set_ylabel("share that became text")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--methods", default="token_recycling,suffix_tree,rasd")
    parser.add_argument("--limit", type=int, default=48)
    parser.add_argument("--skip", type=int, default=48)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--plot", type=Path)
    args, results, about = ask_each(parser, lambda args: by_label(args.methods), measure)
    for name, result in results.items():
        print(name, {key: value for key, value in result.items() if key != "bins"})
    save(args.json, about | {"methods": results})
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
