"""Trees from LongSpec's draft in the real engine, with a target whose texts the draft foresees only
if it reads the target's KV cache where it lies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.engine import harness
from tests.engine.test_sampling import TOKENS, chi_square, joint_probabilities
from tests.long_heads import save_long, write

pytestmark = pytest.mark.engine

FIXED, GOODPUT = {"policy": "fixed"}, {"policy": "goodput"}
#: Units of the target: every token has one of its own, and every group of tokens.
HIDDEN, HEADS, KV_HEADS, DIM, VOCAB, THETA = 128, 4, 2, 32, 100, 1e6
#: Tokens of these ids name a group each, which the text behind them keeps to; ids before and among
#: them belong to none.
GROUPS = 10
MARKERS = range(10, 10 + GROUPS)
TREE = [2, 4, 4]
NORMS = ("input_layernorm", "post_self_attention_layernorm", "post_cross_attention_layernorm")


def spec(model: str, **keys) -> dict:
    base = {"method": "long_draft", "tree": TREE, "num_speculative_tokens": sum(TREE),
            "control": FIXED}  # fmt: skip
    return base | {"model": model, **keys}


def looking_for_markers(vocab: int) -> dict:
    """Weights and biases of an attention that goes to a marker, however far it is, and says which.

    Queries are a bias and keys those of markers, in the last pair of units, which positions hardly
    turn. A token's normed row is its unit, by the root of ``HIDDEN``.
    """
    import torch

    unit, strength = HIDDEN**0.5, 20.0
    last = DIM // 2 - 1
    query, none = torch.zeros(HEADS * DIM), torch.zeros(KV_HEADS * DIM)
    key, value = torch.zeros(2, KV_HEADS * DIM, HIDDEN)
    out = torch.zeros(HIDDEN, HEADS * DIM)
    query.view(HEADS, DIM)[:, last] = strength
    for group, marker in enumerate(MARKERS):
        key.view(KV_HEADS, DIM, HIDDEN)[:, last, marker] = DIM**0.5 / unit
        value[group, marker] = 1 / unit  # of the first KV head
        out[vocab + group, group] = unit
    return {
        "q_proj.weight": torch.zeros(HEADS * DIM, HIDDEN), "q_proj.bias": query,
        "k_proj.weight": key, "k_proj.bias": none, "v_proj.weight": value, "v_proj.bias": none,
        "o_proj.weight": out, "o_proj.bias": torch.zeros(HIDDEN),
    }  # fmt: skip


def build_target(path: Path, vocab: int, spread: float, bonus: float) -> str:
    """A Llama whose last layer looks for a marker, by which the next token is one of a group; which
    of the group depends on the token before. Its other layers do nothing.

    ``spread`` of the logits of tokens of a group, and what the group has more than the others.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=DIM, rope_theta=THETA,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, attention_bias=True,
        tie_word_embeddings=False, rms_norm_eps=1e-6,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(torch.float32)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.self_attn.o_proj.bias.zero_()
            layer.mlp.down_proj.weight.zero_()
        own = model.model.layers[-1].self_attn.state_dict()
        for name, weight in looking_for_markers(vocab).items():
            own[name].copy_(weight)
        model.model.embed_tokens.weight.copy_(HIDDEN**0.5 * torch.eye(HIDDEN)[:vocab])
        output = model.lm_head.weight.zero_()
        output[:, :vocab] = spread * torch.rand(vocab, vocab)
        for token in range(MARKERS.stop, vocab):
            output[token, vocab + token % GROUPS] = bonus
    model.save_pretrained(path)
    return str(path)


def right_draft(path: Path, vocab: int, window: int = 40, blind: bool = False) -> str:
    """The draft of such a target: nothing but the cross-attention does anything, so that it is the
    target itself, if it sees the marker. ``blind``: not even that does."""
    import torch

    looking = looking_for_markers(vocab)
    ones = torch.ones(HIDDEN)
    tensors = {f"self_attn.{name}": torch.zeros_like(each) for name, each in looking.items()}
    tensors |= {
        f"cross_attn.{name}": each for name, each in looking.items() if name[0] in ("q", "o")
    }
    if blind:
        tensors["cross_attn.o_proj.weight"].zero_()
    for part, shape in (("gate", (8, HIDDEN)), ("up", (8, HIDDEN)), ("down", (HIDDEN, 8))):
        tensors[f"mlp.{part}_proj.weight"] = torch.zeros(shape)
    tensors |= {f"{name}.weight": ones.clone() for name in (*NORMS, "norm")}
    config = {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": HIDDEN, "intermediate_size": 8,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM,
        "rms_norm_eps": 1e-6, "rope_theta": THETA, "max_position_embeddings": 2048,
        "draft_window": window,
    }  # fmt: skip
    return write(path, tensors, config)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> str:
    return build_target(tmp_path_factory.mktemp("marked") / "target", VOCAB, 1.0, 8.0)


@pytest.fixture(scope="module")
def engine(tiny_engine, target) -> dict:
    return tiny_engine | {"model": target}


