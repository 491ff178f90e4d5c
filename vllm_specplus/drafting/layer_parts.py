"""Decoder layers, taken apart by what they compute.

A layer is taken for ``h = x + A(x)``, ``h + M(h)``, attention and MLP each with a norm before,
behind or on both sides. Which of its modules are what goes neither by names nor by the model's
family: the one that attends is A's, the other with parts is M's, those without are norms, and
every place of theirs is tried. What is right is what computes the same as the layer itself.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import nn

#: Norms are before attention, behind it, before the MLP or behind that.
PLACES = 4
#: Rows that a layer is tried with, and the largest relative difference of most of them: roundings
#: are smaller, another structure is further off.
TRIED, TOLERANCE = 8, 0.05


class UnknownLayers(ValueError):
    """The layers are not of the kind that can be left out or divided."""


#: What an attention takes beside the rows.
Given = TypeVar("Given")


class LayerParts(ABC, Generic[Given]):
    """The attention, the MLP and the norms of one decoder layer.

    A subclass says how the attention is called.
    """

    def __init__(self, layer: nn.Module, attends: Callable[[nn.Module], bool]):
        """``attends`` knows attentions. Raises UnknownLayers if the modules are others."""
        children = list(layer.children())
        attending = [each for each in children if attends(each)]
        feeding = [each for each in children if each not in attending and list(each.children())]
        bare = [each for each in children if each not in attending and each not in feeding]
        self.norms = [each for each in bare if not isinstance(each, nn.Dropout | nn.Identity)]
        if len(attending) != 1 or len(feeding) != 1 or len(self.norms) > PLACES:
            raise UnknownLayers(f"{type(layer).__name__} is not an attention, an MLP and norms")
        self.attention: nn.Module | None = attending[0]
        self.mlp: nn.Module | None = feeding[0]
        self.placed: list[nn.Module | None] = [None] * PLACES
        """The norm at each place."""

    @abstractmethod
    def mix(self, normed: torch.Tensor, given: Given) -> torch.Tensor:
        """Return the attention of ``normed`` rows [..., hidden]."""

    def transform(self, normed: torch.Tensor) -> torch.Tensor:
        """Return the MLP of ``normed`` rows [..., hidden]."""
        return self.mlp(normed)

    def attend(self, rows: torch.Tensor, given: Given) -> torch.Tensor:
        """Return A(x) of ``rows`` x [..., hidden]."""
        return self.behind_mix(self.mixed(rows, given))

    def feed(self, rows: torch.Tensor) -> torch.Tensor:
        """Return M(x) of ``rows`` x [..., hidden]."""
        return self.behind_transform(self.transformed(rows))

    # The two halves of each: what is divided among devices is summed in between.

    def mixed(self, rows: torch.Tensor, given: Given) -> torch.Tensor:
        """Return A(x) of ``rows`` x [..., hidden] without a norm behind the attention."""
        before = self.placed[0]
        return self.mix(rows if before is None else before(rows), given)

    def behind_mix(self, out: torch.Tensor) -> torch.Tensor:
        """Return A(x) of what :meth:`mixed` returned."""
        behind = self.placed[1]
        return out if behind is None else behind(out)

    def transformed(self, rows: torch.Tensor) -> torch.Tensor:
        """Return M(x) of ``rows`` x [..., hidden] without a norm behind the MLP."""
        before = self.placed[2]
        return self.transform(rows if before is None else before(rows))

    def behind_transform(self, out: torch.Tensor) -> torch.Tensor:
        """Return M(x) of what :meth:`transformed` returned."""
        behind = self.placed[3]
        return out if behind is None else behind(out)

    def place(self, rows: torch.Tensor, wanted: torch.Tensor, given: Given) -> None:
        """Put the norms where the parts make of ``rows`` what is ``wanted``, which is what the
        layer makes of them, both [..., hidden]; raise UnknownLayers if there is no such place."""
        for order in itertools.permutations(self.norms):
            for at in itertools.combinations(range(PLACES), len(order)):
                chosen = dict(zip(at, order, strict=True))
                self.placed = [chosen.get(place) for place in range(PLACES)]
                between = rows + self.attend(rows, given)
                if close(between + self.feed(between), wanted):
                    return
        raise UnknownLayers("they are not attention and MLP, each behind a norm and added")


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Do most rows [..., hidden] equal those that are ``wanted``, but for roundings?"""
    difference, size = (found - wanted).float().norm(dim=-1), wanted.float().norm(dim=-1)
    return bool((difference <= TOLERANCE * size).float().mean() > 0.5)
