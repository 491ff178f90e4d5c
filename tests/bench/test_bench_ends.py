"""A benchmark that is killed leaves no engine at work."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
BENCH = """
import sys, time
from pathlib import Path
from vllm_specplus.bench import runner
runner.ENGINE_MODULE = "tests.bench.busy_engine"
engines = [runner.EngineProcess(Path(log)) for log in sys.argv[1:]]
while not all(Path(log).read_text().endswith("\\n") for log in sys.argv[1:]):
    time.sleep(0.05)
if SUSPEND:
    engines[0].suspend()
print("ready", flush=True)
time.sleep(600)
"""


def wait_until(true, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("suspend", [False, True])
def test_engines_end_with_the_benchmark(tmp_path, number, suspend):
    """Busy ones, suspended ones, and what they have started."""
    logs = [tmp_path / "a", tmp_path / "b"]
    bench = subprocess.Popen(
        [sys.executable, "-c", BENCH.replace("SUSPEND", str(suspend)), *map(str, logs)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert bench.stdout.readline() == "ready\n"
    pids = [int(pid) for log in logs for pid in log.read_text().split()]
    assert len(pids) == 4
    assert not any(ended(pid) for pid in pids)
    bench.send_signal(number)
    bench.wait()
    wait_until(lambda: all(ended(pid) for pid in pids))
