"""SpecEE in the real engine: it may change texts, and never ends them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.drafting.test_exit_predictors import tensors
from tests.engine import harness
from tests.engine.conftest import VOCAB, build_model
from tests.engine.test_self_speculation import CODE, following, idle, of_two_kinds

pytestmark = pytest.mark.engine


def predictors(path: Path, layers: list[int], odds: float) -> str:
    """A file of predictors that say the same of all rows."""
    weights = tensors(len(layers), candidates=4)
    weights["layers"], weights["static"] = torch.tensor(layers), torch.tensor(layers)
    weights["out.weight"].zero_()
    weights["out.bias"][:] = odds
    save_file(weights, path)
    return str(path)


def spec(draft: str, file: str, nodes: int = 4, width: int = 4) -> dict:
    return {
        "method": "spec_ee", "allow_lossy": True, "predictors": file,
        "num_speculative_tokens": nodes,
        "draft": {"method": "draft_tree", "model": draft, "shape": "topk", "width": width},
    }  # fmt: skip


@pytest.mark.parametrize("nodes", [4, 12])
def test_without_exits_the_text_is_the_same(
    tmp_path, tiny_engine, tiny_model, mixed_requests, plain, nodes
):
    """The target drafts for itself; no predictor ever fires, in batches of everything."""
    file = predictors(tmp_path / "p.safetensors", [1, 2], -9.0)
    config = {"speculative_config": spec(tiny_model, file, nodes)}
    result = harness.run(tmp_path, tiny_engine | config, [{"requests": mixed_requests}] * 2)
    assert harness.ids(result) == harness.ids(plain)
    assert harness.ids(result, 1) == harness.ids(plain, 1)
    assert result["counters"]["draft_failures"] == 0
    assert (result["counters"]["nodes_accepted"] > 0) == (nodes > 4)


@pytest.mark.parametrize("nodes", [4, 12])
def test_behind_the_layer_that_knows_the_text_is_the_same(tmp_path, tiny_engine, nodes):
    """Predictors fire at once, and the target's best token has to be a candidate: of code that is
    so behind the second layer, and what the layers behind it keep of a token does not matter."""
    model = of_two_kinds(tmp_path / "model")
    file = predictors(tmp_path / "p.safetensors", [2, 3, 4], 9.0)
    params = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True, "detokenize": False}
    requests = [[[CODE[5 * i]], params] for i in range(4)]
    engine = {"model": model, "speculative_config": spec(model, file, nodes)}
    result = harness.run(tmp_path, tiny_engine | engine, [{"requests": requests}])
    for (prompt, _), answer in zip(requests, result["batches"][0], strict=True):
        text = list(prompt)
        for _ in range(60):
            text.append(following(text[-1]))
        assert answer["ids"][0] == text[1:]
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["early_exits"] > 0


def test_exits_that_are_wrong_change_texts_and_end_none(
    tmp_path, tiny_engine, tiny_model, mixed_requests, plain
):
    """A draft whose layers do nothing behind the first says what the first layer does."""
    draft = build_model(tmp_path / "draft", VOCAB, 0.25)
    for layer in (1, 2):
        idle(Path(draft) / "model.safetensors", layer)
    file = predictors(tmp_path / "p.safetensors", [1, 2], 9.0)
    config = {"speculative_config": spec(draft, file)}
    requests = mixed_requests[::2]  # the others ask for penalties and the like: passes run through
    strict = {"extra_args": {"specplus": {"lossless": True}}}
    exact = [[prompt, params | strict] for prompt, params in requests]
    batches = [{"requests": requests}, {"requests": exact}]
    result = harness.run(tmp_path, tiny_engine | config, batches)
    expected = harness.ids(plain)[::2]
    assert harness.ids(result) != expected
    assert harness.ids(result, 1) == harness.ids(plain, 1)[::2]
    for (_, params), answer, exact in zip(requests, harness.ids(result), expected, strict=True):
        if params["ignore_eos"]:
            assert [len(ids) for ids in answer] == [len(ids) for ids in exact]
    assert result["counters"]["draft_failures"] == 0
    assert result["counters"]["early_exits"] > 0
