"""``POST /v1/images/generations`` of ``vllm serve``, for image models of this project.

A ``vllm.endpoint_plugins`` entry point, which vLLM loads only if it is named::

    VLLM_PLUGINS=specplus,specplus_images vllm serve FOLDER --skip-tokenizer-init ...

The body is OpenAI's with some keys of our own (``image_requests.py``). Pictures come in the answer,
as events, or by links below ``/images/``, where no API key is asked for: names cannot be guessed.
"""

from __future__ import annotations

import asyncio
import json
import time
from argparse import Namespace
from typing import TYPE_CHECKING, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import ValidationError
from vllm.entrypoints.serve.utils.api_utils import load_aware_call, with_cancellation
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive

from vllm_specplus.engine.image_requests import ImageRequest
from vllm_specplus.engine.image_service import ImageService, Made, Order, UnfinishedError
from vllm_specplus.engine.picture_links import PictureLinks
from vllm_specplus.engine.refusals import refusal
from vllm_specplus.image.pictures import pictures_of
from vllm_specplus.strict import quoted, sentences, told

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient

PATH, LINKED = "/v1/images/generations", "/images/{name}"
_SCHEMA = {"content": {"application/json": {"schema": ImageRequest.model_json_schema()}}}


class Models(Protocol):
    """What a server has, as vLLM's ``OpenAIServingModels``."""

    def is_base_model(self, model_name: str) -> bool: ...

    def model_name(self) -> str: ...


class ImagesEndpoint:
    """vLLM's ``EndpointPlugin``."""

    name = "specplus_images"
    required_tasks = ("generate",)

    def __init__(self):
        self._service: ImageService | None = None
        self._models: Models | None = None
        self._links: PictureLinks | None = None
        self._keep_alive = 0.0

    def attach_router(self, app: FastAPI) -> None:
        described = {"requestBody": {"required": True, **_SCHEMA}}
        app.add_api_route(PATH, self._generations, methods=["POST"], openapi_extra=described)
        app.add_api_route(LINKED, self._linked, methods=["GET"], name="specplus_image")

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace):
        if engine_client is None:
            return
        model = engine_client.model_config
        pictures = pictures_of(model.hf_config, model.model)
        if pictures is None:
            return
        # Whichever of several processes is asked for a link, one of them has the picture.
        alone = (getattr(args, "api_server_count", None) or 1) == 1
        self.serve(ImageService(engine_client, pictures), state.openai_serving_models, alone)
        self._keep_alive = float(getattr(args, "sse_keep_alive_interval", 0))

    def serve(self, service: ImageService, models: Models, alone: bool = True) -> None:
        """From now on, by the names that ``models`` knows; ``alone``: is this process asked for
        all links?"""
        self._service, self._models = service, models
        self._links = PictureLinks() if alone else None

    async def _generations(self, raw: Request) -> Response:
        if self._service is None:
            return refusal("the model that is served makes no pictures", 404)
        try:
            body = ImageRequest.model_validate(json.loads(await raw.body()))
        except ValidationError as error:
            return refusal(told("images", sentences(error, ImageRequest)), 400)
        except (ValueError, RecursionError):
            return refusal('the body is no JSON: send for example {"prompt": "7"}', 400)
        if body.model is not None and not self._models.is_base_model(body.model):
            served = quoted(self._models.model_name())
            return refusal(f"the model {quoted(body.model)} is not served here, {served} is", 404)
        if body.response_format == "url" and self._links is None:
            return refusal(
                "links are for servers with one API process, and this has several: set "
                "'response_format' to 'b64_json'", 400,
            )  # fmt: skip
        return await self._answer(body=body, raw_request=raw)

    @with_cancellation
    @load_aware_call
    async def _answer(self, body: ImageRequest, raw_request: Request) -> Response:
        """vLLM's own wrappers end it when the client leaves, and count it as load."""
        try:
            order = await self._service.order(body)
            if body.stream:
                events = with_sse_keep_alive(self._service.events(order), self._keep_alive)
                return StreamingResponse(events, media_type="text/event-stream")
            made, urls = await self._service.make(order), None
            if body.response_format == "url":
                names = self._links.put([each.content for each in made], order.kind)
                urls = [str(raw_request.url_for("specplus_image", name=name)) for name in names]
            # In a thread: pictures are megabytes of text.
            return await asyncio.to_thread(_answer_of, order, made, urls)
        except ValueError as error:
            return refusal(str(error), 400)
        except UnfinishedError as error:
            return refusal(str(error), 500)

    async def _linked(self, name: str) -> Response:
        kept = None if self._links is None else self._links.get(name)
        if kept is None:
            return refusal("there is no such picture, or no more: links last for an hour", 404)
        return Response(kept.content, media_type=f"image/{kept.kind}")


def _answer_of(order: Order, made: list[Made], urls: list[str] | None) -> JSONResponse:
    data = [{"url": url} for url in urls] if urls else [{"b64_json": each.text} for each in made]
    return JSONResponse({
        "created": int(time.time()), "data": data, "background": "opaque",
        "output_format": order.kind, "size": made[0].size, "usage": order.usage(len(made)),
    })  # fmt: skip
