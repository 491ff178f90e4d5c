"""What users ask of vLLM beside plain text, on a real model: SmolLM2-135M."""

from __future__ import annotations

import json

import pytest

from tests.engine import harness

pytestmark = pytest.mark.engine

#: Fixed: how much is drafted by measured time would make what the counters show a matter of luck.
SPEC = {
    "method": "token_recycling", "num_speculative_tokens": 8, "control": {"policy": "fixed"},
}  # fmt: skip
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"type": "string", "maxLength": 20},
        "capital": {"type": "boolean"},
    },
    "required": ["city", "country", "capital"],
    "additionalProperties": False,
}
QUESTIONS = [
    "Name the planets of the solar system in order.",
    "Write a short story about a fox and a crow.",
    "Explain how rain forms.",
    "List ten animals that live in the sea.",
    "What is a prime number? Give the first ten.",
    "Write a Python function that adds two numbers.",
    "Describe a day at the beach in four sentences.",
    "Why is the sky blue?",
]


def chat(question: str) -> str:
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


ORDINARY = [[chat(q), {"temperature": 0, "max_tokens": 64}] for q in QUESTIONS[:4]]
STOPS = [
    [chat(QUESTIONS[0]), {"temperature": 0, "max_tokens": 64, "stop": ["Mars", "Earth"]}],
    [chat(QUESTIONS[1]), {"temperature": 0, "max_tokens": 64, "stop": [" the f", "."]}],
    [
        chat(QUESTIONS[2]),
        {"temperature": 0, "max_tokens": 64, "stop": ["water"], "include_stop_str_in_output": True},
    ],
]
CHOICES = [
    [chat(q), {"n": 2, "seed": 5 + i, "temperature": 0.8, "top_p": 0.9, "max_tokens": 32}]
    for i, q in enumerate(QUESTIONS[4:6])
]
STRUCTURED = [
    [chat(f"Describe {city} as JSON."), {"temperature": 0, "max_tokens": 80, "json_schema": SCHEMA}]
    for city in ("Paris", "Sydney")
]
#: The last batch puts schema requests beside ordinary ones.
BATCHES = [{"requests": r} for r in (STOPS, CHOICES, ORDINARY, STRUCTURED + ORDINARY)]


@pytest.fixture(scope="module")
def engine() -> dict:
    from vllm_specplus.cli.model import prepare_model

    return {"model": str(prepare_model()), "enforce_eager": True, "max_model_len": 512}


@pytest.fixture(scope="module")
def plain(tmp_path_factory, engine) -> dict:
    engine = engine | {"dtype": "float32"}
    return harness.run(tmp_path_factory.mktemp("plain"), engine, BATCHES)


@pytest.fixture(scope="module")
def speculative(tmp_path_factory, engine) -> dict:
    engine = engine | {"dtype": "float32", "speculative_config": SPEC}
    return harness.run(tmp_path_factory.mktemp("speculative"), engine, BATCHES)


def test_stop_strings(plain, speculative):
    """A stop string may end inside what one step accepted: the text is cut at the same place."""
    for got, want in zip(speculative["batches"][0], plain["batches"][0], strict=False):
        assert got["text"] == want["text"]
        assert got["finish"] == want["finish"] == ["stop"]
    assert speculative["batches"][0][2]["text"][0].endswith("water")


def test_several_choices_of_one_prompt(plain, speculative):
    for got, want in zip(speculative["batches"][1], plain["batches"][1], strict=False):
        assert got["ids"] == want["ids"]
        assert len(got["ids"]) == 2
        assert got["ids"][0] != got["ids"][1]


def test_greedy_text(plain, speculative):
    assert harness.ids(speculative, 2) == harness.ids(plain, 2)


def test_json_schema_beside_ordinary_requests(plain, speculative):
    assert harness.ids(speculative, 3) == harness.ids(plain, 3)
    for request in speculative["batches"][3][: len(STRUCTURED)]:
        assert set(json.loads(request["text"][0])) == set(SCHEMA["required"])
    counters = speculative["counters"]
    assert counters["chain_fallbacks:structured_output"] > 0
    assert counters["nodes_accepted"] > 0
    assert counters["kv_slots_moved"] > 0  # only a tree's path has gaps to close
    assert counters["draft_failures"] == 0


def test_bfloat16_differs_only_at_near_ties(tmp_path, engine):
    """Rows of another batch shape are rounded another way; nothing more may happen."""
    requests = [[chat(q), {"temperature": 0, "max_tokens": 48, "logprobs": 5}] for q in QUESTIONS]
    engine = engine | {"dtype": "bfloat16"}
    plain = harness.run(tmp_path, engine, [{"requests": requests}])
    speculative = harness.run(
        tmp_path,
        engine | {"speculative_config": SPEC},
        [{"requests": requests}],
    )
    assert speculative["counters"]["nodes_accepted"] > 0
    identical = 0
    for got, want in zip(speculative["batches"][0], plain["batches"][0], strict=False):
        a, b = got["ids"][0], want["ids"][0]
        identical += a == b
        first = next(
            (i for i, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None
        )
        if first is None:
            assert a == b
            continue
        plainly = want["logprobs"][0][first]
        assert str(a[first]) in plainly
        margin = max(plainly.values()) - plainly[str(a[first])]
        assert margin < 0.5, f"token {first}: {got['text']} != {want['text']}"
    assert identical >= len(requests) // 4  # 5 of 8 where this was written
