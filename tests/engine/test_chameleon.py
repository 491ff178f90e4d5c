"""Texts with pictures in them in the real engine, against two plain passes of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import chameleon
from tests.chameleon import BEGIN, CODES, END, LINE, OPENING, SIZE, TURN, WORDS
from tests.engine import harness
from tests.engine.test_images import JACOBI, RECYCLING
from tests.engine.test_sampling import chi_square
from vllm_specplus.image.chameleon import CHAMELEON, LUMINA, Layout

pytestmark = pytest.mark.engine


def engine(model, **keys) -> dict:
    """In which everything that complicates a batch happens: prompts in chunks, prefix caching,
    and preemption."""
    return {
        "model": str(model), "skip_tokenizer_init": True, "dtype": "float32",
        "enforce_eager": True, "max_num_seqs": 32, "max_num_batched_tokens": 512,
        "long_prefill_token_threshold": 24, "block_size": 32, "num_gpu_blocks_override": 60,
        "disable_log_stats": False, "max_model_len": 256, **keys,
    }  # fmt: skip


def prompts(architecture: str) -> list[list[int]]:
    """Pictures asked for, behind words and earlier pictures; begun pictures; words alone; some
    with beginnings in common, which end near a picture's."""
    rng = np.random.default_rng(4)
    sized = architecture == LUMINA

    def words(count: int) -> list[int]:
        return rng.integers(30, 30 + WORDS, count).tolist()

    def picture(rows: int, columns: int) -> list[int]:
        codes = rng.integers(4, 4 + CODES, (rows, columns)).tolist()
        if not sized:
            return [BEGIN, *sum(codes, []), END]
        lines = sum(([*row, LINE] for row in codes), [])
        return [BEGIN, SIZE + rows // 2, SIZE + columns // 2, *lines, END]

    def begun() -> list[int]:
        return (
            [BEGIN, SIZE + int(rng.integers(1, 3)), SIZE + int(rng.integers(1, 4))]
            if sized
            else [BEGIN]
        )

    shared = [OPENING, *words(70)]
    out = []
    for i in range(8):
        plain = [OPENING, *words(int(rng.integers(1, 90)))]
        out += [
            [*plain, TURN, *begun()],
            plain,
            [*shared[: 62 + i], *begun()],
            [*shared[: 62 + i], *words(3), *picture(4, 4), *words(2), *picture(4, 4)[: 4 + i]],
            [OPENING, *words(3), *picture(4, 4), *words(i), *begun()],
        ]
    return [*out, [OPENING, BEGIN], [BEGIN], begun()]


@pytest.fixture(scope="module", params=[CHAMELEON, LUMINA])
def family(request, tmp_path_factory):
    """(folder, requests of several scales, their texts by two passes of the plain model)."""
    folder = tmp_path_factory.mktemp("family") / "model"
    model = chameleon.build(folder, request.param)
    own = 4.0 if request.param == LUMINA else 3.0
    requests, expected = [], []
    for i, prompt in enumerate(prompts(request.param)):
        scale = (None, 1.0, 2.5, 0.0, 7.5)[i % 7 % 5]
        params = {
            "temperature": 0.0, "max_tokens": 30, "ignore_eos": True, "detokenize": False,
        }  # fmt: skip
        if scale is not None:
            params["extra_args"] = {"guidance_scale": scale}
        requests.append([prompt, params])
        expected.append([chameleon.greedy(model, prompt, own if scale is None else scale, 30)])
    assert len({tuple(text[0]) for text in expected}) > 30
    return folder, requests, expected


@pytest.mark.parametrize("config", [JACOBI, RECYCLING], ids=lambda config: config["method"])
def test_guided_texts_equal_two_passes(tmp_path, family, config):
    """Three times: read, from the prefix cache, and in few blocks."""
    folder, requests, expected = family
    result = harness.run(
        tmp_path, engine(folder, speculative_config=config), [{"requests": requests}] * 2
    )
    assert harness.ids(result, 0) == expected
    assert harness.ids(result, 1) == expected
    assert result["preemptions"] > 0
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 50
