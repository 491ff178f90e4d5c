"""``/v1/specplus/control`` of ``vllm serve``: how much is drafted, changed while serving.

A ``vllm.endpoint_plugins`` entry point, which vLLM loads only if it is named. It answers only where
the server has an API key::

    VLLM_PLUGINS=specplus,specplus_control vllm serve MODEL --api-key KEY --speculative-config ...
    curl -H "Authorization: Bearer KEY" localhost:8000/v1/specplus/control -d '{"mode": "off"}'

GET says what holds; POST changes it from the next step on, by the keys of
``control.settings.ControlChange``, in all engines of the server.
"""

from __future__ import annotations

import json
from argparse import Namespace
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from vllm import envs

from vllm_specplus.control.settings import ControlChange
from vllm_specplus.engine.refusals import refusal
from vllm_specplus.strict import sentences, told

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

PATH = "/v1/specplus/control"


class ControlEndpoint:
    """vLLM's ``EndpointPlugin``."""

    name = "specplus_control"
    required_tasks = ("generate",)

    def __init__(self):
        self._engine: EngineClient | None = None
        self._guarded = False

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route(PATH, self._ask, methods=["GET"])
        app.add_api_route(PATH, self._change, methods=["POST"])

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace):
        self._engine = engine_client
        # vLLM's middleware then asks for it on every path below /v1.
        self._guarded = bool(getattr(args, "api_key", None) or envs.VLLM_API_KEY)

    async def _ask(self) -> JSONResponse:
        return await self._call({})

    async def _change(self, raw: Request) -> JSONResponse:
        try:
            change = ControlChange.model_validate(json.loads(await raw.body()))
        except ValidationError as error:
            return refusal(told("control", sentences(error, ControlChange)), 400)
        except (ValueError, RecursionError):
            return refusal('the body is no JSON: send for example {"mode": "off"}', 400)
        return await self._call(change.model_dump(exclude_none=True))

    async def _call(self, change: dict[str, Any]) -> JSONResponse:
        if not self._guarded:
            return refusal("the server has no API key: start it with --api-key", 403)
        if self._engine is None:
            return refusal("no engine is served here", 404)
        # The rank that drafts answers first; the others hold the same.
        answer = (await self._engine.collective_rpc("control_speculation", args=(change,)))[0]
        if "refused" in answer:
            return refusal(answer["refused"], 400)
        return JSONResponse(answer)
