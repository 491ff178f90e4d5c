"""Give every question of a data set an answer length of its own.

    python benchmarks/vary_lengths.py question.jsonl OUT.jsonl [--low 8] [--high 40] [--thin 4]

A closed loop whose answers are all of one length runs in step: prompts are read together, and
nobody's tokens wait for another's prompt. Served answers do not end together.

``--thin N`` keeps one in N of the questions longer than ``LONG`` characters: on a small machine
reading them takes most of the time, in which no method differs.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

LONG = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--low", type=int, default=8)
    parser.add_argument("--high", type=int, default=40)
    parser.add_argument("--thin", type=int, default=1)
    args = parser.parse_args()
    lengths = random.Random(0)
    long = 0
    with args.out.open("w", encoding="utf-8") as out:
        for line in args.dataset.read_text(encoding="utf-8").splitlines():
            row = json.loads(line) | {"max_tokens": lengths.randint(args.low, args.high)}
            long += len(row["turns"][0]) > LONG
            if len(row["turns"][0]) > LONG and long % args.thin:
                continue
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
