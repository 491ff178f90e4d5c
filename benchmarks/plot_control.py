"""Draw tokens/s by load, relative to no speculation, from results of ``bench --json``.

python benchmarks/plot_control.py RESULT.json... --plot OUT.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from simulator import plot


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
    rows: dict[int, dict] = {}
    for path in args.results:
        for run in json.loads(path.read_text())["runs"]:
            row = rows.setdefault(run["concurrency"], {"in_flight": run["concurrency"]})
            # Relative to the same run's baseline: a later file may repeat some methods only.
            row[label(run)] = {"tokens_per_second": run["ratio_vs_none"]}
    table = [rows[load] for load in sorted(rows)]
    plot(table, [name for name in table[0] if name != "in_flight"], args.plot)


if __name__ == "__main__":
    main()
