"""A draft that goes on while the target verifies, in the real engine.

The engine runs on the machine's first core, the draft on its second.
"""

from __future__ import annotations

import os

import pytest

from tests.drafting.test_drafting import save_draft
from tests.eagle_heads import save_head
from tests.engine import harness
from tests.engine.test_sampling import TOKENS, chi_square, joint_probabilities
from tests.overlap.test_home import is_gone
from vllm_specplus.testing.models import VOCAB

CORES = sorted(os.sched_getaffinity(0))
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(len(CORES) < 2, reason="the draft needs a core of its own"),
]
FIXED = {"policy": "fixed"}
full = pytest.mark.full(
    "vllm_specplus/overlap/*.py", "vllm_specplus/drafting/*.py", "vllm_specplus/proposers/*.py",
    "vllm_specplus/engine/drafter.py", "tests/engine/child.py",
)  # fmt: skip
#: A process of its own: the one that others are forked from is on all cores.
APART = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(autouse=True)
def first_core():
    """What is started from here stays there; its drafts go where they are told to."""
    os.sched_setaffinity(0, {CORES[0]})
    yield
    os.sched_setaffinity(0, CORES)


def spec(draft: str, **keys) -> dict:
    base = {"method": "draft_tree", "model": draft, "shape": "topk", "width": 3}
    base |= {"num_speculative_tokens": 9, "control": FIXED, "overlap": True}
    base |= {"draft_cores": str(CORES[1]), **keys}
    if base["shape"] == "chain":
        del base["width"]
    return base


@pytest.mark.parametrize(
    "keys",
    [
        {},
        pytest.param({"overlap": "paper"}, marks=full),
        pytest.param({"shape": "chain"}, marks=full),
        {"shape": "rsd_s", "control": {"policy": "goodput"}},
    ],
    ids=lambda keys: "-".join(map(str, keys)) or "topk",
)
def test_greedy_text_is_the_same(
    tmp_path,
    tiny_engine,
    mixed_requests,
    plain,
    near_model,
    keys,
):
    """Chunked prefill, prefix caching, preemption, penalties: whatever is foreseen."""
    batches = [{"requests": mixed_requests}] * 2
    config = {"speculative_config": spec(near_model, **keys)}
    result = harness.run(tmp_path, tiny_engine | config, batches, "fixed_prices", env=APART)
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    assert counters["nodes_accepted"] > 20


def test_what_one_request_will_say_is_foreseen(tmp_path, tiny_engine, tiny_model):
    """With the target as its own draft, whose texts it has in its cache."""
    requests = [[[5] * 9, {"temperature": 0.0, "max_tokens": 90, "ignore_eos": True}]]
    config = {"speculative_config": spec(tiny_model)}
    result = harness.run(tmp_path, tiny_engine | config, [{"requests": requests}] * 2, env=APART)
    without = spec(tiny_model, overlap=False)
    del without["draft_cores"]
    alone = {"speculative_config": without}
    alone = harness.run(tmp_path, tiny_engine | alone, [{"requests": requests}] * 2, env=APART)
    assert harness.ids(result) == harness.ids(alone)
    assert result["counters"]["outcomes_foreseen"] > 10
    assert result["counters"]["draft_failures"] == 0


@full
@pytest.mark.parametrize("generation", [1, 3])
def test_a_head_goes_on(tmp_path, tiny_engine, mixed_requests, plain, generation):
    """Its process gets the target's vocabulary at the start and its states in every step."""
    head = save_head(tmp_path / "head", generation, VOCAB, hidden=128)
    config = spec(head, method="eagle_tree")
    result = harness.run(
        tmp_path, tiny_engine | {"speculative_config": config}, [{"requests": mixed_requests}] * 2,
        env=APART,
    )  # fmt: skip
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_drafted"] > 100


@full
def test_layers_in_parallel_go_on(tmp_path, tiny_engine, mixed_requests, plain):
    """Groups of fuzzy layers in the draft's process."""
    draft = save_draft(tmp_path / "deep", layers=6, vocab=VOCAB)
    config = spec(draft, method="easyspec", group_size=2)
    batch = {"requests": mixed_requests}
    result = harness.run(tmp_path, tiny_engine | {"speculative_config": config}, [batch], env=APART)
    assert harness.ids(result) == harness.ids(plain)
    assert result["counters"]["draft_failures"] == 0


@full
@pytest.mark.parametrize("overlap", [True, "paper"])
@pytest.mark.parametrize("shape", ["chain", "rsd_s"])
def test_sampled_text_has_the_targets_distribution(
    tmp_path,
    small_pair,
    shape,
    overlap,
):
    """Three tokens under top-k sampling."""
    target, draft = small_pair
    config = spec(draft, shape=shape, overlap=overlap, num_speculative_tokens=3)
    engine = {
        "model": target, "skip_tokenizer_init": True, "dtype": "float32", "enforce_eager": True,
        "max_model_len": 64, "max_num_seqs": 64, "max_num_batched_tokens": 4096,
        "speculative_config": config,
    }  # fmt: skip
    prompt, samples = [5, 9, 17, 3, 21], 8_000
    params = {"temperature": 1.0, "top_k": 6, "max_tokens": TOKENS + 1, "ignore_eos": True}
    batch = {"prompt": prompt, "params": params | {"detokenize": False}, "repeat": samples}
    result = harness.run(tmp_path, engine, [batch], env=APART)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    assert counters["nodes_accepted"] > 0.1 * samples
    texts = [tuple(out[0][:TOKENS]) for out in harness.ids(result)]
    assert chi_square(joint_probabilities(target, prompt, 6), texts) > 1e-3


@full
@pytest.mark.parametrize("end", ["kill_owner_at", "stop_owner_at"])
def test_a_lost_process_costs_drafts_and_nothing_else(
    tmp_path,
    tiny_engine,
    mixed_requests,
    plain,
    near_model,
    end,
):
    """In the middle of the second batch; another one drafts for the fourth. A stopped one is found
    out when it has owed an answer for ten seconds, which the third waits for."""
    batch = {"requests": mixed_requests}
    result = harness.run(
        tmp_path,
        tiny_engine | {"speculative_config": spec(near_model)},
        [batch, batch | {end: 5}, batch | {"pause": 11}, batch | {"await_rebuild": True}],
        env=APART,
    )
    for i in range(4):
        assert harness.ids(result, i) == harness.ids(plain)
    counters = result["counters"]
    assert counters["draft_group_rebuilds"] == 1
    assert counters["draft_failures"] >= 1
    first, second = result["owners"]
    assert first != second
    assert all(is_gone(pid) for pid in first + second)
