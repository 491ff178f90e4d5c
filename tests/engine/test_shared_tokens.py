"""Drafts of another tokenizer than the target's, in the real engine."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.engine import harness
from tests.engine.conftest import VOCAB, build_model
from tests.engine.test_sampling import TOKENS, chi_square, joint_probabilities

pytestmark = pytest.mark.engine

FIXED = {"policy": "fixed"}
UNKNOWN = "<unk>"


def save_words(folder: Path, words: list[str]) -> None:
    """Write a tokenizer of these words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, UNKNOWN))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=bare, unk_token=UNKNOWN).save_pretrained(folder)


def reordered(model: str, path: Path, unknown: int) -> tuple[str, str]:
    """The model with a tokenizer, and a draft: the same model, but with its tokens in another
    order, of which the first ``unknown`` ones (behind that for unknown words) are other words."""
    import torch
    from transformers import LlamaForCausalLM

    target = Path(shutil.copytree(model, path / "target"))
    draft = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    size = draft.config.vocab_size
    order = np.random.default_rng(5).permutation(size)
    with torch.no_grad():
        for matrix in (draft.model.embed_tokens.weight, draft.lm_head.weight):
            matrix[torch.from_numpy(order)] = matrix.clone()
    draft.save_pretrained(path / "draft")
    words = [UNKNOWN, *(f"w{i:03}" for i in range(1, size))]
    own = [""] * size
    for i, word in enumerate(words):
        own[order[i]] = f"other{i:03}" if 1 <= i <= unknown else word
    save_words(target, words)
    save_words(path / "draft", own)
    return str(target), str(path / "draft")


def spec(draft: str, **keys) -> dict:
    base = {"method": "draft_tree", "num_speculative_tokens": 12, "control": FIXED}
    return base | {"model": draft, "vocabulary": "intersection", **keys}


@pytest.mark.parametrize("shape", ["topk", "rsd_s"])
def test_greedy_text_is_the_same(tmp_path, tiny_engine, tiny_model, mixed_requests, shape):
    """And often foreseen, where the draft knows the words: it is the target but for its ids."""
    # Of few texts: a random model is led astray by every word that is missing.
    target, draft = reordered(tiny_model, tmp_path, unknown=3)
    engine = tiny_engine | {"model": target, "skip_tokenizer_init": False}
    batches = [{"requests": mixed_requests}] * 2
    plain = harness.run(tmp_path, engine, batches)
    config = {"speculative_config": spec(draft, shape=shape)}
    result = harness.run(tmp_path, engine | config, batches)
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 300


def test_a_draft_that_knows_all_words_is_always_right(tmp_path, tiny_engine, tiny_model):
    target, draft = reordered(tiny_model, tmp_path, unknown=0)
    requests = [
        [[5 + i] * (1 + 30 * i), {"temperature": 0.0, "max_tokens": 61, "ignore_eos": True}]
        for i in range(4)
    ]
    engine = {"model": target, "skip_tokenizer_init": False, "num_gpu_blocks_override": 400}
    config = {"speculative_config": spec(draft, shape="chain", num_speculative_tokens=5)}
    result = harness.run(tmp_path, tiny_engine | engine | config, [{"requests": requests}])
    counters = result["counters"]
    assert counters["request_steps"] == 4 * 10
    assert counters["nodes_accepted"] == counters["nodes_drafted"] == 4 * 50


def test_without_the_key_it_is_refused(tmp_path, tiny_engine, tiny_model):
    target, draft = reordered(tiny_model, tmp_path, unknown=0)
    engine = tiny_engine | {"model": target, "skip_tokenizer_init": False}
    config = {"speculative_config": spec(draft, vocabulary="same")}
    with pytest.raises(RuntimeError, match="or set 'vocabulary' to 'intersection'"):
        harness.run(tmp_path, engine | config, [{"requests": []}])


@pytest.mark.full(
    "vllm_specplus/samplers/*.py", "vllm_specplus/drafting/*.py",
    "vllm_specplus/proposers/draft_tree.py", "vllm_specplus/engine/verify.py",
)  # fmt: skip
@pytest.mark.parametrize("shape", ["topk", "rsd_s", "chain"])
def test_sampled_text_has_the_targets_distribution(tmp_path, shape):
    """Half of the words are the target's alone."""
    model = build_model(tmp_path / "model", VOCAB, 0.12)
    target, draft = reordered(model, tmp_path, unknown=VOCAB // 2)
    nodes = {} if shape != "chain" else {"num_speculative_tokens": 3}
    engine = {
        "model": target, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 64, "max_num_seqs": 256, "max_num_batched_tokens": 4096,
        "speculative_config": spec(draft, shape=shape, **nodes),
    }  # fmt: skip
    prompt, samples = [305, 409, 317, 403, 421], 8_000
    params = {"temperature": 1.0, "top_k": 6, "max_tokens": TOKENS + 1, "ignore_eos": True}
    batch = {"prompt": prompt, "params": params | {"detokenize": False}, "repeat": samples}
    result = harness.run(tmp_path, engine, [batch])
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 0.1 * samples
    texts = [tuple(out[0][:TOKENS]) for out in harness.ids(result)]
    assert chi_square(joint_probabilities(target, prompt, 6), texts) > 1e-3
