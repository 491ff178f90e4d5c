"""Checkpoints of several layouts into vLLM's layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn


def load_blocks(
    module: nn.Module,
    given: Iterable[tuple[str, torch.Tensor]],
    place: Callable[[str], tuple[str, tuple]],
) -> set[str]:
    """Load a checkpoint's tensors into ``module``; the names of what was loaded.

    ``place``: of a checkpoint's parameter, its name in ``module`` and its shard of a merged one,
    () of one that is not.
    """
    parameters, loaded = dict(module.named_parameters()), set()
    for name, tensor in given:
        own, shard = place(name)
        parameter = parameters[own]
        if hasattr(parameter, "weight_loader"):
            parameter.weight_loader(parameter, tensor, *shard)
        else:
            parameter.data.copy_(tensor)
        loaded.add(own)
    return loaded
