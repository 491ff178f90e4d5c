"""What a request may write under ``specplus``."""

from __future__ import annotations

import json

import pytest

from vllm_specplus.control.requests import parse


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
        ({"nodes": 3}, "unknown key 'nodes' (allowed: enabled, max_nodes, lossless, cache_salt)"),
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
