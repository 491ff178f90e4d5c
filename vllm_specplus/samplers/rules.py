"""What an acceptance rule is."""

from __future__ import annotations

from abc import ABC
from enum import Enum
from typing import ClassVar


class Nodes(Enum):
    """Where a node of a draft comes from."""

    DETERMINISTIC = "deterministic"
    """It is a function of the past: looked up, or the most probable."""
    DRAWN = "drawn"
    """It was drawn from a distribution of the draft's."""


class Rule(ABC):
    """Decides which nodes become text.

    A class is found by its name in ``samplers.registry``; its constructor takes the keys that a
    user may set, and what it ``needs``. Beside whatever serves, it has a ``reference``: the same
    decision, one node after another, as its paper writes it.
    """

    name: ClassVar[str]
    verifies: ClassVar[frozenset[Nodes]]
    """Nodes that it has an opinion on."""
    chains_only: ClassVar[bool] = False
    """May no row have two children?"""
    lossless: ClassVar[bool] = False
    """Does the output follow the target's distribution?"""
    needs: ClassVar[tuple[str, ...]] = ()
    """Arguments of its constructor that come from the engine: ``codebook``, a tensor [V, d] of
    an image model's codes; ``embeddings``, a function of no argument that returns those which the
    model reads them as, [V, hidden]; or ``device``, the target's."""
