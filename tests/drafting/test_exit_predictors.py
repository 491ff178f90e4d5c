"""SpecEE's predictors against their formulas, and the two levels of their schedule."""

from __future__ import annotations

import math
import re

import pytest
import torch
from safetensors.torch import save_file

from vllm_specplus.drafting.exit_predictors import (
    FAR,
    ExitPredictors,
    Schedule,
    features,
    read_sizes,
    scores,
)

#: The authors' offline level, of 32 layers: they count from 0 what we count as layers that ran.
THEIRS = [15, 16, 17, 19, 21, 24, 26, 28]


def tensors(predictors: int = 3, inner: int = 5, candidates: int = 4) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return {
        "layers": torch.arange(2, 2 + predictors),
        "static": torch.tensor([2, 4]),
        "hidden.weight": torch.randn(predictors, inner, 3 * candidates, generator=rng),
        "hidden.bias": torch.randn(predictors, inner, generator=rng),
        "out.weight": torch.randn(predictors, inner, generator=rng),
        "out.bias": torch.randn(predictors, generator=rng),
    }


def test_what_is_read_is_logits_probabilities_and_their_change():
    first, second = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 3.0]])
    none = torch.zeros(1, 2, dtype=torch.bool)
    read, before = features(first, none, None)
    p = 1 / (1 + math.e)
    assert read[0].tolist() == pytest.approx([1, 2, p, 1 - p, p, 1 - p])
    read, _ = features(second, none, before)
    now = 1 / (1 + math.exp(3))
    assert read[0].tolist() == pytest.approx([0, 3, now, 1 - now, now - p, p - now])


def test_a_missing_candidate_reads_as_improbable():
    logits, missing = torch.tensor([[1.0, 9.0, 2.0]]), torch.tensor([[False, True, False]])
    read, _ = features(logits, missing, None)
    p = 1 / (1 + math.e)
    assert read[0, :3].tolist() == [1.0, 1.0 - FAR, 2.0]
    assert read[0, 3:6].tolist() == pytest.approx([p, 0, 1 - p], abs=1e-6)


def test_a_score_is_that_of_a_layer_of_relus():
    weights, read = tensors(), torch.randn(7, 12, generator=torch.Generator().manual_seed(1))
    together = scores(weights, slice(None), read.expand(3, 7, 12))
    for number in range(3):
        own = scores(weights, number, read)
        for row, found in zip(read, own.tolist(), strict=True):
            inner = weights["hidden.weight"][number] @ row + weights["hidden.bias"][number]
            value = weights["out.weight"][number] @ inner.clamp(min=0)
            assert found == pytest.approx(float(value + weights["out.bias"][number]), rel=1e-4)
        torch.testing.assert_close(own, together[number])


def test_a_file_is_read_and_asked(tmp_path):
    weights = tensors()
    save_file(weights, tmp_path / "p.safetensors")
    assert read_sizes(tmp_path / "p.safetensors") == (3, 4)
    predictors = ExitPredictors(tmp_path / "p.safetensors", 0.6, torch.device("cpu"))
    assert (predictors.layers, predictors.candidates) == ([2, 3, 4], 4)
    assert predictors.schedule.asked() == {2, 4}
    read = torch.randn(50, 12, generator=torch.Generator().manual_seed(1))
    expected = scores(weights, 1, read).sigmoid() > 0.6
    assert torch.equal(predictors.fire(3, read), expected)
    assert 0 < int(expected.sum()) < 50


@pytest.mark.parametrize("missing", ["layers", "static", "hidden.bias", "out.weight"])
def test_what_are_no_predictors_is_named(tmp_path, missing):
    weights = tensors()
    del weights[missing]
    save_file(weights, tmp_path / "p.safetensors")
    with pytest.raises(ValueError, match=re.escape("predictors are what vllm-specplus train")):
        read_sizes(tmp_path / "p.safetensors")


def test_behind_five_exits_their_neighbours_are_asked_too():
    """As the authors' list: exits behind layers x ask x - 1 and two on either side, from 0 on."""
    static = [layer + 1 for layer in THEIRS]
    schedule = Schedule(list(range(1, 32)), static)
    for exited in (11, 12, 20, 32):
        schedule.exited(exited)
        assert schedule.asked() == set(static)
    schedule.exited(20)
    exits = [11, 12, 20, 32, 20]
    theirs = set(THEIRS)
    for x in exits:
        theirs |= {x + y - 1 for y in (-2, 0, 2) if 0 <= x + y - 1 < 31}
    assert schedule.asked() == {layer + 1 for layer in theirs}
    schedule.exited(3)  # the oldest one is forgotten
    assert 9 not in schedule.asked()
    assert {1, 3, 5} <= schedule.asked()
