"""Run a batch of requests through a real engine in a fresh process.

Jobs that need no environment of their own are forked from a process that has imported vLLM.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

from vllm_specplus.testing import engine

ROOT = Path(__file__).parents[2]
#: Seconds an engine may take for its job.
TIMEOUT = 600


def run(
    tmp_path: Path,
    engine: dict,
    batches: list[dict],
    sabotage: str | None = None,
    env: dict[str, str] | None = None,
) -> dict:
    """``engine``: arguments of ``vllm.LLM``; ``batches``: ``{"requests": [[prompt,
    sampling params], ...]}`` or ``{"prompt", "params", "repeat"}``, run one after the
    other, with more keys for what happens before or instead:

    * "control": how much is drafted is changed, see ``ControlChange``
    * "pause": wait so many seconds; "await_rebuild": until a layer-parallel draft has new processes
    * "truncate": that file is cut short; "renew": the engine forgets all, see ``engine.renewal``
    * "kill_owner_at": a process of that draft is killed when the draft of that number is asked
      for, "stop_owner_at": stopped; "end_process": that one, at the draft "end_at"
    * "fail_at": drafting with the target's layers fails at these drafts, "apart_at": within them
    * "weights": the folder of a model whose weights the engine takes from now on
    * "adapters": the folder of each request's LoRA adapter, None for none
    * "abort_after": the requests are aborted after so many steps, and nothing is returned
    * "sessions": ``sessions.serve``; "hostile": ``hostile.serve``

    ``env``: more environment. Returns {"batches": [[{"ids", "text", ...}]], "counters": {...},
    "counted": [the counters after each batch], "owners": [[pid, ...]]}; with statistics also
    "preemptions", the scheduler's "trims" of drafts and, with any speculation, vLLM's
    "accepted_per_position" and how many tokens it thinks "drafted" after each batch.
    """
    number = len(list(tmp_path.glob("job*.json")))
    job, out = tmp_path / f"job{number}.json", tmp_path / f"out{number}.json"
    defaults = {"kv_cache_memory_bytes": 1 << 28, "disable_log_stats": True, "seed": 0}
    job.write_text(
        json.dumps({"engine": defaults | engine, "batches": batches, "sabotage": sabotage})
    )
    log = out.with_suffix(".log")
    status = _spawn(job, out, log, env) if env else _zygote().run(job, out, log)
    if status:
        raise RuntimeError(f"engine process failed ({status}):\n{log.read_text()[-8000:]}")
    return json.loads(out.read_text())


def _environment(extra: dict[str, str]) -> dict[str, str]:
    return engine.environment() | {"PYTHONPATH": str(ROOT), **extra}


def _spawn(job: Path, out: Path, log: Path, env: dict[str, str]) -> int:
    """In a process of its own environment, from nothing."""
    with log.open("w") as stream:
        return subprocess.run(
            [sys.executable, "-m", "tests.engine.child", str(job), str(out)],
            cwd=ROOT, env=_environment(env), stdout=stream, stderr=stream, timeout=TIMEOUT,
        ).returncode  # fmt: skip


class Zygote:
    """This test process' end of ``zygote.py``."""

    def __init__(self):
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.engine.zygote"], cwd=ROOT, env=_environment({}),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        atexit.register(self._process.stdin.close)

    def run(self, job: Path, out: Path, log: Path) -> int:
        """Exit status of an engine that was forked for the job."""
        print(json.dumps({"job": str(job), "out": str(out), "log": str(log)}),
              file=self._process.stdin, flush=True)  # fmt: skip
        if not select.select([self._process.stdout], [], [], TIMEOUT)[0]:
            os.killpg(self._process.pid, signal.SIGKILL)
            _zygote.cache_clear()
            raise subprocess.TimeoutExpired(str(job), TIMEOUT)
        return int(self._process.stdout.readline())


@functools.cache
def _zygote() -> Zygote:
    return Zygote()


def ids(result: dict, batch: int = 0) -> list[list[list[int]]]:
    """Output ids [request][n] of one batch."""
    return [request["ids"] for request in result["batches"][batch]]
