"""The images route as OpenAI's client uses it, before an engine that draws codes at random."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import httpx
import numpy as np
import openai
import pytest
from fastapi import FastAPI
from PIL import Image
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind

from vllm_specplus.cli.model import IMAGE_MODEL
from vllm_specplus.engine import image_service
from vllm_specplus.engine.images_api import PATH, ImagesEndpoint
from vllm_specplus.image.llamagen import LlamaGenConfig
from vllm_specplus.image.pictures import load_pictures

CODES = 64
PICTURES = load_pictures(IMAGE_MODEL)


def codes_of(seed: int | None) -> list[int]:
    return np.random.default_rng((seed or 0) % 2**64).integers(0, 512, CODES).tolist()


def picture_of(seed: int | None) -> np.ndarray:
    return PICTURES.pixels(SimpleNamespace(token_ids=codes_of(seed), logprobs=None))


class Engine:
    """Draws ``step`` codes at a time as soon as it is ``open``."""

    def __init__(self, step: int = 7):
        config = LlamaGenConfig(**json.loads((IMAGE_MODEL / "config.json").read_text()))
        self.model_config = SimpleNamespace(
            hf_config=config, model=str(IMAGE_MODEL), max_model_len=CODES + 1
        )
        self.step, self.open = step, True
        self.asked, self.ended, self.left = [], 0, 0
        self.fails: Callable[[int | None], Exception | None] = lambda seed: None
        self.last = CODES

    async def generate(self, prompt, params, request_id):
        self.asked.append((prompt, params))
        drawn, sent = codes_of(params.seed), 0
        try:
            while sent < self.last:
                await asyncio.sleep(0)
                if not self.open:
                    continue
                if error := self.fails(params.seed):
                    raise error
                upto = min(sent + self.step, self.last)
                if params.output_kind is RequestOutputKind.DELTA or upto == self.last:
                    delta = params.output_kind is RequestOutputKind.DELTA
                    yield output(drawn[sent if delta else 0 : upto], upto == self.last)
                sent = upto
            self.ended += 1
        except (asyncio.CancelledError, GeneratorExit):
            self.left += 1
            raise


def output(codes: list[int], last: bool) -> SimpleNamespace:
    one = SimpleNamespace(token_ids=codes, logprobs=None, finish_reason="length" if last else None)
    return SimpleNamespace(outputs=[one])


def server(engine: Engine, **args) -> FastAPI:
    app, endpoint = FastAPI(), ImagesEndpoint()
    app.state.args = SimpleNamespace(log_error_stack=False)
    endpoint.attach_router(app)
    init_exception_handler(app)
    models = SimpleNamespace(is_base_model="digits".__eq__, model_name=lambda: "digits")
    state = SimpleNamespace(openai_serving_models=models)
    asyncio.run(endpoint.init_state(engine, state, SimpleNamespace(**args)))
    return app


def client_of(app: FastAPI) -> openai.AsyncOpenAI:
    transport = httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=False))
    return openai.AsyncOpenAI(
        base_url="http://server/v1", api_key="none", max_retries=0, http_client=transport
    )


def asked(app: FastAPI, **keys):
    """The answer of one call of the client's."""
    return asyncio.run(client_of(app).images.generate(**{"prompt": "7"} | keys))


