"""The route that changes how much is drafted, with vLLM's own check of the API key before it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

from vllm_specplus.engine.control_api import PATH, ControlEndpoint

KEY = {"Authorization": "Bearer key"}


class Engine:
    """Answers for the workers."""

    def __init__(self):
        self.changes = []

    async def collective_rpc(self, method, args):
        assert method == "control_speculation"
        self.changes.append(args[0])
        if args[0].get("objective") == "slo" and "tpot_ms" not in args[0]:
            return [{"refused": "a target is missing"}]
        return [{"policy": "goodput", **args[0]}] * 2


def client(engine, api_key):
    app, endpoint = FastAPI(), ControlEndpoint()
    endpoint.attach_router(app)
    if api_key:
        app.add_middleware(AuthenticationMiddleware, tokens=api_key)
    asyncio.run(endpoint.init_state(engine, None, SimpleNamespace(api_key=api_key)))
    return TestClient(app)


@pytest.fixture
def engine():
    return Engine()


def test_with_the_key_it_asks_and_changes(engine):
    server = client(engine, ["key"])
    assert server.get(PATH, headers=KEY).json() == {"policy": "goodput"}
    change = {"mode": "shadow", "objective": "slo", "tpot_ms": 30}
    assert server.post(PATH, headers=KEY, json=change).json() == {"policy": "goodput", **change}
    assert engine.changes == [{}, change]


def test_without_the_key_nobody_changes_anything(engine):
    assert client(engine, ["key"]).post(PATH, json={"mode": "off"}).status_code == 401
    answer = client(engine, None).post(PATH, json={"mode": "off"})
    assert answer.status_code == 403
    assert "--api-key" in answer.json()["error"]["message"]
    assert engine.changes == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("", "no JSON"),
        ("[" * 50_000, "no JSON"),
        ("[]", "control"),
        ('{"mod": "off"}', "did you mean 'mode'"),
        ('{"mode": "of"}', "'on', 'off' or 'shadow'"),
        ('{"tpot_ms": -1}', "greater than 0"),
        ('{"objective": "slo"}', "a target is missing"),
    ],
)
def test_mistakes_are_one_sentence(engine, body, words):
    answer = client(engine, ["key"]).post(PATH, headers=KEY, content=body)
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert words in message
    assert len(message) < 400
    assert "\n" not in message
