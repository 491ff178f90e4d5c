"""What a request may write under ``specplus``."""

from __future__ import annotations

import json

import pytest

from vllm_specplus.control import requests
from vllm_specplus.control.requests import RequestControls, check_latents, guidance, parse


@pytest.mark.parametrize(
    ("extra_args", "limit"),
    [
        (None, None),
        ({}, None),
        ({"other": 1}, None),
        ({"specplus": {}}, None),
        ({"specplus": {"enabled": True}}, None),
        ({"specplus": {"enabled": False}}, 0),
        ({"specplus": {"max_nodes": 8}}, 8),
        ({"specplus": {"max_nodes": 0}}, 0),
        ({"specplus": {"enabled": False, "max_nodes": 8}}, 0),
    ],
)
def test_limits(extra_args, limit):
    assert parse(extra_args).limit == limit
    if extra_args and "specplus" in extra_args:  # as vllm_xargs carries it
        assert parse({"specplus": json.dumps(extra_args["specplus"])}).limit == limit


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"max_nodes": -1}, "specplus: 'max_nodes' is -1: input should be greater than"),
        ({"max_nodes": 81}, "'max_nodes' is 81: input should be less than or equal to 80"),
        ({"max_nodes": "8"}, "'max_nodes' is '8': input should be a valid integer"),
        ({"enabled": "no"}, "'enabled' is 'no': input should be a valid boolean"),
        ({"cache_salt": 3}, "'cache_salt' is 3: input should be a valid string"),
        ({"enabled": 0}, "'enabled' is 0: input should be a valid boolean"),
        ({"nodes": 3}, "unknown key 'nodes', did you mean 'max_nodes'? (allowed: enabled, max_"),
        ({"x": 3}, "unknown key 'x' (allowed: enabled, max_nodes, lossless, tpot_ms, cache_salt)"),
        (3, 'must be an object such as {"max_nodes": 8}, not 3'),
        ("{", "not valid JSON"),
        ("[1]", "must be an object"),
    ],
)
def test_mistakes_are_one_sentence(value, words):
    with pytest.raises(ValueError, match=r"^specplus: ") as error:
        parse({"specplus": value})
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_guidance():
    assert guidance(None, possible=False) is None
    assert guidance({"specplus": {}}, possible=False) is None
    assert guidance({"guidance_scale": 3}, possible=True) == 3.0
    assert guidance({"guidance_scale": 0.0}, possible=True) == 0.0


@pytest.mark.parametrize("value", [-0.5, "3", True, float("nan"), float("inf"), 1e39, 10**400, [1]])
def test_guidance_is_a_number(value):
    with pytest.raises(
        ValueError, match=r"guidance_scale is .*: it must be a number from 0 to 1000"
    ):
        guidance({"guidance_scale": value}, possible=True)


def test_guidance_needs_a_model_that_has_it():
    with pytest.raises(ValueError, match="guidance_scale is for image models with guidance"):
        guidance({"guidance_scale": 3.0}, possible=False)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0: latents are drawn"),
        ({"logprobs": None}, "logprobs is None: latents come back in their place"),
        ({"logprobs": 3}, "set it to 4"),
        ({"top_k": 5}, "top_k is for tokens"),
        ({"top_p": 0.9}, "top_p is for tokens"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is for tokens"),
        ({"stop_token_ids": [0]}, "stop_token_ids is for tokens"),
        ({"allowed_token_ids": [0]}, "allowed_token_ids is for tokens"),
        ({"prompt_logprobs": 1}, "prompt_logprobs is for tokens"),
        ({"min_tokens": 4}, "min_tokens is for tokens"),
    ],
)
def test_requests_for_latents(keys, words):
    from vllm import SamplingParams

    check_latents(SamplingParams(logprobs=4, seed=3, temperature=0.7, top_k=-1, n=2), 4)
    with pytest.raises(ValueError, match=words):
        check_latents(SamplingParams(**{"logprobs": 4} | keys), 4)


@pytest.mark.parametrize(
    ("extra_args", "controls"),
    [
        ({"specplus.enabled": False}, {"enabled": False}),
        ({"specplus.enabled": 0}, {"enabled": False}),  # what vllm_xargs makes of false
        ({"specplus.enabled": 0.0}, {"enabled": False}),
        ({"specplus.enabled": "false"}, {"enabled": False}),
        ({"specplus.max_nodes": 8}, {"max_nodes": 8}),
        ({"specplus.max_nodes": 8.0}, {"max_nodes": 8}),
        ({"specplus.max_nodes": "8"}, {"max_nodes": 8}),
        ({"specplus.cache_salt": "a"}, {"cache_salt": "a"}),
        ({"specplus.lossless": 1, "other": 3}, {"lossless": True}),
        ({"specplus": '{"max_nodes": 3}', "specplus.enabled": True}, {"max_nodes": 3}),
        ({"specplus": {"max_nodes": 3}, "specplus.cache_salt": ""}, {"max_nodes": 3}),
    ],
)  # fmt: skip
def test_flat_keys(extra_args, controls):
    assert parse(extra_args) == RequestControls(**controls)


@pytest.mark.parametrize(
    ("extra_args", "words"),
    [
        ({"specplus.max_node": 3}, "unknown key 'max_node', did you mean 'max_nodes'? (allowed:"),
        ({"specplus_enabled": False}, "unknown key 'specplus_enabled': write 'specplus.enabled'"),
        ({"specplus.": 1}, "unknown key ''"),
        ({"specplus.max_nodes": 8.5}, "'max_nodes' is 8.5: input should be a valid integer"),
        ({"specplus.enabled": 2}, "'enabled' is 2: input should be a valid boolean"),
        ({"specplus": {"max_nodes": 3}, "specplus.max_nodes": 3}, "'max_nodes' is given twice"),
        ({"specplus": "[" * 50_000}, "not valid JSON"),
        ({"specplus": "9" * 50_000}, "not valid JSON"),
        ({"specplus": {"x" * 50_000: 1}}, "unknown key 'xxx"),
        ({"specplus": {"cache_salt": "x" * 50_000}}, "at most 256 characters"),
    ],
)
def test_mistakes_in_flat_keys_are_one_sentence(extra_args, words):
    with pytest.raises(ValueError, match=r"^specplus: ") as error:
        parse(extra_args)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 400


@pytest.mark.parametrize(
    ("given", "salt", "expected"),
    [
        (None, None, ""),
        ({"specplus": {"cache_salt": "ours"}}, None, "ours"),
        ({"specplus": {"cache_salt": "ours"}}, "vllm's", "vllm's"),
        ({requests.SALT: "another's"}, None, ""),  # a client must not write it itself
        ({requests.SALT: "another's"}, "mine", "mine"),
        (None, f"{requests.CAPTION}12 ", ""),
        (None, f"{requests.CAPTION}12 a b", "a b"),
    ],
)
def test_vllms_salt_reaches_the_worker(given, salt, expected):
    carried = requests.carry_salt(given, salt)
    assert requests.salt_of(carried, requests.parse(carried)) == expected
    assert salt or given is None or requests.SALT not in carried
