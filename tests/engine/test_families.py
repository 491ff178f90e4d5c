"""Every family of models that is served: the same text as plain decoding, with drafts accepted,
while prompts are read in chunks, prefixes are cached and requests are preempted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.contract import folders
from tests.eagle_heads import save_head
from tests.engine import harness

pytestmark = [
    pytest.mark.engine,
    pytest.mark.full(
        "vllm_specplus/engine/attention/*.py", "vllm_specplus/engine/batch.py",
        "vllm_specplus/engine/tree_metadata.py", "vllm_specplus/engine/target_layers.py",
        "vllm_specplus/kernels/**/*.*", "vllm_specplus/tree.py", "tests/contract/folders.py",
        "tests/engine/drawn_weights.py",
    ),
]  # fmt: skip

ENGINE = {
    "dtype": "float32", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 8,
    "skip_tokenizer_init": True, "block_size": 32, "long_prefill_token_threshold": 48,
    "enable_prefix_caching": True, "disable_log_stats": False,
}  # fmt: skip
#: Of our engines: the texts together have 28 pages of every group of layers. Those with a window
#: and those without have pages of their own, Gemma 4's of other sizes.
PAGES = 19
GROUPS = {
    "cohere2": 4, "exaone4": 4, "gemma2": 2, "gemma3n": 2, "gemma4": 1.6, "gpt_oss": 2,
    "llama4": 4, "olmo3": 4, "step3p5": 4, "vaultgemma": 2,
}  # fmt: skip
#: So many pages are freed behind windows and chunks that these texts find room in what vLLM wants
#: for the longest one.
FREED = ("gemma3", "llama4", "mistral_short_window", "starcoder2")
#: Tokens of the prompts: below, about and beyond the window of 64 and the chunk of 48.
PROMPTS = (1, 30, 62, 64, 130, 250)
#: Served, in the order of their names in vLLM. Windows are of 64 tokens.
FAMILIES = (
    "apertus", "arcee", "bloom", "cohere", "cohere2", "deepseek_v2", "deepseek_v3", "ernie4_5",
    "ernie4_5_moe", "exaone4", "falcon", "falcon_alibi", "flex_olmo", "gemma", "gemma2", "gemma3",
    "gemma3n", "gemma4", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_oss",
    "gptj", "granite", "granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan", "llama3",
    "llama4", "mimo", "minicpm", "minicpm3", "ministral3", "mistral", "mistral_short_window",
    "mixtral", "mrope", "nemotron", "olmo", "olmo2", "olmo3", "olmoe", "opt", "phi", "phi4",
    "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "stablelm", "starcoder2",
    "step3_text", "step3p5", "vaultgemma",
)  # fmt: skip
#: Of every kind of attention and of experts, and with other embeddings and output layers.
WITH_HEADS = (
    "cohere", "deepseek_v3", "falcon", "gemma2", "gpt2", "gpt_oss", "granitemoe", "llama4",
    "olmoe", "phi",
)  # fmt: skip
REFUSED = r"speculative method 'layer_skip'|'layer_skip' reads|cannot draft with the layers"
#: Of multi-head latent attention: vLLM reads whole prompts then, on a CPU, and misrotates them.
LATENT = {"long_prefill_token_threshold": 0, "compilation_config": {"custom_ops": ["none"]}}
LATENTS = ("deepseek_v2", "deepseek_v3")
#: Of every kind of attention and of experts: what goes by heads is divided among ranks.
ON_TWO_RANKS = (
    "bloom", "deepseek_v3", "gemma2", "gpt_oss", "llama4", "mistral_short_window", "qwen3_moe",
)  # fmt: skip


def draft(tmp_path) -> dict:
    """A tree of another model, of the same vocabulary."""
    folder = folders.make(tmp_path / "draft", "llama3", weights=True)
    return {"method": "draft_tree", "model": str(folder), "shape": "topk", "width": 3}


def head(tmp_path, folder) -> str:
    """A random EAGLE head, which does not care what the target's layers are."""
    config = json.loads((folder / "config.json").read_text())
    config = config.get("text_config", config)
    hidden = config.get("hidden_size") or config["n_embd"]
    return save_head(tmp_path / "head", 1, config["vocab_size"], hidden=hidden)


