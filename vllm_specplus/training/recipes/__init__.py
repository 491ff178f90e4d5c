"""Recipes by name; a file is imported when it is asked for."""

from __future__ import annotations

import importlib
from types import ModuleType

from vllm_specplus.strict import nearest, quoted
from vllm_specplus.training.errors import TrainingError

#: Name -> module; see ``training/recipe.py`` for what is in one.
RECIPES = {
    name: f"{__name__}.{name}"
    for name in (
        "acceptance_head",
        "dflash",
        "distill",
        "eagle",
        "eagle3",
        "judge",
        "layerskip",
        "long_draft",
        "router",
        "spec_ee",
    )
}


def recipe_file(name: str) -> ModuleType:
    """The module of a recipe; TrainingError for an unknown name."""
    if name not in RECIPES:
        meant = nearest(name, RECIPES)
        hint = f", did you mean {meant!r}?" if meant else ""
        raise TrainingError(f"unknown recipe {quoted(name)}{hint} (allowed: {', '.join(RECIPES)})")
    return importlib.import_module(RECIPES[name])
