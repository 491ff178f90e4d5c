"""One registry of acceptance rules: what users may name is there, and says the same."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest

from vllm_specplus import config
from vllm_specplus.drafting import shaped_config
from vllm_specplus.samplers import chains
from vllm_specplus.samplers.registry import make_rule, rule_class, rule_names
from vllm_specplus.samplers.relaxed_sampling import Relaxation
from vllm_specplus.samplers.rules import Nodes, Rule
from vllm_specplus.samplers.sampled import SampledRule
from vllm_specplus.step import Rows

SETTINGS = {each.model_fields["rule"].annotation.__args__[0]: each
            for each in get_args(config.AcceptanceConfig)}  # fmt: skip


@pytest.mark.parametrize("name", rule_names())
def test_a_class_is_complete(name):
    cls = rule_class(name)
    assert issubclass(cls, Rule)
    assert cls.name == name
    assert cls.verifies
    assert callable(cls.reference)
    assert not getattr(cls, "__abstractmethods__", None)
    if issubclass(cls, SampledRule):
        from vllm_specplus.kernels import tree_rules

        assert callable(getattr(tree_rules, cls.kernel))


def test_every_rule_has_a_user():
    """Either its name is an ``acceptance`` rule, or a way to verify drawn nodes."""
    drawing = {rule for rules in shaped_config._RULES.values() for rule in rules.values()}
    assert set(rule_names()) == set(SETTINGS) | drawing
    assert all(issubclass(rule_class(name), SampledRule) for name in drawing)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_front_end_knows_of_a_rule_is_what_its_class_says(name):
    settings, cls = SETTINGS[name], rule_class(name)
    assert settings.needs_codebook == ("codebook" in cls.needs)
    assert cls.lossless == (name == "lossless")
    if name != "lossless":  # of drawn nodes it is their method's
        assert settings.compares == (Nodes.DRAWN in cls.verifies)
        assert settings.needs_draws == (Nodes.DETERMINISTIC not in cls.verifies)


def test_no_rule_is_one_sentence():
    with pytest.raises(ValueError, match="there is no acceptance rule 'lax' \\(allowed: block, "):
        rule_class("lax")


def test_a_rule_gets_what_it_needs():
    with pytest.raises(KeyError, match="codebook"):
        make_rule("gsd", {"group": 1, "max_gap": 0.1, "max_distance": None}, embeddings=None)
    rule = make_rule("kl_judge", {"threshold": 1.0, "sure": 0.9}, codebook=None)
    assert type(rule) is rule_class("kl_judge")


def test_the_front_end_loads_no_rule():
    code = (
        "import sys, vllm_specplus.samplers.registry; "
        "sys.exit([name for name in ('torch', 'triton') if name in sys.modules] or 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


CHAIN = Rows(*(np.array(each, np.int32) for each in ([0, 1, 2], [-1, 0, 1], [0, 3], [0, 1, 2])))
TREE = Rows(*(np.array(each, np.int32) for each in ([0, 1, 2], [-1, 0, 0], [0, 3], [0, 1, 1])))
PADDED = Rows(*(np.array(each, np.int32) for each in ([0, -1, -1], [-1, 0, 1], [0, 3], [0, 1, 2])))


@pytest.mark.parametrize(
    ("name", "device", "rows", "relaxed", "way"),
    [
        ("without_replacement", "cpu", CHAIN, False, "chains"),
        ("without_replacement", "cpu", TREE, False, "reference"),
        ("without_replacement", "cuda", CHAIN, False, "kernel"),
        ("without_replacement", "cuda", TREE, False, "kernel"),
        ("without_replacement", "cuda", PADDED, False, "chains"),
        ("block", "cpu", CHAIN, False, "reference"),
        ("block", "cuda", CHAIN, False, "kernel"),
        ("block", "cuda", PADDED, False, "reference"),
        ("traversal", "cuda", CHAIN, True, "chains"),
        ("traversal", "cuda", TREE, True, "reference"),
        ("k_seq", "cpu", TREE, False, "reference"),
    ],
)
def test_the_fastest_way_that_knows_the_step_is_taken(
    name, device, rows, relaxed, way, monkeypatch
):
    rule = rule_class(name)()
    monkeypatch.setattr(chains, "verify", lambda *step: "chains")
    monkeypatch.setattr(rule, "reference", lambda *step: "reference")
    monkeypatch.setattr(rule, "on_device", lambda *step: "kernel")
    target_probs = SimpleNamespace(device=SimpleNamespace(type=device))
    relaxation = Relaxation(None, [frozenset()]) if relaxed else None
    assert rule.verify(target_probs, rows, None, None, None, relaxation) == way
