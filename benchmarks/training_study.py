"""What a draft gains by its objective, its texts and its size: runs of ``train`` side by side.

    python benchmarks/training_study.py --target DIR --data texts.jsonl --measure measured.jsonl
        --work DIR [--only distill,eagle3] [--minutes 4] [--json OUT]

Each run is a command of ``vllm-specplus train`` that learns for ``--minutes`` from the same texts,
and is measured on the same others; files of texts are those of an earlier run's folder. Runs whose
folder in ``--work`` is finished are read, not repeated.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from one_engine import save

from vllm_specplus.bench.report import describe_run

DIVERGENCES = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")

#: Of each recipe, settings by name.
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "distill": {
        f"{loss}, {source}": {"loss": loss, "finish_share": 0.0, "source": source}
        for source in ("target", "draft")
        for loss in DIVERGENCES
    },
    "eagle3": {
        "as by default": {},
        "2,048 tokens": {"draft_vocabulary": 2048},
        "all tokens": {"draft_vocabulary": 1 << 30},
        "output layer learnt": {"learn_output": True},
        "one step": {"steps": 1},
        "total variation in the end": {"finish": "total_variation", "finish_share": 0.4},
        "hard labels": {"loss": "hard_ce", "finish": "hard_ce"},
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--measure", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default=",".join(RUNS))
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for recipe in args.only.split(","):
        for name, settings in RUNS[recipe].items():
            folder = args.work / recipe / name.replace(" ", "_").replace(",", "")
            found.setdefault(recipe, {})[name] = run(args, recipe, settings, folder)
            print(recipe, name, json.dumps(found[recipe][name]["measured"]), flush=True)
    if args.json:
        with tempfile.TemporaryDirectory() as scratch:
            about = describe_run(Path(scratch, "machine.log"))
        save(args.json, {**about, "minutes": args.minutes, "runs": found})


def run(
    args: argparse.Namespace, recipe: str, settings: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Train one draft, unless it is there; what was measured, and how it went."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "vllm_specplus.cli.main", "train", recipe]
    command += ["--target", str(args.target), "--out", str(folder), "--data", str(args.data)]
    # More epochs than there is time for.
    command += ["--measure", str(args.measure), "--minutes", str(args.minutes), "--epochs", "99"]
    for key, value in settings.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    measured = json.loads((folder / "measured.json").read_text())
    return {
        "command": shlex.join(command[3:]),
        "settings": settings,
        "steps": log[-1]["step"],
        "learnt_tokens": sum(each["tokens"] for each in log),
        "seconds": log[-1]["seconds"],
        "loss": {"first": log[0]["loss"], "last": log[-1]["loss"]},
        **measured,
    }


if __name__ == "__main__":
    main()
