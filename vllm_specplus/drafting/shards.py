"""A draft on several shards: what each computes of a pass, and what home tells the others.

Shard 0, *home*, is the process of the target; the others, *owners*, hold what ``division.py``
gives them, and the keys and values of their attentions. Home announces what is next, from host to
host, so that an owner that waits for work keeps no device busy; the integers of a pass' rows
follow, and then its hidden states:

* ``attentions``: fuzzy, one broadcast of the input and one gather of the results per group with
  layers elsewhere; exact, two point-to-point copies per layer elsewhere;
* ``attentions_and_mlps``: all shards hold the hidden states. Fuzzy, one all-gather per group;
  exact, one broadcast per layer; and in both one all-reduce per MLP and for the embedding;
* ``tensor_parallel``: two all-reduces per layer, and one for the embedding.

Where the vocabulary is divided, home gathers the logits.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_specplus.drafting.division import (
    PLACEMENTS,
    Placement,
    layer_owner,
    layers_of,
    share_of,
)
from vllm_specplus.drafting.easyspec import LayerParallelExecutor, Parts, groups_of
from vllm_specplus.drafting.graphs import Record
from vllm_specplus.drafting.group import Group
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.passes import Rows

#: What home announces: passes over levels and over text, logits of rows that only home has, graphs
#: to record, another placement, and the last one.
_LEVEL, _TEXT, _OUTPUT, _RECORD, _PLACE, _SETTLE = range(6)
_TOLD = 1 + Rows.SIZES


@dataclass(frozen=True, slots=True)
class Plan:
    """What all shards know in advance."""

    model: str
    """Folder or name on the hub, as the user wrote it."""
    fingerprint: str
    """Of the draft (``memory.fingerprint``): all nodes must have the same."""
    dtype: str
    head_tokens: int | None
    max_slots: int
    max_nodes: int
    group_size: int
    shards: int
    placement: Placement | Literal["auto"]
    """"auto": home tries several (``trial.py``) and says."""
    graphs: bool = False
    """Are levels recorded as CUDA graphs?"""


class Shared(Parts):
    """Home's side of passes that owners take part in."""

    def __init__(self, model: DraftModel, groups: list[range], group: Group):
        super().__init__(model, groups)
        self._group = group

    def begin(self, tokens, rows, exact):
        self._group.check()
        sizes, raw = rows.packed()
        tell(self._group, _TEXT if exact else _LEVEL, *sizes)
        # A copy, as in ``Rows.packed``: one token of any stride passes for contiguous.
        own = tokens.clone(memory_format=torch.contiguous_format).view(torch.uint8)
        self._group.broadcast(torch.cat([own, raw]))

    def end(self):
        self._group.watch()

    def begin_recording(self, widths, max_requests):
        tell(self._group, _RECORD, max_requests, len(widths))
        self._group.announce(torch.tensor(widths))


class ApartAttentions(Shared):
    """``attentions``, home's side."""

    def __init__(self, model: DraftModel, groups: list[range], group: Group, group_size: int):
        super().__init__(model, groups, group)
        self._group_size = group_size

    def _owner(self, layer: int) -> int:
        return layer_owner(layer, self.model.num_layers, self._group_size, self._group.size)

    def together(self, layers, hidden, given):
        owners = [self._owner(layer) for layer in layers]
        if not any(owners):
            return super().together(layers, hidden, given)
        self._group.broadcast(hidden.contiguous())
        own = [
            super(ApartAttentions, self).alone(layer, hidden, given)
            for layer, owner in zip(layers, owners, strict=True)
            if owner == 0
        ]
        parts = self._group.gather(_stacked(own, _most(owners), hidden))
        return _in_order(owners, [own, *parts[1:]])

    def alone(self, layer, hidden, given):
        owner = self._owner(layer)
        if owner == 0:
            return super().alone(layer, hidden, given)
        self._group.send(hidden.contiguous(), owner)
        return self._group.receive(torch.empty_like(hidden), owner)


