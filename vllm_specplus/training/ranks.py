"""The processes that train together (torchrun): each has its share of every batch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

#: The first rank writes texts, for hours perhaps, while the others wait.
PATIENCE = timedelta(days=2)
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone by default."""

    rank: int = 0
    count: int = 1
    device: torch.device = CPU

    @property
    def first(self) -> bool:
        """Is this the process that writes, and speaks to the user?"""
        return self.rank == 0

    def shared(self, value: Any) -> Any:
        """What the first rank gives, on every rank."""
        if self.count == 1:
            return value
        values = [value]
        distributed.broadcast_object_list(values, src=0, device=self.device)
        return values[0]

    def spread(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrites tensors by those of the first rank."""
        for tensor in tensors if self.count > 1 else ():
            distributed.broadcast(tensor, src=0)

    def sum_gradients(self, parameters: Sequence[nn.Parameter], weight: float) -> None:
        """Makes gradients the sum over ranks, each times its ``weight``, its share of the batch.

        Every rank calls it for the same parameters; one without a gradient counts as zeros where
        another rank has one.
        """
        if self.count == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad *= weight
            distributed.all_reduce(parameter.grad)

    def mean(self, means: dict[str, float], weight: float) -> dict[str, float]:
        """Means over the whole batch of those over each rank's share; a rank without one has
        none."""
        if self.count == 1:
            return means
        parts: list[Any] = [None] * self.count
        distributed.all_gather_object(parts, (weight, means))
        names = next(means for _, means in parts if means)
        return {name: sum(w * m[name] for w, m in parts if m) for name in names}


@contextmanager
def joined() -> Iterator[Ranks]:
    """Joins the processes that torchrun has started, for the time of a run; alone without it."""
    cuda = torch.cuda.is_available()
    count = int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else CPU
    if cuda:
        torch.cuda.set_device(device)
    if count == 1:
        yield Ranks(device=device)
        return
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield Ranks(distributed.get_rank(), count, device)
    finally:
        distributed.destroy_process_group()
