"""Image models, guidance and their drafts in the real engine, against a plain forward pass."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest
import torch

from tests.eagle_heads import save_head
from tests.engine import harness
from tests.engine.test_sampling import chi_square
from vllm_specplus.image import llamagen
from vllm_specplus.image.llamagen import LlamaGen, LlamaGenConfig

pytestmark = pytest.mark.engine

JACOBI = {"method": "jacobi", "num_speculative_tokens": 7, "control": {"policy": "fixed"}}
RECYCLING = {
    "method": "token_recycling", "num_speculative_tokens": 12, "control": {"policy": "fixed"},
}  # fmt: skip


def build(folder: Path, codes: int, grid: int, spread: float, scale: float | None) -> LlamaGen:
    """A random model, saved as a folder that vLLM serves."""
    torch.manual_seed(11)
    config = LlamaGenConfig(
        codebook_size=codes, codebook_dim=4, num_classes=5, grid_size=grid, hidden_size=128,
        intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, guidance_scale=scale,
    )  # fmt: skip
    model = LlamaGen(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=spread)
    weights = dict(model.state_dict()) | {"codebook": torch.randn(codes, 4)}
    llamagen.save(folder, weights, config)
    return model


def engine(model: Path, **keys) -> dict:
    return {
        "model": str(model), "skip_tokenizer_init": True, "dtype": "float32",
        "enforce_eager": True, "max_num_seqs": 32, "max_num_batched_tokens": 512,
        "block_size": 32, **keys,
    }  # fmt: skip


@torch.inference_mode()
def greedy(model: LlamaGen, label: int, scale: float) -> list[int]:
    codes = torch.empty(1, 0, dtype=torch.long)
    for _ in range(model.config.grid_size**2):
        logits = model.guided(codes, torch.tensor([label]), scale)[:, -1:]
        codes = torch.cat((codes, logits.argmax(-1)), 1)
    return codes[0].tolist()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """(folder, 64 requests of several labels and scales, their codes by the plain model)."""
    folder = tmp_path_factory.mktemp("pictures") / "model"
    model = build(folder, codes=200, grid=8, spread=0.2, scale=1.5)
    requests, expected = [], []
    for i in range(64):
        label, scale = i % 5, (None, 1.0, 3.0, 0.0, 7.5)[i % 7 % 5]
        params = {
            "temperature": 0.0, "max_tokens": 64, "ignore_eos": True, "detokenize": False,
        }  # fmt: skip
        if scale is not None:
            params["extra_args"] = {"guidance_scale": scale}
        requests.append([[model.config.label_token(label)], params])
        expected.append((label, 1.5 if scale is None else scale))
    known = {key: greedy(model, *key) for key in set(expected)}
    assert len({tuple(codes) for codes in known.values()}) > 15  # labels and scales matter
    return folder, requests, [[known[key]] for key in expected]


@pytest.mark.parametrize("config", [JACOBI, RECYCLING], ids=lambda config: config["method"])
def test_guided_pictures_equal_the_plain_model(tmp_path, pictures, config):
    """64 requests at once, each with its own guidance, in so few blocks that requests are
    preempted; the second time from the prefix cache."""
    folder, requests, expected = pictures
    keys = {"num_gpu_blocks_override": 40, "speculative_config": config}
    result = harness.run(tmp_path, engine(folder, **keys), [{"requests": requests}] * 2)
    assert harness.ids(result, 0) == expected
    assert harness.ids(result, 1) == expected
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 50


def test_aborted_pictures_leave_the_others_alone(tmp_path, pictures):
    """All of them are aborted in the middle, in few blocks, and asked for again."""
    folder, requests, expected = pictures
    keys = {"num_gpu_blocks_override": 40, "speculative_config": JACOBI}
    aborted = {"requests": requests, "abort_after": 9}
    batches = [aborted, {"requests": requests[:32]}, aborted, {"requests": requests[32:]}]
    result = harness.run(tmp_path, engine(folder, **keys), batches)
    assert harness.ids(result, 0) == expected[:32]
    assert harness.ids(result, 1) == expected[32:]
    assert result["counters"]["draft_failures"] == 0


def test_without_a_method_the_models_own_guidance_holds(tmp_path, pictures):
    folder, requests, expected = pictures
    own = [i for i, (_, params) in enumerate(requests) if "extra_args" not in params]
    result = harness.run(tmp_path, engine(folder), [{"requests": [requests[i] for i in own]}])
    assert harness.ids(result) == [expected[i] for i in own]


def test_without_guidance_one_branch_is_computed(tmp_path, pictures):
    folder, requests, expected = pictures
    plain = [i for i, (_, p) in enumerate(requests) if p.get("extra_args", {}).get(
        "guidance_scale") == 1.0]  # fmt: skip
    bare = [[prompt, {**params, "extra_args": None}] for prompt, params in
            (requests[i] for i in plain)]  # fmt: skip
    keys = {"hf_overrides": {"guidance_scale": None}, "speculative_config": JACOBI}
    result = harness.run(tmp_path, engine(folder, **keys), [{"requests": bare}])
    assert harness.ids(result) == [expected[i] for i in plain]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Pictures of four codes of six: (folder, label, exact law of the first three codes)."""
    folder = tmp_path_factory.mktemp("small") / "model"
    model = build(folder, codes=6, grid=2, spread=0.15, scale=1.5)
    law = {}
    with torch.inference_mode():
        for codes in product(range(6), repeat=3):
            rows = model.guided(torch.tensor([codes[:2]]), torch.tensor([2]), 1.5)[0]
            law[codes] = float(rows.softmax(-1)[torch.arange(3), list(codes)].prod())
    return folder, model.config.label_token(2), law


