"""Models of latents in the real engine, plain and with CSpD, against the plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from tests.engine import harness
from vllm_specplus.image.continuous.causal import CausalLatents, CausalLatentsConfig
from vllm_specplus.image.continuous.decoding import (
    Guided,
    Settings,
    Speculation,
    decode,
    decode_speculative,
)

pytestmark = pytest.mark.engine

SCALES = (None, 1.0, 3.0, 0.0)
FIXED = {"policy": "fixed"}
#: So few blocks that requests are preempted, and read again in chunks.
CROWDED = {
    "num_gpu_blocks_override": 40, "disable_log_stats": False, "long_prefill_token_threshold": 20,
}  # fmt: skip


@torch.no_grad()
def build(folder: Path, grid: int, scale: float | None, layers: int = 2, seed: int = 3, **keys):
    """A random model, saved as a folder that vLLM serves."""
    torch.manual_seed(seed)
    config = CausalLatentsConfig(
        **{"size": 3, "steps": 4, "end": 250} | keys, num_classes=5, grid_size=grid,
        hidden_size=128, intermediate_size=192, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_width=32, head_depth=2, guidance_scale=scale,
    )  # fmt: skip
    model = CausalLatents(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    # What is saved in half precision is what both sides are to compute with.
    model.save(folder)
    return CausalLatents.load(folder)


def engine(model: Path, draft: Path | None = None, window: int = 3, **keys) -> dict:
    if draft is not None:
        keys["speculative_config"] = {
            "method": "cspd", "model": str(draft), "num_speculative_tokens": window,
            "control": FIXED,
        } | keys.pop("spec", {})  # fmt: skip
    return {
        "model": str(model), "dtype": "float32", "enforce_eager": True, "max_num_seqs": 32,
        "max_num_batched_tokens": 512, "block_size": 32, **keys,
    }  # fmt: skip


def requests_for(count: int, length: int = 64, size: int = 3, scales=SCALES, first: int = 0):
    """Of several labels, scales and temperatures, by seed."""
    requests = []
    for i in range(first, first + count):
        params = {
            "max_tokens": length, "logprobs": size, "seed": i,
            "temperature": (1.0, 0.7)[i % 3 == 0],
        }  # fmt: skip
        if scales[i % len(scales)] is not None:
            params["extra_args"] = {"guidance_scale": scales[i % len(scales)]}
        requests.append([[1 + i % 5], params])
    return requests


def latents(result: dict, batch: int = 0) -> torch.Tensor:
    """float32 [requests, length, d]"""
    return torch.tensor([
        [[place[str(i)] for i in range(1, len(place))] for place in request["logprobs"][0]]
        for request in result["batches"][batch]
    ])  # fmt: skip


def asked(requests, own: float | None):
    """(labels, seeds, temperatures, scales) of requests."""
    params = [params for _, params in requests]
    scales = [each.get("extra_args", {}).get("guidance_scale", own) for each in params]
    return (
        torch.tensor([prompt[0] - 1 for prompt, _ in requests]), [p["seed"] for p in params],
        torch.tensor([p["temperature"] for p in params]), torch.tensor(scales),
    )  # fmt: skip


def expect(target, requests, own: float, draft=None, window: int = 3):
    """The same by the plain loops."""
    labels, seeds, temperature, scale = asked(requests, own)
    config = target.config
    settings = Settings(config.grid_size**2, config.size, config.schedule(), temperature)
    target = Guided(target, config.num_classes, scale)
    if draft is None:
        return decode(target, labels, seeds, settings)
    # vLLM's first step, the prompt's, has no drafts.
    speculation = Speculation(window=window, prefill=1)
    draft = Guided(draft, config.num_classes, scale)
    return decode_speculative(target, draft, labels, seeds, settings, speculation)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """(folder, model) of a target with guidance 1.5, and of a draft."""
    root = tmp_path_factory.mktemp("latents")
    return tuple(
        (root / name, build(root / name, grid=8, scale=1.5, layers=layers, seed=seed))
        for name, layers, seed in (("target", 2, 3), ("draft", 1, 3))
    )


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Not to the bit: sums in batches of other shapes differ by rounding."""
    torch.testing.assert_close(a, b, atol=2e-3, rtol=0)


