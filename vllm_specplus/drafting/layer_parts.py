"""Decoder layers, taken apart by what they compute.

A layer is taken for ``h = x + A(x)``, ``h + M(h)``, attention and MLP each with a norm before,
behind or on both sides. Which of its modules are what goes neither by names nor by the model's
family: the one that attends is A's, the other with parts is M's, those without are norms, and
every place of theirs is tried. What is right is what computes the same as the layer itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

#: Norms are before attention, behind it, before the MLP or behind that.
PLACES = 4
#: Rows that a layer is tried with, and the largest relative difference of most of them: roundings
#: are smaller, another structure is further off.
TRIED, TOLERANCE = 8, 0.05
#: [PLACES] the norm at each place.
Norms = Sequence[nn.Module | None]


class UnknownLayers(ValueError):
    """The layers are not of the kind that can be left out or divided."""


def parts(
    layer: nn.Module, attends: Callable[[nn.Module], bool]
) -> tuple[nn.Module, nn.Module, list[nn.Module]]:
    """Return the attention, the MLP and the norms of a layer; ``attends`` knows attentions."""
    children = list(layer.children())
    attending = [each for each in children if attends(each)]
    feeding = [each for each in children if each not in attending and list(each.children())]
    bare = [each for each in children if each not in attending and each not in feeding]
    norms = [each for each in bare if not isinstance(each, nn.Dropout | nn.Identity)]
    if len(attending) != 1 or len(feeding) != 1 or len(norms) > PLACES:
        raise UnknownLayers(f"{type(layer).__name__} is not an attention, an MLP and norms")
    return attending[0], feeding[0], norms


def find_places(norms: Sequence[nn.Module], agrees: Callable[[Norms], bool]) -> Norms:
    """Return the places of ``norms`` with which the parts agree with their layer; raise
    UnknownLayers if there are none."""
    for order in itertools.permutations(norms):
        for at in itertools.combinations(range(PLACES), len(order)):
            chosen = dict(zip(at, order, strict=True))
            placed = [chosen.get(place) for place in range(PLACES)]
            if agrees(placed):
                return placed
    raise UnknownLayers("they are not attention and MLP, each behind a norm and added")


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Do most rows [..., hidden] equal those that are ``wanted``, but for roundings?"""
    difference, size = (found - wanted).float().norm(dim=-1), wanted.float().norm(dim=-1)
    return bool((difference <= TOLERANCE * size).float().mean() > 0.5)
