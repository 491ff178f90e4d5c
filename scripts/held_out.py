"""Writes the list of questions that nothing learns from, ``vllm_specplus/training/held_out.json``.

    python scripts/held_out.py question.jsonl

takes all questions of a file of Spec-Bench's form: their ids, and hashes of runs of their words.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm_specplus.training.splits import LIST, RUN, fingerprint

ABOUT = (
    "Questions of Spec-Bench, by id and by hashes of runs of words of their first turn: nothing "
    "learns from them; see training/splits.py."
)


def entries(path: Path) -> list[dict]:
    """The entries of all questions of a file."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [
        {
            "id": str(row["question_id"]),
            "category": row["category"],
            "runs": fingerprint(row["turns"][0]),
        }
        for row in rows
    ]


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(entry) for entry in entries(Path(sys.argv[1])))
    head = f'{{"about": {json.dumps(ABOUT)},\n"words": {RUN},\n"questions": [\n'
    LIST.write_text(f"{head}{lines}\n]}}\n", encoding="utf-8")
