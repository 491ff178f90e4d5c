"""At which positions a draft learns: masks of those that a batch offers."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_specplus.training.batch import Batch


def top_quantile(delta: Tensor, keep: float) -> Tensor:
    """bool [N]: where ``delta`` [N] is in its upper share ``keep``, above 0 and at most 1.

    AdaSPEC (arXiv 2510.19779): ``delta`` is by how much a draft's loss exceeds that of a reference
    which was trained on everything. Where it is large a draft can still learn, and where the
    reference does not get it right either its small capacity is lost. Without gradient: what is
    selected must not be learnt by way of the selection.
    """
    delta = delta.detach()
    # In the order of a sort, as torch.quantile refuses more than 16 million values.
    rank = (1 - keep) * (len(delta) - 1)
    ordered = delta.sort().values
    below = ordered[int(rank)]
    above = ordered[min(int(rank) + 1, len(delta) - 1)]
    return delta >= below + (above - below) * (rank - int(rank))


def rejected(batch: Batch) -> Tensor:
    """bool [B, n]: where the prediction was rejected while serving, for replay (OSD, arXiv
    2310.07177): the token *behind* the position has label 0.

    OSD notes the index of the token that the target put in the place of a rejected one, and learns
    at that row, which predicts the token after it. The row that was wrong is the one before.
    """
    wrong = torch.zeros_like(batch.learn)
    wrong[:, :-1] = batch.labels[:, 1:] == 0
    return batch.learn & wrong
