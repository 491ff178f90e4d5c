"""examples/ray as they are written, on a cluster of two nodes, which are processes of this machine,
with replicas on CPUs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.engine import harness

pytest.importorskip("ray.serve.llm")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.full("examples/ray/*", "vllm_specplus/engine/counts.py", "vllm_specplus/plugin.py"),
]

EXAMPLES = harness.ROOT / "examples" / "ray"
BIN = Path(sys.executable).parent
SECONDS = 900


def environment(address: str = "") -> dict[str, str]:
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    path = os.pathsep.join((str(harness.ROOT), str(EXAMPLES)))
    own = {
        "PYTHONPATH": path, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return plain | own | ({"RAY_ADDRESS": address} if address else {})


@pytest.fixture(scope="module")
def model() -> str:
    from vllm_specplus.cli.model import prepare_model

    return str(prepare_model())


@pytest.fixture(scope="module")
def cluster() -> Iterator[tuple[str, list[int]]]:
    """Its address, and the metrics ports of its two nodes."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment().items():
            patch.setenv(name, value)
        from ray.cluster_utils import Cluster

        ports = [18771, 18772]
        nodes = {"num_cpus": 4, "object_store_memory": 10**8}
        made = Cluster(
            initialize_head=True,
            head_node_args=nodes | {"include_dashboard": False, "metrics_export_port": ports[0]},
        )
        made.add_node(**nodes, metrics_export_port=ports[1])
        yield made.address, ports
        for node in made.list_all_nodes():
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


def run(address: str, *command: str) -> str:
    done = subprocess.run(
        command, cwd=EXAMPLES, env=environment(address), capture_output=True, text=True,
        timeout=SECONDS, check=False,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def deploy(address: str, model: str, revision: str) -> None:
    run(
        address, str(BIN / "serve"), "run", "--non-blocking", "serve_app:build", f"model={model}",
        "cpu=true", "replicas=1", "most_replicas=2", "requests_per_replica=1",
        f"revision={revision}", "kv_cache_gb=0.2", "max_model_len=1024",
    )  # fmt: skip


def ask(number: int, tokens: int = 16) -> str:
    content = {
        "model": "model", "max_tokens": tokens, "temperature": 0,
        "messages": [{"role": "user", "content": f"Count to {number}."}],
    }  # fmt: skip
    request = urllib.request.Request(
        "http://127.0.0.1:8000/v1/chat/completions",
        json.dumps(content).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def await_answer() -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            ask(3)
            return
        except OSError:
            assert time.monotonic() < deadline, "no replica answers"
            time.sleep(2)


def replicas_that_drafted(ports: list[int]) -> set[str]:
    """By what the nodes' metrics ports say."""
    found = set()
    for port in ports:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
                text = page.read().decode()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith("ray_vllm_specplus_nodes_drafted"):
                found |= set(re.findall(r'ReplicaId="([^"]+)"', line))
    return found


@pytest.fixture(scope="module")
def served(cluster, model) -> Iterator[tuple[str, list[int]]]:
    address, ports = cluster
    deploy(address, model, "1")
    await_answer()
    yield address, ports
    run(address, str(BIN / "serve"), "shutdown", "-y")


def test_a_second_replica_is_started_and_metrics_arrive_from_both(served):
    _, ports = served
    deadline = time.monotonic() + 300
    while len(replicas_that_drafted(ports)) < 2:
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda n: ask(10 + n, 32), range(16)))
        assert time.monotonic() < deadline, "counters of two replicas did not arrive"
        time.sleep(5)


def test_replicas_are_replaced_and_no_request_is_lost(served, model):
    address, ports = served
    before = replicas_that_drafted(ports)
    over, answers, lost = threading.Event(), [], []

    def keep_asking(number: int) -> None:
        while not over.is_set():
            try:
                answers.append(ask(number, 8))
            except Exception as error:
                lost.append(error)

    threads = [threading.Thread(target=keep_asking, args=(n,)) for n in (5, 6)]
    for thread in threads:
        thread.start()
    deploy(address, model, "2")
    deadline = time.monotonic() + SECONDS
    while not replicas_that_drafted(ports) - before and time.monotonic() < deadline:
        time.sleep(5)
    over.set()
    for thread in threads:
        thread.join(300)
    assert lost == []
    assert len(answers) > 2
    assert replicas_that_drafted(ports) - before


def test_batches_of_ray_data_are_answered(cluster, served, model, tmp_path):
    address, _ = cluster
    prompts = tmp_path / "questions.jsonl"
    lines = [json.dumps({"prompt": f"{n} and {n} is"}) for n in range(12)]
    prompts.write_text("\n".join(lines) + "\n")
    said = run(
        address, sys.executable, "batch.py", "--model", model, "--prompts", str(prompts), "--out",
        str(tmp_path / "answers"), "--batch", "6", "--max-tokens", "8", "--cpu",
    )  # fmt: skip
    assert "12 answers" in said
    written = [
        json.loads(line)
        for file in (tmp_path / "answers").glob("*.json")
        for line in file.read_text().splitlines()
    ]
    assert {each["prompt"] for each in written} == {f"{n} and {n} is" for n in range(12)}
    assert all(each["answer"] for each in written)
