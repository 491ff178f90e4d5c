"""OpenAI's API above an arbiter, as an ASGI application of FastAPI's.

What is streamed are steps: a draft's is not the client's before the router has spoken. A client
that leaves ends what is being written for it in both engines.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from vllm_specplus.arbitrage.arbiter import Arbiter
from vllm_specplus.arbitrage.engines import EngineError, Refused
from vllm_specplus.arbitrage.protocol import (
    Ask,
    Chat,
    Completion,
    Format,
    Output,
    Tally,
    Wrong,
    error_body,
    parsed,
)
from vllm_specplus.arbitrage.steps import Job, Step, Writer

log = logging.getLogger(__name__)
T = TypeVar("T")
#: A step, if there is a new one, and what the client gets of its text.
Piece = tuple[Step | None, str]
#: What servers log of a client that has left before its answer.
CLIENT_GONE = 499


@dataclass(frozen=True)
class Serving:
    """How answers are served."""

    name: str
    """Of the pair, as clients call it."""
    threshold: float
    max_tokens: int
    """Of answers whose clients say nothing."""
    api_key: str | None = None
    """That clients must show."""


class Server:
    """The routes."""

    def __init__(self, arbiter: Arbiter, serving: Serving):
        self._arbiter, self._serving = arbiter, serving

    async def completions(self, request: Request) -> Response:
        return await self._answered(request, Completion)

    async def chats(self, request: Request) -> Response:
        return await self._answered(request, Chat)

    async def models(self) -> dict[str, Any]:
        model = {
            "id": self._serving.name, "object": "model", "created": 0, "owned_by": "vllm-specplus",
            "parents": [self._arbiter.draft.name, self._arbiter.target.name],
        }  # fmt: skip
        return {"object": "list", "data": [model]}

    async def metrics(self) -> Response:
        text = generate_latest(self._arbiter.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def health(self) -> Response:
        return Response()

    async def _answered(self, request: Request, kind: type[Ask]) -> Response:
        try:
            ask = parsed(kind, await _body(request))
            if ask.model not in (None, self._serving.name):
                raise Wrong(f"there is no model {ask.model!r}: it is {self._serving.name!r}", 404)
            return await until_gone(
                request, self._streamed(ask) if ask.stream else self._whole(ask)
            )
        except Gone:
            self._arbiter.metrics.ended("gone")
            return Response(status_code=CLIENT_GONE)
        except (Wrong, EngineError) as error:
            if isinstance(error, EngineError):
                self._arbiter.metrics.ended("error")
            return refusal(error)

    async def check_key(self, request: Request) -> None:
        """Lets nobody in without the key, if there is one."""
        key = self._serving.api_key
        given = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if key is not None and not hmac.compare_digest(given.encode(), key.encode()):
            raise Wrong("this server wants its API key: send it as a bearer token", 401)

    async def _job(self, ask: Ask) -> Job:
        serving, read = self._serving, ask.own()
        if isinstance(read, str):
            prompts = dict.fromkeys(Writer, read)
        else:
            prompts = await chat_prompts(self._arbiter, read)
        own = ask.arbitrage.threshold
        return Job(
            problem=ask.problem, prompts=prompts, max_tokens=ask.most or serving.max_tokens,
            threshold=serving.threshold if own is None else own, sampling=ask.sampling,
            seed=ask.seed, stop=ask.stops, cache_salt=ask.cache_salt,
            special_tokens=isinstance(read, str),
        )  # fmt: skip

    async def _whole(self, ask: Ask) -> Response:
        tally, text = Tally(), ""
        async with aclosing(self._told(ask, await self._job(ask), tally)) as pieces:
            async for _, piece in pieces:
                text += piece
        self._arbiter.metrics.ended(tally.finish)
        return JSONResponse(self._format(ask).whole(text, tally))

    async def _streamed(self, ask: Ask) -> Response:
        tally = Tally()
        pieces = self._told(ask, await self._job(ask), tally)
        # What is wrong with a request has a status of its own as long as nothing was sent.
        first = await anext(pieces, None)
        return StreamingResponse(
            self._events(ask, tally, first, pieces), media_type="text/event-stream"
        )

    async def _events(
        self, ask: Ask, tally: Tally, first: Piece | None, others: AsyncGenerator[Piece, None]
    ) -> AsyncIterator[str]:
        """The parts of a stream, as server-sent events."""
        form, end = self._format(ask), "gone"
        try:
            async with aclosing(others):
                if first is not None:
                    yield event(form.chunk(first[1], first[0]))
                async for step, piece in others:
                    yield event(form.chunk(piece, step))
            end = tally.finish
            yield event(form.chunk("", finish=end))
            if ask.stream_options is not None and ask.stream_options.include_usage:
                yield event(form.usage(tally))
        except EngineError as error:
            end = "error"
            log.error("%s; an answer ends in the middle", error)
            yield event(error_body(str(error), status_of(error)))
        finally:
            self._arbiter.metrics.ended(end)
        yield "data: [DONE]\n\n"

    async def _told(self, ask: Ask, job: Job, tally: Tally) -> AsyncGenerator[Piece, None]:
        """Steps, and what the client gets of their text; behind them what was held back."""
        output = Output(ask.stops)
        async with aclosing(self._arbiter.answer(job)) as steps:
            async for step in steps:
                piece = output.add(step.text)
                tally.add(step, output.stopped)
                yield step, piece
                if output.stopped:
                    return
        if rest := output.rest():
            yield None, rest

    def _format(self, ask: Ask) -> Format:
        return Format(isinstance(ask, Chat), self._serving.name)


class Gone(Exception):
    """The client has left."""


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """What ``work`` comes to; if its client leaves before, it is cancelled, and Gone is raised."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Gone
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    # The body has been read: all that can come is the end.
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request) -> Any:
    try:
        return json.loads(await request.body())
    except (ValueError, RecursionError):
        raise Wrong("the body is no JSON: send an object") from None


