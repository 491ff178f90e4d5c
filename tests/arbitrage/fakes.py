"""Servers that write what a test says, as vLLM's do: a token is a character."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

TEMPLATE = "<{}>"


class FakeModel:
    """``vllm serve`` with a model that knows one answer to everything.

    It goes on with ``says(text)``, all that it would write behind a text. ``faults`` are HTTP
    statuses of the next answers, 200 for good ones; when they are used up, all are good.
    """

    def __init__(
        self, name: str, says: Callable[[str], str], context: int = 10_000, template: str = TEMPLATE
    ):
        self.name, self.says, self.context, self.template = name, says, context, template
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.faults: list[int] = []
        self.seconds = 0.0
        self.running = self.most_running = self.left_alone = 0
        self.app = FastAPI()
        for path, route in (
            ("/v1/completions", self.completions),
            ("/tokenize", self.tokenize),
            ("/detokenize", self.detokenize),
        ):
            self.app.add_api_route(path, route, methods=["POST"], response_model=None)
        self.app.add_api_route("/v1/models", self.models)

    @property
    def prompts(self) -> list[str]:
        return [body["prompt"] for body in self.asked]

    async def models(self):
        return {"data": [{"id": self.name, "max_model_len": self.context}]}

    async def tokenize(self, request: Request):
        messages = (await request.json())["messages"]
        if not self.template:
            return error(400, "there is no chat template")
        text = "".join(self.template.format(each["content"]) for each in messages)
        return {"tokens": [ord(each) for each in text], "count": len(text)}

    async def detokenize(self, request: Request):
        return {"prompt": "".join(map(chr, (await request.json())["tokens"]))}

    async def completions(self, request: Request):
        body = await request.json()
        self.asked.append(body)
        self.keys.append(request.headers.get("Authorization"))
        status = self.faults.pop(0) if self.faults else 200
        if status != 200:
            return error(status, f"fault {status}")
        prompt, most = body["prompt"], body["max_tokens"]
        room = self.context - len(prompt)
        if room < 0:
            return error(400, "maximum context length")
        if not await self.busy(request):
            return JSONResponse(None)
        text, reason = self.says(prompt), "stop"
        ends = [at + len(each) for each in body["stop"] if (at := text.find(each)) >= 0]
        text = text[: min(ends, default=len(text))]
        if len(text) > (most := min(most, room)):
            text, reason = text[:most], "length"
        choice = {"index": 0, "text": text, "finish_reason": reason}
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(text)}
        return {"choices": [choice], "usage": usage}

    async def busy(self, request: Request) -> bool:
        """Takes its time; False if the client has left meanwhile, which is counted."""
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for _ in range(int(self.seconds / 0.01)):
                await asyncio.sleep(0.01)
                if await request.is_disconnected():
                    self.left_alone += 1
                    return False
            return True
        finally:
            self.running -= 1


class FakeRouter:
    """``vllm serve --runner pooling`` with a classifier that scores as ``says`` it."""

    def __init__(self, says: Callable[[str], float]):
        self.says = says
        self.asked: list[str] = []
        self.salts: list[str | None] = []
        self.faults: list[int] = []
        self.app = FastAPI()
        self.app.add_api_route("/classify", self.classify, methods=["POST"], response_model=None)
        self.app.add_api_route("/v1/models", self.models)

    async def models(self):
        return {"data": [{"id": "router"}]}

    async def classify(self, request: Request):
        body = await request.json()
        self.asked.append(body["input"])
        self.salts.append(body.get("cache_salt"))
        if self.faults and (status := self.faults.pop(0)) != 200:
            return error(status, f"fault {status}")
        share = self.says(body["input"])
        return {"data": [{"index": 0, "probs": [1 - share, share], "num_classes": 2}]}


def error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


def script(question: str, *steps: str) -> Callable[[str], str]:
    """A model whose answer to ``question`` has these steps, whoever has written those before: what
    it goes on with, it counts by separators."""

    def says(text: str) -> str:
        begun = text.partition(question)[2].removeprefix(">").removeprefix("\n")
        return "\n\n".join(steps[begun.count("\n\n") :])

    return says


def recital(question: str, full: str) -> Callable[[str], str]:
    """A model that recites one text, from as many characters on as stand there already."""

    def says(text: str) -> str:
        return full[len(text.partition(question)[2].removeprefix("\n")) :]

    return says
