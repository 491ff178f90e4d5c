"""Imports all that a run of the toy does, for processes that are forked from one that has."""

import matplotlib.figure  # noqa: F401
import torch

import tests.training.toy  # noqa: F401

torch.set_num_threads(1)
# The first step of an optimiser imports much of torch.
_weight = torch.nn.Parameter(torch.zeros(1))
_weight.grad = torch.zeros(1)
torch.optim.AdamW([_weight]).step()
