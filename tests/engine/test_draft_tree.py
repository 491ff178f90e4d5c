"""Trees from a draft model in the real engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.engine import harness
from tests.engine.conftest import build_model
from tests.engine.test_sampling import TOKENS, chi_square, joint_probabilities

pytestmark = pytest.mark.engine
#: Sampled variants last too long for every run.
sampled = pytest.mark.full(
    "vllm_specplus/samplers/*.py", "vllm_specplus/drafting/*.py",
    "vllm_specplus/proposers/draft_tree.py", "vllm_specplus/proposers/rasd.py",
    "vllm_specplus/engine/verify.py", "vllm_specplus/engine/row_sampling.py",
    "vllm_specplus/engine/drafter.py", "tests/engine/child.py",
)  # fmt: skip

FIXED, GOODPUT = {"policy": "fixed"}, {"policy": "goodput"}


def spec(draft, **keys):
    base = {"method": "draft_tree", "num_speculative_tokens": 12, "control": FIXED}
    return base | {"model": draft, **keys}


def fused(draft, **keys):
    """The draft's sequences (by default the most probable ones) among what others find."""
    own = {"method": "draft_tree", "model": draft, "width": 3, "num_speculative_tokens": 6, **keys}
    sources = ["token_recycling", "suffix_tree", own]
    return {"method": "rasd", "num_speculative_tokens": 16, "control": FIXED, "sources": sources}


@pytest.mark.parametrize(
    "keys",
    [
        {"shape": "topk", "width": 4, "num_speculative_tokens": 12},
        {"shape": "rsd_s", "width": 3, "num_speculative_tokens": 12},
        {"shape": "spectr", "width": 3, "num_speculative_tokens": 12},
        {"shape": "rsd_s", "width": 3, "num_speculative_tokens": 12, "control": GOODPUT},
    ],
    ids=lambda keys: keys["shape"] + ("-goodput" if "control" in keys else ""),
)
def test_greedy_text_is_the_same(tmp_path, tiny_engine, mixed_requests, plain, near_model, keys):
    """Chunked prefill, prefix caching, preemption, penalties: whatever is drafted."""
    batches = [{"requests": mixed_requests}] * 2
    config = {"speculative_config": spec(near_model, **keys)}
    result = harness.run(tmp_path, tiny_engine | config, batches, "fixed_prices")
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    # The controller finds little to gain with 32 requests on one core.
    assert counters["nodes_accepted"] > (20 if "control" in keys else 300)


@pytest.mark.parametrize(("shape", "control"), [("topk", FIXED), ("rsd_s", GOODPUT)])
def test_greedy_text_is_the_same_when_fused(
    tmp_path, tiny_engine, mixed_requests, plain, near_model, shape, control
):
    config = {"speculative_config": fused(near_model, shape=shape) | {"control": control}}
    batches = [{"requests": mixed_requests}] * 2
    result = harness.run(tmp_path, tiny_engine | config, batches, "fixed_prices")
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > (300 if control is FIXED else 20)


def test_the_target_as_its_own_draft_is_always_right(tmp_path, tiny_engine, tiny_model):
    """Its cache follows the text exactly: every node of a greedy chain is accepted."""
    requests = [
        [[5 + i] * (1 + 30 * i), {"temperature": 0.0, "max_tokens": 61, "ignore_eos": True}]
        for i in range(4)
    ]
    config = {"speculative_config": spec(tiny_model, shape="chain", num_speculative_tokens=5)}
    roomy = {"num_gpu_blocks_override": 400}
    result = harness.run(tmp_path, tiny_engine | roomy | config, [{"requests": requests}])
    counters = result["counters"]
    assert counters["request_steps"] == 4 * 10
    assert counters["nodes_accepted"] == counters["nodes_drafted"] == 4 * 50


