"""The benchmark with real engines."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.test_serve import environment

pytestmark = pytest.mark.engine


def test_loads_and_turns_side_by_side(tmp_path):
    """Closed and open loops and conversations in one engine per method, answers as without
    drafts."""
    from vllm_specplus.cli.model import prepare_model

    questions, out = tmp_path / "questions.jsonl", tmp_path / "out.json"
    rows = [{"turns": [f"Count from {i} to 9.", "Go on."], "category": "count"} for i in range(6)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable, "-m", "vllm_specplus.cli.main", "bench", "--model", str(prepare_model()),
        "--dataset", str(questions), "--later-turns", "--methods",
        'none,token_recycling:num_speculative_tokens=8:control={"policy":"fixed"}',
        "--concurrency", "1,2", "--rate", "5", "--limit", "3",
        "--max-tokens", "12", "--slo-ttft-ms", "100000", "--json", str(out),
        "--engine-arg", "dtype=float32", "--engine-arg", "enforce_eager=true",
        "--engine-arg", "max_model_len=512", "--engine-arg", "kv_cache_memory_bytes=67108864",
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert [(run["method"][:5], run["concurrency"], run["rate"]) for run in report["runs"]] == [
        (method, concurrency, rate)
        for concurrency, rate in ((1, None), (2, None), (None, 5.0))
        for method in ("none", "token")
    ]
    for run in report["runs"]:
        asked = [answer["question_id"] for answer in run["answers"]]
        assert sorted(asked) == sorted(f"{i}{turn}" for i in "123" for turn in ("", "::turn 2"))
        assert run["slo_attainment"] == 1.0
        if run["method"] != "none":
            assert run["identical_share"] == 1.0
            assert run["tokens_per_step"] > 1
    logs = Path(report["settings"]["log_dir"])
    assert len(list(logs.glob("*.log"))) == 3  # who looked at the machine, and one engine each
