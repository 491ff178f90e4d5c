"""Trees from heads of one pass in the real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.block_heads import save_block
from tests.engine import harness
from tests.engine.conftest import build_model
from tests.engine.test_sampling import TOKENS, chi_square, joint_probabilities
from tests.parallel_heads import save_parallel

pytestmark = pytest.mark.engine

FIXED, GOODPUT = {"policy": "fixed"}, {"policy": "goodput"}
#: Units of the target; every token has one of its own, the mask's is never seen.
HIDDEN, HEADS, DIM, VOCAB, MASK, THETA = 128, 4, 32, 100, 1, 10000.0
BLOCK = 4


def spec(head: str, **keys) -> dict:
    base = {"method": "block_tree", "num_speculative_tokens": 12, "control": FIXED}
    return base | {"model": head, **keys}


def successors(vocab: int):
    """Permutation matrix [HIDDEN, HIDDEN]: a token's unit to that of its successor; all tokens are
    in one cycle."""
    import torch

    cycle = torch.randperm(vocab, generator=torch.Generator().manual_seed(5))
    matrix = torch.zeros(HIDDEN, HIDDEN)
    matrix[cycle.roll(-1), cycle] = 1
    return matrix


def build_target(path: Path, vocab: int, spread: float, gain: float) -> str:
    """A Llama that mostly says a token's successor; its random layers say what else."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=HIDDEN, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=HEADS, num_key_value_heads=2, head_dim=DIM, initializer_range=spread,
        max_position_embeddings=1024, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float32)
    units = torch.eye(HIDDEN)[:vocab]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(units * HIDDEN**0.5)
        # The row of a token asks for the unit of the one that it succeeds.
        model.lm_head.weight.copy_(gain * units @ successors(vocab))
    model.save_pretrained(path)
    return str(path)