def test_pictures_equal_the_plain_loop(tmp_path, models):
    """64 requests, each with its own guidance and temperature, in so few blocks that requests
    are preempted and read again in chunks; then some of them one by one."""
    (folder, model), _ = models
    requests = requests_for(64)
    result = harness.run(tmp_path, engine(folder, **CROWDED), [{"requests": requests}])
    assert result["preemptions"] > 5
    expected = expect(model, requests, 1.5)
    close(latents(result), expected)
    alone = [{"requests": [requests[i]]} for i in (0, 7, 33)]
    result = harness.run(tmp_path, engine(folder, max_num_seqs=1), alone)
    close(torch.cat([latents(result, i) for i in range(3)]), expected[[0, 7, 33]])


def test_drafted_pictures_equal_the_plain_loops(tmp_path, models):
    """A real draft: what is accepted, replaced and drafted again is the same, in batches of 32
    and one by one."""
    (folder, target), (draft_folder, draft) = models
    requests = requests_for(48)
    result = harness.run(tmp_path, engine(folder, draft_folder), [{"requests": requests}])
    expected, counts = expect(target, requests, 1.5, draft)
    assert 0.1 < counts.acceptance < 0.95
    close(latents(result), expected)
    counters = result["counters"]
    assert counters["draft_failures"] == 0
    assert counters["nodes_accepted"] == int(counts.accepted.sum())
    # The first step, the prompt's, is not a decoding step.
    assert counters["request_steps"] == int(counts.target_passes.sum()) - len(requests)
    alone = [{"requests": [requests[i]]} for i in (0, 7, 33)]
    result = harness.run(tmp_path, engine(folder, draft_folder, max_num_seqs=1), alone)
    close(torch.cat([latents(result, i) for i in range(3)]), expected[[0, 7, 33]])


def test_a_draft_that_is_the_target_changes_nothing(tmp_path, models):
    """All of it is accepted, whatever is preempted in between."""
    (folder, model), _ = models
    requests = requests_for(64)
    result = harness.run(tmp_path, engine(folder, folder, window=7, **CROWDED),
                         [{"requests": requests}])  # fmt: skip
    assert result["preemptions"] > 5
    close(latents(result), expect(model, requests, 1.5))
    counters = result["counters"]
    # Ratios of two roundings of one number are 1 but for rounding.
    assert counters["nodes_accepted"] > 0.97 * counters["nodes_drafted"]


