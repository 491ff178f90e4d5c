"""Trees from EAGLE heads in the real engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.eagle_heads import save_head
from tests.engine import harness
from tests.engine.conftest import VOCAB, build_model
from tests.engine.test_sampling import TOKENS, chi_square, joint_probabilities

pytestmark = pytest.mark.engine

FIXED, GOODPUT = {"policy": "fixed"}, {"policy": "goodput"}


def spec(head, **keys):
    base = {"method": "eagle_tree", "num_speculative_tokens": 12, "control": FIXED}
    return base | {"model": head, **keys}


def single_layer(path: Path, vocab: int, spread: float) -> tuple[str, str]:
    """A target of one layer, and an EAGLE head that is the same layer.

    The target's embeddings have norm 1 per unit, so that its first normalisation, which EAGLE
    heads leave out, does nothing; ``fc`` takes the embedding and leaves the hidden state. All
    that the head lacks is the text's first token.
    """
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM

    target = build_model(path / "target", vocab, spread)
    model = LlamaForCausalLM.from_pretrained(target, dtype=torch.float32)
    model.config.num_hidden_layers = 1
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding /= embedding.pow(2).mean(-1, keepdim=True).sqrt()
    layers = model.model.layers
    model.model.layers = layers[:1]
    model.save_pretrained(target)
    hidden = model.config.hidden_size
    tensors = {
        f"layers.0.{name}": weight.detach().clone()
        for name, weight in layers[0].named_parameters()
        if not name.startswith("input_layernorm")
    }
    tensors["fc.weight"] = torch.cat((torch.eye(hidden), torch.zeros(hidden, hidden)), 1)
    head = path / "head"
    head.mkdir()
    save_file(tensors, head / "model.safetensors")
    (head / "config.json").write_text((Path(target) / "config.json").read_text())
    return target, str(head)


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> tuple[str, str]:
    return single_layer(tmp_path_factory.mktemp("single"), VOCAB, 0.25)


@pytest.fixture(scope="module")
def plain_single(tmp_path_factory, tiny_engine, mixed_requests, single) -> dict:
    """Two batches, the second one with its prompts cached."""
    batches = [{"requests": mixed_requests}] * 2
    engine = tiny_engine | {"model": single[0]}
    result = harness.run(tmp_path_factory.mktemp("plain"), engine, batches)
    assert result["preemptions"] > 0
    return result


@pytest.mark.parametrize(
    "keys",
    [{"shape": "topk"}, {"shape": "rsd_s"}, {"shape": "rsd_s", "control": GOODPUT}],
    ids=["topk", "rsd_s", "goodput"],
)
def test_greedy_text_is_the_same(tmp_path, tiny_engine, mixed_requests, single, plain_single, keys):
    """Chunked prefill, prefix caching, preemption, penalties; and the head is nearly right."""
    target, head = single
    batches = [{"requests": mixed_requests}] * 2
    config = {"model": target, "speculative_config": spec(head, **keys)}
    result = harness.run(tmp_path, tiny_engine | config, batches, "fixed_prices")
    assert harness.ids(result) == harness.ids(plain_single)
    assert harness.ids(result, 1) == harness.ids(plain_single, 1)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    if "control" not in keys:
        assert counters["nodes_accepted"] > 2 * counters["request_steps"]


def test_drafting_stops_where_the_head_has_no_positions(
    tmp_path, tiny_engine, mixed_requests, single, plain_single
):
    """With prefixes cached: rows that lie there are a shorter text's too."""
    target, head = single
    short = Path(shutil.copytree(head, tmp_path / "short")) / "config.json"
    changed = json.loads(short.read_text()) | {"max_position_embeddings": 100}
    short.write_text(json.dumps(changed))
    config = {"model": target, "speculative_config": spec(str(short.parent))}
    batches = [{"requests": mixed_requests}] * 2
    result = harness.run(tmp_path, tiny_engine | config, batches)
    assert harness.ids(result) == harness.ids(plain_single)
    assert harness.ids(result, 1) == harness.ids(plain_single, 1)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    assert counters["texts_beyond_head"] > 100
    assert counters["nodes_accepted"] > 100


