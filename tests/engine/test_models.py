"""Models of every kind of attention: the same text with drafts in it, or a refusal at start."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.contract import folders
from tests.engine import harness

pytestmark = pytest.mark.engine

ENGINE = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8,
    "skip_tokenizer_init": True, "block_size": 32, "kv_cache_memory_bytes": 1 << 29,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen3_next", "GDN_ATTN.* verifies no draft trees"),
        ("deepseek_v3", "verifies no draft trees|multi-head latent"),
    ],
)
def test_what_the_config_does_not_tell_is_refused_after_load(tmp_path, name, words):
    """The checks of the launch are off, as if nothing were known of the model's config."""
    engine = ENGINE | {
        "model": str(folders.make(tmp_path, name)), "load_format": "dummy", "dtype": "bfloat16",
        "speculative_config": {"method": "token_recycling"},
    }  # fmt: skip
    request = [[3, 4, 5, 6, 7, 8] * 8, {"temperature": 0, "max_tokens": 32, "detokenize": False}]
    with pytest.raises(RuntimeError, match=f"({words}).*vllm-specplus|vllm-specplus.*({words})"):
        harness.run(tmp_path, engine, [{"requests": [request]}], sabotage="unchecked_launch")


#: What goes by positions, and beyond them: ALiBi, soft caps, sinks, windows of 64 in all layers or
#: in some.
BY_POSITION = (
    "bloom", "falcon_alibi", "gemma2", "gemma3", "gpt_oss", "llama4", "mistral_short_window",
    "cohere2",
)  # fmt: skip
#: "mrope": rotary positions of three axes.
SERVED = ("mrope", "glm4", "granite", "mixtral", "olmo2", "phi4")


def equal(tmp_path, name: str, plain: dict, ours: dict, lengths=(5, 17)) -> None:
    """The same text under the worst drafts, by a plain engine and by ours, for random weights."""
    folder = folders.make(tmp_path, name, weights=True)
    rng = np.random.default_rng(5)
    params = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "detokenize": False}
    requests = [[rng.integers(3, 250, n).tolist(), params] for n in lengths]
    engine = ENGINE | {"model": str(folder)}
    want = harness.run(tmp_path, engine | plain, [{"requests": requests}])
    assert all(len(set(r["ids"][0])) > 10 for r in want["batches"][0])
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps([[r["prompt"], r["ids"][0]] for r in want["batches"][0]]))
    spec = {"method": "hidden_truth", "reference": str(reference), "num_speculative_tokens": 8}
    got = harness.run(
        tmp_path, engine | ours | {"speculative_config": spec}, [{"requests": requests}]
    )
    assert harness.ids(got) == harness.ids(want)
    assert got["counters"]["nodes_accepted"] > 20
    assert got["counters"]["kv_slots_moved"] > 0
    assert got["counters"]["draft_failures"] == 0


@pytest.mark.parametrize("name", SERVED)
def test_text_is_the_same(tmp_path, name):
    equal(tmp_path, name, {}, {})


@pytest.mark.parametrize("name", BY_POSITION)
def test_text_is_the_same_beyond_windows(tmp_path, name):
    """Shorter than the window, about to reach it, and beyond it."""
    equal(tmp_path, name, {}, {}, lengths=(5, 50, 150))
