"""Stands for an engine in the middle of a round, with a process of its own; see test_runner.py."""

import os
import subprocess
import sys

from vllm_specplus.bench.engine import end_with_parent

os.setpgrp()
end_with_parent()
child = subprocess.Popen(["sleep", "600"])
print(os.getpid(), child.pid, file=sys.stderr, flush=True)
while True:
    pass
