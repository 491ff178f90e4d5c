"""Attentions of a draft on several processes: the group that carries a step's tensors.

Shard 0, *home*, is the process of the target: embedding, MLPs, output layer and its own
share of the attentions. The other shards, *owners*, hold the attention weights and the keys
and values of their layers, and nothing else. Tensors travel in a ``torch.distributed``
group of their own (NCCL on GPUs, gloo elsewhere), apart from vLLM's.

A pass costs two broadcasts of integers (its sizes, from host to host, so that an owner that
waits for work keeps no device busy; what its rows are), then, fuzzy: one
broadcast of the input and one gather of the results per group with layers elsewhere; exact: two
point-to-point copies per layer elsewhere.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from vllm_specplus.drafting.cache import PagedCache
from vllm_specplus.drafting.easyspec import LocalAttentions, layer_groups, layer_owner, layers_of
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.drafting.passes import Rows

#: A home that waits longer than this for an owner takes it for lost.
STEP_TIMEOUT = timedelta(seconds=10)
#: An owner waits for work as long as its connection lives; an engine may be idle for days.
IDLE_TIMEOUT = timedelta(days=365)
_FUZZY, _EXACT = 0, 1


@dataclass(frozen=True, slots=True)
class Plan:
    """What all shards know in advance."""

    folder: str
    dtype: str
    pages: int
    group_size: int
    shards: int

    def owner(self, layer: int, num_layers: int) -> int:
        return layer_owner(layer, num_layers, self.group_size, self.shards)


class Group:
    """The shards' process group. Every call is a collective or a copy, and is counted."""

    def __init__(
        self, rank: int, size: int, host: str, port: int, device: torch.device,
        connect: timedelta, check: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """Rank 0 listens at ``host``:``port``. A RuntimeError if not all are there after
        ``connect``; ``check`` is called now and then meanwhile and may raise."""
        store = dist.TCPStore(
            host, port, size, is_master=rank == 0, timeout=connect, wait_for_workers=False
        )
        store = dist.PrefixStore("specplus", store)
        if rank:
            store.set(f"ready {rank}", "")
        # The group itself forms in an instant, and must: its timeout is a step's.
        others = [f"ready {other}" for other in range(1, size)]
        end = time.monotonic() + connect.total_seconds()
        while not store.check(others):
            check()
            if time.monotonic() > end:
                raise RuntimeError(f"not all of {size} shards were there in {connect}")
            time.sleep(0.2)
        timeout = IDLE_TIMEOUT if rank else STEP_TIMEOUT
        self._hosts = self._group = dist.ProcessGroupGloo(store, rank, size, timeout)
        if device.type == "cuda":
            self._group = _nccl(dist.PrefixStore("nccl", store), rank, size)
        self.rank, self.size = rank, size
        self.counts: Counter[str] = Counter()

    def announce(self, tensor: torch.Tensor) -> torch.Tensor:
        """From home to all, from host to host; fills ``tensor`` elsewhere."""
        return self._broadcast(self._hosts, tensor)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """From home to all; fills ``tensor`` elsewhere."""
        return self._broadcast(self._group, tensor)

    def _broadcast(self, group: dist.ProcessGroup, tensor: torch.Tensor) -> torch.Tensor:
        options = dist.BroadcastOptions()
        options.rootRank = 0
        group.broadcast([_bytes(tensor)], options).wait()
        self.counts["broadcast"] += 1
        return tensor

    def gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Of every rank's ``tensor``, to home; [] elsewhere."""
        options = dist.GatherOptions()
        options.rootRank = 0
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else []
        outputs = [[_bytes(part) for part in parts]] if parts else []
        self._group.gather(outputs, [_bytes(tensor)], options).wait()
        self.counts["gather"] += 1
        return parts

    def send(self, tensor: torch.Tensor, rank: int) -> None:
        self._group.send([_bytes(tensor)], rank, 0).wait()
        self.counts["copy"] += 1

    def receive(self, tensor: torch.Tensor, rank: int) -> torch.Tensor:
        self._group.recv([_bytes(tensor)], rank, 0).wait()
        self.counts["copy"] += 1
        return tensor


def _nccl(store: dist.Store, rank: int, size: int) -> dist.ProcessGroup:
    """A group in which waiting for a lost peer ends in an error, as with gloo, and not with the
    process. NCCL learns that from the environment, which is vLLM's otherwise."""
    wanted = {"TORCH_NCCL_BLOCKING_WAIT": "1", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = STEP_TIMEOUT
        return dist.ProcessGroupNCCL(store, rank, size, options)
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory in a type every back end carries."""
    return tensor.view(torch.uint8)


class RemoteAttentions(LocalAttentions):
    """Home's side: its own attentions, and the owners'."""

    def __init__(self, model: DraftModel, cache: PagedCache, plan: Plan, group: Group):
        super().__init__(model, cache)
        self._plan, self._group = plan, group

    def begin(self, rows, exact):
        super().begin(rows, exact)
        kind = _EXACT if exact else _FUZZY
        sizes, raw = rows.packed()
        self._group.announce(torch.tensor([kind, *sizes]))
        self._group.broadcast(raw)

    def layer_group(self, layers, hidden):
        owners = [self._plan.owner(layer, self._model.num_layers) for layer in layers]
        if not any(owners):
            return super().layer_group(layers, hidden)
        self._group.broadcast(hidden.contiguous())
        own = [
            super(RemoteAttentions, self).one_layer(layer, hidden)
            for layer, owner in zip(layers, owners, strict=True)
            if owner == 0
        ]
        # Every shard sends as many results as the busiest one has.
        most = max(owners.count(shard) for shard in range(self._plan.shards))
        parts = self._group.gather(_stacked(own, most, hidden))
        taken = [0] * self._plan.shards
        out = []
        for owner in owners:
            out.append(own[taken[0]] if owner == 0 else parts[owner][taken[owner]])
            taken[owner] += 1
        return out

    def one_layer(self, layer, hidden):
        owner = self._plan.owner(layer, self._model.num_layers)
        if owner == 0:
            return super().one_layer(layer, hidden)
        self._group.send(hidden.contiguous(), owner)
        return self._group.receive(torch.empty_like(hidden), owner)


def _stacked(results: list[torch.Tensor], count: int, like: torch.Tensor) -> torch.Tensor:
    """[count, T, d], padded with zeros."""
    out = like.new_zeros(count, *like.shape)
    for i, result in enumerate(results):
        out[i] = result
    return out


def receive_pass(group: Group, device: torch.device) -> tuple[Rows, bool]:
    """What home's :meth:`RemoteAttentions.begin` sends: its arguments."""
    told = torch.zeros(1 + Rows.SIZES, dtype=torch.int64)
    kind, *sizes = group.announce(told).tolist()
    return Rows.received(sizes, device, group.broadcast), kind == _EXACT


@torch.inference_mode()
def serve(
    plan: Plan, rank: int, host: str, port: int, device: torch.device, connect: timedelta
) -> None:
    """An owner's life: attentions for home, until home is gone (RuntimeError)."""
    model = DraftModel(plan.folder, device, getattr(torch, plan.dtype))
    own_layers = layers_of(rank, model.num_layers, plan.group_size, plan.shards)
    model.keep_attention(own_layers, mlps=False)
    cache = PagedCache(own_layers, model.kv_heads, model.head_dim, plan.pages, model.dtype, device)
    local = LocalAttentions(model, cache)
    size = model.config.hidden_size
    # Last, when nothing slow is left: home does not wait long within a step.
    group = Group(rank, plan.shards, host, port, device, connect)
    while True:
        rows, exact = receive_pass(group, device)
        local.begin(rows, exact)
        hidden = torch.empty(len(rows.positions), size, dtype=model.dtype, device=device)
        for layers in layer_groups(model.num_layers, plan.group_size):
            owners = [plan.owner(layer, model.num_layers) for layer in layers]
            own = [layer for layer in layers if layer in own_layers]
            if exact:
                for layer in own:
                    group.receive(hidden, 0)
                    group.send(local.one_layer(layer, hidden).contiguous(), 0)
            elif any(owners):
                group.broadcast(hidden)
                most = max(owners.count(shard) for shard in range(plan.shards))
                group.gather(_stacked(local.layer_group(own, hidden), most, hidden))


def messages(num_layers: int, group_size: int, shards: int) -> dict[str, Counter[str]]:
    """Collectives and copies of a fuzzy and of an exact pass, as home counts them."""
    groups = layer_groups(num_layers, group_size)
    owned = set(range(num_layers)) - set(layers_of(0, num_layers, group_size, shards))
    apart = sum(not owned.isdisjoint(group) for group in groups)
    return {
        "fuzzy": +Counter(broadcast=2 + apart, gather=apart),
        "exact": +Counter(broadcast=2, copy=2 * len(owned)),
    }
