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


def test_what_the_config_does_not_tell_is_refused_after_load(tmp_path):
    """The checks of the launch are off, as if nothing were known of the model's config."""
    words = "GDN_ATTN.* verifies no draft trees"
    engine = ENGINE | {
        "model": str(folders.make(tmp_path, "qwen3_next")), "load_format": "dummy",
        "dtype": "bfloat16", "speculative_config": {"method": "token_recycling"},
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
#: For the plain engine: vLLM's own rotary kernel on CPUs takes the heads of latent attention from
#: wrong places, which an engine of ours does not let it (``needs.misrotates``).
ROTATES_RIGHT = {"compilation_config": {"custom_ops": ["-rotary_embedding"]}}
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
    """Shorter than the window, about to reach it, and beyond it; of mixed layers every kind has
    pages of its own."""
    equal(tmp_path, name, {}, {}, lengths=(5, 50, 150))


def test_text_is_the_same_with_one_table_for_all_layers(tmp_path):
    """As methods have it that read the target's cache."""
    equal(tmp_path, "gemma2", {}, {"disable_hybrid_kv_cache_manager": True}, lengths=(5, 50, 150))


def test_text_is_the_same_with_latents(tmp_path):
    """Multi-head latent attention and experts; one prompt is so short that it is read as drafts
    are."""
    equal(tmp_path, "deepseek_v3", ROTATES_RIGHT, {}, lengths=(5, 50, 150))


def test_engines_of_ours_rotate_latents_right(tmp_path):
    """Every prompt is answered as it is alone; with vLLM's own kernel it would not be."""
    folder = folders.make(tmp_path, "deepseek_v3", weights=True)
    rng = np.random.default_rng(6)
    params = {"temperature": 0, "max_tokens": 8, "ignore_eos": True, "detokenize": False}
    requests = [[rng.integers(3, 250, n).tolist(), params] for n in (20, 30, 40)]
    engine = ENGINE | {"model": str(folder)}
    batches = [{"requests": requests}, *({"requests": [each]} for each in requests)]
    spec = {"method": "token_recycling", "num_speculative_tokens": 8}
    outcomes = {
        name: harness.run(tmp_path, engine | change, batches)
        for name, change in (("stock", {}), ("ours", {"speculative_config": spec}))
    }
    same = {
        name: harness.ids(out) == [harness.ids(out, i + 1)[0] for i in range(len(requests))]
        for name, out in outcomes.items()
    }
    assert same == {"stock": False, "ours": True}


def test_experts_and_sandwiched_layers_draft(tmp_path):
    """Layers that self-speculation takes apart though it was never told of their families."""
    params = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "detokenize": False}
    requests = [[[*range(3, 30)], params]]
    for name in ("qwen3_moe", "glm4"):
        engine = ENGINE | {"model": str(folders.make(tmp_path, name, weights=True))}
        spec = {"method": "layer_skip", "num_speculative_tokens": 6, "skip_mlp": [1],
                "control": {"policy": "fixed"}}  # fmt: skip
        want = harness.run(tmp_path, engine, [{"requests": requests}])
        got = harness.run(tmp_path, engine | {"speculative_config": spec}, [{"requests": requests}])
        assert harness.ids(got) == harness.ids(want)
        assert got["counters"]["nodes_accepted"] > 0
        assert got["counters"]["draft_failures"] == 0


@pytest.mark.parametrize("name", ["gemma2", "qwen3_moe"])
def test_drafts_are_of_the_targets_family(tmp_path, name):
    """The target drafts for itself, beyond its window: nearly all that it proposes is accepted."""
    folder = folders.make(tmp_path, name, weights=True)
    rng = np.random.default_rng(5)
    params = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "detokenize": False}
    requests = [[rng.integers(3, 250, n).tolist(), params] for n in (5, 150)]
    engine = ENGINE | {"model": str(folder)}
    # Of trees the nodes count for positions of a window, which in one of 64 tokens tells.
    spec = {"method": "draft_tree", "model": str(folder), "shape": "chain",
            "num_speculative_tokens": 4, "control": {"policy": "fixed"}}  # fmt: skip
    want = harness.run(tmp_path, engine, [{"requests": requests}])
    got = harness.run(tmp_path, engine | {"speculative_config": spec}, [{"requests": requests}])
    assert harness.ids(got) == harness.ids(want)
    assert got["counters"]["draft_failures"] == 0
    assert got["counters"]["nodes_accepted"] > 0.9 * got["counters"]["nodes_drafted"]


def test_layers_of_another_structure_are_refused(tmp_path):
    """Attention and MLP of Cohere both read what comes in."""
    engine = ENGINE | {"model": str(folders.make(tmp_path, "cohere")), "load_format": "dummy",
                       "speculative_config": {"method": "layer_skip"}}  # fmt: skip
    with pytest.raises(RuntimeError, match="cannot draft with the layers of CohereForCausalLM"):
        harness.run(tmp_path, engine, [{"requests": []}])
