"""What ``SamplingParams.verify`` admits beside speculation."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from vllm_specplus import plugin
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
