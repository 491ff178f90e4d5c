"""OpenAI's API above an arbiter: what clients may ask, streams, and what ends with a client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from tests.arbitrage.fakes import script
from tests.arbitrage.serving import World, listening
from vllm_specplus.arbitrage import arbiter as arbiter_module
from vllm_specplus.arbitrage.protocol import Output
from vllm_specplus.arbitrage.server import Serving, application

WHOLE = "d0\n\nt1\n\nd2"


@pytest.fixture
def world(monkeypatch) -> World:
    monkeypatch.setattr(arbiter_module, "AGAIN", 0.0)
    return World.of(("d0", "d1", "d2"), ("t0", "t1", "t2"), d0=0.1, d1=0.9, d2=0.2)


def body(**keys: Any) -> dict[str, Any]:
    return {"model": "pair", "prompt": "q\n"} | keys


def chat(**keys: Any) -> dict[str, Any]:
    return {"model": "pair", "messages": [{"role": "user", "content": "q"}]} | keys


def events(response: httpx.Response) -> list[dict]:
    """The objects of a stream, which is whole."""
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_an_answer_as_a_whole(world):
    answer = world.ask(body()).json()
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (WHOLE, "stop")
    assert (answer["object"], answer["model"]) == ("text_completion", "pair")
    assert answer["usage"] == {
        "prompt_tokens": len("q\n"), "completion_tokens": len(WHOLE),
        "total_tokens": len("q\n") + len(WHOLE),
    }  # fmt: skip
    told = answer["arbitrage"]["steps"]
    assert [step["writer"] for step in told] == ["draft", "target", "draft"]
    assert [step["score"] for step in told] == [0.1, 0.9, 0.2]


def test_a_chat_goes_by_the_template_of_each_model(world):
    world.target.template = "[[{}]]"
    answer = world.ask(chat(max_completion_tokens=9), "/v1/chat/completions").json()
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": WHOLE[:9]}
    assert (answer["object"], choice["finish_reason"]) == ("chat.completion", "length")
    assert world.draft.prompts[:2] == ["<q>", "<q>d0\n\n"]
    assert world.target.prompts == ["[[q]]d0\n\n"]
    # A template has written the special tokens already.
    assert world.draft.asked[0]["add_special_tokens"] is False
    assert world.router.asked[0].startswith("q\nModel 0: d0")


def test_a_draft_that_cannot_read_a_chat_is_not_asked(world):
    world.draft.template = ""
    answer = world.ask(chat(), "/v1/chat/completions").json()
    assert answer["choices"][0]["message"]["content"] == "t0\n\nt1\n\nt2"
    assert not world.draft.asked
    world.target.template = ""
    refused = world.ask(chat(), "/v1/chat/completions")
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "the target refuses: there is no chat template"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_steps_are_streamed(world, path):
    is_chat = path.endswith("chat/completions")
    asked = (chat if is_chat else body)(stream=True, stream_options={"include_usage": True})
    *parts, end, usage = events(world.ask(asked, path))
    choices = [part["choices"][0] for part in parts]
    pieces = [each["delta"]["content"] if is_chat else each["text"] for each in choices]
    assert pieces == ["d0\n\n", "t1\n\n", "d2"]
    assert [part["arbitrage"]["writer"] for part in parts] == ["draft", "target", "draft"]
    assert {each["finish_reason"] for each in choices} == {None}
    assert end["choices"][0]["finish_reason"] == "stop"
    assert usage["usage"]["completion_tokens"] == len(WHOLE)
    assert len({part["id"] for part in (*parts, end, usage)}) == 1


def test_openais_client_reads_both(world):
    openai = pytest.importorskip("openai")

    async def run() -> tuple[str, str, str]:
        async with (
            world.arbiter() as arbiter,
            listening(application(arbiter, Serving("pair", 0.5, 100))) as address,
        ):
            client = openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none")
            asked: dict[str, Any] = {
                    "model": "pair", "messages": [{"role": "user", "content": "q"}],
                }  # fmt: skip
            whole = await client.chat.completions.create(**asked)
            stream = await client.chat.completions.create(**asked, stream=True)
            parts = [part.choices[0].delta.content or "" async for part in stream]
            (model,) = (await client.models.list()).data
            await client.close()
            return whole.choices[0].message.content, "".join(parts), model.id

    assert asyncio.run(run()) == (WHOLE, WHOLE, "pair")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("1", "d0\n\nt"),
        (["2", "t"], "d0\n\n"),
        ("0\n\nt", "d"),  # begins in one step and ends in the next
        ("\n\n", "d0"),
        ("nowhere", WHOLE),
        ("d2 and more", WHOLE),  # held back to the end, and sent then
    ],
)
def test_stop_strings_end_answers_wherever_they_stand(world, stream, stop, text):
    response = world.ask(body(stop=stop, stream=stream))
    if stream:
        choices = [part["choices"][0] for part in events(response)]
        assert "".join(each["text"] for each in choices) == text
        assert choices[-1]["finish_reason"] == "stop"
    else:
        assert response.json()["choices"][0]["text"] == text
        assert response.json()["choices"][0]["finish_reason"] == "stop"
    assert len(world.draft.asked) <= 3


def test_what_is_held_back_is_never_too_much():
    """Cut anywhere, a text comes out as it went in, up to the stop string."""
    text = "one two three"
    for stops, right in ((("two",), "one "), (("e t", "x"), "on"), ((), text)):
        for first in range(len(text)):
            for second in range(first, len(text)):
                output, sent = Output(stops), ""
                for piece in (text[:first], text[first:second], text[second:]):
                    if not output.stopped:
                        sent += output.add(piece)
                assert sent + output.rest() == right


def test_a_request_may_have_a_threshold_of_its_own(world):
    draft_only = world.ask(body(arbitrage={"threshold": 1})).json()
    assert draft_only["choices"][0]["text"] == "d0\n\nd1\n\nd2"
    assert not world.router.asked


def test_a_cache_salt_goes_wherever_the_text_does(world):
    assert world.ask(body(cache_salt="mine")).status_code == 200
    asked = world.draft.asked + world.target.asked
    assert {each["cache_salt"] for each in asked} == set(world.router.salts) == {"mine"}


@pytest.mark.parametrize(
    ("shown", "status"), [("Bearer secret", 200), ("Bearer s", 401), ("", 401)]
)
def test_a_key_is_asked_of_clients(world, shown, status):
    async def run() -> list[int]:
        async with world.arbiter() as arbiter:
            app = application(arbiter, Serving("pair", 0.5, 100, "secret"))
            transport, headers = httpx.ASGITransport(app=app), {"Authorization": shown}
            async with httpx.AsyncClient(transport=transport, base_url="http://pair") as client:
                answers = [
                    await client.post("/v1/completions", json=body(), headers=headers),
                    await client.get("/v1/models", headers=headers),
                    await client.get("/health"),
                ]
        if status == 401:
            assert "wants its API key" in answers[0].json()["error"]["message"]
        return [each.status_code for each in answers]

    assert asyncio.run(run()) == [status, status, 200]


WRONG = [
    (b"{", "the body is no JSON"),
    (b"[]", "the body is []: it must be a JSON object"),
    (body(prompts="q"), "unknown key 'prompts', did you mean 'prompt'?"),
    ({"model": "pair"}, "'prompt' is missing"),
    (body(prompt=["q"]), "'prompt' is ['q']: input should be a valid string"),
    (body(model="other"), "there is no model 'other': it is 'pair'"),
    (body(n=2), "'n' is 2"),
    (body(logprobs=1), "unknown key 'logprobs'"),
    (body(echo=True), "'echo' is True"),
    (body(max_tokens=0), "'max_tokens' is 0"),
    (body(temperature=-1), "'temperature' is -1"),
    (body(temperature="hot"), "'temperature' is 'hot'"),
    (body(seed=1 << 63), "'seed' is 9223372036854775808"),
    (body(frequency_penalty=0.1), "unknown key 'frequency_penalty'"),
    (body(cache_salt=""), "'cache_salt' is ''"),
    (body(stop=["a", ""]), "'stop' has an empty string"),
    (body(arbitrage={"tau": 0.1}), "unknown key 'arbitrage.tau'"),
    (chat(), "unknown key 'messages'"),
]


@pytest.mark.parametrize(("asked", "says"), WRONG)
def test_what_cannot_be_is_refused_in_a_sentence(world, asked, says):
    response = world.ask(asked)
    assert response.status_code == (404 if "there is no model" in says else 400)
    error = response.json()["error"]
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    assert not world.draft.asked


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "messages"),
        ([{"role": "tool", "content": "x"}], "'messages.0.role' is 'tool'"),
        ([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "messages.0.content"),
    ],
)
def test_chats_are_text(world, messages, says):
    response = world.ask({"messages": messages}, "/v1/chat/completions")
    assert response.status_code == 400
    assert says in response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_target_that_fails_at_the_start_is_told_by_the_status(world, stream):
    world.router.says = lambda _: 1.0
    world.target.faults = [500, 500]
    response = world.ask(body(stream=stream))
    assert response.status_code == 502
    assert "the target at http://target answers 500" in response.json()["error"]["message"]


def test_a_target_that_fails_in_the_middle_ends_the_stream_with_an_error(world):
    world.target.faults = [500, 500]
    first, error = events(world.ask(body(stream=True)))
    assert first["choices"][0]["text"] == "d0\n\n"
    assert error["error"]["code"] == 502


async def leaves(world: World, asked: dict[str, Any], after: float) -> dict[str, float]:
    """What is counted when a client leaves, over real connections to both."""
    from vllm_specplus.arbitrage.arbiter import Arbiter
    from vllm_specplus.arbitrage.engines import Client, Endpoint, EndpointClassifier, http_client
    from vllm_specplus.arbitrage.metrics import Metrics
    from vllm_specplus.arbitrage.routers import Learnt

    async with (
        listening(world.draft.app) as draft, listening(world.target.app) as target,
        listening(world.router.app) as router, http_client() as http,
    ):  # fmt: skip
        engines = [
            Endpoint(Client("draft", draft, http)), Endpoint(Client("target", target, http))
        ]  # fmt: skip
        judge = EndpointClassifier(Client("router", router, http))
        for each in (*engines, judge):
            await each.connect()
        metrics = Metrics()
        app = application(Arbiter(*engines, Learnt(judge), metrics), Serving("pair", 0.5, 100))
        async with listening(app) as address, httpx.AsyncClient(base_url=address) as client:
            task = asyncio.create_task(client.post("/v1/completions", json=asked))
            await asyncio.sleep(after)
            task.cancel()
            for _ in range(200):
                if metrics.value("answers", end="gone"):
                    break
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
        return {"gone": metrics.value("answers", end="gone"), "left": world.draft.left_alone}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_what_is_written_for_it(world, stream):
    """The draft, which would have written for ten seconds, notices, and nothing more is asked."""
    says = world.draft.says
    world.draft.says = says

    async def run() -> dict[str, float]:
        if stream:  # leaves behind the first step
            world.router.says = slow_from_the_second(world)
        else:
            world.draft.seconds = 10.0
        return await leaves(world, body(stream=stream), 0.4)

    assert asyncio.run(run()) == {"gone": 1, "left": 1}
    assert len(world.draft.asked) == 1 + stream
    assert not world.target.asked


def slow_from_the_second(world: World):
    """A router that keeps the first step, behind which the draft becomes slow."""

    def says(text: str) -> float:
        world.draft.seconds = 10.0
        return 0.0

    return says


def test_answers_do_not_mix(world):
    """Many at a time, each with a question of its own, side by side in the engines."""
    count = 32

    def says(writer: str):
        def of_question(text: str) -> str:
            number = text.partition("\n")[0]
            return script(number, *(f"{writer}{i} {number}" for i in range(3)))(text)

        return of_question

    world.draft.says, world.target.says = says("d"), says("t")
    world.router.says = lambda text: float(text.rpartition("Model 0: ")[2].startswith("d1"))
    world.draft.seconds = world.target.seconds = 0.03

    async def run() -> list[str]:
        async with world.arbiter() as arbiter:
            transport = httpx.ASGITransport(app=application(arbiter, Serving("pair", 0.5, 100)))
            async with httpx.AsyncClient(transport=transport, base_url="http://pair") as client:
                answers = await asyncio.gather(
                    *(
                        client.post("/v1/completions", json={"prompt": f"q{i:02}\n"})
                        for i in range(count)
                    )
                )
        return [answer.json()["choices"][0]["text"] for answer in answers]

    texts = asyncio.run(run())
    assert texts == [f"d0 q{i:02}\n\nt1 q{i:02}\n\nd2 q{i:02}" for i in range(count)]
    assert world.draft.most_running > count // 2


def test_what_is_counted(world):
    async def run() -> tuple[str, int]:
        async with world.arbiter() as arbiter:
            transport = httpx.ASGITransport(app=application(arbiter, Serving("pair", 0.5, 100)))
            async with httpx.AsyncClient(transport=transport, base_url="http://pair") as client:
                await client.post("/v1/completions", json=body())
                health = await client.get("/health")
                return (await client.get("/metrics")).text, health.status_code

    text, health = asyncio.run(run())
    assert health == 200
    name = "vllm:specplus_arbitrate"
    assert f'{name}_steps_total{{writer="draft"}} 2.0' in text
    assert f'{name}_steps_total{{writer="target"}} 1.0' in text
    assert f'{name}_answers_total{{end="stop"}} 1.0' in text
