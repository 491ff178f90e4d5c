"""Run a batch of requests through a real engine in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(
    tmp_path: Path,
    engine: dict,
    batches: list[dict],
    sabotage: str | None = None,
    env: dict[str, str] | None = None,
) -> dict:
    """``engine``: arguments of ``vllm.LLM``; ``batches``: ``{"requests": [[prompt,
    sampling params], ...]}`` or ``{"prompt", "params", "repeat"}``, run one after the
    other (before one with "truncate", that file is cut short; one with "pause" waits so many
    seconds; in one with "kill_owner_after" a process of a layer-parallel draft is killed after
    so many seconds, in one with "stop_cluster_after" all of Ray on this machine); ``env``: more
    environment.
    Returns {"batches": [[{"ids", "text", ...}]], "counters": {...}, "owners": [[pid, ...]]}.
    """
    number = len(list(tmp_path.glob("job*.json")))
    job, out = tmp_path / f"job{number}.json", tmp_path / f"out{number}.json"
    defaults = {"kv_cache_memory_bytes": 1 << 28, "disable_log_stats": True, "seed": 0}
    job.write_text(
        json.dumps({"engine": defaults | engine, "batches": batches, "sabotage": sabotage})
    )
    # TRITON_INTERPRET is for the kernel tests only.
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # The models are tiny: a second OpenMP thread only spins against the test process.
    extra = {"VLLM_LOGGING_LEVEL": "WARNING", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    extra |= env or {}
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.child", str(job), str(out)],
        cwd=ROOT, env=inherited | extra, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    if done.returncode:
        log = f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
        raise RuntimeError(f"engine process failed ({done.returncode}):\n{log}")
    return json.loads(out.read_text())


def ids(result: dict, batch: int = 0) -> list[list[list[int]]]:
    """Output ids [request][n] of one batch."""
    return [request["ids"] for request in result["batches"][batch]]
