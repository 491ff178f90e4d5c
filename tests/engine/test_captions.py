"""LlamaGen of text in the real engine, against a plain forward pass."""

from __future__ import annotations

import pytest
import torch

from tests.engine import harness
from tests.engine.test_images import JACOBI, RECYCLING, engine
from vllm_specplus.image import llamagen
from vllm_specplus.image.llamagen import LlamaGen, LlamaGenConfig

pytestmark = pytest.mark.engine

CONFIG = LlamaGenConfig(
    codebook_size=200, codebook_dim=4, num_classes=0, grid_size=6, hidden_size=128,
    intermediate_size=192, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    guidance_scale=1.5, caption_size=24, caption_tokens=40,
)  # fmt: skip
#: Prompts read in chunks, in so few pages that requests are preempted.
TIGHT = {
    "num_gpu_blocks_override": 32, "long_prefill_token_threshold": 16, "disable_log_stats": False,
}  # fmt: skip


@torch.inference_mode()
def greedy(model: LlamaGen, caption: torch.Tensor, scale: float) -> list[int]:
    codes = torch.empty(1, 0, dtype=torch.long)
    for _ in range(model.config.grid_size**2):
        logits = model.guided(codes, caption[None], scale)[:, -1:]
        codes = torch.cat((codes, logits.argmax(-1)), 1)
    return codes[0].tolist()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """(folder, requests of captions of many lengths and scales, their codes by the plain model).
    Four captions have one beginning, longer than a page."""
    torch.manual_seed(13)
    model = LlamaGen(CONFIG).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    # States of an encoder are not small.
    torch.nn.init.normal_(model.cls_embedding.uncond_embedding)
    folder = tmp_path_factory.mktemp("captions") / "model"
    weights = dict(model.state_dict()) | {"codebook": torch.randn(CONFIG.codebook_size, 4)}
    llamagen.save(folder, weights, CONFIG)
    lengths = [1, 2, 5, 9, 16, 17, 23, 31, 32, 33, 40, 40]
    captions = [torch.randn(n, CONFIG.caption_size) for n in lengths]
    captions += [captions[-1][:n] for n in (33, 34, 39)]
    requests, expected = [], []
    for i in range(36):
        caption, scale = captions[i % 15], (None, 3.0, 1.0, 7.5, 0.0)[i % 7 % 5]
        params = {
            "temperature": 0.0, "max_tokens": 36, "ignore_eos": True, "detokenize": False,
        }  # fmt: skip
        if scale is not None:
            params["extra_args"] = {"guidance_scale": scale}
        requests.append([caption.tolist(), params])
        expected.append([greedy(model, caption, 1.5 if scale is None else scale)])
    assert len({tuple(codes) for (codes,) in expected}) > 30  # captions and scales matter
    return folder, requests, expected


@pytest.mark.parametrize(
    "config", [None, JACOBI, RECYCLING], ids=lambda config: config["method"] if config else "none"
)
def test_guided_pictures_of_captions_equal_the_plain_model(tmp_path, pictures, config):
    """The second time from the prefix cache."""
    folder, requests, expected = pictures
    keys = TIGHT | {"speculative_config": config}
    result = harness.run(tmp_path, engine(folder, **keys), [{"requests": requests}] * 2)
    assert harness.ids(result, 0) == expected
    assert harness.ids(result, 1) == expected
    assert result["preemptions"] > 0
    if config is not None:
        assert result["counters"]["draft_failures"] == 0
        assert result["counters"]["nodes_accepted"] > 20


def test_without_guidance_one_branch_is_computed(tmp_path, pictures):
    folder, requests, expected = pictures
    plain = [i for i, (_, params) in enumerate(requests)
             if params.get("extra_args", {}).get("guidance_scale") == 1.0]  # fmt: skip
    bare = [[requests[i][0], {**requests[i][1], "extra_args": None}] for i in plain]
    keys = {"hf_overrides": {"guidance_scale": None}, "speculative_config": JACOBI}
    result = harness.run(tmp_path, engine(folder, **keys), [{"requests": bare}])
    assert harness.ids(result) == [expected[i] for i in plain]
