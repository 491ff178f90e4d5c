"""What may be asked of ``POST /v1/images/generations``: OpenAI's body, and keys of our own.

All keys and values that OpenAI's client has are known here. Some say how a picture is drawn
(``size``) or sent (``output_format``), some are wishes that are admitted and change nothing
(``quality``), and what no model here can do is refused (transparency, drawings, films).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, model_validator

from vllm_specplus.control import requests
from vllm_specplus.control.requests import GUIDANCE
from vllm_specplus.strict import StrictModel

#: Most characters of a prompt; OpenAI's.
MOST_PROMPT = 32_000
#: Most pictures of a request.
MOST_PICTURES = 64
#: Seeds have 64 bits. vLLM takes this one for none.
SEEDS, NO_SEED = 2**63, -1

Word = Annotated[str, Field(max_length=512)]


class ImageRequest(StrictModel):
    """The body. Null is the default of every key."""

    prompt: Annotated[str, Field(min_length=1, max_length=MOST_PROMPT)]
    """Names a class of the model, or is a text for one that reads text."""
    model: Word | None = None
    """One that the server has; None: its own."""
    n: Annotated[int, Field(ge=1, le=MOST_PICTURES)] = 1
    size: Word = "auto"
    """WIDTHxHEIGHT; "auto" is the model's own."""
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    """Quality of a JPEG or WebP."""
    stream: bool = False
    """Send events instead of one answer."""
    partial_images: Annotated[int, Field(ge=0, le=3)] = 0
    """Events, of every picture, that show as much of it as is drawn."""
    # Wishes that change nothing.
    quality: Literal["auto", "standard", "hd", "low", "medium", "high", "xhigh", "max"] = "auto"
    style: Literal["vivid", "natural"] | None = None
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    complexity: Literal["low", "medium", "high"] | None = None
    user: Word | None = None
    safety_identifier: Word | None = None
    # Our own.
    guidance_scale: float | None = None
    """None: the model's own. Its bounds are those of other routes, see ``control/requests.py``."""
    seed: Annotated[int, Field(ge=-SEEDS, lt=SEEDS)] | None = None
    """Of the first picture, see :meth:`seeds`."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    vllm_xargs: Annotated[dict[str, Any], Field(default_factory=dict)]
    """See ``control/requests.py``."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, given: Any) -> Any:
        if isinstance(given, dict):
            return {key: value for key, value in given.items() if value is not None}
        return given

    @model_validator(mode="after")
    def _goes_together(self):
        if self.output_format == "png" and self.output_compression != 100:
            raise ValueError("'output_compression' is for 'jpeg' and 'webp': set 'output_format'")
        if self.partial_images and not self.stream:
            raise ValueError("'partial_images' are events: set 'stream' to true")
        if self.stream and self.response_format == "url":
            raise ValueError("events hold pictures: set 'response_format' to 'b64_json'")
        if (self.seeds()[-1] or 0) >= SEEDS:
            raise ValueError(f"the last picture's seed would be above {SEEDS - 1}: lower 'seed'")
        return self

    @model_validator(mode="after")
    def _reaches_the_engine(self):
        """What the engine's processes cannot be sent, or would refuse."""
        try:
            msgspec.msgpack.encode(self.extra_args())
        except (OverflowError, RecursionError):
            raise ValueError("'vllm_xargs' has a number of over 64 bits, or is too deep") from None
        requests.parse(self.extra_args())
        requests.guidance(self.extra_args(), possible=True)
        return self

    def seeds(self) -> list[int | None]:
        """Every picture's own: ``seed`` and the next higher ones, but for the one that is none;
        None where there is no ``seed``."""
        if self.seed in (None, NO_SEED):
            return [None] * self.n
        first = self.seed
        past = max(NO_SEED - first, 0) if first < NO_SEED else self.n
        return [first + i + (i >= past) for i in range(self.n)]

    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that are asked for."""
        asked = {key: getattr(self, key) for key in ("temperature", "top_k", "top_p")}
        return {key: value for key, value in asked.items() if value is not None}

    def extra_args(self) -> dict[str, Any]:
        """``extra_args`` of vLLM's ``SamplingParams``."""
        own = {} if self.guidance_scale is None else {GUIDANCE: self.guidance_scale}
        return self.vllm_xargs | own
