"""A KV cache of bytes: the same text as plain decoding with one."""

from __future__ import annotations

import json

import pytest
import torch

from tests.engine import harness
from tests.engine.test_needs import engine_args, problems
from vllm_specplus.config import parse
from vllm_specplus.target import Target

able = pytest.mark.skipif(
    not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()),
    reason="vLLM keeps bytes on processors with AVX-512 or AMX only",
)


@able
@pytest.mark.engine
@pytest.mark.parametrize("kind", ["fp8_e4m3", "fp8_e5m2"])
def test_texts_are_those_of_plain_decoding(tmp_path, tiny_engine, mixed_requests, plain, kind):
    engine = tiny_engine | {"kv_cache_dtype": kind}
    batches = [{"requests": mixed_requests}] * 2
    want = harness.run(tmp_path, engine, batches)
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps([[r["prompt"], r["ids"][0]] for r in want["batches"][0]]))
    for spec in (
        {"method": "hidden_truth", "reference": str(reference), "num_speculative_tokens": 8},
        {"method": "token_recycling", "num_speculative_tokens": 12},
    ):
        spec["control"] = {"policy": "fixed"}
        got = harness.run(tmp_path, engine | {"speculative_config": spec}, batches)
        for batch in range(2):
            assert harness.ids(got, batch) == harness.ids(want, batch)
        assert got["counters"]["nodes_accepted"] > 20
        assert got["counters"]["kv_slots_moved"] > 0
        assert got["counters"]["draft_failures"] == 0
    assert harness.ids(want) != harness.ids(plain)  # bytes are not what was computed


def test_who_serves_it():
    assert problems(engine_args(kv_cache_dtype="fp8_e5m2")) is None
    assert "a quantized KV cache" in problems(engine_args(kv_cache_dtype="turboquant_k8v4"))
    target = Target(lambda: None, 9, "llama", 4, 1, 8, fp8_cache=True)
    parse({"method": "token_recycling"}).check_target(target)
    with pytest.raises(ValueError, match="set --kv-cache-dtype to bfloat16, or use another"):
        parse({"method": "layer_skip"}).check_target(target)