@pytest.fixture(scope="module")
def requests(mixed_requests) -> list:
    """Those of the other tests, each with a marker for its first token, and no other one."""
    marked = []
    for prompt, params in mixed_requests:
        own, rest = dict(params), [MARKERS.stop + token % 80 for token in prompt[1:]]
        for key in ("allowed_token_ids", "stop_token_ids"):
            if key in own:
                own[key] = sorted({MARKERS.stop + token % 80 for token in own[key]})[:70]
        marked.append([[MARKERS.start + prompt[0] % GROUPS, *rest], own])
    return marked


@pytest.fixture(scope="module")
def plain(tmp_path_factory, engine, requests) -> dict:
    """Two batches, the second one with its prompts cached."""
    result = harness.run(tmp_path_factory.mktemp("plain"), engine, [{"requests": requests}] * 2)
    assert result["preemptions"] > 0
    assert len({token for ids in harness.ids(result) for token in ids[0]}) > 20
    return result


@pytest.mark.parametrize("control", [FIXED, GOODPUT], ids=["fixed", "goodput"])
def test_greedy_text_is_the_same(tmp_path, engine, requests, plain, control):
    """Chunked prefill, prefix caching, preemption, penalties; and the draft is mostly right, with a
    window that most markers are beyond."""
    draft = right_draft(tmp_path / "draft", VOCAB)
    config = engine | {"speculative_config": spec(draft, control=control)}
    result = harness.run(tmp_path, config, [{"requests": requests}] * 2, "fixed_prices")
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    if control is FIXED:
        assert counters["nodes_accepted"] > counters["request_steps"]
    else:
        assert counters["nodes_accepted"] > 100


def test_greedy_text_is_the_same_with_a_draft_that_is_wrong(tmp_path, engine, requests, plain):
    """A random one, as LongSpec's authors write them; and windows for few of the requests."""
    draft = save_long(
        tmp_path / "draft", VOCAB, hidden=HIDDEN, head_dim=DIM, last_norm=False, rope_theta=THETA
    )
    config = engine | {"speculative_config": spec(draft, kv_memory_mb=1)}
    result = harness.run(tmp_path, config, [{"requests": requests}])
    assert harness.ids(result) == harness.ids(plain)
    assert result["counters"]["nodes_drafted"] > 1000


@pytest.mark.full(
    "vllm_specplus/drafting/long_*.py", "vllm_specplus/drafting/context_pages.py",
    "vllm_specplus/proposers/long_draft.py", "vllm_specplus/engine/verify.py",
)  # fmt: skip
def test_a_draft_foresees_texts_whose_beginning_its_window_does_not_reach(tmp_path, target):
    """With its paper's tree and window, behind 1,500 tokens; not so a draft that is blind to all
    but its window."""
    engine = {
        "model": target, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 2048, "max_num_seqs": 4,
    }  # fmt: skip
    params = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True, "detokenize": False}
    text = [MARKERS.stop + (7 * i + i * i) % 80 for i in range(1500)]
    batch = {"requests": [[[MARKERS.start + 3, *text], params]]}
    plain, shares = harness.run(tmp_path, engine, [batch]), []
    for blind in (False, True):
        draft = right_draft(tmp_path / f"draft-{blind}", VOCAB, window=512, blind=blind)
        keys = {"method": "long_draft", "model": draft, "control": FIXED}
        speculative = {"speculative_config": keys | {"num_speculative_tokens": 68}}
        result = harness.run(tmp_path, engine | speculative, [batch])
        assert harness.ids(result) == harness.ids(plain)
        counters = result["counters"]
        assert counters["draft_failures"] == 0
        shares.append(counters["nodes_accepted"] / counters["request_steps"])
    assert shares[0] > 3
    assert shares[1] < 2


@pytest.mark.full(
    "vllm_specplus/samplers/*.py", "vllm_specplus/drafting/long_*.py",
    "vllm_specplus/proposers/long_draft.py", "vllm_specplus/engine/verify.py",
)  # fmt: skip
def test_sampled_text_has_the_targets_distribution(tmp_path):
    vocab = 40
    target = build_target(tmp_path / "target", vocab, 0.3, 0.4)
    engine = {
        "model": target, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 64, "max_num_seqs": 256, "max_num_batched_tokens": 4096,
        "speculative_config": spec(right_draft(tmp_path / "draft", vocab)),
    }  # fmt: skip
    prompt, samples = [MARKERS.start + 3, 29, 37, 23, 31], 8_000
    params = {"temperature": 1.0, "top_k": 6, "max_tokens": TOKENS + 1, "ignore_eos": True}
    batch = {"prompt": prompt, "params": params | {"detokenize": False}, "repeat": samples}
    result = harness.run(tmp_path, engine, [batch])
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 0.5 * samples
    texts = [tuple(out[0][:TOKENS]) for out in harness.ids(result)]
    assert chi_square(joint_probabilities(target, prompt, 6), texts) > 1e-3


def test_a_draft_for_another_target_is_refused_before_the_start(tmp_path, engine):
    config = {"speculative_config": spec(save_long(tmp_path / "draft", VOCAB))}
    with pytest.raises(RuntimeError, match="of 64 hidden units, and this one has 128"):
        harness.run(tmp_path, engine | config, [{"requests": []}])
