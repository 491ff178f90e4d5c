"""Whatever is written under ``--speculative-config``, and whatever its files hold: it is taken, or
answered with one sentence. Nothing else comes out, however deep, long or broken it is."""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.datastores import build_datastore
from tests.drafting.test_drafting import save_draft
from vllm_specplus import registry, speculative_config
from vllm_specplus.config import MethodConfig, parse
from vllm_specplus.control import requests
from vllm_specplus.control.cost import CostCurve, CostProfile
from vllm_specplus.proposer import Services
from vllm_specplus.strict import MOST_TOLD

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([10**400, -(10**30), 1e308, "x" * 5000, "a\0b", "..", "/", "a\nb"])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
METHODS = registry.method_names()
FILES = ("cost_file", "load_matrix", "datastore", "config.json", "weights")
MANY = settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def answer(raw: object) -> MethodConfig | str | None:
    """The config, what the user is told, or None: it is left to vLLM."""
    try:
        ours = speculative_config.ours(SimpleNamespace(speculative_config=raw))
        return None if ours is None else parse(ours)
    except ValueError as error:
        return str(error)


def told_of(read: Callable[[dict], object], extra_args: dict) -> str | None:
    """What ``read`` says of a request, None: it is taken."""
    try:
        read(extra_args)
    except ValueError as error:
        return str(error)
    return None


def is_good(told: MethodConfig | str | None) -> bool:
    if isinstance(told, str):
        return len(told) <= MOST_TOLD and told.isprintable() and len(told.split()) > 4
    return told is None or isinstance(told, MethodConfig)


@MANY
@given(VALUES)
@example({1: 2})
def test_any_value(raw):
    assert is_good(answer(raw))


@pytest.mark.parametrize("depth", [10, 100, 900])
def test_values_of_any_depth(depth):
    """As deep as Python reads JSON; apart from the others, since hypothesis cannot print them."""
    deep = nested(depth)
    method = {"method": "token_recycling"}
    for raw in (
        deep, {"method": deep}, {"a": deep}, method | {"a": deep}, method | {"top_k": deep},
        method | {"control": {"policy": deep}}, {"method": "rasd", "sources": deep},
    ):  # fmt: skip
        told = answer(raw)
        assert isinstance(told, str)
        assert is_good(told)
    assert is_good(told_of(requests.parse, {"specplus": deep}))
    assert is_good(told_of(requests.parse, {"specplus.max_nodes": deep}))
    assert is_good(told_of(lambda extra: requests.guidance(extra, True), {"guidance_scale": deep}))


def keys_of(method: str) -> list[str]:
    return [field.alias or key for key, field in registry.config_class(method).model_fields.items()]


@pytest.mark.slow
@MANY
@given(st.data())
def test_any_value_of_any_key_of_any_method(data):
    method = data.draw(st.sampled_from(METHODS))
    known = st.sampled_from(keys_of(method)) | st.text(string.ascii_lowercase + "_-.", max_size=12)
    raw = data.draw(st.dictionaries(known, VALUES, max_size=4))
    assert is_good(answer(raw | {"method": method}))


@pytest.mark.parametrize("method", METHODS)
def test_every_number_has_a_largest(method):
    """A size that no machine has is a slip of the keyboard."""
    schema = registry.config_class(method).model_json_schema()
    shapes = [schema, *schema.get("$defs", {}).values()]
    numbers = [
        (key, shape)
        for each in shapes
        for key, field in each.get("properties", {}).items()
        for shape in (field, field.get("items", {}), *field.get("anyOf", []))
        if shape.get("type") in ("integer", "number")
    ]
    assert numbers
    for key, shape in numbers:
        assert shape.keys() & {"maximum", "exclusiveMaximum"}, key


@MANY
@given(VALUES, st.booleans())
@example("[" * 50_000, False)
def test_any_controls_of_a_request(value, flat):
    key = "specplus.max_nodes" if flat else "specplus"
    assert is_good(told_of(requests.parse, {key: value}))


@MANY
@given(VALUES)
def test_any_guidance_of_a_request(value):
    args = {"guidance_scale": value}
    assert is_good(told_of(lambda extra: requests.guidance(extra, possible=True), args))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, tuple[Path, dict]]:
    """File that may be damaged -> and a config that names it or its folder."""
    root = tmp_path_factory.mktemp("files")
    cost = root / "cost.json"
    curve = CostCurve(np.array([1, 2]), np.array([0.1, 0.2]))
    CostProfile(curve).save(cost, {"model": "m"})
    matrix = root / "matrix.safetensors"
    keys = {"method": "token_recycling", "pair_keys": False}
    proposer = registry.method_class("token_recycling")(parse(keys), Services(vocab_size=9))
    proposer.save(str(matrix))
    store = build_datastore(root / "store", [[1, 2, 3]], 9)
    draft = Path(save_draft(root, layers=1, vocab=32))
    named = {"method": "draft_tree", "model": str(draft)}
    goodput = {"policy": "goodput", "cost_file": str(cost)}
    return {
        "cost_file": (cost, {"method": "token_recycling", "control": goodput}),
        "load_matrix": (matrix, keys | {"load_matrix": str(matrix)}),
        "datastore": (store / "manifest.json", {"method": "rest", "datastore": str(store)}),
        "config.json": (draft / "config.json", named),
        "weights": (draft / "model.safetensors", named),
    }


@pytest.mark.parametrize("name", FILES)
def test_whole_files_are_taken(files, name):
    assert isinstance(answer(files[name][1]), MethodConfig)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@MANY
@given(data=st.data())
def test_files_that_are_cut_short_or_changed(files, name, data):
    path, raw = files[name]
    whole = path.read_bytes()
    head = min(len(whole), 3000)  # where it says what follows
    damaged = bytearray(whole)
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, head)) :]
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            damaged[data.draw(st.integers(0, min(len(damaged), head) - 1))] ^= data.draw(
                st.integers(1, 255)
            )
    path.write_bytes(damaged)
    try:
        assert is_good(answer(raw))
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("name", sorted({*FILES} - {"datastore"}))
@pytest.mark.parametrize("content", [b"", b"\0" * 64, b"[]", b"3", b"\xff" * 64, b"[" * 100_000])
def test_files_of_something_else_are_refused(files, name, content):
    path, raw = files[name]
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        told = answer(raw)
        assert isinstance(told, str)
        assert is_good(told)
    finally:
        path.write_bytes(whole)


def test_a_traceback_or_a_page_would_be_noticed():
    assert not is_good("x" * 401)
    assert not is_good("one validation error\nfor TokenRecyclingConfig and more")
    assert not is_good(json.dumps("KeyError"))
