"""Draw tokens/s by load, relative to no speculation, from results of ``bench --json``.

python benchmarks/plot_control.py RESULT.json... --plot OUT.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def label(run: dict) -> str:
    config = run["speculative_config"]
    if config is None:
        return "none"
    fixed = config.get("control", {}).get("policy") == "fixed"
    return f"fixed {config['num_speculative_tokens']}" if fixed else "goodput"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--plot", type=Path, required=True)
    args = parser.parse_args()
    lines: dict[str, list[tuple[int, float]]] = {}
    for path in args.results:
        runs = json.loads(path.read_text())["runs"]
        none = {r["concurrency"]: r["tokens_per_s"] for r in runs if label(r) == "none"}
        for run in runs:
            load = run["concurrency"]
            lines.setdefault(label(run), []).append((load, run["tokens_per_s"] / none[load]))
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, points in lines.items():
        style = {"linewidth": 2.5, "marker": "o"} if name == "goodput" else {"linestyle": "--"}
        axes.plot(*zip(*sorted(points), strict=True), label=name, **style)
    loads = sorted({load for points in lines.values() for load, _ in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(loads, [str(n) for n in loads])
    axes.set_xlabel("requests in flight")
    axes.set_ylabel("tokens/s, relative to no speculation")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(args.plot, dpi=130)


if __name__ == "__main__":
    main()
