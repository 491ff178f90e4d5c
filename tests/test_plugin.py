"""What ``SamplingParams.verify`` admits beside speculation, and heads that bring their targets."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_specplus import plugin, speculative_config
from vllm_specplus.engine.names import DRAFTER

ASKED = {"min_p": 0.1, "logit_bias": {3: 2.0}}


@pytest.mark.parametrize("name", ASKED)
def test_our_methods_serve_what_vllms_refuse(name):
    plugin.register()
    params = SamplingParams(**{name: ASKED[name]})
    params._validate_spec_decode(SimpleNamespace(model=DRAFTER))
    assert getattr(params, name) == ASKED[name]
    with pytest.raises(VLLMValidationError, match="min_p and logit_bias"):
        params._validate_spec_decode(SimpleNamespace(model="a/draft-model"))


@pytest.fixture
def speculator(tmp_path) -> str:
    """A folder as `speculators` write it, without weights."""
    config = {
        "speculators_model_type": "eagle3",
        "transformer_layer_config": {"model_type": "llama"},
        "speculators_config": {
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"name_or_path": "/models/target"},
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def arguments(model: str, spec: object, **more) -> SimpleNamespace:
    given = {
        "model": model, "tokenizer": None, "trust_remote_code": False, "revision": None,
        "hf_token": None, "spec_method": None, "spec_model": None, "speculative_config": spec,
    }  # fmt: skip
    return SimpleNamespace(**given | more)


@pytest.mark.parametrize(
    ("spec", "more", "becomes"),
    [
        ({"method": "eagle_tree"}, {}, {"method": "eagle_tree", "model": True}),
        ({"method": "block_tree"}, {}, {"method": "block_tree", "model": True}),
        (None, {"spec_method": "eagle_tree"}, {"model": True}),
        ({"method": "eagle_tree", "model": "a"}, {}, {"method": "eagle_tree", "model": "a"}),
        ({"method": "eagle_tree"}, {"spec_model": "other"}, {"method": "eagle_tree"}),
        ({"method": "token_recycling"}, {}, {"method": "token_recycling"}),
        ({"method": "draft_tree"}, {}, {"method": "draft_tree"}),
    ],
)
def test_a_speculator_brings_its_target(speculator, spec, more, becomes):
    """And itself, for methods that draft with such heads and are given no other."""
    args = arguments(speculator, spec, **more)
    speculative_config.take_speculator(args)
    assert (args.model, args.tokenizer) == ("/models/target", "/models/target")
    wanted = {key: speculator if value is True else value for key, value in becomes.items()}
    assert args.speculative_config == wanted


@pytest.mark.parametrize(
    "spec", [None, {"method": "eagle3"}, {}, "eagle_tree", {"method": ["eagle_tree"]}, 3]
)
def test_a_speculator_that_is_served_otherwise_is_vllms(speculator, spec):
    args = arguments(speculator, spec)
    speculative_config.take_speculator(args)
    assert (args.model, args.speculative_config) == (speculator, spec)


def test_other_models_stay_as_they_are(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    args = arguments(str(tmp_path), {"method": "eagle_tree", "model": "head"})
    speculative_config.take_speculator(args)
    assert args.model == str(tmp_path)
    assert args.speculative_config == {"method": "eagle_tree", "model": "head"}


def test_a_speculator_without_a_target_is_refused(speculator):
    path = Path(speculator) / "config.json"
    path.write_text(path.read_text().replace('"/models/target"', "null"))
    with pytest.raises(ValueError, match="names no target: serve the target, and name the head"):
        speculative_config.take_speculator(arguments(speculator, {"method": "eagle_tree"}))
