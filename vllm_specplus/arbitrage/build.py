"""An arbiter from what a user has named: addresses of servers, or folders of models."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from vllm_specplus.arbitrage.arbiter import Arbiter, Limits
from vllm_specplus.arbitrage.engines import (
    Classifier,
    Client,
    Endpoint,
    EndpointClassifier,
    Engine,
    EngineError,
    http_client,
)
from vllm_specplus.arbitrage.metrics import Metrics
from vllm_specplus.arbitrage.routers import Learnt
from vllm_specplus.arbitrage.steps import SEPARATOR
from vllm_specplus.strict import MOST_TOLD


@dataclass(frozen=True)
class Named:
    """A model as a user names it: ``http://host:port``, or a folder or name for an engine here."""

    place: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of an engine here."""

    @property
    def is_served(self) -> bool:
        return self.place.startswith(("http://", "https://"))


async def engine(
    what: str, named: Named, separator: str, http: httpx.AsyncClient, open_engines: ExitStack
) -> Engine:
    """A model that writes; EngineError says what is wrong. Engines here are closed by
    ``open_engines``."""
    if named.is_served:
        if named.arguments:
            raise EngineError(
                f"--{what}-arg is for an engine here, and --{what} is a server: remove it, or set "
                f"it where the server is started"
            )
        endpoint = Endpoint(Client(what, named.place, http), separator)
        await endpoint.connect()
        return endpoint
    from vllm_specplus.arbitrage.local import LocalEngine

    try:
        local = LocalEngine(named.place, separator, named.arguments)
    except Exception as error:  # of vLLM, whatever it is
        reason = (str(error).splitlines() or [type(error).__name__])[0][:MOST_TOLD]
        raise EngineError(f"the {what} {named.place} cannot be started: {reason}") from error
    open_engines.callback(local.close)
    return local


async def classifier(what: str, place: str, http: httpx.AsyncClient) -> Classifier:
    """A model that judges; EngineError says what is wrong."""
    named = Named(place)
    if named.is_served:
        endpoint = EndpointClassifier(Client(what, named.place, http))
        await endpoint.connect()
        return endpoint
    from vllm_specplus.arbitrage.local import LocalClassifier

    return LocalClassifier(Path(place))


@asynccontextmanager
async def arbiter(
    draft: Named, target: Named, router: str, limits: Limits, separator: str = SEPARATOR,
    api_key: str | None = None,
) -> AsyncIterator[Arbiter]:  # fmt: skip
    """All parts, connected; they are closed afterwards. ``api_key`` is shown to servers."""
    async with http_client(api_key) as http:
        with ExitStack() as open_engines:
            first, second = [
                await engine(what, named, separator, http, open_engines)
                for what, named in (("draft", draft), ("target", target))
            ]
            learnt = Learnt(await classifier("router", router, http))
            yield Arbiter(first, second, learnt, Metrics(), limits)
