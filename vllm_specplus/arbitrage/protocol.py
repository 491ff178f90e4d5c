"""What clients may ask, and what they are told: OpenAI's completions and chats, as far as answers
in steps can follow them. What would not be followed is refused."""

from __future__ import annotations

import time
import uuid
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from vllm_specplus.arbitrage.steps import End, Step
from vllm_specplus.strict import StrictModel, quoted, sentences, told

#: Keys that are vLLM's sampling parameters, and hold for every step alike.
SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class Wrong(ValueError):
    """A request that cannot be served, and why, in a sentence."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class StreamOptions(StrictModel):
    include_usage: bool = False
    continuous_usage_stats: Literal[False] = False


class Own(StrictModel):
    """Of the key ``arbitrage``, which is no key of OpenAI's."""

    threshold: float | None = None
    """Instead of the server's."""


class Message(StrictModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None


class Ask(StrictModel):
    """What both kinds of requests know."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Literal[1] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    user: str | None = None
    cache_salt: Annotated[str, Field(min_length=1)] | None = None
    arbitrage: Own = Own()

    @field_validator("stop")
    @classmethod
    def _stops_are_strings(cls, value: str | list[str] | None) -> str | list[str] | None:
        if value is not None and not all(value if isinstance(value, list) else [value]):
            raise ValueError("'stop' has an empty string, which would end every answer: remove it")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def sampling(self) -> dict[str, Any]:
        """Parameters of every step, as far as they were given."""
        given = {name: getattr(self, name) for name in SAMPLING}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def most(self) -> int | None:
        """Tokens of the answer."""
        return self.max_tokens

    @property
    @abstractmethod
    def problem(self) -> str:
        """The question, as the router knows it."""

    @abstractmethod
    def own(self) -> str | list[dict[str, Any]]:
        """What the models read: a text, or messages."""


class Completion(Ask):
    """``/v1/completions``."""

    prompt: str
    echo: Literal[False] = False

    @property
    def problem(self) -> str:
        return self.prompt

    def own(self) -> str:
        return self.prompt


class Chat(Ask):
    """``/v1/chat/completions``."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def problem(self) -> str:
        """What the user has said."""
        return "\n".join(each.content for each in self.messages if each.role == "user")

    def own(self) -> list[dict[str, Any]]:
        return [each.model_dump(exclude_none=True) for each in self.messages]


def parsed(model: type[Ask], body: Any) -> Any:
    """A request; Wrong says what in it cannot be."""
    if not isinstance(body, dict):
        raise Wrong(f"the body is {quoted(body)}: it must be a JSON object")
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise Wrong(told("the request", sentences(error, model))) from None


class Output:
    """The text of an answer as its client gets it: cut at the first of its stop strings, of which
    nothing is sent although they may begin in one step and end in the next."""

    def __init__(self, stops: Sequence[str]):
        self._stops = stops
        self._held = max(map(len, stops), default=1) - 1
        """Characters that may be the beginning of a stop string."""
        self._text = ""
        self._sent = 0
        self.stopped = False

    def add(self, piece: str) -> str:
        """What can be sent of the text, with ``piece`` behind it."""
        begin = max(len(self._text) - self._held, 0)
        self._text += piece
        found = [at for stop in self._stops if (at := self._text.find(stop, begin)) >= 0]
        if found:
            self.stopped = True
            self._text = self._text[: min(found)]
            return self.rest()
        return self._up_to(len(self._text) - self._held)

    def rest(self) -> str:
        """What has not been sent when the text is at its end."""
        return self._up_to(len(self._text))

    def _up_to(self, end: int) -> str:
        begin, self._sent = self._sent, max(self._sent, end)
        return self._text[begin : self._sent]


class Tally:
    """What an answer has come to."""

    def __init__(self):
        self.steps: list[Step] = []
        self.finish = "length"

    def add(self, step: Step, stopped: bool) -> None:
        """A step, and whether a stop string has ended the text in it."""
        self.steps.append(step)
        if stopped or step.end is End.ANSWER:
            self.finish = "stop"

    def usage(self) -> dict[str, int]:
        """What was written, and the prompt as the first step's writer has counted it."""
        tokens = sum(step.tokens for step in self.steps)
        read = self.steps[0].read if self.steps else 0
        return {
            "prompt_tokens": read, "completion_tokens": tokens, "total_tokens": read + tokens,
        }  # fmt: skip

    def told(self) -> dict[str, Any]:
        """Of the key ``arbitrage``: who wrote what."""
        return {"steps": [told_step(step) for step in self.steps]}


def told_step(step: Step) -> dict[str, Any]:
    """A step without its text."""
    return {
        "writer": str(step.writer), "tokens": step.tokens, "end": str(step.end),
        "score": step.score, "seconds": dict(step.seconds),
    }  # fmt: skip


class Format:
    """The objects of one answer, of either kind."""

    def __init__(self, chat: bool, model: str):
        self._chat = chat
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}", "object": kind,
            "created": int(time.time()), "model": model,
        }  # fmt: skip

    def whole(self, text: str, tally: Tally) -> dict[str, Any]:
        """The answer as one object."""
        said: Mapping[str, Any] = {"text": text}
        if self._chat:
            said = {"message": {"role": "assistant", "content": text}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": tally.finish}
        return {
            **self._head, "choices": [choice], "usage": tally.usage(), "arbitrage": tally.told(),
        }  # fmt: skip

    def chunk(self, text: str, step: Step | None = None, finish: str | None = None) -> dict:
        """A part of a stream: a step's text, or the end."""
        said: Mapping[str, Any] = {"text": text}
        if self._chat:
            said = {"delta": {"role": "assistant", "content": text}}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        chunk = self._streamed() | {"choices": [choice]}
        return chunk if step is None else chunk | {"arbitrage": told_step(step)}

    def usage(self, tally: Tally) -> dict[str, Any]:
        """The part of a stream that says what it came to."""
        return self._streamed() | {"choices": [], "usage": tally.usage()}

    def _streamed(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": kind}


def error_body(message: str, status: int) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
