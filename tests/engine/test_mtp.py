"""Trees from MTP modules in the real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine import harness
from tests.engine.conftest import VOCAB
from tests.engine.test_sampling import TOKENS, chi_square, joint_probabilities
from tests.mtp_modules import in_checkpoint, module_tensors, save_module

pytestmark = pytest.mark.engine

FIXED, GOODPUT = {"policy": "fixed"}, {"policy": "goodput"}
ARCHITECTURES = {"mimo": "MiMoForCausalLM", "glm4_moe": "Glm4MoeForCausalLM"}
HIDDEN, DIM = 128, 32


def spec(folder: str, **keys) -> dict:
    base = {"method": "mtp_tree", "num_speculative_tokens": 12, "control": FIXED}
    return base | {"model": folder, **keys}


def save_target(path: Path, family: str, vocab: int, spread: float, layers: int) -> dict:
    """Write a random target, and return its tensors by name.

    Its embeddings have norm 1 per unit, so that another normalisation does nothing.
    """
    import torch
    from safetensors.torch import load_file
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(7)
    sizes = {
        "vocab_size": vocab, "hidden_size": HIDDEN, "intermediate_size": 96,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "initializer_range": spread, "max_position_embeddings": 1024, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    if family == "mimo":
        model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    else:
        experts = {
            "head_dim": DIM, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 48, "first_k_dense_replace": 0, "routed_scaling_factor": 1.7,
        }  # fmt: skip
        model = Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, **experts))
    model = model.to(torch.float32)
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding /= embedding.pow(2).mean(-1, keepdim=True).sqrt()
    model.save_pretrained(path)
    return load_file(path / "model.safetensors")


def add_module(path: Path, family: str, module: dict, layers: int) -> str:
    """Write a module into the checkpoint of its target."""
    from safetensors.torch import load_file, save_file

    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    save_file(tensors | in_checkpoint(family, module, layers), file, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"architectures": [ARCHITECTURES[family]], "num_nextn_predict_layers": 1}
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def right_module(path: Path, family: str, vocab: int, spread: float) -> str:
    """A target of one layer whose module is the same layer: the projection takes the embedding and
    leaves the hidden state. All that the module lacks is the beginning of the text."""
    import torch

    tensors = save_target(path, family, vocab, spread, 1)
    own = "model.layers.0."
    module = {k.removeprefix(own): w for k, w in tensors.items() if k.startswith(own)}
    both = [torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)]
    module["eh_proj.weight"] = torch.cat(both[::-1] if family == "mimo" else both, 1)
    module |= {f"{name}.weight": torch.ones(HIDDEN) for name in ("enorm", "hnorm")}
    module["norm.weight"] = tensors["model.norm.weight"]
    return add_module(path, family, module, 1)


@pytest.fixture(scope="module", params=["mimo", "glm4_moe"])
def single(tmp_path_factory, request) -> str:
    return right_module(tmp_path_factory.mktemp("single") / "target", request.param, VOCAB, 0.25)


@pytest.fixture(scope="module")
def plain_single(tmp_path_factory, tiny_engine, mixed_requests, single) -> dict:
    """Two batches, the second one with its prompts cached."""
    batches = [{"requests": mixed_requests}] * 2
    result = harness.run(tmp_path_factory.mktemp("plain"), tiny_engine | {"model": single}, batches)
    assert result["preemptions"] > 0
    return result


@pytest.mark.parametrize(
    "keys",
    [{"shape": "topk"}, {"shape": "rsd_s", "control": GOODPUT}],
    ids=["topk", "goodput"],
)
def test_greedy_text_is_the_same(tmp_path, tiny_engine, mixed_requests, single, plain_single, keys):
    """Chunked prefill, prefix caching, preemption, penalties; and the module is nearly right."""
    config = {"model": single, "speculative_config": spec(single, **keys)}
    batches = [{"requests": mixed_requests}] * 2
    result = harness.run(tmp_path, tiny_engine | config, batches, "fixed_prices")
    assert harness.ids(result) == harness.ids(plain_single)
    assert harness.ids(result, 1) == harness.ids(plain_single, 1)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    print(keys, {k: v for k, v in counters.items() if v})
    if "control" not in keys:
        assert counters["nodes_accepted"] > 1.5 * counters["request_steps"]


@pytest.mark.parametrize("family", ["mimo", "glm4_moe"])
def test_chains_are_accepted_exactly_as_vllms_own(tmp_path, family):
    """By position, over 1,600 tokens, with a random module: so the drafts are the same."""
    save_target(tmp_path / "target", family, 64, 0.12, 3)
    module = module_tensors(
        family, experts=family == "glm4_moe", hidden=HIDDEN, head_dim=DIM, spread=0.08
    )
    target = add_module(tmp_path / "target", family, module, 3)
    engine = {
        "model": target, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 256, "enable_prefix_caching": False, "disable_log_stats": False,
    }  # fmt: skip
    params = {"temperature": 0.0, "max_tokens": 100, "ignore_eos": True, "detokenize": False}
    requests = [[[3 + (7 * i + j * j) % 61 for j in range(5 + 7 * i)], params] for i in range(16)]
    ours = spec(target, shape="chain", num_speculative_tokens=3)
    stock, tree = (
        harness.run(tmp_path, engine | {"speculative_config": each}, [{"requests": requests}])
        for each in ({"method": "mtp", "num_speculative_tokens": 3}, ours)
    )
    assert harness.ids(tree) == harness.ids(stock)
    assert tree["accepted_per_position"] == stock["accepted_per_position"]
    assert stock["accepted_per_position"][0] > 10


@pytest.mark.parametrize("family", ["mimo", "glm4_moe"])
@pytest.mark.full(
    "vllm_specplus/samplers/*.py", "vllm_specplus/drafting/*.py",
    "vllm_specplus/proposers/mtp_tree.py", "vllm_specplus/engine/verify.py",
)  # fmt: skip
def test_sampled_text_has_the_targets_distribution(tmp_path, family):
    target = right_module(tmp_path / "target", family, 32, 0.12)
    engine = {
        "model": target, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 64, "max_num_seqs": 256, "max_num_batched_tokens": 4096,
        "speculative_config": spec(target, shape="rsd_s"),
    }  # fmt: skip
    prompt, samples = [5, 9, 17, 3, 21], 8_000
    params = {"temperature": 1.0, "top_k": 6, "max_tokens": TOKENS + 1, "ignore_eos": True}
    batch = {"prompt": prompt, "params": params | {"detokenize": False}, "repeat": samples}
    result = harness.run(tmp_path, engine, [batch])
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 0.5 * samples
    texts = [tuple(out[0][:TOKENS]) for out in harness.ids(result)]
    assert chi_square(joint_probabilities(target, prompt, 6), texts) > 1e-3


def test_a_module_of_another_target_is_refused_before_the_start(tmp_path, tiny_engine):
    config = {"speculative_config": spec(save_module(tmp_path / "module", "mimo", VOCAB))}
    with pytest.raises(RuntimeError, match="of 64 hidden units, and this one has 128"):
        harness.run(tmp_path, tiny_engine | config, [{"requests": []}])
