"""What a user may write is documented: every key of every method, rule, policy and request."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import pytest
from pydantic import BaseModel, Field, create_model

from vllm_specplus import registry
from vllm_specplus.config import AcceptanceConfig, MethodConfig
from vllm_specplus.control.requests import RequestControls
from vllm_specplus.control.settings import ControlConfig
from vllm_specplus.training.recipes import RECIPES, recipe_file

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METHODS = [
    registry.config_class(each.name)
    for each in registry.methods()
    if each.package == "vllm-specplus"
]
#: Models of keys, and the key whose value says which of them is meant.
CHOICES = {
    **dict.fromkeys(METHODS, "method"),
    **dict.fromkeys(get_args(AcceptanceConfig), "rule"),
    **dict.fromkeys(get_args(ControlConfig), "policy"),
}


def passages() -> Iterator[str]:
    """The paragraphs of all pages, and the rows of their tables."""
    for page in PAGES:
        for block in re.split(r"\n\s*\n", page.read_text(encoding="utf-8")):
            yield from block.splitlines() if re.search(r"^\|", block, re.MULTILINE) else [block]


def named(passage: str) -> set[str]:
    """Words in spans of code and strings of JSON: a word of prose names no key."""
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", passage)
    words = {word for span in spans for word in re.findall(r"[\w+]+", span)}
    return words | set(re.findall(r'"([\w+]+)"', passage))


@pytest.fixture(scope="module")
def documented() -> list[set[str]]:
    return [named(each) for each in passages()]


def keys(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()}


def undocumented(model: type[BaseModel], choice: str, documented: list[set[str]]) -> set[str]:
    """Keys of a model's own that stand nowhere beside the name by which it is chosen."""
    field = model.model_fields[choice]
    name = field.default if isinstance(field.default, str) else get_args(field.annotation)[0]
    others = {each for each in model.__mro__[1:] if each in CHOICES or each is MethodConfig}
    own = keys(model).difference({choice}, *map(keys, others))
    return own.difference(*(words for words in documented if name in words))


@pytest.mark.parametrize("model", CHOICES, ids=lambda model: model.__name__)
def test_every_key_is_documented_beside_what_it_is_of(documented, model):
    assert undocumented(model, CHOICES[model], documented) == set()


@pytest.mark.parametrize("model", [MethodConfig, RequestControls])
def test_keys_of_all_methods_and_of_requests_are_documented(documented, model):
    assert keys(model).difference(*documented) == set()


@pytest.mark.parametrize("name", RECIPES)
def test_every_setting_of_a_recipe_is_documented_beside_it(documented, name):
    own = keys(recipe_file(name).Settings)
    assert own.difference(*(words for words in documented if name in words)) == set()


def test_a_key_without_documentation_is_found(documented):
    planted = create_model(
        "Planted",
        __base__=MethodConfig,
        method=(Literal["suffix_tree"], "suffix_tree"),
        max_depth=(int, 1),
        planted_key=(int, 1),
        lambda_=(int, Field(1, alias="lambda")),  # documented, but of another thing
    )
    assert undocumented(planted, "method", documented) == {"planted_key", "lambda"}


def test_only_code_names_keys():
    passage = 'the tree of `top_k` and `"pair_keys": true`, {"method": "lantern++"}'
    assert named(passage) == {"top_k", "pair_keys", "true", "method", "lantern++"}
