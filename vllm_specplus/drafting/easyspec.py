"""Layer-parallel drafting (EasySpec, arXiv 2502.02493).

A layer is ``x -> b = x + A(x) -> b + M(b)``. Where the draft has devices to spare, the
attentions of ``N`` consecutive layers read the *same* input and run at the same time::

    a_j = A_j(h), j in the group;   then in order:  h <- h + a_j;  h <- h + M_j(h)

which is close to the exact result, since hidden states change slowly from layer to layer.
The first and the last layer stay exact. Text is always read exactly (the paper's bonus
calibration): accepted nodes are read again with the next token, so that what the fuzzy
passes wrote is never built upon. The text that is output does not change: nodes are
verified against the distributions they were drawn from, fuzzy or not.

What the devices share is the *placement* (``division.py``, ``shards.py``):

* ``attentions``: the attentions of a group; MLPs, embedding and output layer are on the first;
* ``attentions_and_mlps``: the same, and every MLP and the vocabulary are divided among all;
* ``tensor_parallel``: every layer and the vocabulary are divided, nothing is fuzzy;
* ``one_device``: nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from vllm_specplus.drafting.division import Placement
from vllm_specplus.drafting.executor import DraftExecutor
from vllm_specplus.drafting.graphs import Record
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.passes import Attend, PagedAttention, Rows


def layer_groups(num_layers: int, size: int) -> list[range]:
    """Layers that run together: the first and the last alone, the others by ``size``."""
    middle = range(1, num_layers - 1)
    groups = [middle[i : i + size] for i in range(0, len(middle), size)]
    last = [range(num_layers - 1, num_layers)] if num_layers > 1 else []
    return [range(1), *groups, *last]


def groups_of(placement: Placement, num_layers: int, size: int) -> list[range]:
    """The groups of a pass over tree nodes; of one layer each where nothing is fuzzy."""
    fuzzy = placement in ("attentions", "attentions_and_mlps")
    return layer_groups(num_layers, size if fuzzy else 1)


@dataclass(slots=True)
class Given:
    """What the attentions of a pass take beside hidden states."""

    rotary: tuple[torch.Tensor, torch.Tensor]
    """cos and sin, of ``DraftModel.rotary``."""
    attend: Attend


class Parts:
    """The parts of a pass, and who computes them. Here: this process, one after the other, which
    is the reference. Hidden states are [T, hidden]."""

    def __init__(self, model: DraftModel, groups: list[range]):
        """``groups``: of layers, see :func:`groups_of`."""
        self.model, self._groups = model, groups

    def layers(self, tokens: torch.Tensor, given: Given, exact: bool) -> torch.Tensor:
        """Hidden states behind the last layer, of int64 [T] ``tokens``."""
        hidden = self.embed(tokens)
        for group in self._groups:
            if exact or len(group) == 1:
                for layer in group:
                    hidden = hidden + self.alone(layer, hidden, given)
                    hidden = hidden + self.feed(layer, hidden)
            else:
                for layer, a in zip(group, self.together(group, hidden, given), strict=True):
                    hidden = hidden + a
                    hidden = hidden + self.feed(layer, hidden)
        return hidden

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embedding of int64 [T]."""
        return self.model.embed(tokens)

    def alone(self, layer: int, hidden: torch.Tensor, given: Given) -> torch.Tensor:
        """A_j of its own input."""
        return self.model.attention(layer, hidden, given.rotary, given.attend)

    def together(self, layers: range, hidden: torch.Tensor, given: Given) -> list[torch.Tensor]:
        """A_j of the same input, for every layer of a group."""
        return [self.alone(layer, hidden, given) for layer in layers]

    def feed(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """M_j."""
        return self.model.mlp(layer, hidden)

    def logits(self, hidden: torch.Tensor, behind_level: bool) -> torch.Tensor:
        """Float32 [T, V]; ``behind_level``: of all rows of the level that ran last."""
        return self.model.logits(hidden)

    # What the other shards are told, if there are any.

    def begin(self, tokens: torch.Tensor, rows: Rows, exact: bool) -> None:
        """A pass over these rows is next."""

    def end(self) -> None:
        """All of it has been asked for: on a device it may still run."""

    def begin_recording(self, widths: list[int], max_requests: int) -> None:
        """Graphs of levels are recorded next, see ``LevelGraphs.record``."""


class LayerParallelExecutor(DraftExecutor):
    """A draft executor whose tree levels may be fuzzy, and whose passes may be shared."""

    model: DraftModel

    def __init__(self, parts: Parts, max_slots: int, max_nodes: int, record: Record | None = None):
        super().__init__(parts.model, max_slots, max_nodes, record)
        self.parts = parts
        self._level_hidden: torch.Tensor | None = None

    def warm_up(self, widths: Iterable[int], max_requests: int) -> None:
        graphs, self.graphs = self.graphs, None
        super().warm_up(widths, max_requests)
        self.graphs = graphs
        self.record(sorted(set(widths)), max_requests)

    def record(self, widths: list[int], max_requests: int) -> None:
        """Record graphs of levels on all shards: their layers, with the messages in between."""
        if self.graphs is not None:
            self.parts.begin_recording(widths, max_requests)
            self.record_here(widths, max_requests)

    def record_here(self, widths: list[int], max_requests: int) -> None:
        """Record this shard's part, which the others do at the same time."""
        like = self._inputs(Rows.of_text(self.cache, np.zeros((1, 1), np.int32), [(0, 1)]))
        self.graphs.record(widths, max_requests, like)

    def attach(self, parts: Parts) -> None:
        """Go on with other shards, which have read no text: nothing of a cache holds."""
        self.parts = parts
        self.cache.forget_texts()
        if self.graphs is not None:
            self.graphs.forget()  # they hold messages of the group that is gone

    def _level(self, active, own, parents, tokens, rows):
        self._level_hidden = self._forward(tokens, rows, exact=False)
        return self._level_hidden

    def _logits(self, hidden):
        return self.parts.logits(hidden, behind_level=hidden is self._level_hidden)

    def _forward(self, tokens, rows, exact):
        self.parts.begin(tokens, rows, exact)
        hidden = self.run(tokens, rows, exact)
        self.parts.end()
        return hidden

    @torch.inference_mode()
    def run(self, tokens: torch.Tensor, rows: Rows, exact: bool) -> torch.Tensor:
        """This shard's part in a pass; of home the hidden states [T, hidden]."""
        cos, sin = self.model.rotary(rows.positions)
        if self.graphs is None or exact:
            return self._run(rows, tokens, (cos, sin), exact)
        return self.graphs(rows, tokens, cos, sin)

    def _layers(self, rows, tokens, cos, sin):
        return self._run(rows, tokens, (cos, sin), exact=False)

    def _run(self, rows, tokens, rotary, exact):
        given = Given(rotary, PagedAttention(self.cache, rows))
        return self.parts.layers(tokens, given, exact)
