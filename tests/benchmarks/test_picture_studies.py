"""The studies of relaxed acceptance: verdicts, the bound, and what is timed and planted."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.image.test_continuous import settings, shaken, small_model
from vllm_specplus.image.continuous import acceptance, decoding, masked
from vllm_specplus.image.continuous.acceptance import judge
from vllm_specplus.image.continuous.chain import Schedule
from vllm_specplus.image.continuous.decoding import Speculation, decode, decode_speculative
from vllm_specplus.image.quality import Gaussian
from vllm_specplus.samplers.relaxed_sampling import Lantern, LanternPlus

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cspd_batches
import lantern_curve
import picture_quality
import picture_runs

SCHEDULE = Schedule(4, end=250, prediction="velocity")


def test_a_loss_of_quality_is_told_from_noise():
    """Of 2,000 pictures: the same law passes, the planted rule and a third of its shift do not."""
    rng = np.random.default_rng(0)
    reference = Gaussian(np.zeros(6), np.eye(6))
    seen = {name: rng.normal(size=(2000, 6)) for name in ("base", "same", "worse", "planted")}
    seen["worse"] += 0.6
    seen["planted"] += 2.0
    told = picture_runs.verdicts(seen, reference, "base", "planted")
    assert set(told) == {"same", "worse", "planted"}
    assert [told[name]["not_inferior"] for name in ("same", "worse", "planted")] == [
        True, False, False,
    ]  # fmt: skip
    assert told["same"]["margin"] == pytest.approx(0.05 * 6 * 4.0, rel=0.2)
    assert told["same"]["same_law_p"] > 0.01
    assert told["planted"]["same_law_p"] < 0.01


def test_pictures_are_made_once(tmp_path, monkeypatch):
    made = []

    def measured(self, method):
        made.append(method.label)
        return {"tokens": np.zeros((2, 4), np.int64), "seconds": 1.5, "counted": {"a": 2.0}}

    monkeypatch.setattr(picture_runs.ImageBench, "__init__", lambda self: None)
    monkeypatch.setattr(picture_runs.ImageBench, "_measure", measured)
    bench = object.__new__(picture_runs.KeptBench)
    bench._folder, bench.model, bench.labels, bench.in_flight = tmp_path, "m", [0, 1], 4
    bench.temperature, bench.seed, bench.engine_args = 1.0, 0, {}
    one, other = picture_quality.METHODS[:2]
    for each in (one, other, one):
        found = bench._measure(each)
        assert found["tokens"].shape == (2, 4)
        assert (found["seconds"], found["counted"]) == (1.5, {"a": 2.0})
    assert made == [one.label, other.label]
    bench.seed = 1
    bench._measure(one)
    assert made[2:] == [one.label]


def test_only_some_methods_may_be_asked_for():
    methods = picture_quality.METHODS
    needed = {picture_quality.LOSSLESS, picture_quality.PLANTED}
    assert picture_runs.chosen(methods, None, needed) == methods
    some = picture_runs.chosen(methods, "gsd 14; lantern++ 10, 5", needed)
    assert {each.label for each in some} == needed | {"gsd 14", "lantern++ 10, 5"}
    with pytest.raises(ValueError, match="there is no 'gsd 15'"):
        picture_runs.chosen(methods, "gsd 15", needed)


def test_all_methods_of_the_studies_are_configurations(tmp_path):
    """Of no study two have one name."""
    from tests.eagle_heads import save_head
    from vllm_specplus.config import parse

    head = save_head(tmp_path, 1, 40)
    for methods in (picture_quality.METHODS, *map(lantern_curve.methods, (False, True))):
        assert len({each.label for each in methods}) == len(methods)
        for each in methods:
            config = each.speculative_config
            if each.name == "eagle_tree":
                config = config | {"model": head}
            assert parse(config).num_speculative_tokens in (15, 25, 57)


@pytest.mark.parametrize("make", [
    lambda book: Lantern(k=0, delta=0.0, residual="optimal", codebook=book),
    lambda book: Lantern(k=4, delta=0.3, residual="optimal", codebook=book),
    lambda book: LanternPlus(k=4, lambda_=3.0, residual="optimal", codebook=book),
])  # fmt: skip
def test_the_bound_is_that_of_the_output_law(make):
    """By the naive sum over what is drafted, accepted, or drawn instead."""
    rng = np.random.default_rng(0)
    p, q = (torch.from_numpy(rng.dirichlet(np.full(9, 0.4), 3)).float() for _ in range(2))
    rule = make(torch.from_numpy(rng.normal(size=(9, 2))))
    found = lantern_curve.bound(rule, p, q)
    for i in range(3):
        out, kept, lent = torch.zeros(9), 0.0, 0.0
        for token in range(9):
            target_mass, draft_mass = rule.reference(p[i].tolist(), q[i].tolist(), token)
            f = min(1.0, target_mass / draft_mass)
            rest = (p[i] - q[i]).clamp(min=0)
            out += q[i, token] * (f * torch.eye(9)[token] + (1 - f) * rest / rest.sum())
            kept += float(q[i, token]) * f
            lent += float(q[i, token]) * (target_mass - float(p[i, token]))
        assert float(found["accepted"][i]) == pytest.approx(kept, abs=1e-5)
        assert float(found["tvd"][i]) == pytest.approx(
            float((out - p[i]).abs().sum()) / 2, abs=1e-5
        )
        assert float(found["lent_mean"][i]) == pytest.approx(lent, abs=1e-5)
    if getattr(rule, "_delta", 1.0) == 0.0:
        assert float(found["tvd"].max()) < 1e-6


def test_parts_are_timed_and_nothing_stays_changed():
    target, draft = shaken(small_model()), shaken(small_model(1, 1))
    folder = SimpleNamespace(target=target, draft=draft)
    labels, seeds, how = torch.arange(8) % 3, list(range(8)), settings(9, 4, SCHEDULE)
    before = (decoding.denoise, masked.denoise, acceptance.residual, masked.residual)
    plain = decode(target, labels, seeds, how)
    clock = cspd_batches.Clock(folder)
    with clock.running(folder):
        assert torch.equal(decode(target, labels, seeds, how), plain)
        decode_speculative(target, draft, labels, seeds, how, Speculation(2))
    assert set(clock.seconds) == {
        "target's backbone",
        "target's head",
        "draft's backbone",
        "draft's head",
        "residuals",
    }
    assert (decoding.denoise, masked.denoise, acceptance.residual, masked.residual) == before
    assert "begin" not in vars(target)
    assert torch.equal(decode(target, labels, seeds, how), plain)


def test_the_planted_rule_accepts_all_and_is_taken_back():
    target, draft = shaken(small_model()), shaken(small_model(1, 1))
    labels, seeds, how = torch.arange(8) % 3, list(range(8)), settings(9, 4, SCHEDULE)
    with cspd_batches.accepting_all():
        _, counts = decode_speculative(target, draft, labels, seeds, how, Speculation(2))
    assert counts.acceptance == 1
    _, counts = decode_speculative(target, draft, labels, seeds, how, Speculation(2))
    assert counts.acceptance < 1
    assert judge is acceptance.judge
