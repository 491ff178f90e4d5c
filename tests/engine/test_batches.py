"""A text does not depend on how many are decoded beside it (arXiv 2510.22876; float32)."""

from __future__ import annotations

import pytest

from tests.engine import harness
from tests.engine.test_greedy import hidden_truth, run

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def requests(mixed_requests) -> list:
    return mixed_requests * 2


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tiny_engine, requests) -> list:
    """Plain decoding, one request at a time: the paper's reference."""
    folder = tmp_path_factory.mktemp("alone")
    return harness.ids(
        harness.run(folder, tiny_engine | {"max_num_seqs": 1}, [{"requests": requests}])
    )


@pytest.mark.parametrize("size", [1, 2, 7, 32, 64])
def test_a_batch_changes_no_text(tmp_path, tiny_engine, requests, alone, reference_file, size):
    """Trees of which all requests accept different parts, prompts of 1 to 200 tokens, others that
    come and go; one request alone is the batch of one."""
    spec = hidden_truth(reference_file, num_speculative_tokens=12)
    result = run(tmp_path, tiny_engine, requests, spec, max_num_seqs=size)
    assert harness.ids(result) == alone
    assert result["counters"]["nodes_accepted"] > 200
    assert result["counters"]["draft_failures"] == 0


@pytest.mark.parametrize("drafts", [1, 3, 8])
def test_chains_of_any_length_change_no_text(
    tmp_path, tiny_engine, requests, alone, reference_file, drafts
):
    spec = hidden_truth(reference_file, shape="chain", num_speculative_tokens=drafts)
    result = run(tmp_path, tiny_engine, requests, spec)
    assert harness.ids(result) == alone