@pytest.mark.parametrize("drafted", [False, True])
def test_nothing_of_a_request_stays(tmp_path, models, drafted):
    """Aborted in the middle and preempted on the way: one request later, the buffers are those
    of an engine that has seen nothing else."""
    (folder, _), (draft, _) = models
    keys = engine(folder, draft if drafted else None, num_gpu_blocks_override=20)
    last = {"requests": requests_for(1, length=20, first=500)}
    aborted = {"requests": requests_for(40), "abort_after": 23}
    fresh = harness.run(tmp_path, keys, [last])
    used = harness.run(tmp_path, keys, [aborted, {"requests": requests_for(16)}, aborted, last])
    assert used["slots"] == fresh["slots"]
    assert len(fresh["slots"]["free"]) == fresh["slots"]["slots"] - 1
    close(latents(used, -1), latents(fresh))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Pictures of four latents in one step each: (target, draft)."""
    root = tmp_path_factory.mktemp("small")
    for name, layers, seed in (("target", 2, 5), ("draft", 1, 6)):
        build(root / name, grid=2, scale=None, layers=layers, seed=seed, size=2, steps=1, end=100)
    return root / "target", root / "draft"


def sample(tmp_path, target, draft=None, first: int = 0, **keys) -> np.ndarray:
    """float64 [4000, 8], of seeds that no other call uses."""
    requests = requests_for(4000, length=4, size=2, scales=(None,), first=first)
    for request in requests:
        request[0][0], request[1]["temperature"] = 2, 1.0
    keys = engine(target, draft, max_num_seqs=256, **keys)
    keys["max_num_batched_tokens"] = 1024  # room for every draft
    result = harness.run(tmp_path, keys, [{"requests": requests}])
    if draft is not None:
        assert result["counters"]["nodes_accepted"] > 1000
        assert result["counters"]["nodes_accepted"] < 0.98 * result["counters"]["nodes_drafted"]
    return latents(result).flatten(1).double().numpy()


def least_p(one: np.ndarray, other: np.ndarray) -> float:
    """Of Kolmogorov-Smirnov tests along 40 directions, times their number."""
    directions = np.random.default_rng(0).standard_normal((one.shape[1], 40))
    pairs = zip((one @ directions).T, (other @ directions).T, strict=True)
    return 40 * min(ks_2samp(a, b).pvalue for a, b in pairs)


def test_drafted_pictures_have_the_targets_law(tmp_path, small):
    """4000 pictures of independent seeds; and a rule that is not exact is noticed."""
    plain = sample(tmp_path, small[0])
    assert least_p(plain, sample(tmp_path, *small, first=4000)) > 1e-2
    lossy = {"verification": "reference", "allow_lossy": True}
    assert least_p(plain, sample(tmp_path, *small, first=8000, spec=lossy)) < 1e-6
    assert least_p(plain, sample(tmp_path, small[1], first=12000)) < 1e-6


@pytest.mark.full(
    "vllm_specplus/image/continuous/*.py", "vllm_specplus/engine/latents.py",
    "vllm_specplus/proposers/cspd.py",
)  # fmt: skip
def test_the_embedded_model_by_default(tmp_path):
    """Compiled, in the CPU's dtype, under the controller, drafts and all."""
    from vllm_specplus.cli.model import LATENTS_MODEL
    from vllm_specplus.image import quality
    from vllm_specplus.image.continuous.folder import LatentsFolder

    folder = LatentsFolder.load(LATENTS_MODEL)
    requests = [
        [[1 + i % 10], {"max_tokens": 64, "logprobs": 4, "seed": i}] for i in range(60)
    ]  # fmt: skip
    keys = {
        "model": str(LATENTS_MODEL), "max_num_seqs": 32,
        "speculative_config": {"method": "cspd", "model": f"{LATENTS_MODEL}/draft"},
    }  # fmt: skip
    result = harness.run(tmp_path, keys, [{"requests": requests}])
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["nodes_drafted"] > 0
    with torch.inference_mode():
        made = folder.vae.decode(latents(result))
    labels = torch.arange(60) % 10
    seen = quality.features(folder.classifier, made)
    assert quality.accuracy(folder.classifier, seen, labels.numpy()) > 0.6


@pytest.mark.parametrize(
    ("keys", "request_", "words"),
    [
        ({}, [[1, 0], {"logprobs": 3}], "is the token of one label (1 to 5, or 6 for any), not"),
        ({}, [[2], {"logprobs": 2}], "set it to 3"),
        (
            {"speculative_config": {"method": "token_recycling"}}, [[2], {}],
            "drafts tokens, and the target generates latents: use cspd",
        ),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, [[2], {}],
            "a model of latents does not work with a speculative method of vLLM's own ('ngram'): "
            "use a method of vllm-specplus, such as 'jacobi' for pictures of codes and 'cspd' for "
            "latents",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, models, keys, request_, words):
    with pytest.raises(RuntimeError) as error:
        harness.run(tmp_path, engine(models[0][0], **keys), [{"requests": [request_]}])
    assert words in str(error.value)
