"""``POST /v1/images/generations`` of ``vllm serve``, for image models of this project.

A ``vllm.endpoint_plugins`` entry point, which vLLM loads only if it is named::

    VLLM_PLUGINS=specplus,specplus_images vllm serve FOLDER --skip-tokenizer-init ...

The body is OpenAI's. ``prompt`` names a class of the model, or is a text for one that reads text;
beside OpenAI's own keys the body may hold ``guidance_scale``, ``seed``, ``temperature``, ``top_k``,
``top_p`` and ``vllm_xargs`` (see ``control/requests.py``). Pictures come back as PNG in
``b64_json``.
"""

from __future__ import annotations

import asyncio
import base64
import time
import uuid
from argparse import Namespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from vllm_specplus.control.requests import GUIDANCE
from vllm_specplus.engine.refusals import refusal
from vllm_specplus.image.pictures import Pictures, pictures_of

if TYPE_CHECKING:
    from starlette.datastructures import State
    from vllm.engine.protocol import EngineClient


class ImageRequest(BaseModel):
    """OpenAI's keys that mean something here, and our own."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1, le=64)] = 1
    response_format: Literal["b64_json"] = "b64_json"
    size: str | None = None
    user: str | None = None
    guidance_scale: float | None = None
    seed: int | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    vllm_xargs: dict[str, Any] = {}


class ImagesEndpoint:
    """vLLM's ``EndpointPlugin``."""

    name = "specplus_images"
    required_tasks = ("generate",)

    def __init__(self):
        self._engine: EngineClient | None = None
        self._pictures: Pictures | None = None

    def attach_router(self, app: FastAPI) -> None:
        app.add_api_route("/v1/images/generations", self._generations, methods=["POST"])

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace):
        if engine_client is None:
            return
        model = engine_client.model_config
        self._engine = engine_client
        self._pictures = pictures_of(model.hf_config, model.model)

    async def _generations(self, body: ImageRequest, raw: Request) -> JSONResponse:
        if self._pictures is None:
            return refusal("the model that is served makes no pictures", 404)
        pictures = self._pictures
        try:
            size = None if body.size == "auto" else body.size
            # In a thread: a text encoder takes its time.
            prompt, sampling = await asyncio.to_thread(pictures.request, body.prompt, size)
            read = prompt["prompt_embeds" if "prompt_embeds" in prompt else "prompt_token_ids"]
            tokens = len(read) + sampling["max_tokens"]
            most = self._engine.model_config.max_model_len
            if tokens > most:
                raise ValueError(
                    f"prompt and picture have {tokens} tokens, max_model_len is {most}"
                )
            for key in ("temperature", "top_k", "top_p"):
                if getattr(body, key) is not None:
                    sampling = sampling | {key: getattr(body, key)}
            sampling = pictures.defaults | sampling
            extra = dict(body.vllm_xargs)
            if body.guidance_scale is not None:
                extra[GUIDANCE] = body.guidance_scale
            made = await asyncio.gather(
                *(self._output(prompt, sampling, body.seed, extra, i) for i in range(body.n))
            )
        except ValueError as error:
            return refusal(str(error), 400)
        data = [
            {"b64_json": base64.b64encode(await asyncio.to_thread(pictures.png, each)).decode()}
            for each in made
        ]
        return JSONResponse({"created": int(time.time()), "data": data})

    async def _output(self, prompt, sampling: dict, seed: int | None, extra: dict, number: int):
        params = SamplingParams(
            seed=None if seed is None else seed + number,
            output_kind=RequestOutputKind.FINAL_ONLY, extra_args=extra or None, **sampling,
        )  # fmt: skip
        async for output in self._engine.generate(prompt, params, f"img-{uuid.uuid4().hex}"):
            last = output
        return last.outputs[0]
