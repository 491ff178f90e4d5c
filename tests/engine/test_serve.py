"""``vllm serve`` with our method, used as its users do: HTTP, metrics, command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.engine

SPEC = {"method": "token_recycling", "num_speculative_tokens": 8}
#: Its likeliest next token leads by more than bfloat16 rounding, at each of the first 24.
COUNT = "Count from 1 to 20."
QUESTIONS = [
    COUNT,
    "List the days of the week.",
    "What is the capital of France?",
    "Write the alphabet.",
]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "population": {"type": "integer", "minimum": 0, "maximum": 99_999_999},
    },
    "required": ["city", "population"],
    "additionalProperties": False,
}


def vllm_serve(model: str, *arguments: str) -> list[str]:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model]
    return [*command, "--enforce-eager", "--max-model-len", "1024", *arguments]


def environment() -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return env | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@pytest.fixture(scope="module")
def model() -> str:
    from vllm_specplus.cli.model import prepare_model

    return str(prepare_model())


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    """Address of a running server; one for all tests but one."""
    with serving(smol(model, SPEC), tmp_path_factory.mktemp("server") / "log") as url:
        yield url


def smol(model: str, spec: dict) -> list[str]:
    return vllm_serve(
        model, "--served-model-name", "smol", "--dtype", "bfloat16",
        "--kv-cache-memory-bytes", str(1 << 28), "--max-num-seqs", "16",
        "--speculative-config", json.dumps(spec),
    )  # fmt: skip


@contextmanager
def serving(command: list[str], log: Path) -> Iterator[str]:
    """Address of a server while it runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*command, "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment(), start_new_session=True
        )
    try:
        deadline = time.monotonic() + 900
        while not healthy(url):
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def metrics(url: str) -> dict[str, float]:
    """Samples of /metrics; a labelled reason becomes part of the name."""
    from prometheus_client.parser import text_string_to_metric_families

    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    return {
        ":".join([sample.name, *filter(None, [sample.labels.get("reason")])]): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if "spec" in sample.name
    }


@pytest.fixture
def ask(server):
    return asking(server)


def asking(url: str):
    """A function that asks the server at ``url``."""
    from openai import OpenAI

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=600, max_retries=0)

    def ask(question: str, max_tokens: int = 32, **fields):
        return client.chat.completions.create(
            model="smol", messages=[{"role": "user", "content": question}],
            temperature=0, max_tokens=max_tokens, **fields,
        )  # fmt: skip

    return ask


def test_the_same_question_gets_the_same_answer(ask):
    """The second time the drafts are better; the text is not to change."""
    first, second = (ask(COUNT, max_tokens=24) for _ in range(2))
    assert first.choices[0].message.content.startswith("1. 1\n2. 2\n")
    assert first.choices[0].message.content == second.choices[0].message.content


