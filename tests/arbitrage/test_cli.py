"""`vllm-specplus arbitrate`: what cannot start is told in a sentence; and what can, answers."""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

import httpx
import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from tests.arbitrage.fakes import FakeModel, FakeRouter
from tests.arbitrage.serving import World, listening
from vllm_specplus.arbitrage.arbiter import Limits
from vllm_specplus.arbitrage.build import Named, arbiter
from vllm_specplus.arbitrage.engines import EngineError
from vllm_specplus.cli.main import app


def closed_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return each.getsockname()[1]


def invoke(*more: str):
    nobody = f"http://127.0.0.1:{closed_port()}"
    given = ["--draft", nobody, "--target", nobody, "--router", nobody, *more]
    return CliRunner().invoke(app, ["arbitrate", *given])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ((), "Error: the draft at http://127.0.0.1:"),
        (("--draft-arg", "seed=1"), "--draft-arg is for an engine here, and --draft is a server"),
        (("--draft-arg", "seed"), "--draft-arg: expected key=value, not 'seed'"),
        (("--separator", ""), "--separator is empty"),
    ],
)
def test_what_cannot_be_is_told_in_a_sentence(more, says):
    done = invoke(*more)
    assert done.exit_code == 2
    assert says in done.output
    assert "Traceback" not in done.output


def test_servers_are_connected_by_their_addresses():
    """With or without ``/v1`` at the end, and in any state of their own."""
    world = World.of(("d0",), ("t0",), d0=0.0)

    async def run() -> tuple[str, str]:
        async with (
            listening(world.draft.app) as draft, listening(world.target.app) as target,
            listening(world.router.app) as router,
        ):  # fmt: skip
            place = Named(f"{target}/v1")
            parts = arbiter(Named(draft), place, router, Limits(), api_key="secret")
            async with parts as connected:
                await connected.draft.write("q", 5, (), {}, True)
                return connected.draft.name, connected.target.name

    assert asyncio.run(run()) == ("small", "large")
    assert world.draft.keys == ["Bearer secret"]


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ({"data": []}, "serves no model"),
        ([], "answers what is no JSON object"),
    ],
)
def test_servers_that_are_none(answer, says):
    bare = FastAPI()
    bare.add_api_route("/v1/models", lambda: answer)

    async def run() -> None:
        async with listening(bare) as address:
            place = Named(address)
            async with arbiter(place, place, address, Limits()):
                pass

    with pytest.raises(EngineError, match=says):
        asyncio.run(run())


@pytest.mark.slow
def test_the_command_serves():
    """All of it: over the loopback, with a chat, until it is asked to end."""
    port, texts = closed_port(), []
    draft = FakeModel("small", lambda text: "yes" if text.endswith("?>") else "")
    target, router = FakeModel("large", lambda _: "no"), FakeRouter(lambda _: 0.1)

    async def run() -> None:
        async with (
            listening(draft.app) as first, listening(target.app) as second,
            listening(router.app) as third,
        ):  # fmt: skip
            command = ["arbitrate", "--draft", first, "--target", second, "--router", third]
            command += ["--port", str(port), "--name", "both"]
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "vllm_specplus.cli.main", *command
            )
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
                for _ in range(200):
                    try:
                        await client.get("/health")
                        break
                    except httpx.ConnectError:
                        await asyncio.sleep(0.05)
                asked = {"model": "both", "messages": [{"role": "user", "content": "Well?"}]}
                answer = (await client.post("/v1/chat/completions", json=asked)).json()
                texts.append(answer["choices"][0]["message"]["content"])
            process.send_signal(signal.SIGINT)
            await asyncio.wait_for(process.wait(), 10)

    asyncio.run(run())
    assert texts == ["yes"]