def opened(text: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


def test_every_key_of_the_clients_is_known():
    """All at once; what cannot change a picture changes none."""
    engine = Engine()
    answer = asked(
        server(engine), model="digits", n=2, size="32x32", quality="hd", style="vivid",
        background="opaque", moderation="low", output_format="png", output_compression=100,
        response_format="b64_json", stream=False, partial_images=0, user="me",
        extra_body={"seed": 3, "guidance_scale": 2, "top_k": 100, "safety_identifier": "me",
                    "vllm_xargs": {"specplus.enabled": False}},
    )  # fmt: skip
    for seed, each in zip((3, 4), answer.data, strict=True):
        assert (opened(each.b64_json) == picture_of(seed)).all()
    assert (answer.size, answer.output_format, answer.background) == ("32x32", "png", "opaque")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (1, 2 * CODES)
    for prompt, params in engine.asked:
        assert prompt["prompt_token_ids"] == [512 + 7]
        assert params.extra_args == {"specplus.enabled": False, "guidance_scale": 2.0}
        assert (params.top_k, params.temperature, params.max_tokens) == (100, 1.0, CODES)


def test_null_is_the_default():
    keys = dict.fromkeys(("n", "size", "quality", "style", "response_format", "stream", "seed"))
    sent = {"prompt": "7", **keys}
    app = server(Engine())

    async def post():
        return await client_of(app)._client.post(f"http://server{PATH}", json=sent)

    answer = asyncio.run(post())
    assert answer.status_code == 200
    assert len(answer.json()["data"]) == 1


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_links_are_fetched_without_a_key(kind):
    app = server(Engine())
    quality = {} if kind == "png" else {"output_compression": 90}
    answer = asked(app, n=2, response_format="url", output_format=kind,
                   extra_body={"seed": 5}, **quality)  # fmt: skip

    async def fetch(url: str):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as plain:
            return await plain.get(url)

    for seed, each in zip((5, 6), answer.data, strict=True):
        assert each.url.startswith("http://server/images/")
        assert each.url.endswith(f".{kind}")
        found = asyncio.run(fetch(each.url))
        assert found.headers["content-type"] == f"image/{kind}"
        image = Image.open(io.BytesIO(found.content))
        assert image.format == kind.upper()
        apart = np.abs(np.asarray(image.convert("L")).astype(int) - picture_of(seed))
        assert apart.mean() <= (0 if kind == "png" else 12)
    gone = asyncio.run(fetch("http://server/images/another.png"))
    assert gone.status_code == 404
    assert "links last for an hour" in gone.json()["error"]["message"]


def test_several_servers_have_no_links():
    app = server(Engine(), api_server_count=2)
    with pytest.raises(openai.BadRequestError, match="set 'response_format' to 'b64_json'"):
        asked(app, response_format="url")
    assert asked(app).data[0].b64_json


def test_another_model_is_not_served():
    engine = Engine()
    with pytest.raises(openai.NotFoundError, match="'dall-e-3' is not served here, 'digits' is"):
        asked(server(engine), model="dall-e-3")
    assert engine.asked == []


async def events_of(app: FastAPI, **keys) -> list:
    stream = await client_of(app).images.generate(**{"prompt": "7", "stream": True} | keys)
    return [event async for event in stream]


def test_events_show_a_picture_grow():
    events = asyncio.run(events_of(server(Engine()), partial_images=2, extra_body={"seed": 8}))
    *parts, whole = events
    assert [each.type for each in parts] == ["image_generation.partial_image"] * 2
    assert [each.partial_image_index for each in parts] == [0, 1]
    assert whole.type == "image_generation.completed"
    assert (opened(whole.b64_json) == picture_of(8)).all()
    assert (whole.usage.output_tokens, whole.size) == (CODES, "32x32")
    # After 28 and 49 codes, the first steps at a third and two thirds: 3 and 6 rows of 8.
    for rows, each in zip((3, 6), parts, strict=True):
        shown = opened(each.b64_json)
        assert shown.shape == (32, 32)
        assert (shown[4 * rows :] == 128).all()
        assert (shown[: 4 * rows] != 128).any()


def test_events_of_several_pictures_say_which_they_are_of():
    events = asyncio.run(events_of(server(Engine()), n=3, extra_body={"seed": -2}))
    found = {each.index: opened(each.b64_json) for each in events}
    for index, seed in enumerate((-2, 0, 1)):
        assert (found[index] == picture_of(seed)).all()


def test_an_error_after_the_answer_has_begun_is_an_event():
    engine = Engine()
    engine.fails = lambda seed: VLLMValidationError("not this one") if seed == 2 else None
    with pytest.raises(openai.APIError, match="not this one"):
        asyncio.run(events_of(server(engine), n=4, extra_body={"seed": 0}))
    assert (engine.left, engine.ended) == (3, 0)


def test_32_requests_at_once_are_decoded_a_few_at_a_time(monkeypatch):
    at_once, most, lock, decode = 0, 0, threading.Lock(), PICTURES.pixels

    def counted(self, each):
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.001)
        with lock:
            at_once -= 1
        return decode(each)

    monkeypatch.setattr(type(PICTURES), "pixels", counted)
    monkeypatch.setattr(image_service, "decoders", lambda: 2)
    app = server(Engine())

    async def all_of_them():
        client = client_of(app)
        return await asyncio.gather(*(
            client.images.generate(prompt="7", n=2, extra_body={"seed": 10 * i}) for i in range(32)
        ))  # fmt: skip

    for i, answer in enumerate(asyncio.run(all_of_them())):
        for seed, each in zip((10 * i, 10 * i + 1), answer.data, strict=True):
            assert (opened(each.b64_json) == decode_of(seed, decode)).all()
    assert most == 2


def decode_of(seed: int, decode) -> np.ndarray:
    return decode(SimpleNamespace(token_ids=codes_of(seed), logprobs=None))