def write(path: Path, tensors: dict, config: dict) -> str:
    from safetensors.torch import save_file

    path.mkdir()
    save_file({name: each.contiguous() for name, each in tensors.items()},
              path / "model.safetensors")  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def right_body(vocab: int, positions: int = 1024) -> tuple[dict, dict]:
    """Tensors and config of layers each of which takes a row for the successor of the row before.

    After as many layers as there are masks every row is right, if the text is. Queries and keys are
    biases, so that attention goes by the distance alone: it peaks at 1.
    """
    import torch

    layers = BLOCK - 1
    angle = THETA ** (-torch.arange(0, DIM, 2) / DIM)
    query = torch.cat((angle.cos(), -angle.sin())).repeat(HEADS)
    key = torch.cat((torch.ones(DIM // 2), torch.zeros(DIM // 2))).repeat(HEADS)
    nothing, none, ones = torch.zeros(HIDDEN, HIDDEN), torch.zeros(HIDDEN), torch.ones(HIDDEN)
    tensors = {
        "fc.weight": torch.cat((torch.eye(HIDDEN), nothing), 1),
        "hidden_norm.weight": ones, "norm.weight": ones,
    }  # fmt: skip
    for i in range(layers):
        weights = {"q": nothing, "k": nothing, "v": successors(vocab), "o": torch.eye(HIDDEN)}
        biases = {"q": query, "k": key, "v": none, "o": none}
        for part, weight in weights.items():
            tensors[f"layers.{i}.self_attn.{part}_proj.weight"] = weight
            tensors[f"layers.{i}.self_attn.{part}_proj.bias"] = biases[part]
        for part in "qk":
            tensors[f"layers.{i}.self_attn.{part}_norm.weight"] = torch.full((DIM,), 10.0)
        for part, shape in (("gate", (8, HIDDEN)), ("up", (8, HIDDEN)), ("down", (HIDDEN, 8))):
            tensors[f"layers.{i}.mlp.{part}_proj.weight"] = torch.zeros(shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"layers.{i}.{norm}.weight"] = ones
    config = {
        "vocab_size": vocab, "hidden_size": HIDDEN, "intermediate_size": 8, "rope_theta": THETA,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": HEADS,
        "head_dim": DIM, "attention_bias": True, "max_position_embeddings": positions,
    }  # fmt: skip
    return {name: each.clone() for name, each in tensors.items()}, config


def right_parallel(vocab: int) -> tuple[dict, dict]:
    """Tensors and config of P-EAGLE, nearly as above: half of the heads of the first layer take a
    row's own token, the others the successor of the row before; the target's output layer goes on
    from there. Hidden states are not read."""
    import torch

    layers, size = BLOCK - 1, 2 * HEADS * DIM
    angle = THETA ** (-torch.arange(0, DIM, 2) / DIM)
    here = torch.cat((torch.ones(DIM // 2), torch.zeros(DIM // 2)))
    before = torch.cat((angle.cos(), -angle.sin()))
    biases = {
        "q": torch.cat((here.repeat(HEADS), before.repeat(HEADS))), "k": here.repeat(2 * HEADS),
        "v": torch.zeros(size), "o": torch.zeros(HIDDEN),
    }  # fmt: skip
    ones, nothing, one = torch.ones(HIDDEN), torch.zeros(HIDDEN, HIDDEN), torch.eye(HIDDEN)
    tensors = {
        "fc.weight": torch.zeros(HIDDEN, 2 * HIDDEN), "mask_hidden": torch.zeros(1, 1, 2 * HIDDEN),
        "norm.weight": ones, "layers.0.hidden_norm.weight": ones,
        "embed_tokens.weight": torch.eye(HIDDEN)[:vocab],
    }  # fmt: skip
    tensors["embed_tokens.weight"][MASK] = 0
    for i in range(layers):
        of, reads = f"layers.{i}", HIDDEN if i else 2 * HIDDEN
        # What a row says itself weighs more than what the row before says of it.
        values = torch.cat((nothing, 0.4 * successors(vocab)))
        if not i:
            values = torch.cat((torch.cat((4 * one, nothing), 1),
                                torch.cat((successors(vocab), nothing), 1)))  # fmt: skip
        weights = {
            "q": torch.zeros(size, reads), "k": torch.zeros(size, reads), "v": values,
            "o": torch.cat((one, one), 1),
        }  # fmt: skip
        for part, weight in weights.items():
            tensors[f"{of}.self_attn.{part}_proj.weight"] = weight
            tensors[f"{of}.self_attn.{part}_proj.bias"] = biases[part]
        tensors |= {f"{of}.self_attn.{part}_norm.weight": torch.full((DIM,), 10.0) for part in "qk"}
        for part, shape in (("gate", (8, HIDDEN)), ("up", (8, HIDDEN)), ("down", (HIDDEN, 8))):
            tensors[f"{of}.mlp.{part}_proj.weight"] = torch.zeros(shape)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{of}.{norm}.weight"] = ones
    layer = {
        "model_type": "qwen3", "vocab_size": vocab, "hidden_size": HIDDEN, "intermediate_size": 8,
        "rope_theta": THETA, "num_hidden_layers": layers, "num_attention_heads": 2 * HEADS,
        "num_key_value_heads": 2 * HEADS, "head_dim": DIM, "attention_bias": True,
        "max_position_embeddings": 1024,
    }  # fmt: skip
    config = {
        "speculators_model_type": "peagle", "transformer_layer_config": layer,
        "mask_token_id": MASK, "eagle_aux_hidden_state_layer_ids": [1, 2],
        "speculators_config": {"proposal_methods": [{"speculative_tokens": BLOCK}]},
    }  # fmt: skip
    return {name: each.clone() for name, each in tensors.items()}, config


def add_second(tensors: dict, vocab: int) -> dict:
    """What DFlash-2 has more, such that it changes nothing; the keys of its config."""
    import torch

    base = torch.stack((torch.ones(HIDDEN), torch.zeros(HIDDEN))).expand(2, -1, -1)
    for layer in range(BLOCK - 1):
        for part in ("attention_conv", "mlp_conv"):
            tensors[f"layers.{layer}.{part}.base_kernel"] = base
            projection = torch.zeros(4 * HIDDEN // 16, HIDDEN)
            tensors[f"layers.{layer}.{part}.kernel_projection.weight"] = projection
    for part in ("predecessor", "successor"):
        tensors[f"candidate_selector.{part}_codebook"] = torch.zeros(vocab, 8)
    tensors["candidate_selector.hidden_projection.weight"] = torch.zeros(8, HIDDEN)
    return {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 8, "selector_top_k": 8}


def right_head(path: Path, kind: str, vocab: int, gain: float, positions: int = 1024) -> str:
    """A head that knows the successors: DFlash and DFlash-2 in their authors' format, with an
    embedding and an output layer; DSpark and P-EAGLE as ``speculators`` write them; Medusa."""
    import torch

    units = torch.eye(HIDDEN)[:vocab]
    if kind == "medusa":
        step, tensors = successors(vocab), {}
        for i in range(BLOCK - 1):
            power = torch.linalg.matrix_power(step, i + 1)
            tensors[f"blocks.{i}.layers.0.weight"] = 9 * power
        config = {"architectures": ["MedusaModel"], "hidden_size": HIDDEN, "vocab_size": vocab,
                  "num_heads": BLOCK - 1, "num_hidden_layers": 1}  # fmt: skip
        return write(path, tensors, config)
    if kind == "peagle":
        return write(path, *right_parallel(vocab))
    tensors, config = right_body(vocab, positions)
    if kind.startswith("dflash"):
        tensors["lm_head.weight"] = gain * units
        tensors["embed_tokens.weight"] = units.clone()
        tensors["embed_tokens.weight"][MASK] = 0
        known = {"mask_token_id": MASK, "target_layer_ids": [0, 1]}
        name = "DFlashDraftModel"
        if kind == "dflash2":
            name, known = "DFlash2DraftModel", known | add_second(tensors, vocab)
        config |= {"architectures": [name], "block_size": BLOCK, "dflash_config": known}
        return write(path, tensors, config)
    tensors["mask_embedding"] = torch.zeros(HIDDEN)
    # Which token follows which, as the target's output layer has it.
    tensors["markov_head.markov_w1.weight"] = units
    tensors["markov_head.markov_w2.weight"] = gain * units @ successors(vocab)
    tensors["confidence_head.proj.weight"] = torch.zeros(1, 2 * HIDDEN)
    tensors["confidence_head.proj.bias"] = torch.full((1,), 3.0)
    return write(
        path, tensors,
        {
            "speculators_model_type": "dspark", "block_size": BLOCK, "mask_token_id": MASK,
            "transformer_layer_config": config | {"model_type": "qwen3"},
            "draft_vocab_size": vocab, "aux_hidden_state_layer_ids": [1, 2],
            "sample_from_anchor": True, "markov_rank": HIDDEN, "enable_confidence_head": True,
            "confidence_head_with_markov": True,
        },
    )  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> str:
    return build_target(tmp_path_factory.mktemp("successors") / "target", VOCAB, 0.11, 1.0)


@pytest.fixture(scope="module")
def engine(tiny_engine, target) -> dict:
    return tiny_engine | {"model": target}


@pytest.fixture(scope="module")
def requests(mixed_requests) -> list:
    """Those of the other tests, of fewer tokens."""
    few = []
    for prompt, params in mixed_requests:
        own = dict(params)
        for key in ("allowed_token_ids", "stop_token_ids"):
            if key in own:
                own[key] = sorted({3 + token % (VOCAB - 3) for token in own[key]})[:90]
        few.append([[3 + token % (VOCAB - 3) for token in prompt], own])
    return few


@pytest.fixture(scope="module")
def plain(tmp_path_factory, engine, requests) -> dict:
    """Two batches, the second one with its prompts cached."""
    result = harness.run(tmp_path_factory.mktemp("plain"), engine, [{"requests": requests}] * 2)
    assert result["preemptions"] > 0
    return result


@pytest.mark.parametrize(
    ("kind", "control"),
    [
        *((kind, FIXED) for kind in ("dflash", "dflash2", "dspark", "medusa", "peagle")),
        ("dspark", GOODPUT),
    ],
    ids=["dflash", "dflash2", "dspark", "medusa", "peagle", "goodput"],
)
def test_greedy_text_is_the_same(tmp_path, engine, requests, plain, kind, control):
    """Chunked prefill, prefix caching, preemption, penalties; and the head is often right."""
    head = right_head(tmp_path / "head", kind, VOCAB, 1.0)
    config = engine | {"speculative_config": spec(head, control=control)}
    result = harness.run(tmp_path, config, [{"requests": requests}] * 2, "fixed_prices")
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    print(kind, control, {k: v for k, v in counters.items() if v})
    if control is FIXED:
        assert counters["nodes_accepted"] > 0.8 * counters["request_steps"]
    else:
        assert counters["nodes_accepted"] > 100


def test_a_head_is_a_source_of_rasd(tmp_path, engine, requests, plain):
    head = right_head(tmp_path / "head", "dflash", VOCAB, 1.0)
    speculative = {
        "method": "rasd", "num_speculative_tokens": 16, "control": FIXED,
        "sources": ["token_recycling", {"method": "block_tree", "model": head}],
    }  # fmt: skip
    config = engine | {"speculative_config": speculative}
    result = harness.run(tmp_path, config, [{"requests": requests}] * 2, "fixed_prices")
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    assert result["counters"]["draft_failures"] == 0


def test_drafting_stops_where_the_head_has_no_positions(tmp_path, engine, requests, plain):
    head = right_head(tmp_path / "head", "dspark", VOCAB, 1.0, positions=100)
    config = engine | {"speculative_config": spec(head)}
    result = harness.run(tmp_path, config, [{"requests": requests}])
    assert harness.ids(result) == harness.ids(plain)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    assert counters["texts_beyond_head"] > 100
    assert counters["nodes_accepted"] > 100


@pytest.mark.parametrize("kind", ["dflash", "dspark", "peagle"])
def test_greedy_text_is_the_same_with_a_head_that_is_wrong(tmp_path, engine, requests, plain, kind):
    """A random one, of few tokens, with windows."""
    sliding = {
        "layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True,
        "sliding_window": 40,
    }  # fmt: skip
    keys = {"hidden": HIDDEN, "own_tokens": 60}
    if kind == "peagle":
        head = save_parallel(tmp_path / "head", VOCAB, **keys)
    else:
        head = save_block(tmp_path / "head", kind, VOCAB, target=HIDDEN, **keys, **sliding)
    config = engine | {"speculative_config": spec(head)}
    result = harness.run(tmp_path, config, [{"requests": requests}])
    assert harness.ids(result) == harness.ids(plain)
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_drafted"] > 1000


@pytest.mark.parametrize("kind", ["dflash", "dflash2", "dspark", "medusa", "peagle"])
@pytest.mark.full(
    "vllm_specplus/samplers/*.py", "vllm_specplus/drafting/block_*.py",
    "vllm_specplus/drafting/dflash2.py", "vllm_specplus/drafting/peagle*.py",
    "vllm_specplus/drafting/head_executor.py", "vllm_specplus/drafting/passes.py",
    "vllm_specplus/proposers/block_tree.py", "vllm_specplus/engine/verify.py",
)  # fmt: skip
def test_sampled_text_has_the_targets_distribution(tmp_path, kind):
    target = build_target(tmp_path / "target", 32, 0.08, 0.4)
    head = right_head(tmp_path / "head", kind, 32, 0.4)
    engine = {
        "model": target, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 64, "max_num_seqs": 256, "max_num_batched_tokens": 4096,
        "speculative_config": spec(head),
    }  # fmt: skip
    prompt, samples = [5, 9, 17, 3, 21], 8_000
    params = {"temperature": 1.0, "top_k": 6, "max_tokens": TOKENS + 1, "ignore_eos": True}
    batch = {"prompt": prompt, "params": params | {"detokenize": False}, "repeat": samples}
    result = harness.run(tmp_path, engine, [batch])
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 0.5 * samples
    texts = [tuple(out[0][:TOKENS]) for out in harness.ids(result)]
    assert chi_square(joint_probabilities(target, prompt, 6), texts) > 1e-3


def test_a_head_for_another_target_is_refused_before_the_start(tmp_path, engine):
    config = {"speculative_config": spec(save_block(tmp_path / "head", "dflash", VOCAB))}
    with pytest.raises(RuntimeError, match="of 64 hidden units, and this one has 128"):
        harness.run(tmp_path, engine | config, [{"requests": []}])


# Not of DFlash: on a CPU vLLM's own drafts other tokens than its formulas in some steps, where ours
# drafts theirs (tests/drafting/test_block_heads.py).
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_chains_are_accepted_exactly_as_those_of_vllms_own_p_eagle(tmp_path, family):
    """By position, over 1,600 tokens, with random heads: so the drafts are the same."""
    target = build_model(tmp_path / "target", 64, 0.12)
    head = save_parallel(
        tmp_path / "head", 64, family=family, depth=3, head_dim=DIM, hidden=HIDDEN,
        writer="authors", spread=0.08,
    )  # fmt: skip
    own = {"method": "eagle3", "parallel_drafting": True}
    engine = {
        "model": target, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 256, "enable_prefix_caching": False, "disable_log_stats": False,
    }  # fmt: skip
    params = {"temperature": 0.0, "max_tokens": 100, "ignore_eos": True, "detokenize": False}
    requests = [[[4 + (7 * i + j * j) % 60 for j in range(5 + 7 * i)], params] for i in range(16)]
    batches, number = [{"requests": requests}], {"num_speculative_tokens": 3}
    stock = harness.run(
        tmp_path, engine | {"speculative_config": own | {"model": head} | number}, batches
    )
    tree = harness.run(
        tmp_path, engine | {"speculative_config": spec(head, **number)}, batches, "chains"
    )
    assert harness.ids(tree) == harness.ids(stock)
    assert tree["accepted_per_position"] == stock["accepted_per_position"]
    assert stock["accepted_per_position"][0] > 10
