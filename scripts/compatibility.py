"""Runs the launch lines of well-known recipes, plain and with a method, through vLLM's own
configuration, and writes docs/compatibility.json and docs/compatibility.md.

``python scripts/compatibility.py``: some minutes on a CPU. With ``--page`` only the page is
written anew, from the JSON.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.contract import launches  # noqa: E402

LINES = ROOT / "tests" / "contract" / "launch_lines.json"
TABLE = ROOT / "docs" / "compatibility.json"
PAGE = TABLE.with_suffix(".md")
METHOD = {"method": "token_recycling"}
HEAD = """# Which launches work

<!--fig none in this section: scripts/compatibility.py writes this page from its file-->
The launch lines below are those of the recipes of well-known models. Each goes through vLLM's own
parser and `create_engine_config`, as it is and with `--speculative-config
'{{"method": "token_recycling"}}'`, on a folder whose `config.json` has the model's architecture in
small sizes (`scripts/compatibility.py` writes this page; `tests/contract` has the lines). They run
on a CPU build of vLLM {version}, which itself refuses a few that need a GPU or the libraries of
vision models. What a model and a launch may need, and who serves it, is the table in
[`capabilities.py`](../vllm_specplus/capabilities.py); `vllm-specplus doctor --model DIR` shows it
for your model.

{count} lines: plain vLLM takes {plain}; with a method of ours {ours} of these are served and
{refused} are refused at start, each with what to do.

| model | launch line | with a method of ours |
|---|---|---|
"""


def tables() -> list[dict]:
    """Each line with what plain vLLM (``plain``) and vLLM with a method (``ours``) answer."""
    lines = json.loads(LINES.read_text())
    wanted = [(each["model"], each["line"], spec) for each in lines for spec in (None, METHOD)]
    with tempfile.TemporaryDirectory() as folder:
        answers = launches.outcomes(wanted, Path(folder))
    # Folders have names by chance.
    answers = [
        answer and " ".join(answer.replace(folder, "").split("\n")[:3]) for answer in answers
    ]
    pairs = zip(lines, answers[::2], answers[1::2], strict=True)
    return [each | {"plain": plain, "ours": ours} for each, plain, ours in pairs]


def page(table: list[dict]) -> str:
    """The table as Markdown."""
    from vllm_specplus import compat

    taken = [row for row in table if row["plain"] is None]
    served = [row for row in taken if row["ours"] is None]
    version = (compat.vllm_version() or "").split("+")[0]
    text = HEAD.format(
        version=version, count=len(table), plain=len(taken), ours=len(served),
        refused=len(taken) - len(served),
    )  # fmt: skip
    for row in table:
        if row["plain"] is not None:
            answer = "vLLM refuses the line without a method too"
        elif row["ours"] is None:
            answer = "served"
        else:
            answer = row["ours"].removeprefix("ValueError: ")
            answer = answer.replace("speculative method 'token_recycling' does not work", "not")
        line = f"`{row['line']}`" if row["line"] else ""
        text += f"| {row['recipe']} | {line} | {answer} |\n".replace("  |", " |")
    return text


def main() -> None:
    if "--page" not in sys.argv:
        TABLE.write_text(json.dumps(tables(), indent=1) + "\n")
    PAGE.write_text(page(json.loads(TABLE.read_text())))


if __name__ == "__main__":
    main()
