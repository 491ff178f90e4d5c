from __future__ import annotations

import os

from prometheus_client import generate_latest

from vllm_specplus import metrics


def exposition() -> str:
    return generate_latest().decode()


def test_counters_of_all_engines_reach_the_scrape():
    paths = [metrics.publish("method_a"), metrics.publish("method_a")]
    for path, steps in zip(paths, (3, 4), strict=False):
        worker = metrics.Counters(path)  # another process maps the same file
        worker.add("request_steps", steps)
        worker.add("output_tokens", 2 * steps)
        worker.add("chain_fallbacks:structured_output")
    text = exposition()
    assert 'vllm:specplus_request_steps_total{method="method_a"} 7.0' in text
    assert 'vllm:specplus_tokens_per_step{method="method_a"} 2.0' in text
    assert (
        'vllm:specplus_chain_fallbacks_total{method="method_a",reason="structured_output"} 2.0'
        in text
    )
    for path in paths:
        metrics._remove(path)
        assert not os.path.exists(path)
    assert "method_a" not in exposition()


def test_an_unreachable_file_counts_for_the_process(tmp_path):
    counters = metrics.Counters(str(tmp_path / "other machine"))
    counters.add("draft_failures")
    assert counters["draft_failures"] == 1.0
