"""A process that has imported vLLM and forks an engine for every job: seven seconds less each.

``python -m tests.engine.zygote`` reads lines of JSON, ``{"job": ..., "out": ..., "log": ...}``,
runs ``child.main(job, out)`` in a fork whose output goes to the log, and answers each with the
fork's exit status.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import traceback

from tests.engine import child


def preload() -> None:
    """What every engine imports."""
    child.load_plugin()
    import numba  # noqa: F401
    import vllm.entrypoints.llm
    import vllm.model_executor.models.llama
    import vllm.v1.worker.cpu_worker  # noqa: F401


def run(job: str, out: str, log: str) -> None:
    """In the fork; does not return."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(output, stream)
    status = 1
    try:
        child.main(job, out)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    preload()
    for line in sys.stdin:
        engine = os.fork()
        if engine == 0:
            run(**json.loads(line))
        _, status = os.waitpid(engine, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