def test_drafting_stops_where_the_draft_has_no_positions(
    tmp_path, tiny_engine, mixed_requests, plain, near_model
):
    """That is no fault; texts end as they would, at the target's own positions."""
    short = Path(shutil.copytree(near_model, tmp_path / "short")) / "config.json"
    changed = json.loads(short.read_text()) | {"max_position_embeddings": 100}
    short.write_text(json.dumps(changed))
    config = {"speculative_config": spec(str(short.parent), shape="topk", width=4)}
    result = harness.run(tmp_path, tiny_engine | config, [{"requests": mixed_requests}])
    assert harness.ids(result) == harness.ids(plain)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    assert counters["texts_beyond_head"] > 100
    assert counters["nodes_accepted"] > 50


def test_a_draft_without_memory_leaves_requests_undrafted(
    tmp_path, tiny_engine, mixed_requests, plain, near_model
):
    """A slot takes 3 layers x 2 x 2 heads x 32 x 4 bytes: 1 MiB holds 682 of them, and the
    32 requests need thousands."""
    config = {"speculative_config": spec(near_model, kv_memory_mb=1)}
    result = harness.run(tmp_path, tiny_engine | config, [{"requests": mixed_requests}])
    assert harness.ids(result) == harness.ids(plain)
    assert result["counters"]["draft_failures"] > 0
    assert result["counters"]["nodes_accepted"] > 50


@pytest.mark.parametrize(
    ("keys", "sabotage"),
    [
        ({"shape": "rsd_s"}, None),
        ({"shape": "rsd_s"}, "foreign_draft_probs"),
        *(
            pytest.param(*variant, marks=sampled)
            for variant in (
                ({"shape": "chain", "num_speculative_tokens": 3}, None),
                ({"shape": "rsd_c", "branching": [3, 2], "num_speculative_tokens": 9}, None),
                ({"shape": "spectr"}, None),
                ({"source": "topk"}, None),
                ({"source": "rsd_s"}, None),
                ({"source": "rsd_s", "control": GOODPUT}, None),
                ({"source": "rsd_s"}, "found_as_drawn"),
                ({"shape": "rsd_s", "verification": "recursive"}, "q_not_renormalised"),
            )
        ),
    ],
    ids=lambda value: (
        "-".join(v["policy"] if isinstance(v, dict) else str(v) for v in value.values())
        if isinstance(value, dict)
        else value
    ),
)
def test_sampled_text_has_the_targets_distribution(tmp_path, small_pair, keys, sabotage):
    """Three tokens under top-k sampling, by every rule, from a draft alone or as a source of
    rasd; what is wrong is noticed."""
    target, draft = small_pair
    if "source" in keys:
        config = fused(draft, shape=keys["source"]) | {"control": keys.get("control", FIXED)}
    else:
        config = spec(draft, **keys)
    engine = {
        "model": target, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 64, "max_num_seqs": 256, "max_num_batched_tokens": 4096,
        "speculative_config": config,
    }  # fmt: skip
    # With fewer this wrong rule is found by some seeds only: the draft is close to the target.
    prompt, samples = [5, 9, 17, 3, 21], 24_000 if sabotage == "q_not_renormalised" else 8_000
    params = {"temperature": 1.0, "top_k": 6, "max_tokens": TOKENS + 1, "ignore_eos": True}
    batch = {"prompt": prompt, "params": params | {"detokenize": False}, "repeat": samples}
    result = harness.run(tmp_path, engine, [batch], sabotage)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    # The controller finds less to gain with 256 requests at once.
    assert counters["nodes_accepted"] > (0.05 if "control" in keys else 0.5) * samples
    texts = [tuple(out[0][:TOKENS]) for out in harness.ids(result)]
    p = chi_square(joint_probabilities(target, prompt, 6), texts)
    assert p > 1e-3 if sabotage is None else p < 1e-6


