"""What is read off a request's parameters."""

from __future__ import annotations

import pytest
from vllm.sampling_params import SamplingParams

from vllm_specplus.engine.request_options import RequestOptions


@pytest.mark.parametrize(("ignore_eos", "ends"), [(False, [2, 7]), (True, [7])])
def test_a_request_ends_where_vllm_ends_it(ignore_eos, ends):
    params = SamplingParams(stop_token_ids=[7], ignore_eos=ignore_eos)
    params.update_from_generation_config({}, 2)
    assert RequestOptions.of(params, 8).ends.tolist() == ends