@pytest.mark.parametrize("control", [FIXED, GOODPUT], ids=["fixed", "goodput"])
def test_a_head_is_a_source_of_rasd(
    tmp_path, tiny_engine, mixed_requests, single, plain_single, control
):
    """Beside what is looked up."""
    target, head = single
    sources = ["token_recycling", "suffix_tree", {"method": "eagle_tree", "model": head}]
    speculative = {
        "method": "rasd", "sources": sources, "num_speculative_tokens": 16, "control": control
    }  # fmt: skip
    result = harness.run(
        tmp_path, tiny_engine | {"model": target, "speculative_config": speculative},
        [{"requests": mixed_requests}] * 2, "fixed_prices",
    )  # fmt: skip
    assert harness.ids(result) == harness.ids(plain_single)
    assert harness.ids(result, 1) == harness.ids(plain_single, 1)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    # The head is nearly always right, the others know little of the text.
    assert counters["nodes_accepted"] > counters["request_steps"] * (2 if control is FIXED else 0.5)


@pytest.mark.parametrize("generation", [1, 3])
def test_greedy_text_is_the_same_with_a_head_that_is_wrong(
    tmp_path, tiny_engine, mixed_requests, plain, tiny_model, generation
):
    """A random one; of EAGLE-3 with states of three layers, and with few tokens of its own."""
    own = {} if generation == 1 else {"own_tokens": 100}
    head = save_wide_head(tmp_path / "head", tiny_model, generation, **own)
    config = {"speculative_config": spec(head)}
    result = harness.run(tmp_path, tiny_engine | config, [{"requests": mixed_requests}])
    assert harness.ids(result) == harness.ids(plain)
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_drafted"] > 1000


def save_wide_head(path: Path, target: str, generation: int, **keys) -> str:
    """A random head for a target of other sizes than its own."""
    config = json.loads((Path(target) / "config.json").read_text())
    return save_head(path, generation, config["vocab_size"], hidden=config["hidden_size"], **keys)


@pytest.mark.parametrize("generation", [1, 3])
def test_chains_are_accepted_exactly_as_those_of_vllms_own_heads(tmp_path, generation):
    """By position, over 1,600 tokens: so the drafts are the same."""
    target = build_model(tmp_path / "target", 64, 0.12)
    sizes = {"hidden": 128, "head_dim": 32, "spread": 0.08, "bias": False}
    head = save_head(tmp_path / "head", generation, 64, **sizes)
    engine = {
        "model": target, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 256, "enable_prefix_caching": False, "disable_log_stats": False,
    }  # fmt: skip
    params = {"temperature": 0.0, "max_tokens": 100, "ignore_eos": True, "detokenize": False}
    requests = [[[3 + (7 * i + j * j) % 61 for j in range(5 + 7 * i)], params] for i in range(16)]
    own = {"method": "eagle" if generation == 1 else "eagle3"}
    ours = {"method": "eagle_tree", "shape": "chain", "control": FIXED}
    stock, tree = (
        harness.run(
            tmp_path,
            engine | {"speculative_config": {**each, "model": head, "num_speculative_tokens": 3}},
            [{"requests": requests}],
        )
        for each in (own, ours)
    )
    assert harness.ids(tree) == harness.ids(stock)
    assert tree["accepted_per_position"] == stock["accepted_per_position"]
    assert stock["accepted_per_position"][0] > 10


@pytest.mark.full(
    "vllm_specplus/samplers/*.py", "vllm_specplus/drafting/*.py",
    "vllm_specplus/proposers/eagle_tree.py", "vllm_specplus/engine/verify.py",
)  # fmt: skip
def test_sampled_text_has_the_targets_distribution(tmp_path, tmp_path_factory):
    target, head = single_layer(tmp_path_factory.mktemp("small"), 32, 0.12)
    engine = {
        "model": target, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 64, "max_num_seqs": 256, "max_num_batched_tokens": 4096,
        "speculative_config": spec(head, shape="rsd_s"),
    }  # fmt: skip
    prompt, samples = [5, 9, 17, 3, 21], 8_000
    params = {"temperature": 1.0, "top_k": 6, "max_tokens": TOKENS + 1, "ignore_eos": True}
    batch = {"prompt": prompt, "params": params | {"detokenize": False}, "repeat": samples}
    result = harness.run(tmp_path, engine, [batch])
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 0.5 * samples
    texts = [tuple(out[0][:TOKENS]) for out in harness.ids(result)]
    assert chi_square(joint_probabilities(target, prompt, 6), texts) > 1e-3


def test_a_head_for_another_target_is_refused_before_the_start(tmp_path, tiny_engine):
    config = {"speculative_config": spec(save_head(tmp_path / "head", 3, VOCAB))}
    with pytest.raises(RuntimeError, match="of 64 hidden units, and this one has 128"):
        harness.run(tmp_path, tiny_engine | config, [{"requests": []}])