class ServedAttentions(ApartAttentions):
    """``attentions``, an owner's side: its attentions and no more."""

    def layers(self, tokens, given, exact):
        model, rank = self.model, self._group.rank
        hidden = torch.empty(
            len(tokens), model.config.hidden_size, dtype=model.dtype, device=model.device
        )
        for layers in self._groups:
            owners = [self._owner(layer) for layer in layers]
            own = [layer for layer, owner in zip(layers, owners, strict=True) if owner == rank]
            if exact or len(layers) == 1:
                for layer in own:
                    self._group.receive(hidden, 0)
                    out = model.attention(layer, hidden, given.rotary, given.attend)
                    self._group.send(out.contiguous(), 0)
            elif any(owners):
                self._group.broadcast(hidden)
                out = [model.attention(each, hidden, given.rotary, given.attend) for each in own]
                self._group.gather(_stacked(out, _most(owners), hidden))
        return hidden

    def logits(self, hidden, behind_level):
        return hidden  # home's alone


class DividedMlps(ApartAttentions):
    """``attentions_and_mlps``: the same on every shard, all of which hold the hidden states."""

    def embed(self, tokens):
        return self._group.all_reduce(self.model.embed_share(tokens))

    def together(self, layers, hidden, given):
        owners = [self._owner(layer) for layer in layers]
        own = [
            self.model.attention(layer, hidden, given.rotary, given.attend)
            for layer, owner in zip(layers, owners, strict=True)
            if owner == self._group.rank
        ]
        parts = self._group.all_gather(_stacked(own, _most(owners), hidden))
        return _in_order(owners, parts)

    def alone(self, layer, hidden, given):
        owner = self._owner(layer)
        if owner == self._group.rank:
            out = self.model.attention(layer, hidden, given.rotary, given.attend).contiguous()
        else:
            out = torch.empty_like(hidden)
        return self._group.broadcast(out, owner)

    def feed(self, layer, hidden):
        total = self._group.all_reduce(self.model.mlp_share(layer, hidden).contiguous())
        return self.model.behind_mlp(layer, total)

    def logits(self, hidden, behind_level):
        home = self._group.rank == 0
        if home and not behind_level:
            tell(self._group, _OUTPUT, len(hidden))
            self._group.broadcast(hidden.contiguous())
        shares = self._group.gather(self.model.logits_share(hidden).contiguous())
        if not home:
            return hidden
        self._group.watch()
        return self.model.whole_logits(shares)


class DividedLayers(DividedMlps):
    """``tensor_parallel``: attentions are divided by heads too."""

    def alone(self, layer, hidden, given):
        share = self.model.mixed(layer, hidden, given.rotary, given.attend)
        return self.model.behind_attention(layer, self._group.all_reduce(share.contiguous()))


def parts_of(placement: Placement, model: DraftModel, group: Group, group_size: int) -> Parts:
    """One shard's side of a placement, with its share of the draft."""
    groups = groups_of(placement, model.num_layers, group_size)
    if placement == "one_device":
        return Parts(model, groups)
    if placement == "attentions":
        kind = ServedAttentions if group.rank else ApartAttentions
        return kind(model, groups, group, group_size)
    kind = DividedMlps if placement == "attentions_and_mlps" else DividedLayers
    return kind(model, groups, group, group_size)


def _most(owners: list[int]) -> int:
    """Every shard sends as many results as the busiest one has."""
    return max(map(owners.count, owners))


def _stacked(results: list[torch.Tensor], count: int, like: torch.Tensor) -> torch.Tensor:
    """[count, T, d], padded with zeros."""
    out = like.new_zeros(count, *like.shape)
    for i, result in enumerate(results):
        out[i] = result
    return out


def _in_order(owners: list[int], parts) -> list[torch.Tensor]:
    """Results in the order of the layers: of each owner's ``parts`` one after the other."""
    taken = [iter(part) for part in parts]
    return [next(taken[owner]) for owner in owners]


