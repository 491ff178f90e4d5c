"""For scripts that ask one engine after the other: each has a process of its own, this script again
with ``--one``, since an engine leaves threads and memory behind.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vllm_specplus.bench.methods import parse_methods
from vllm_specplus.bench.report import describe_run


def runner_of(llm: Any) -> Any:
    """The model runner of vLLM's ``LLM``, whose engine is in this process."""
    core = llm.llm_engine.engine_core.engine_core
    return core.model_executor.driver_worker.worker.model_runner


def ask_each(
    parser: argparse.ArgumentParser,
    engines: Callable[[argparse.Namespace], Mapping[str, dict | None]],
    measure: Callable[[argparse.Namespace, dict | None], Any],
) -> tuple[argparse.Namespace, dict[str, Any], dict[str, Any]]:
    """Parse the command line, to which ``--json`` and ``--one`` are added, and ask each of the
    ``engines``, speculative configs by name.

    ``measure`` is called with the arguments and a config, in the engine's process, and returns what
    JSON can hold. Returns the arguments, those answers by name, and what a report says of the run.
    """
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        args.json.write_text(json.dumps(measure(args, args.one["config"])))
        sys.exit()
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder, "part.json")
        for name, config in engines(args).items():
            own = ["--one", json.dumps({"config": config}), "--json", str(part)]
            subprocess.run([sys.executable, *sys.argv, *own], check=True)
            answers[name] = json.loads(part.read_text())
        about = describe_run(Path(folder, "machine.log"))
    return args, answers, about


def by_label(methods: str) -> dict[str, dict | None]:
    """Speculative configs of ``methods``, by what was typed; as in ``vllm-specplus bench``."""
    return {spec.label: spec.speculative_config for spec in parse_methods(methods)}


def save(path: Path, report: dict[str, Any], indent: int | None = 1) -> None:
    """Write a report as JSON."""
    path.write_text(json.dumps(report, indent=indent) + "\n", encoding="utf-8")
