"""Step-level speculation above two real engines in one process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from vllm_specplus.training import arithmetic
from vllm_specplus.training.arithmetic import Size

pytestmark = pytest.mark.engine


@pytest.mark.full(
    "vllm_specplus/arbitrage/*.py", "vllm_specplus/training/arithmetic.py",
    "tests/engine/arbitrate_child.py",
)  # fmt: skip
def test_two_engines_in_one_process(tmp_path):
    tokenizer = arithmetic.make_tokenizer()
    for seed, name in enumerate(("draft", "target")):
        torch.manual_seed(seed)
        model = arithmetic.make_model(Size(64, 1, 0, 0.0, 0.0, "plain"), tokenizer)
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    command = [sys.executable, "-m", "tests.engine.arbitrate_child"]
    folders = [str(tmp_path / name) for name in ("draft", "target")]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["prompt"] == "How many eggs?\n"
    writers = [writer for writer, *_ in found["both"]]
    assert writers == (["draft", "target"] * 15)[: len(writers)]
    assert {writer for writer, *_ in found["alone"]} == {"target"}
    for steps in (found["both"], found["alone"]):
        assert sum(tokens for _, _, tokens, _ in steps) <= 30
        for _, text, tokens, end in steps:
            assert 0 < tokens <= 8
            assert end in ("separator", "answer", "length")
            assert (end == "separator") == text.endswith(".")
    assert found["alone"][0][1] == found["first"]
    assert found["cancelled"]
    assert found["unfinished"] == 0
    assert "reads 128 tokens, and the text has" in found["refused"]