@pytest.mark.parametrize("name", FAMILIES)
def test_family(tmp_path, name):
    folder = folders.make(tmp_path, name, weights=True)
    rng = np.random.default_rng(5)
    params = {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "detokenize": False}
    requests = [[rng.integers(3, 250, n).tolist(), params] for n in PROMPTS]
    batches = [{"requests": requests}] * 2  # the second with its prefixes cached
    engine = ENGINE | {"model": str(folder)} | (LATENT if name in LATENTS else {})
    if name in folders.DRAWN:
        engine["load_format"] = "drawn"
    want = harness.run(tmp_path, engine, batches)
    texts = harness.ids(want)
    assert harness.ids(want, 1) == texts
    assert np.median([len(set(text[0])) for text in texts]) > 5  # repetition would hide errors
    reference = tmp_path / "reference.json"
    reference.write_text(json.dumps([[r["prompt"], r["ids"][0]] for r in want["batches"][0]]))
    specs = [
        {"method": "hidden_truth", "reference": str(reference), "num_speculative_tokens": 8},
        {"method": "token_recycling", "num_speculative_tokens": 12},
        draft(tmp_path) | {"num_speculative_tokens": 9},
        {"method": "layer_skip", "num_speculative_tokens": 6},
    ]
    if name in WITH_HEADS:
        own = head(tmp_path, folder)
        specs.append({"method": "eagle_tree", "model": own, "num_speculative_tokens": 9})
    for spec in specs:
        spec["control"] = {"policy": "fixed"}
        pages = int(PAGES * GROUPS.get(name, 1)) * (2 if name in LATENTS else 1)  # of 16 tokens
        if spec["method"] in ("layer_skip", "eagle_tree"):  # one table for all layers
            pages = PAGES * (2 if name in LATENTS else 1)
        changed = engine | {"num_gpu_blocks_override": pages, "speculative_config": spec}
        if spec["method"] == "layer_skip" and name not in folders.LAYERS_APART:
            with pytest.raises(RuntimeError, match=REFUSED):
                harness.run(tmp_path, changed, batches)
            continue
        got = harness.run(tmp_path, changed, batches)
        assert [harness.ids(got), harness.ids(got, 1)] == [texts, texts], spec["method"]
        counters = got["counters"]
        assert counters["nodes_drafted"] > 100, spec["method"]
        assert counters["draft_failures"] == 0, spec["method"]
        # Those of random weights cannot know the texts.
        if spec["method"] not in ("draft_tree", "eagle_tree"):
            assert counters["nodes_accepted"] > 0, spec["method"]
        assert got["preemptions"] > 0 or name in FREED, spec["method"]


@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_family_on_two_ranks(tmp_path, name):
    folder = folders.make(tmp_path, name, weights=True)
    # By another seed the two best tokens are once within 0.0001 nats, which is within rounding.
    rng = np.random.default_rng(6)
    params = {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "detokenize": False}
    batches = [{"requests": [[rng.integers(3, 250, n).tolist(), params] for n in PROMPTS]}]
    engine = ENGINE | {"model": str(folder)} | (LATENT if name in LATENTS else {})
    engine |= {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    spec = {
        "method": "token_recycling", "num_speculative_tokens": 12, "control": {"policy": "fixed"}
    }  # fmt: skip
    want = harness.run(tmp_path, engine, batches, env=env)
    got = harness.run(tmp_path, engine | {"speculative_config": spec}, batches, env=env)
    assert harness.ids(got) == harness.ids(want)
    assert got["counters"]["nodes_accepted"] > 0
    assert got["counters"]["draft_failures"] == 0
