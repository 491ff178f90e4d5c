"""Pictures of a request: asked of the engine, decoded, and made files of.

The engine draws a request's pictures side by side. Whatever ends the request, a client that leaves
or one picture that fails, ends all of it. Decoding is work of the front end, in threads of which
there are no more than the cores carry: a picture of Chameleon's 768 pixels takes gigabytes.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError
from vllm.logger import init_logger
from vllm.sampling_params import RequestOutputKind

from vllm_specplus.engine.image_requests import ImageRequest
from vllm_specplus.engine.refusals import error_body
from vllm_specplus.image.pictures import Output, Pictures, encoded

if TYPE_CHECKING:
    from vllm.engine.protocol import EngineClient
    from vllm.outputs import CompletionOutput

logger = init_logger(__name__)

#: Most pictures that are decoded at a time.
MOST_DECODED = 4


class UnfinishedError(RuntimeError):
    """The engine ended a request before its picture was whole."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the engine is asked for."""

    prompt: Any
    prompt_tokens: int
    picture_tokens: int
    sampling: dict[str, Any]
    """Of all pictures."""
    seeds: list[int | None]
    """One for each."""
    kind: str
    """Format of the files."""
    quality: int
    partial: int
    """Events before each picture's last."""

    def check(self, output: Output, ended: str | None) -> None:
        """Raises :class:`UnfinishedError` if ``output``, which ``ended`` so, is no whole
        picture."""
        if len(output.token_ids) != self.picture_tokens:
            raise UnfinishedError(
                f"a picture ended after {len(output.token_ids)} of its {self.picture_tokens} "
                f"tokens ({ended}): ask again"
            )

    def usage(self, pictures: int) -> dict[str, Any]:
        """OpenAI's account of tokens."""
        drawn = pictures * self.picture_tokens
        return {
            "input_tokens": self.prompt_tokens, "output_tokens": drawn,
            "total_tokens": self.prompt_tokens + drawn,
            "input_tokens_details": {"text_tokens": self.prompt_tokens, "image_tokens": 0},
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Made:
    """A picture's file."""

    content: bytes
    size: str
    """WIDTHxHEIGHT"""

    @property
    def text(self) -> str:
        return base64.b64encode(self.content).decode()


@dataclass(slots=True)
class Drawn:
    """What a request that is answered bit by bit has generated so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Mapping[int, Any]] = field(default_factory=list)

    def add(self, more: CompletionOutput) -> None:
        self.token_ids += more.token_ids
        self.logprobs += more.logprobs or ()


def decoders() -> int:
    """How many pictures are decoded at a time: as many as there are cores for the threads that
    torch gives each, and at most :data:`MOST_DECODED`."""
    counted = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if counted else os.cpu_count() or 1
    return max(1, min(MOST_DECODED, cores // torch.get_num_threads()))


class ImageService:
    """Of one engine and its model."""

    def __init__(self, engine: EngineClient, pictures: Pictures):
        self._engine, self._pictures = engine, pictures
        # A text encoder takes its time, too, and no prompt should wait for a picture.
        self._reading = ThreadPoolExecutor(1, "prompts")
        self._decoding = ThreadPoolExecutor(decoders(), "pictures")

    async def order(self, body: ImageRequest) -> Order:
        """ValueError with one sentence if the model makes no such picture."""
        size = None if body.size == "auto" else body.size
        prompt, needed = await self._in(self._reading, self._pictures.request, body.prompt, size)
        read = prompt["prompt_embeds" if "prompt_embeds" in prompt else "prompt_token_ids"]
        tokens, most = len(read) + needed["max_tokens"], self._engine.model_config.max_model_len
        if tokens > most:
            raise ValueError(f"prompt and picture have {tokens} tokens, max_model_len is {most}")
        return Order(
            prompt, len(read), needed["max_tokens"],
            self._pictures.defaults | needed | body.sampling()
            | {"extra_args": body.extra_args() or None},
            body.seeds(), body.output_format, body.output_compression, body.partial_images,
        )  # fmt: skip

    async def make(self, order: Order) -> list[Made]:
        """All pictures. The first failure is raised, and ends the others."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._make_one(order, seed)) for seed in order.seeds]
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return [task.result() for task in tasks]

    async def events(self, order: Order) -> AsyncGenerator[str]:
        """The same as server-sent events, OpenAI's ``image_generation.partial_image`` and
        ``image_generation.completed``; ``index`` says which of the pictures is meant. An error is
        the last event."""
        ready: asyncio.Queue[str | None] = asyncio.Queue()

        async def make() -> None:
            try:
                async with asyncio.TaskGroup() as group:
                    for index, seed in enumerate(order.seeds):
                        group.create_task(self._follow_one(order, seed, index, ready.put_nowait))
            except ExceptionGroup as failed:
                ready.put_nowait(_event("error", _told(failed.exceptions[0])))
            finally:
                ready.put_nowait(None)

        making = asyncio.create_task(make())
        try:
            while (event := await ready.get()) is not None:
                yield event
        finally:
            making.cancel()  # the client may have left

    async def _make_one(self, order: Order, seed: int | None) -> Made:
        async with aclosing(self._generate(order, seed, RequestOutputKind.FINAL_ONLY)) as outputs:
            async for last in outputs:
                output = last
        order.check(output, output.finish_reason)
        return await self._in(self._decoding, self._decode, order, output)

    async def _follow_one(
        self, order: Order, seed: int | None, index: int, tell: Callable[[str], None]
    ) -> None:
        kind = RequestOutputKind.DELTA if order.partial else RequestOutputKind.FINAL_ONLY
        drawn, shown, ended = Drawn(), 0, None
        async with aclosing(self._generate(order, seed, kind)) as outputs:
            async for output in outputs:
                drawn.add(output)
                ended = output.finish_reason
                # Of equal parts of a picture, the last one that is drawn: events do not queue up.
                part = len(drawn.token_ids) * (order.partial + 1) // order.picture_tokens
                if shown < part <= order.partial:
                    shown = part
                    event = await self._in(self._decoding, self._part, order, drawn, index, part)
                    if event is not None:
                        tell(event)
        order.check(drawn, ended)
        tell(await self._in(self._decoding, self._completed, order, drawn, index))

    async def _generate(
        self, order: Order, seed: int | None, kind: RequestOutputKind
    ) -> AsyncGenerator[CompletionOutput]:
        """What a picture's request says; ends it in the engine when it is closed."""
        params = SamplingParams(seed=seed, output_kind=kind, **order.sampling)
        name = f"img-{uuid.uuid4().hex}"
        async with aclosing(self._engine.generate(order.prompt, params, name)) as outputs:
            async for output in outputs:
                yield output.outputs[0]

    # In threads: decoding, and putting megabytes into words.

    def _decode(self, order: Order, output: Any) -> Made:
        return _made(order, self._pictures.pixels(output))

    def _completed(self, order: Order, drawn: Drawn, index: int) -> str:
        made = self._decode(order, drawn)
        return _picture_event(order, "completed", index, made, usage=order.usage(1))

    def _part(self, order: Order, drawn: Drawn, index: int, part: int) -> str | None:
        pixels = self._pictures.beginning(drawn, order.picture_tokens)
        if pixels is None:
            return None
        made = _made(order, pixels)
        return _picture_event(order, "partial_image", index, made, partial_image_index=part - 1)

    @staticmethod
    async def _in(threads: ThreadPoolExecutor, function: Callable, *arguments: Any) -> Any:
        """Waits for one of ``threads`` to call it. Cancelled before its turn it is not called."""
        return await asyncio.get_running_loop().run_in_executor(threads, function, *arguments)


def _made(order: Order, pixels: np.ndarray) -> Made:
    height, width = pixels.shape[:2]
    return Made(encoded(pixels, order.kind, order.quality), f"{width}x{height}")


def _picture_event(order: Order, name: str, index: int, made: Made, **keys: Any) -> str:
    name = f"image_generation.{name}"
    return _event(name, {
        "type": name, "index": index, "b64_json": made.text, "background": "opaque",
        "created_at": int(time.time()), "quality": "auto", "output_format": order.kind,
        "size": made.size, **keys,
    })  # fmt: skip


def _event(name: str, content: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(content)}\n\n"


def _told(error: BaseException) -> dict[str, Any]:
    """What a client is told of an error when its answer has begun."""
    if isinstance(error, UnfinishedError):
        return error_body(str(error), 500)
    if isinstance(error, ValueError | VLLMClientError):
        return error_body(str(error), 400)
    logger.error("a picture failed", exc_info=error)
    return error_body("the picture could not be made", 500)