async def chat_prompts(arbiter: Arbiter, messages: Sequence[dict[str, Any]]) -> dict[Writer, str]:
    """The text behind which each model answers a conversation; without the draft's where it has
    none to give. EngineError if the target has none."""
    draft, target = await asyncio.gather(
        arbiter.draft.chat_prompt(messages), arbiter.target.chat_prompt(messages),
        return_exceptions=True,
    )  # fmt: skip
    if isinstance(target, BaseException):
        raise target
    if isinstance(draft, str):
        return {Writer.DRAFT: draft, Writer.TARGET: target}
    if not isinstance(draft, EngineError):
        raise draft
    log.warning("%s; the target writes this answer alone", draft)
    arbiter.metrics.failed("draft")
    return {Writer.TARGET: target}


def status_of(error: Wrong | EngineError) -> int:
    """Of HTTP: the client's fault, or an engine's."""
    return error.status if isinstance(error, Wrong | Refused) else 502


def refusal(error: Wrong | EngineError) -> JSONResponse:
    """The answer to a request that has none."""
    status = status_of(error)
    return JSONResponse(error_body(str(error), status), status)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Wrong)
    return refusal(error)


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content)}\n\n"


def application(arbiter: Arbiter, serving: Serving) -> FastAPI:
    """The ASGI application; its engines are connected."""
    server = Server(arbiter, serving)
    app = FastAPI(title="vllm-specplus arbitrate")
    app.add_exception_handler(Wrong, _refused)
    key = [Depends(server.check_key)]
    for path, route, method, dependencies in (
        ("/v1/completions", server.completions, "POST", key),
        ("/v1/chat/completions", server.chats, "POST", key),
        ("/v1/models", server.models, "GET", key),
        ("/metrics", server.metrics, "GET", []),
        ("/health", server.health, "GET", []),
    ):
        app.add_api_route(
            path, route, methods=[method], dependencies=dependencies, response_model=None
        )
    return app
