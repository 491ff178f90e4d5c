"""An arbiter between fake servers, and clients of it: in one process, over ASGI or the loopback."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import uvicorn

from tests.arbitrage.fakes import FakeModel, FakeRouter, script
from vllm_specplus.arbitrage.arbiter import Arbiter, Limits
from vllm_specplus.arbitrage.engines import Client, Endpoint, EndpointClassifier
from vllm_specplus.arbitrage.metrics import Metrics
from vllm_specplus.arbitrage.routers import Learnt, Router
from vllm_specplus.arbitrage.server import Serving, application
from vllm_specplus.arbitrage.steps import Job, Step, Writer

QUESTION = "q"


def scores(**of_steps: float) -> Callable[[str], float]:
    """A router's score of a candidate, by the word it begins with, which may be cut short."""

    def says(text: str) -> float:
        first = text.rpartition("Model 0: ")[2].split()[0]
        return next(each for word, each in of_steps.items() if word.startswith(first))

    return says


@dataclass
class World:
    """Two models, a router between them, and what they were asked."""

    draft: FakeModel
    target: FakeModel
    router: FakeRouter
    limits: Limits | None = None

    @classmethod
    def of(
        cls, drafted: Sequence[str], by_target: Sequence[str], limits: Limits | None = None,
        **of_steps: float,
    ) -> World:  # fmt: skip
        """Models with these steps, and scores of the draft's by their first words."""
        return cls(
            FakeModel("small", script(QUESTION, *drafted)),
            FakeModel("large", script(QUESTION, *by_target)),
            FakeRouter(scores(**of_steps)), limits,
        )  # fmt: skip

    @asynccontextmanager
    async def arbiter(self, router: Router | None = None) -> AsyncIterator[Arbiter]:
        """Connected over ASGI."""
        places = {"draft": self.draft, "target": self.target, "router": self.router}
        mounts = {
            f"http://{name}": httpx.ASGITransport(app=each.app) for name, each in places.items()
        }
        async with httpx.AsyncClient(mounts=mounts) as http:
            clients = {name: Client(name, f"http://{name}/v1/", http) for name in places}
            engines = [Endpoint(clients[name]) for name in ("draft", "target")]
            classifier = EndpointClassifier(clients["router"])
            for each in (*engines, classifier):
                await each.connect()
            yield Arbiter(*engines, router or Learnt(classifier), Metrics(), self.limits)

    def steps(self, threshold: float, router: Router | None = None, **keys: Any) -> list[Step]:
        """The steps of an answer."""
        values: dict[str, Any] = {"max_tokens": 1000} | keys
        job = Job(
            problem=QUESTION, prompts=dict.fromkeys(Writer, f"{QUESTION}\n"), threshold=threshold,
            **values,
        )  # fmt: skip

        async def run() -> list[Step]:
            async with self.arbiter(router) as arbiter:
                return [step async for step in arbiter.answer(job)]

        return asyncio.run(run())

    def ask(
        self, body: Any, path: str = "/v1/completions", threshold: float = 0.5
    ) -> httpx.Response:
        """A client's request to the server above them."""

        async def run() -> httpx.Response:
            async with self.arbiter() as arbiter:
                app = application(arbiter, Serving("pair", threshold, 1000))
                transport = httpx.ASGITransport(app=app)
                async with httpx.AsyncClient(transport=transport, base_url="http://pair") as client:
                    content = {"json": body} if not isinstance(body, bytes) else {"content": body}
                    return await client.request("POST", path, **content)

        return asyncio.run(run())


@asynccontextmanager
async def listening(app: Any) -> AsyncIterator[str]:
    """The address of an application that listens on the loopback, in this event loop."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    task = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        await task


def text_of(steps: Sequence[Step]) -> str:
    return "".join(step.text for step in steps)


def writers(steps: Sequence[Step]) -> str:
    """Who has written them, as "dtd"."""
    return "".join(step.writer[0] for step in steps)