def test_streaming(ask):
    """Several tokens may come in one event: together they are the whole text."""
    whole = ask(COUNT, max_tokens=24)
    chunks = list(ask(COUNT, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_logprobs(ask):
    """One entry for each token of the text, accepted drafts too, and the text is the likeliest."""
    answer = ask(COUNT, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens == 32
    assert bytes(b for e in entries for b in e.bytes).decode() == answer.choices[0].message.content
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0


def test_what_vllm_refuses_beside_speculation_is_served(ask):
    """Clients that send ``min_p`` or ``logit_bias`` go on as before."""
    likeliest = ask(COUNT, 24)
    same = ask(COUNT, 24, extra_body={"min_p": 1.0})
    assert same.choices[0].message.content == likeliest.choices[0].message.content
    biased = ask(COUNT, 6, logit_bias={"28": 100}, logprobs=True)
    assert len({entry.token for entry in biased.choices[0].logprobs.content}) == 1
    assert not likeliest.choices[0].message.content.startswith(biased.choices[0].message.content)


def test_concurrent_requests_beside_a_json_schema(model, tmp_path):
    """The schema's request is drafted as a chain, its neighbours keep their trees. On a server that
    drafts whatever it costs: by default the machine's speed decides whether trees pay."""
    spec = SPEC | {"control": {"policy": "fixed"}}
    with serving(smol(model, spec), tmp_path / "log") as url:
        beside_a_json_schema(asking(url), url)


def beside_a_json_schema(ask, server):
    before = metrics(server)
    schema = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
    with ThreadPoolExecutor(5) as pool:
        structured = pool.submit(ask, "Describe Rome as JSON.", 64, response_format=schema)
        ordinary = list(pool.map(lambda q: ask(q, 64, extra_body={"ignore_eos": True}), QUESTIONS))
    assert set(json.loads(structured.result().choices[0].message.content)) == set(
        SCHEMA["required"]
    )
    assert [answer.usage.completion_tokens for answer in ordinary] == [64] * 4
    assert ordinary[0].choices[0].message.content.startswith("1. 1\n2. 2\n")
    assert "Monday" in ordinary[1].choices[0].message.content
    after = metrics(server)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:specplus_chain_fallbacks_total:structured_output"] > 0
    assert grown["vllm:specplus_chain_fallbacks_total:resumed"] == 0
    # Only the accepted path of a tree has gaps to close.
    assert grown["vllm:specplus_kv_slots_moved_total"] > 0


def test_metrics(ask, server):
    before = metrics(server)
    answer = ask(COUNT, max_tokens=64, extra_body={"ignore_eos": True})
    after = metrics(server)
    grown = {name: after[name] - before[name] for name in after}
    steps = grown["vllm:specplus_request_steps_total"]
    drafted, accepted = (grown[f"vllm:specplus_nodes_{x}_total"] for x in ("drafted", "accepted"))
    assert 0 < accepted < drafted <= 8 * steps
    # The prompt's step makes the first token; the last step may exceed max_tokens.
    assert grown["vllm:specplus_output_tokens_total"] == steps + accepted
    assert 63 <= steps + accepted <= 63 + 8
    assert answer.usage.completion_tokens == 64
    assert after["vllm:specplus_draft_failures_total"] == 0
    # vLLM's own counters tell the same.
    assert grown["vllm:spec_decode_num_draft_tokens_total"] == drafted
    assert grown["vllm:spec_decode_num_accepted_tokens_total"] == accepted


def test_a_request_can_switch_speculation_off(ask, server):
    """Through ``vllm_xargs``, which carries no objects: as JSON text, or by flat keys."""
    for controls in ({"specplus": '{"enabled": false}'}, {"specplus.enabled": False}):
        before = metrics(server)
        answer = ask(COUNT, 24, extra_body={"vllm_xargs": controls})
        after = metrics(server)
        name = "vllm:specplus_nodes_drafted_total"
        assert after[name] == before[name]
        assert answer.choices[0].message.content.startswith("1. 1\n2. 2\n")
    before = metrics(server)
    ask(COUNT, 24, extra_body={"vllm_xargs": {"specplus.max_nodes": 1}})
    after = metrics(server)
    grown = {name: after[name] - before[name] for name in after}
    assert grown["vllm:specplus_nodes_drafted_total"] <= grown["vllm:specplus_request_steps_total"]


@pytest.mark.parametrize(
    ("controls", "sentence"),
    [
        ('{"max_nodes": 999}', "specplus: 'max_nodes' is 999: input should be less than"),
        (
            '{"nodes": 3}',
            "specplus: unknown key 'nodes', did you mean 'max_nodes'? (allowed: enabled, ",
        ),
        ("{off", "specplus: not valid JSON"),
        ("[" * 50_000, "specplus: not valid JSON"),
        ({"specplus.max_node": 3}, "specplus: unknown key 'max_node', did you mean 'max_nodes'?"),
        ({"specplus.max_nodes": 300}, "specplus: 'max_nodes' is 300: input should be less than"),
        ({"specplus_enabled": False}, "specplus: unknown key 'specplus_enabled': write "),
    ],
)
def test_bad_controls_get_http_400_and_disturb_nobody(ask, controls, sentence):
    from openai import BadRequestError

    xargs = controls if isinstance(controls, dict) else {"specplus": controls}
    with ThreadPoolExecutor(2) as pool:
        neighbour = pool.submit(ask, COUNT, 24)
        with pytest.raises(BadRequestError) as refused:
            ask(COUNT, 24, extra_body={"vllm_xargs": xargs})
    assert refused.value.status_code == 400
    assert sentence in str(refused.value)
    assert neighbour.result().choices[0].message.content.startswith("1. 1\n2. 2\n")


def test_decisions_are_on_metrics(ask, server):
    before = metrics(server)
    ask(COUNT, 64, extra_body={"ignore_eos": True})
    after = metrics(server)
    grown = {
        name.removeprefix("vllm:specplus_").removesuffix("_total"): after[name] - before[name]
        for name in after
        if name.startswith("vllm:specplus_")
    }
    assert grown["control_steps"] >= grown["timed_steps"] > 0
    assert grown["measured_step_seconds"] > 0
    assert grown["predicted_step_seconds"] > 0
    assert grown["nodes_grown"] >= grown["nodes_drafted"]
    assert grown["expected_tokens"] > 0


DOTTED = """
import json, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

parsed = []
for flags in json.loads(sys.argv[2]):
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    args = parser.parse_args(["--model", sys.argv[1], "--max-model-len", "256", *flags])
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    speculative = config.speculative_config
    parsed.append([
        speculative.method, speculative.num_speculative_tokens,
        config.additional_config["specplus"]["config"], config.parallel_config.worker_cls,
    ])
print(json.dumps(parsed))
"""


def test_spellings_of_the_config_mean_the_same(model):
    key = "--speculative-config"
    spellings = [
        [key, json.dumps(SPEC)],
        [f"{key}.method", "token_recycling", f"{key}.num_speculative_tokens", "8"],
        [f"{key}.method", "token_recycling", "--spec-tokens", "8"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", DOTTED, model, json.dumps(spellings)],
        env=environment(), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    first, *others = json.loads(done.stdout.splitlines()[-1])
    assert first[0] == "custom_class"
    assert first[1] == first[2]["num_speculative_tokens"] == 8
    assert first[2]["method"] == "token_recycling"
    assert others == [first, first]


def test_a_mistake_ends_the_server_with_a_sentence(model):
    """One of ``tests/contract/mistakes.jsonl``, by the command that users type."""
    spec = json.dumps(SPEC | {"treee": 1})
    command = vllm_serve(model, "--speculative-config", spec)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert (
        "speculative_config for 'token_recycling': unknown key 'treee', did you mean 'tree'? "
        "(allowed: method, "
    ) in done.stderr
    assert "EngineCore" not in done.stderr  # told before any engine process starts
