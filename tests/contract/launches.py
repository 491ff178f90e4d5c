"""Runs launch lines through vLLM's own parser and configuration, one process each.

``python -m tests.contract.launches FOLDERS`` reads JSON lines ``[[model, line, spec], ...]`` from
stdin and writes for each null (vLLM takes it) or what it says. The processes are forked from this
one, which has imported vLLM once: a configuration leaves traces in its process.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.contract import folders

ROOT = Path(__file__).parents[2]
#: Model, launch line, speculative config (None: none; text: as it stands on the command line).
Launch = tuple[str, str, dict | str | None]


def outcomes(launches: Iterable[Launch], root: Path, timeout: float = 3600) -> list[str | None]:
    """What vLLM says of each launch in a fresh process, None: it takes it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": str(ROOT), "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "tests.contract.launches", str(root)],
        input=json.dumps(list(launches)), env=environment, cwd=ROOT, timeout=timeout,
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith(('"', "null"))]


class _Usage(Exception):
    """What vLLM's parser says before it ends the process."""


def _usage(message: str):
    raise _Usage(message)


def _configure(parser, folder: Path, line: str, spec: dict | str | None) -> str | None:
    from vllm.engine.arg_utils import AsyncEngineArgs

    words = ["--model", str(folder), *shlex.split(line)]
    if spec is not None:
        text = spec if isinstance(spec, str) else json.dumps(spec)
        words += ["--speculative-config", text]
    try:
        args = AsyncEngineArgs.from_cli_args(parser.parse_args(words))
        args.create_engine_config()
    except _Usage as error:
        return str(error)
    except Exception as error:  # whatever vLLM raises is its answer
        return f"{type(error).__name__}: {error}"
    return None


def _warm_up(parser, root: Path, specs: set[str | None]) -> None:
    """Import what any launch imports; a configuration leaves little more than an environment."""
    from vllm.model_executor.models import registry

    # A model's class can be looked at here: no launch of ours starts a device.
    registry._run_in_subprocess = lambda look: look()
    before = dict(os.environ)
    for spec in specs:
        _configure(parser, folders.make(root, "llama3"), "", spec and json.loads(spec))
    os.environ.clear()
    os.environ.update(before)


def main(root: str) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from vllm_specplus import compat
    from vllm_specplus.plugin import register

    register()
    compat.check()  # imports what a method of ours would import in every process
    parser = make_arg_parser(FlexibleArgumentParser())
    parser.error = _usage
    wanted = json.load(sys.stdin)
    usual = {spec and json.dumps(spec) for _, _, spec in wanted if not isinstance(spec, str)}
    _warm_up(parser, Path(root), usual)
    for model, line, spec in wanted:
        folder = folders.make(Path(root), model)
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(2, 1)
            answer = json.dumps(_configure(parser, folder, line, spec))
            os.write(writing, answer.encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as stream:
            answer = stream.read() or json.dumps("the process died")
        os.waitpid(child, 0)
        print(answer, flush=True)
        print(model, line, answer[:60], file=sys.stderr, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