@sampled
def test_the_embedded_pair_follows_the_targets_distribution(tmp_path):
    """SmolLM2-135M and its distilled draft, with their real vocabulary."""
    from vllm_specplus.cli.model import prepare_draft, prepare_model

    target = prepare_model()
    config = spec(str(prepare_draft(target)), width=2, num_speculative_tokens=4)
    engine = {
        "model": str(target), "dtype": "float32", "enforce_eager": True, "max_model_len": 64,
        "max_num_seqs": 32, "kv_cache_memory_bytes": 1 << 29, "speculative_config": config,
    }  # fmt: skip
    prompt, samples = [504, 3575, 282, 4649, 314], 1_000  # "The capital of France is"
    params = {"temperature": 1.0, "top_k": 6, "max_tokens": TOKENS, "ignore_eos": True}
    batch = {"prompt": prompt, "params": params, "repeat": samples}
    result = harness.run(tmp_path, engine, [batch])
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 0.2 * samples
    texts = [tuple(out[0]) for out in harness.ids(result)]
    assert chi_square(joint_probabilities(str(target), prompt, 6), texts) > 1e-3


def test_a_seed_fixes_drafts_and_text_whatever_the_neighbours(
    tmp_path, tiny_engine, mixed_requests, near_model
):
    params = {"temperature": 0.9, "top_p": 0.9, "max_tokens": 30, "ignore_eos": True}
    seeded = [
        [prompt, params | {"seed": 7 + i}] for i, (prompt, _) in enumerate(mixed_requests[:6])
    ]
    neighbours = [[p, params | {"max_tokens": 9}] for p, _ in mixed_requests[6:14]]
    batches = [
        {"requests": seeded},
        {"requests": neighbours[:4] + seeded + neighbours[4:]},
        {"requests": [[p, q | {"seed": 99}] for p, q in seeded]},
    ]
    roomy = {"num_gpu_blocks_override": 400}
    config = {"speculative_config": spec(near_model)}
    result = harness.run(tmp_path, tiny_engine | roomy | config, batches)
    alone, beside, other = (harness.ids(result, i) for i in range(3))
    assert beside[4:10] == alone
    assert other != alone
    assert result["counters"]["nodes_accepted"] > 100


def test_logprobs_are_those_of_the_output(
    tmp_path, tiny_engine, tiny_model, mixed_requests, near_model
):
    import torch
    from transformers import LlamaForCausalLM

    params = {"temperature": 0.8, "max_tokens": 20, "ignore_eos": True, "logprobs": 3}
    requests = [[prompt, params] for prompt, _ in mixed_requests[:4]]
    requests += [[prompt, params | {"temperature": 0.0}] for prompt, _ in mixed_requests[4:6]]
    roomy = {"num_gpu_blocks_override": 400}
    config = {"speculative_config": spec(near_model)}
    result = harness.run(tmp_path, tiny_engine | roomy | config, [{"requests": requests}])
    assert result["counters"]["nodes_accepted"] > 20
    llama = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for request in result["batches"][0]:
        prompt, tokens, logprobs = request["prompt"], request["ids"][0], request["logprobs"][0]
        with torch.inference_mode():
            rows = llama(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        expected = rows.log_softmax(-1)[torch.arange(len(tokens)), tokens]
        got = [step[str(token)] for token, step in zip(tokens, logprobs, strict=True)]
        torch.testing.assert_close(torch.tensor(got), expected, atol=2e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def other_vocabulary(tmp_path_factory) -> str:
    return build_model(tmp_path_factory.mktemp("other"), 600, 0.2)


def test_a_draft_of_another_vocabulary_is_refused_before_the_start(
    tmp_path, tiny_engine, other_vocabulary
):
    config = {"speculative_config": spec(other_vocabulary)}
    with pytest.raises(RuntimeError, match="has 600 token ids, the target 512"):
        harness.run(tmp_path, tiny_engine | config, [{"requests": []}])


@pytest.mark.parametrize("shape", ["rsd_s", "spectr"])
def test_with_one_candidate_sampling_is_greedy(
    tmp_path, tiny_engine, mixed_requests, plain, near_model, shape
):
    """Through the rules for sampled trees, with penalties, minimal lengths, preemption and
    chunked prompts: with top_k = 1 only one text is possible."""
    requests = [[p, params | {"temperature": 1.0, "top_k": 1}] for p, params in mixed_requests]
    config = {"speculative_config": spec(near_model, shape=shape)}
    result = harness.run(tmp_path, tiny_engine | config, [{"requests": requests}])
    assert harness.ids(result) == harness.ids(plain)
    assert result["counters"]["nodes_accepted"] > 300
