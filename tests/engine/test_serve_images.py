"""``/v1/images/generations`` of ``vllm serve``, through the openai client."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from vllm_specplus.cli.model import IMAGE_MODEL, LATENTS_MODEL

pytestmark = pytest.mark.engine

#: Model -> its draft. Always the same window: under the controller it depends on time, and with
#: it what is drawn.
SPECS = {
    IMAGE_MODEL: {"method": "jacobi", "num_speculative_tokens": 7,
                  "acceptance": {"rule": "gsd", "group": 5}},
    LATENTS_MODEL: {"method": "cspd", "num_speculative_tokens": 3,
                    "model": f"{LATENTS_MODEL}/draft"},
}  # fmt: skip


@contextmanager
def serving(model: Path, spec: dict, log: Path, *options: str) -> Iterator:
    """A client of a server of ``model``, there under the name "pictures"."""
    import openai

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_PLUGINS": "specplus,specplus_images",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model),
        "--served-model-name", "pictures", "--skip-tokenizer-init", "--enforce-eager",
        "--port", str(port), "--host", "127.0.0.1", "--max-num-seqs", "16",
        "--kv-cache-memory-bytes", str(1 << 28), "--speculative-config", json.dumps(spec), *options,
    ]  # fmt: skip
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, env=env, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, log.read_text()[-4000:]
                time.sleep(1)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture(scope="module", params=SPECS, ids=lambda model: model.name)
def client(request, tmp_path_factory):
    spec = SPECS[request.param] | {"control": {"policy": "fixed"}}
    with serving(request.param, spec, tmp_path_factory.mktemp("serve") / "log") as client:
        yield client


def opened(data) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data.b64_json))))


def test_pictures_show_what_was_asked_for(client):
    """By the classifier, eight requests at once, of several pictures each."""
    from vllm_specplus.image.quality import PictureClassifier

    def make(digit: int):
        return client.images.generate(
            model="pictures", prompt=str(digit), n=4, size="32x32",
            extra_body={"temperature": 0.9, "seed": digit},
        )  # fmt: skip

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(make, range(8)))
    pictures = np.stack([opened(each) for answer in answers for each in answer.data])
    assert pictures.shape == (32, 32, 32)
    assert pictures.dtype == np.uint8
    seen = torch.from_numpy(pictures).float()[:, None] / 127.5 - 1
    with torch.inference_mode():
        found = PictureClassifier.load(IMAGE_MODEL)(seen).argmax(-1)
    assert float((found == torch.arange(8).repeat_interleave(4)).float().mean()) > 0.8
    assert len({picture.tobytes() for picture in pictures}) == 32


def test_a_seed_gives_the_same_picture_again(client):
    def make():
        answer = client.images.generate(model="pictures", prompt="7", extra_body={"seed": 3})
        return answer.data[0].b64_json

    assert make() == make()


def test_links_and_events_hold_the_same_picture(client):
    """And the client's other keys are admitted."""
    keys = {"model": "pictures", "prompt": "5", "extra_body": {"seed": 2**40 + 3}}
    plain = client.images.generate(**keys, quality="hd", style="natural", user="me")
    linked = client.images.generate(**keys, response_format="url")
    with urllib.request.urlopen(linked.data[0].url, timeout=10) as answer:
        assert answer.headers["content-type"] == "image/png"
        assert answer.read() == base64.b64decode(plain.data[0].b64_json)
    *parts, whole = client.images.generate(**keys, stream=True, partial_images=3)
    assert whole.type == "image_generation.completed"
    assert whole.b64_json == plain.data[0].b64_json
    assert 1 <= len(parts) <= 3
    for each in parts:
        assert each.type == "image_generation.partial_image"
        assert opened(each).shape == (32, 32)


def test_seeds_that_differ_in_high_bits_give_other_latents(client, request):
    if LATENTS_MODEL.name not in request.node.name:
        pytest.skip("of codes on a CPU 32 bits count")

    def make(seed: int) -> str:
        answer = client.images.generate(model="pictures", prompt="7", extra_body={"seed": seed})
        return answer.data[0].b64_json

    assert len({make(seed) for seed in (3, 3 + 2**32, 3 + 2**62, -3)}) == 4


def total(client, name: str, **labels: str) -> float:
    """Of a metric of the server's, over all other labels."""
    root = str(client.base_url).removesuffix("/v1/")
    with urllib.request.urlopen(f"{root}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(
        float(line.rsplit(" ", 1)[1]) for line in lines
        if line.startswith(f"{name}{{") and all(each in line for each in wanted)
    )  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(client, stream):
    """All its pictures end, those too that had not begun."""
    whole = {"name": "vllm:request_success_total", "finished_reason": "length"}
    before, deadline = total(client, **whole), time.monotonic() + 60
    body = json.dumps({"prompt": "3", "n": 64, "stream": stream}).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
        head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        while not total(client, "vllm:num_requests_running"):
            assert time.monotonic() < deadline
    while total(client, "vllm:num_requests_running") + total(client, "vllm:num_requests_waiting"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert total(client, **whole) < before + 64


def test_another_model_is_refused(client):
    import openai

    with pytest.raises(openai.NotFoundError, match="'other' is not served here, 'pictures' is"):
        client.images.generate(model="other", prompt="1")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"prompt": "a cat"}, "prompt 'a cat' names no class of this model (it has '0', '1'"),
        ({"prompt": "1", "size": "64x64"}, "size '64x64': this model makes 32x32"),
        (
            {"prompt": "1", "extra_body": {"guidance_scale": -1}},
            "guidance_scale is -1.0: it must be a number from 0 to 1000, such as 3.0",
        ),
        (
            {"prompt": "1", "extra_body": {"vllm_xargs": {"specplus": '{"nodes": 3}'}}},
            "specplus: unknown key 'nodes'",
        ),
    ],
)
def test_mistakes_are_one_sentence(client, keys, message):
    import openai

    with pytest.raises(openai.BadRequestError) as error:
        client.images.generate(model="pictures", **keys)
    assert message in str(error.value)