@pytest.mark.parametrize(
    ("threads", "cores", "expected"), [(1, 16, 4), (8, 16, 2), (16, 16, 1), (16, 2, 1)]
)
def test_no_more_is_decoded_than_the_cores_carry(monkeypatch, threads, cores, expected):
    monkeypatch.setattr(image_service.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(image_service.os, "sched_getaffinity", lambda _: range(cores), False)
    assert image_service.decoders() == expected


async def leave(app: FastAPI, engine: Engine, body: dict) -> None:
    """Sends a request as a server does and goes when the engine has all of it."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        while len(engine.asked) < body["n"]:
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": "POST", "scheme": "http", "path": PATH, "raw_path": PATH.encode(),
        "query_string": b"", "root_path": "", "headers": [], "server": ("server", 80),
        "client": ("client", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    deadline = time.monotonic() + 10
    while engine.left < body["n"] and time.monotonic() < deadline:
        await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_all_pictures(stream):
    engine = Engine()
    engine.open = False
    app = server(engine)
    asyncio.run(leave(app, engine, {"prompt": "7", "n": 64, "stream": stream}))
    assert (engine.left, engine.ended) == (64, 0)


def test_a_picture_that_fails_ends_the_others():
    engine = Engine()
    engine.fails = lambda seed: VLLMValidationError("not this one") if seed == 3 else None
    with pytest.raises(openai.BadRequestError, match="not this one"):
        asked(server(engine), n=8, extra_body={"seed": 0})
    assert (engine.left, engine.ended) == (7, 0)


def test_a_picture_that_the_engine_does_not_finish_is_no_picture():
    engine = Engine()
    engine.last = CODES - 5
    with pytest.raises(openai.InternalServerError, match="ended after 59 of its 64 tokens"):
        asked(server(engine))


@pytest.mark.parametrize(
    ("first", "seeds"),
    [
        (None, [None] * 5),
        (-1, [None] * 5),
        (-3, [-3, -2, 0, 1, 2]),
        (0, [0, 1, 2, 3, 4]),
        (2**32 - 2, list(range(2**32 - 2, 2**32 + 3))),
        (2**63 - 5, list(range(2**63 - 5, 2**63))),
        (-(2**63), list(range(-(2**63), 5 - 2**63))),
    ],
)
def test_every_picture_has_the_next_seed_but_for_the_one_that_is_none(first, seeds):
    engine = Engine()
    asked(server(engine), n=5, extra_body={"seed": first})
    assert [params.seed for _, params in engine.asked] == seeds


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"extra_body": {"seed": 2**64}}, "'seed' is 18446744073709551616: input should be less"),
        ({"extra_body": {"seed": 2**63 - 1}, "n": 2}, "the last picture's seed would be above"),
        ({"prompt": "7" * 20_000_000}, "should have at most 32000 characters"),
        ({"prompt": "7" * 30_000}, "names no class of this model"),
        ({"size": "9" * 500}, "this model makes 32x32"),
        ({"n": 65}, "'n' is 65: input should be less than or equal to 64"),
        ({"background": "transparent"}, "'background' is 'transparent': input should be 'auto'"),
        ({"output_format": "gif"}, "'output_format' is 'gif': input should be 'png', 'jpeg' or"),
        ({"output_compression": 50}, "'output_compression' is for 'jpeg' and 'webp'"),
        ({"partial_images": 2}, "'partial_images' are events: set 'stream' to true"),
        ({"stream": True, "response_format": "url"}, "events hold pictures"),
        ({"extra_body": {"frame_count": 3}}, "unknown key 'frame_count' (allowed: prompt, model"),
        ({"extra_body": {"temperature": 1e300}}, "'temperature' is 1e+300"),
        ({"extra_body": {"guidance_scale": 1e30}}, "it must be a number from 0 to 1000"),
        ({"extra_body": {"guidance_scale": 1e30}, "stream": True}, "a number from 0 to 1000"),
        ({"extra_body": {"vllm_xargs": {"x": 2**70}}}, "'vllm_xargs' has a number of over 64 bits"),
        ({"extra_body": {"vllm_xargs": {"specplus": '{"nodes": 1}'}}}, "unknown key 'nodes'"),
    ],
)
def test_mistakes_are_one_short_sentence(keys, message):
    engine = Engine()
    with pytest.raises(openai.BadRequestError) as error:
        asked(server(engine), **keys)
    assert message in str(error.value)
    assert len(error.value.response.content) < 700
    assert engine.asked == []


def test_what_is_no_json_is_told_so():
    app = server(Engine())

    async def post(content: bytes):
        return await client_of(app)._client.post(f"http://server{PATH}", content=content)

    for content in (b"", b"{", b"[" * 100_000, b'{"prompt": "7", "seed": 1' + b"0" * 5000 + b"}"):
        answer = asyncio.run(post(content))
        assert answer.status_code == 400
        assert "the body is no JSON" in answer.json()["error"]["message"]


def test_the_body_is_described_in_the_servers_own_pages():
    described = server(Engine()).openapi()["paths"][PATH]["post"]["requestBody"]
    assert "guidance_scale" in described["content"]["application/json"]["schema"]["properties"]
