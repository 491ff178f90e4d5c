"""Drafting methods, one file each. ``REGISTRY`` maps a method's name to its class."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm_specplus.proposers.base import Proposer

#: method name -> "module:class"; imported on use, so an unused method costs nothing.
REGISTRY: dict[str, str] = {
    "cspd": "vllm_specplus.proposers.cspd:Cspd",
    "draft_tree": "vllm_specplus.proposers.draft_tree:DraftTree",
    "eagle_tree": "vllm_specplus.proposers.eagle_tree:EagleTree",
    "early_exit": "vllm_specplus.proposers.early_exit:EarlyExit",
    "easyspec": "vllm_specplus.proposers.easyspec:EasySpec",
    "jacobi": "vllm_specplus.proposers.jacobi:Jacobi",
    "layer_skip": "vllm_specplus.proposers.layer_skip:LayerSkip",
    "rasd": "vllm_specplus.proposers.rasd:Rasd",
    "rest": "vllm_specplus.proposers.rest:Rest",
    "suffix_tree": "vllm_specplus.proposers.suffix_tree:SuffixTree",
    "token_recycling": "vllm_specplus.proposers.token_recycling:TokenRecycling",
}


def proposer_class(method: str) -> type[Proposer]:
    """The class registered for ``method``; KeyError when there is none."""
    module, _, name = REGISTRY[method].partition(":")
    return getattr(import_module(module), name)
