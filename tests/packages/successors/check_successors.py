"""The author's tests; run with ``pytest check_successors.py``, the package installed."""

from vllm_specplus.testing import assert_lossless_greedy, assert_lossless_sampled

METHOD = {"method": "successors", "num_speculative_tokens": 4}


def test_greedy_text_is_that_of_plain_decoding(tmp_path):
    assert_lossless_greedy(METHOD, tmp_path)


def test_sampled_text_has_the_targets_distribution(tmp_path):
    assert_lossless_sampled(METHOD, tmp_path)
