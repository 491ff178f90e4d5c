"""Engines in the process of whoever starts them (``VLLM_ENABLE_V1_MULTIPROCESSING=0``)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.engine

CODE = """
import json, sys
import numba
from vllm_specplus import compat, plugin
if sys.argv[2] == "unpatched":
    compat.let_vllm_scan_numba = lambda: None
plugin.register()
from vllm import LLM, SamplingParams, TokensPrompt
texts = []
for _ in range(2):
    llm = LLM(model=sys.argv[1], skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
              max_model_len=64, kv_cache_memory_bytes=1 << 24,
              speculative_config={"method": "token_recycling", "num_speculative_tokens": 4})
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([TokensPrompt(prompt_token_ids=[5, 6, 7])], params, use_tqdm=False)
    texts.append(list(output.outputs[0].token_ids))
    llm.llm_engine.engine_core.shutdown()
assert texts[0] == texts[1] and len(texts[0]) == 8, texts
"""


def start(model: str, how: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1", "VLLM_PLUGINS": ""}
    return subprocess.run(
        [sys.executable, "-c", CODE, model, how], env=env, capture_output=True, text=True
    )


def test_two_engines_one_after_the_other_with_numba_there_before(tiny_model):
    done = start(tiny_model, "patched")
    assert done.returncode == 0, done.stderr[-4000:]


def test_without_the_patch_numba_ends_vllm(tiny_model):
    """The reason of ``compat.let_vllm_scan_numba``: once this fails, remove it."""
    done = start(tiny_model, "unpatched")
    assert done.returncode != 0
    assert "_lib_fn_wrapper" in done.stderr
