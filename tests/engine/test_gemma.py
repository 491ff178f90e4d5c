"""A real model whose layers have windows: Gemma 3 270M, before, about and far beyond 512 tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import gemma
from tests.engine import harness

#: Tokens of context.
LENGTHS = (200, 505, 600, 1500)


def prompts(folder: Path) -> list[list[int]]:
    """Tokens of our own documentation, from other places of it."""
    from tokenizers import Tokenizer

    text = (Path(__file__).parents[2] / "docs" / "control.md").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    ids = [token for token in ids if token != gemma.BOS]
    return [[gemma.BOS, *ids[1000 * i : 1000 * i + n - 1]] for i, n in enumerate(LENGTHS)]


@pytest.mark.engine
@pytest.mark.full(
    "vllm_specplus/engine/attention/*.py", "vllm_specplus/engine/batch.py",
    "vllm_specplus/engine/tree_metadata.py", "vllm_specplus/kernels/**/*.*", "tests/gemma.py",
)  # fmt: skip
def test_texts_are_the_same_beyond_the_window(tmp_path):
    folder = gemma.prepare()
    params = {"temperature": 0, "max_tokens": 64, "ignore_eos": True, "detokenize": False}
    requests = [[prompt, params] for prompt in prompts(folder)]
    engine = {
        "model": str(folder), "dtype": "float32", "enforce_eager": True, "max_model_len": 2048,
        "skip_tokenizer_init": True, "max_num_seqs": 4, "long_prefill_token_threshold": 256,
        "kv_cache_memory_bytes": 1 << 29, "enable_prefix_caching": True,
    }  # fmt: skip
    batches = [{"requests": requests}] * 2
    want = harness.run(tmp_path, engine, batches)
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps([[r["prompt"], r["ids"][0]] for r in want["batches"][0]]))
    for spec in (
        {"method": "hidden_truth", "reference": str(reference), "num_speculative_tokens": 8},
        {"method": "token_recycling", "num_speculative_tokens": 24},
        {"method": "rasd", "num_speculative_tokens": 24},
    ):
        spec["control"] = {"policy": "fixed"}
        got = harness.run(tmp_path, engine | {"speculative_config": spec}, batches)
        for batch in range(2):
            assert harness.ids(got, batch) == harness.ids(want, batch), spec["method"]
        counters = got["counters"]
        assert counters["nodes_accepted"] > 50, spec["method"]
        assert counters["kv_slots_moved"] > 0, spec["method"]
        assert counters["draft_failures"] == 0, spec["method"]