@pytest.mark.parametrize(
    ("config", "sabotage"),
    [
        (JACOBI | {"num_speculative_tokens": 3}, None),
        (JACOBI | {"num_speculative_tokens": 3, "initial": "random"}, None),
        (RECYCLING | {"num_speculative_tokens": 6}, None),
        (
            JACOBI | {"num_speculative_tokens": 3, "acceptance": {"rule": "gsd", "group": 1}},
            None,
        ),
        (JACOBI | {"num_speculative_tokens": 3}, "foreign_draft_probs"),
        (
            JACOBI
            | {
                "num_speculative_tokens": 3,
                "acceptance": {"rule": "lantern", "k": 3, "delta": 0.9},
            },
            "lossy",
        ),
    ],
)
def test_sampled_pictures_have_the_models_distribution(tmp_path, small, config, sabotage):
    """Under every lossless rule; wrong laws and a lossy rule are noticed."""
    folder, prompt, law = small
    samples = 8000
    batch = {
        "prompt": [prompt], "repeat": samples,
        "params": {
            "temperature": 1.0, "max_tokens": 4, "ignore_eos": True, "detokenize": False,
        },
    }  # fmt: skip
    result = harness.run(
        tmp_path, engine(folder, max_num_seqs=256, speculative_config=config), [batch],
        sabotage if sabotage == "foreign_draft_probs" else None,
    )  # fmt: skip
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 0.2 * samples
    assert (result["counters"]["relaxed_tokens"] > 0) == (sabotage == "lossy")
    p = chi_square(law, [tuple(out[0][:3]) for out in harness.ids(result)])
    assert p > 1e-3 if sabotage is None else p < 1e-6


def head_of(folder: Path, model: Path) -> dict:
    """Of an EAGLE head that knows nothing, in LANTERN++'s tree."""
    vocab = LlamaGenConfig(**json.loads((model / "config.json").read_text())).vocab_size
    head = save_head(folder / "head", 1, vocab, hidden=128, head_dim=32, spread=0.1)
    return {
        "method": "eagle_tree", "model": head, "shape": "static", "num_speculative_tokens": 25,
        "control": {"policy": "fixed"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "lossy"),
    [
        ({}, False),
        ({"verification": "recursive"}, False),
        ({"acceptance": {"rule": "lantern++", "k": 3, "lambda": 1.0}}, False),
        ({"acceptance": {"rule": "lantern", "k": 3, "delta": 0.9}}, True),
    ],
)
def test_trees_of_a_head_keep_the_models_distribution(tmp_path, small, keys, lossy):
    """Drawn from states that guidance has mixed; a lossy rule is noticed."""
    folder, prompt, law = small
    samples = 6000
    batch = {
        "prompt": [prompt], "repeat": samples,
        "params": {
            "temperature": 1.0, "max_tokens": 4, "ignore_eos": True, "detokenize": False,
        },
    }  # fmt: skip
    config = head_of(tmp_path, folder) | keys
    engine_keys = engine(folder, max_num_seqs=64, speculative_config=config)
    result = harness.run(tmp_path, engine_keys, [batch])
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_accepted"] > 0.2 * samples
    assert (result["counters"]["relaxed_tokens"] > 0) == lossy
    p = chi_square(law, [tuple(out[0][:3]) for out in harness.ids(result)])
    assert p < 1e-6 if lossy else p > 1e-3


def test_greedy_pictures_equal_the_plain_model_whatever_a_head_drafts(tmp_path, pictures):
    folder, requests, expected = pictures
    keys = {"speculative_config": head_of(tmp_path, folder)}
    result = harness.run(tmp_path, engine(folder, **keys), [{"requests": requests}])
    assert harness.ids(result) == expected
    assert result["counters"]["draft_failures"] == 0


@pytest.mark.full(
    "vllm_specplus/samplers/*.py", "vllm_specplus/engine/verify.py",
    "vllm_specplus/engine/image_rows.py", "vllm_specplus/engine/pictures.py",
)  # fmt: skip
def test_relaxed_rules_at_their_lossless_end_give_the_same_pictures(tmp_path, small):
    """Seeded requests, token for token."""
    folder, prompt, _ = small
    requests = [
        [[prompt], {"temperature": 1.0, "max_tokens": 4, "ignore_eos": True, "seed": seed,
                    "detokenize": False}]
        for seed in range(200)
    ]  # fmt: skip

    def codes(**keys):
        config = JACOBI | {"num_speculative_tokens": 3} | keys
        keys = {"speculative_config": config, "max_num_seqs": 1}
        return harness.ids(harness.run(tmp_path, engine(folder, **keys), [{"requests": requests}]))

    plain = codes()
    assert codes(acceptance={"rule": "lantern", "k": 0}) == plain
    assert codes(acceptance={"rule": "lantern++", "k": 5, "lambda": 1.0}) == plain
    assert codes(acceptance={"rule": "gsd", "group": 1}) == plain
    assert codes(acceptance={"rule": "gsd", "group": 5, "max_gap": 1.0}) != plain
