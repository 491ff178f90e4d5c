"""`vllm-specplus search-skips` with a real engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract import folders
from tests.engine.test_self_speculation import idle
from vllm_specplus.config import parse

pytestmark = pytest.mark.engine


def search(model: Path, tmp_path: Path, trials: int) -> dict:
    command = [
        sys.executable, "-m", "vllm_specplus.cli.main", "search-skips", "--model", str(model),
        "--dataset", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "skips.json"),
        "--prompts", "2", "--max-tokens", "8", "--trials", str(trials),
        "--engine-arg", "enforce_eager=true", "--engine-arg", "dtype=float32",
        "--engine-arg", "max_model_len=128", "--engine-arg", "kv_cache_memory_bytes=268435456",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full(
    "vllm_specplus/cli/search_skips.py", "vllm_specplus/drafting/skip_search.py",
    "vllm_specplus/drafting/bayes.py", "vllm_specplus/bench/engine.py",
)  # fmt: skip
def test_a_search_goes_on_and_its_result_is_served(tmp_path):
    """A target in which the second layer does nothing."""
    model = folders.make(tmp_path, "llama3", weights=True)
    idle(Path(model) / "model.safetensors", layer=1)
    rows = [{"prompt": "What is a tree?"}, {"prompt": "Who was first?"}]
    (tmp_path / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    first = search(model, tmp_path, 2)
    assert first["trials"] == 2
    again = search(model, tmp_path, 4)
    assert again["trials"] == 4
    lines = (tmp_path / "skips.json.trials.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 4
    assert again["tokens_per_s"] == max(json.loads(line)["tokens_per_s"] for line in lines[1:])
    served = parse({"method": "layer_skip", "skips": str(tmp_path / "skips.json")})
    assert served.named_layers()["skip_attention"] == again["skip_attention"]
