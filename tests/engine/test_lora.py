"""LoRA adapters: several of them and the base model in one batch, each with its own text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.engine import harness
from tests.engine.test_needs import engine_args, problems
from vllm_specplus.engine.request_options import RequestOptions
from vllm_specplus.testing.models import VOCAB

#: Sizes of the tiny model: name -> (outputs, inputs).
MODULES = {
    "self_attn.q_proj": (128, 128), "self_attn.k_proj": (64, 128), "self_attn.v_proj": (64, 128),
    "self_attn.o_proj": (128, 128), "mlp.gate_proj": (256, 128), "mlp.up_proj": (256, 128),
    "mlp.down_proj": (128, 256),
}  # fmt: skip
RANK = 8


def write_adapter(folder: Path, seed: int) -> str:
    """A random adapter of all layers and of the output layer; it changes every text."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        f"model.layers.{layer}.{name}": size
        for layer in range(3) for name, size in MODULES.items()
    } | {"lm_head": (VOCAB, 128)}  # fmt: skip
    tensors = {}
    for name, (outputs, inputs) in sizes.items():
        for part, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
            values = 0.1 * torch.randn(shape, generator=generator)
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "tiny",
        "r": RANK, "lora_alpha": 2 * RANK, "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in sizes}),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, mixed_requests) -> list[str | None]:
    """Of each request: the base, one adapter, the base, the other."""
    folder = tmp_path_factory.mktemp("adapters")
    both = [write_adapter(folder / name, seed) for seed, name in enumerate(("first", "second"))]
    every = [None, both[0], None, both[1]]
    return [every[i % 4] for i in range(len(mixed_requests))]


@pytest.fixture(scope="module")
def lora_engine(tiny_engine) -> dict:
    # One more than there are: on a CPU, vLLM 0.32 gives rows without an adapter the one of the
    # last slot (an index of -1), which is empty then.
    return tiny_engine | {"enable_lora": True, "max_loras": 3, "max_lora_rank": RANK}


@pytest.fixture(scope="module")
def plain_texts(tmp_path_factory, lora_engine, mixed_requests, adapters) -> list:
    """Undrafted; and the same when every adapter has the engine for itself, one after the other."""
    kinds = list(dict.fromkeys(adapters))
    batches = [{"requests": mixed_requests, "adapters": adapters}]
    rows = {each: [i for i, own in enumerate(adapters) if own == each] for each in kinds}
    for each in kinds:
        own = [mixed_requests[i] for i in rows[each]]
        batches.append({"requests": own, "adapters": [each] * len(own)})
    result = harness.run(tmp_path_factory.mktemp("plain_lora"), lora_engine, batches)
    together = harness.ids(result)
    for number, each in enumerate(kinds, 1):
        assert harness.ids(result, number) == [together[i] for i in rows[each]]
    return together


METHODS = {
    "recycling": {"method": "token_recycling", "num_speculative_tokens": 12},
    "recycling and prompts": {
        "method": "token_recycling", "num_speculative_tokens": 12, "seed_from_prompt": True,
    },
    "suffix tree": {"method": "suffix_tree", "num_speculative_tokens": 12},
    "draft model": {
        "method": "draft_tree", "shape": "topk", "width": 3, "num_speculative_tokens": 9,
    },
}  # fmt: skip


@pytest.mark.engine
@pytest.mark.parametrize("name", METHODS)
def test_adapters_in_one_batch_have_their_own_texts(
    tmp_path, lora_engine, tiny_model, mixed_requests, adapters, plain, plain_texts, name
):
    spec = METHODS[name] | {"control": {"policy": "fixed"}}
    if spec["method"] == "draft_tree":
        spec["model"] = tiny_model
    batches = [{"requests": mixed_requests, "adapters": adapters}] * 2
    engine = lora_engine | {"speculative_config": spec}
    result = harness.run(tmp_path, engine, batches)
    assert harness.ids(result) == harness.ids(result, 1) == plain_texts
    assert result["counters"]["nodes_accepted"] > 20
    assert result["counters"]["draft_failures"] == 0
    # The control: adapters change the texts that are not short.
    same = [a == b for a, b in zip(plain_texts, harness.ids(plain), strict=True)]
    assert all(same[::2])
    assert sum(same[1::2]) < 5


def test_what_is_learnt_belongs_to_an_adapter():
    from vllm.sampling_params import SamplingParams

    salted = SamplingParams(extra_args={"specplus": {"cache_salt": "tenant"}})
    salts = [
        RequestOptions.of(params, 8, adapter).cache_salt
        for params in (SamplingParams(), salted)
        for adapter in ("", "a", "b", "tenant")
    ]
    assert salts[0] == ""
    assert salts[4] == "tenant"
    assert len(set(salts)) == 8
    # Nobody can write the salt of an adapter's tenant.
    forged = SamplingParams(extra_args={"specplus": {"cache_salt": salts[6]}})
    assert RequestOptions.of(forged, 8).cache_salt not in salts


def test_methods_that_draft_with_the_targets_layers_are_refused():
    args = engine_args(enable_lora=True)
    for method in ("layer_skip", "early_exit"):
        assert "LoRA adapters in the layers" in problems(args, method=method)
    assert problems(args) is None