class Shard:
    """One shard's share of a draft and its executor, whichever placement it is."""

    def __init__(self, plan: Plan, whole: DraftModel, group: Group, record: Record | None):
        """``record`` as ``DraftExecutor``'s."""
        self._plan, self._whole, self._group, self._record = plan, whole, group, record

    def place(
        self, placement: Placement, max_slots: int, settle: bool = True
    ) -> LayerParallelExecutor:
        """Take this shard's share, with a cache of ``max_slots``. ``settle``: for good, the whole
        draft is let go. Home tells the others, unless the plan does."""
        plan, rank = self._plan, self._group.rank
        if not rank and plan.placement == "auto":
            kind = _SETTLE if settle else _PLACE
            tell(self._group, kind, PLACEMENTS.index(placement), max_slots)
        share = share_of(self._whole, placement, rank, plan.shards, plan.group_size)
        if settle:
            self._whole = None
        share.quicken()
        parts = parts_of(placement, share, self._group, plan.group_size)
        executor = LayerParallelExecutor(parts, max_slots, plan.max_nodes, self._record)
        if placement != "one_device":
            self._group.meet()
        return executor

    @torch.inference_mode()
    def serve(self) -> None:
        """An owner's life: what home announces, until home is gone (RuntimeError) or keeps the
        draft for itself."""
        plan, group = self._plan, self._group
        executor = None
        if plan.placement != "auto":
            executor = self.place(plan.placement, plan.max_slots)
        while True:
            kind, *numbers = group.announce(torch.zeros(_TOLD, dtype=torch.int64)).tolist()
            if kind in (_PLACE, _SETTLE):
                executor = None  # frees its memory first
                placement = PLACEMENTS[numbers[0]]
                if placement != "one_device":
                    executor = self.place(placement, numbers[1], kind == _SETTLE)
                elif kind == _SETTLE:
                    return
            elif kind == _RECORD:
                widths = group.announce(torch.zeros(numbers[1], dtype=torch.int64)).tolist()
                executor.record_here(widths, numbers[0])
            elif kind == _OUTPUT:
                model = executor.model
                size = (numbers[0], model.config.hidden_size)
                hidden = torch.empty(size, dtype=model.dtype, device=model.device)
                executor.parts.logits(group.broadcast(hidden), behind_level=False)
            else:
                tokens, rows = _received(group, numbers, executor.model.device)
                hidden = executor.run(tokens, rows, exact=kind == _TEXT)
                if kind == _LEVEL:
                    executor.parts.logits(hidden, behind_level=True)


def rejoin(executor: LayerParallelExecutor, plan: Plan, group: Group) -> None:
    """Let home's executor, which keeps its share, go on with new owners: those of ``group``, which
    settle on what ``plan`` says."""
    group.meet()
    executor.attach(parts_of(plan.placement, executor.model, group, plan.group_size))


def tell(group: Group, kind: int, *numbers: int) -> None:
    """Announce what is next, from home."""
    told = torch.zeros(_TOLD, dtype=torch.int64)
    told[: 1 + len(numbers)] = torch.tensor([kind, *numbers])
    group.announce(told)


def _received(group: Group, sizes: list[int], device: torch.device) -> tuple[torch.Tensor, Rows]:
    """Tokens and rows of a pass, as :meth:`Shared.begin` sends them."""
    tokens = torch.empty(0)

    def receive(raw: torch.Tensor) -> None:
        nonlocal tokens
        length = torch.int64.itemsize * sizes[0]
        both = raw.new_empty(length + len(raw))
        group.broadcast(both)
        tokens = both[:length].view(torch.int64)
        raw.copy_(both[length:])

    rows = Rows.received(sizes, device, receive)
    return tokens, rows


def messages(
    num_layers: int, group_size: int, shards: int, placement: Placement
) -> dict[str, Counter[str]]:
    """Collectives and copies, as home counts them: of a "level" with its logits, of a pass over
    "text", and of the logits behind it ("output")."""
    groups = groups_of(placement, num_layers, group_size)
    told = Counter(broadcast=2)
    if placement == "one_device":
        return {"level": Counter(), "text": Counter(), "output": Counter()}
    if placement == "attentions":
        owned = set(range(num_layers)) - set(layers_of(0, num_layers, group_size, shards))
        apart = sum(not owned.isdisjoint(group) for group in groups if len(group) > 1)
        alone = sum(group[0] in owned for group in groups if len(group) == 1)
        level = told + Counter(broadcast=apart, gather=apart, copy=2 * alone)
        return {"level": level, "text": told + Counter(copy=2 * len(owned)), "output": Counter()}
    output = told + Counter(gather=1)
    if placement == "tensor_parallel":
        text = told + Counter(all_reduce=2 * num_layers + 1)
        return {"level": text + Counter(gather=1), "text": text, "output": output}
    alone = sum(len(group) == 1 for group in groups)
    summed = Counter(all_reduce=num_layers + 1)
    level = told + summed + Counter(broadcast=alone, all_gather=len(groups) - alone, gather=1)
    return {"level": level, "text": told + summed + Counter(broadcast=num_layers), "output": output}
