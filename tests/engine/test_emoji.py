"""The embedded model of emoji: its law under every kind of draft, and that wrong ones are seen."""

from __future__ import annotations

import pytest
import torch

from tests.engine import harness
from vllm_specplus.cli.model import EMOJI_MODEL
from vllm_specplus.testing.distribution import chi_square
from vllm_specplus.training.picture_head import load_llamagen

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(
        not (EMOJI_MODEL / "eagle").is_dir(),
        reason="trained by vllm_specplus.training.emoji and .picture_head",
    ),
]

LABEL, SAMPLES = 5, 4000
FIXED = {"control": {"policy": "fixed"}}
JACOBI = {"method": "jacobi", "num_speculative_tokens": 3} | FIXED
HEAD = {
    "method": "eagle_tree", "model": str(EMOJI_MODEL / "eagle"), "shape": "static",
    "num_speculative_tokens": 25,
} | FIXED  # fmt: skip
FOREIGN = "foreign_draft_probs"


@pytest.fixture(scope="module")
def law() -> dict[tuple[int], float]:
    """Of a picture's second code, the first that can be drafted: over all first ones, exactly."""
    model = load_llamagen(EMOJI_MODEL)
    codes = torch.arange(model.config.codebook_size)[:, None]
    scale = model.config.guidance_scale
    with torch.inference_mode():
        parts = [model.guided(part, torch.full((len(part),), LABEL), scale) for part in
                 codes.split(128)]  # fmt: skip
        rows = torch.cat(parts).softmax(-1).double()
    second = rows[0, 0] @ rows[:, 1]
    return {(code,): float(p) for code, p in enumerate(second)}


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (JACOBI | {"initial": "random"}, None),
        (HEAD | {"verification": "recursive"}, None),
        (HEAD | {"acceptance": {"rule": "lantern", "k": 1000, "delta": 0.0}}, None),
        (HEAD | {"acceptance": {"rule": "lantern", "k": 1000, "delta": 1.0}}, "lossy"),
        (HEAD | {"verification": "recursive"}, FOREIGN),
    ],
)
def test_the_second_code_follows_the_model(tmp_path, law, config, wrong):
    model = load_llamagen(EMOJI_MODEL)
    batch = {
        "prompt": [model.config.label_token(LABEL)], "repeat": SAMPLES,
        "params": {
            "temperature": 1.0, "max_tokens": 3, "ignore_eos": True, "detokenize": False,
        },
    }  # fmt: skip
    engine = {
        "model": str(EMOJI_MODEL), "skip_tokenizer_init": True, "dtype": "float32",
        "enforce_eager": True, "max_num_seqs": 128, "speculative_config": config,
    }  # fmt: skip
    result = harness.run(tmp_path, engine, [batch], FOREIGN if wrong == FOREIGN else None)
    assert result["counters"]["draft_failures"] == 0
    assert (result["counters"]["relaxed_tokens"] > 0) == (wrong == "lossy")
    p = chi_square(law, [(out[0][1],) for out in harness.ids(result)])
    assert p > 1e-3 if wrong is None else p < 1e-6
