"""Models that write steps: what an arbiter asks of one, and vLLM's servers as such."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import httpx

from vllm_specplus.arbitrage.steps import SEPARATOR, End, Written
from vllm_specplus.strict import quoted

#: Seconds until a server has to be reached, and until it has to have answered.
CONNECT, ANSWER = 5.0, 600.0


class EngineError(Exception):
    """An engine could not do what was asked, and why, in a sentence."""


class Refused(EngineError):
    """It will not do it, however often it is asked: the request is wrong, or too long for it."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Engine(Protocol):
    """A model that goes on behind a text."""

    name: str

    async def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text behind which the model answers a conversation, by its own template."""

    async def write(
        self, prompt: str, most: int | None, stop: Sequence[str], sampling: Mapping[str, Any],
        special_tokens: bool,
    ) -> Written:  # fmt: skip
        """One step behind ``prompt``, by vLLM's sampling parameters, among which may be a
        ``cache_salt``; of at most ``most`` tokens (None: as its context has room
        for), to the separator, one of the strings ``stop``, which is in the text then, or the
        model's own end. Refused or EngineError; a task that is cancelled stops the model."""


class Classifier(Protocol):
    """A model that says how likely the second of two labels is for a text."""

    async def probability(self, text: str, cache_salt: str | None = None) -> float:
        """In [0, 1], read at the text's last token; ``cache_salt`` as in ``Job``. EngineError."""


class Client:
    """Asks one server, with what went wrong in a sentence."""

    def __init__(self, what: str, url: str, http: httpx.AsyncClient):
        """``what`` names it to the user; ``url`` ends before ``/v1``."""
        self.what, self.url, self._http = what, url.rstrip("/").removesuffix("/v1"), http

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a body of JSON; Refused for 4xx, EngineError for all else."""
        return await self._ask("POST", path, json=body)

    async def first_model(self) -> dict[str, Any]:
        """What the server says of the first model that it serves; EngineError."""
        models = (await self._ask("GET", "/v1/models")).get("data")
        if not models:
            raise EngineError(f"the {self.what} at {self.url} serves no model: start it with one")
        return models[0]

    async def _ask(self, method: str, path: str, **what: Any) -> dict[str, Any]:
        try:
            response = await self._http.request(method, f"{self.url}{path}", **what)
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise EngineError(f"the {self.what} at {self.url} does not answer: {reason}") from None
        if 400 <= response.status_code < 500 and response.status_code != 429:
            told = _message(response)
            raise Refused(f"the {self.what} refuses: {told}", response.status_code)
        if response.status_code != 200:
            raise EngineError(
                f"the {self.what} at {self.url} answers {response.status_code}: "
                f"{_message(response)}"
            )
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise EngineError(f"the {self.what} at {self.url} answers what is no JSON object")
        return answer


def _message(response: httpx.Response) -> str:
    """What a server says of an error, in OpenAI's form or any."""
    try:
        body = response.json()
        error = body.get("error", body)
        return quoted(error["message"] if isinstance(error, dict) else error).strip("'\"")
    except (ValueError, KeyError, AttributeError):
        return quoted(response.text).strip("'\"")


def http_client(api_key: str | None = None) -> httpx.AsyncClient:
    """A client for any number of requests at once: how many run, the engines decide."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    timeout = httpx.Timeout(ANSWER, connect=CONNECT)
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return httpx.AsyncClient(limits=limits, timeout=timeout, headers=headers)


class Endpoint:
    """A model that ``vllm serve`` serves."""

    def __init__(self, client: Client, separator: str = SEPARATOR):
        self._client, self._separator = client, separator
        self.name = ""
        self._context: int | None = None

    async def connect(self) -> None:
        """Learns the model's name and how many tokens it can read; EngineError."""
        model = await self._client.first_model()
        self.name, self._context = model["id"], model.get("max_model_len")

    async def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        # vLLM renders the template for its tokenizer alone; text is what steps are appended to.
        body = {"model": self.name, "messages": list(messages), "add_generation_prompt": True}
        tokens = (await self._client.post("/tokenize", body))["tokens"]
        read = await self._client.post("/detokenize", {"model": self.name, "tokens": tokens})
        return read["prompt"]

    async def write(
        self, prompt: str, most: int | None, stop: Sequence[str], sampling: Mapping[str, Any],
        special_tokens: bool,
    ) -> Written:  # fmt: skip
        if most is not None and self._context is not None:
            most = min(most, self._context)  # vLLM refuses more, and cuts what has no room
        answer = await self._client.post(
            "/v1/completions",
            {
                "model": self.name, "prompt": prompt, "max_tokens": most,
                "stop": [self._separator, *stop], "include_stop_str_in_output": True,
                "add_special_tokens": special_tokens, **sampling,
            },
        )  # fmt: skip
        try:
            choice = answer["choices"][0]
            text, usage = choice["text"], answer["usage"]
            tokens, read = usage["completion_tokens"], usage["prompt_tokens"]
            end = end_of(choice["finish_reason"], text, self._separator)
        except (KeyError, IndexError, TypeError):
            raise EngineError(
                f"the {self._client.what} at {self._client.url} answers without text or usage: it "
                f"must be a server of vLLM"
            ) from None
        return Written(text, tokens, end, read)


def end_of(reason: str | None, text: str, separator: str) -> End:
    """Why a step ends, by vLLM's reason and what it has written."""
    if reason == "length":
        return End.LENGTH
    if reason != "stop":
        raise EngineError(f"a step ended by {quoted(reason)}: the engine has given it up")
    # Whatever else ended it, a text that ends with the separator is a whole step.
    return End.SEPARATOR if text.endswith(separator) else End.ANSWER


class EndpointClassifier:
    """A classifier that ``vllm serve --runner pooling`` serves."""

    def __init__(self, client: Client):
        self._client = client
        self._name = ""

    async def connect(self) -> None:
        """Learns the model's name; EngineError."""
        self._name = (await self._client.first_model())["id"]

    async def probability(self, text: str, cache_salt: str | None = None) -> float:
        # Of a text that is too long, the end is what is judged.
        body = {
            "model": self._name, "input": text, "truncate_prompt_tokens": -1,
            "truncation_side": "left",
        }  # fmt: skip
        if cache_salt is not None:
            body["cache_salt"] = cache_salt
        answer = await self._client.post("/classify", body)
        try:
            first = answer["data"][0]["probs"]
            if len(first) != 2:
                raise EngineError(
                    f"the {self._client.what} knows {len(first)} labels: it must know two, of "
                    f"which the second says to escalate"
                )
            return float(first[1])
        except (KeyError, IndexError, TypeError, ValueError):
            raise EngineError(
                f"the {self._client.what} at {self._client.url} answers without probabilities: "
                f"serve it with vllm serve FOLDER --runner pooling"
            ) from None
