from __future__ import annotations

import os
import subprocess
import sys

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


def test_methods_are_told_apart():
    paths = [metrics.publish("method_b"), metrics.publish("method_c")]
    metrics.Counters(paths[0]).add("nodes_drafted", 5)
    text = exposition()
    assert 'vllm:specplus_nodes_drafted_total{method="method_b"} 5.0' in text
    assert 'vllm:specplus_nodes_drafted_total{method="method_c"} 0.0' in text
    assert 'vllm:specplus_tokens_per_step{method="method_c"} 0.0' in text  # no step, no division
    for path in paths:
        metrics._remove(path)


def test_another_process_counts_and_the_front_end_removes_its_file_when_it_ends():
    worker = "import sys; from vllm_specplus.metrics import Counters; Counters(sys.argv[1]).add"
    front_end = (
        "import subprocess, sys; from vllm_specplus import metrics;"
        "path = metrics.publish('m');"
        f"code = {worker!r} + '(\"output_tokens\", 3)';"
        "subprocess.run([sys.executable, '-c', code, path], check=True);"
        "print(path, metrics.Counters(path)['output_tokens'])"
    )
    done = subprocess.run([sys.executable, "-c", front_end], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path, value = done.stdout.split()
    assert value == "3.0"
    assert not os.path.exists(path)
