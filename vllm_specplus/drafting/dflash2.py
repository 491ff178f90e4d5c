"""What DFlash-2 adds to DFlash: convolutions within a block, and a selector of candidates.

Attention and MLP of every layer stand between two causal convolutions over the rows of the block,
whose kernels depend on what enters the first one::

    y_i = sum over taps  (base_tap + delta_{i, tap}) x_{i - tap}       delta = P x_i, by groups

The selector chooses among the K tokens of each depth that the logits U like best. Behind the
token ``p`` it gives the candidate ``c`` of row ``h`` the score ``U(c) + <A[p] * (H h), B[c]>``:
the softmax over the candidates is the law of a child given its parent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from vllm_specplus.drafting.block_config import Second
from vllm_specplus.drafting.block_trees import Laws


class GroupedConv(nn.Module):
    """The convolutions before and after a part of a layer."""

    def __init__(self, hidden: int, second: Second):
        super().__init__()
        self._taps, self._group = second.taps, second.group
        self.base_kernel = nn.Parameter(torch.empty(2, second.taps, hidden))
        kernels = 2 * second.taps * hidden // second.group
        self.kernel_projection = nn.Linear(hidden, kernels, bias=False)

    def kernels(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Those before and after, [R, q, taps, hidden] each, of what enters, [R, q, hidden]."""
        delta = self.kernel_projection(hidden).unflatten(-1, (2, self._taps, -1))
        before, after = (self.base_kernel + delta.repeat_interleave(self._group, -1)).unbind(2)
        return before, after


def convolved(hidden: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """[R, q, hidden] of the rows of R blocks, by a ``kernel`` [R, q, taps, hidden]; before a block
    there is nothing."""
    out = kernel[:, :, 0] * hidden
    for tap in range(1, kernel.shape[2]):
        out[:, tap:] += kernel[:, tap:, tap] * hidden[:, :-tap]
    return out


def around(
    layer: nn.ModuleDict, name: str, part: Callable[[torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """``part`` of ``hidden`` [R, q, hidden], between the convolutions that the layer has by that
    name, if any."""
    if name not in layer:
        return part(hidden)
    before, after = layer[name].kernels(hidden)
    return convolved(part(convolved(hidden, before)), after)


def shaped(logits: torch.Tensor, second: Second) -> torch.Tensor:
    """``logits``, capped and scaled."""
    if second.soft_cap:
        logits = second.soft_cap * (logits / second.soft_cap).tanh()
    return second.output_scale * logits


class CandidateSelector(nn.Module):
    """Tables A and B, and the projection H."""

    def __init__(self, hidden: int, vocab: int, rank: int):
        super().__init__()
        self.predecessor_codebook = nn.Parameter(torch.empty(vocab, rank))
        self.successor_codebook = nn.Parameter(torch.empty(vocab, rank))
        self.hidden_projection = nn.Linear(hidden, rank, bias=False)

    def laws(
        self, logits: torch.Tensor, candidates: int, hidden: torch.Tensor, anchors: torch.Tensor
    ) -> Laws:
        """Of blocks behind the newest tokens ``anchors`` int64 [R]: ``logits`` float32 [R, D, V] U
        of rows ``hidden`` [R, D, hidden]."""
        given, ids = logits.topk(min(candidates, logits.shape[-1]), -1)
        before = torch.cat((anchors[:, None, None].expand_as(ids[:, :1]), ids[:, :-1]), 1)
        row = self.predecessor_codebook[before] * self.hidden_projection(hidden)[:, :, None]
        edges = row @ self.successor_codebook[ids].transpose(-1, -2)  # [R, D, K, K]
        return Laws.of(ids, (given[:, :, None] + edges.float()).log_softmax(-1))
