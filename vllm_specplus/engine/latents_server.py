"""The images route for models of latents that vLLM cannot schedule, without an engine of vLLM's.

A masked model (MAR) reads its whole picture anew at every iteration, from both sides: there are no
keys and values to keep, no next token to schedule, and what an iteration reveals is anywhere in the
picture. Its pictures are made in whole batches instead (``image/continuous/batches.py``). To the
images route that is an engine like any other.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from fastapi import FastAPI
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_specplus.control import requests
from vllm_specplus.control.requests import GUIDANCE
from vllm_specplus.engine.image_service import ImageService
from vllm_specplus.engine.images_api import ImagesEndpoint
from vllm_specplus.image.continuous.batches import Batches, Wish
from vllm_specplus.image.continuous.causal import CausalLatentsConfig
from vllm_specplus.image.continuous.folder import LatentsFolder
from vllm_specplus.image.pictures import LatentPictures, as_logprobs
from vllm_specplus.strict import quoted


def pictures_in(folder: LatentsFolder) -> LatentPictures:
    """What a prompt means there, and what its output is as a picture: as for causal models."""
    labels = {label: str(label) for label in range(folder.num_classes)}
    prompts = CausalLatentsConfig(
        size=folder.size, num_classes=folder.num_classes, grid_size=round(folder.length**0.5),
        id2label=labels, label2id={name: label for label, name in labels.items()},
    )  # fmt: skip
    return LatentPictures(prompts, folder.vae)


class BatchEngine:
    """What the images route asks of vLLM's ``EngineClient``."""

    def __init__(self, batches: Batches, config: CausalLatentsConfig):
        length = batches.folder.length
        self.model_config = SimpleNamespace(hf_config=config, max_model_len=1 + length)
        self._batches, self._length = batches, length

    async def generate(
        self, prompt: Any, params: Any, request_id: str
    ) -> AsyncGenerator[SimpleNamespace]:
        """One output, the whole picture. ValueError with one sentence for what cannot be."""
        config, extra = self.model_config.hf_config, params.extra_args or {}
        requests.check_latents(params, config.size)
        if other := sorted(extra.keys() - {GUIDANCE}):
            raise ValueError(f"{quoted(other[0])} is for an engine of vLLM's: remove it")
        scale = requests.guidance(extra, possible=True)
        wish = Wish(
            label=prompt["prompt_token_ids"][0] - config.label_token(0),
            seed=random.getrandbits(63) if params.seed is None else params.seed,
            temperature=params.temperature,
            guidance_scale=self._batches.recipe.guidance_scale if scale is None else scale,
        )
        self._batches.ask(wish)
        latents = await asyncio.wrap_future(wish.made)
        yield SimpleNamespace(outputs=[SimpleNamespace(
            token_ids=[0] * self._length, logprobs=as_logprobs(latents), finish_reason="length"
        )])  # fmt: skip


class Names:
    """Of the one model."""

    def __init__(self, name: str):
        self._name = name

    def is_base_model(self, model_name: str) -> bool:
        return model_name == self._name

    def model_name(self) -> str:
        return self._name


def make_app(batches: Batches, name: str, api_key: str | None = None) -> FastAPI:
    """A server of the images route, ``/v1/models`` and ``/health``, of a model called ``name``."""
    pictures = pictures_in(batches.folder)
    app, endpoint = FastAPI(title="vllm-specplus"), ImagesEndpoint()
    app.state.args = SimpleNamespace(log_error_stack=False)  # vLLM's handlers ask for it
    endpoint.attach_router(app)
    endpoint.serve(ImageService(BatchEngine(batches, pictures.config), pictures), Names(name))
    init_exception_handler(app)
    if api_key:
        app.add_middleware(AuthenticationMiddleware, tokens=[api_key])

    @app.get("/health")
    async def health() -> None:
        """That it answers is the answer."""

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0,
                                            "owned_by": "vllm-specplus"}]}  # fmt: skip

    return app
