"""SpecDec++'s acceptance head: will the target accept the token that the draft has just read?

With ``h`` the draft's hidden state behind its last norm, in the row of a drafted token, ``n``
residual blocks and a linear layer of two outputs (arXiv 2405.19715, section 3.3)::

    x = h      x <- x + SiLU(W_i x + b_i)  for i < n      P(accept) = softmax(U x + c)[1]

The authors build their blocks by multiplying a list, so that all of them are one and the same: a
checkpoint of theirs holds equal blocks, which this reads as it reads unequal ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_specplus.files import check_readable, tensor_shapes
from vllm_specplus.strict import quoted

if TYPE_CHECKING:  # the front end checks a head without torch
    import torch

#: Tensors of a head's file: ``block.{i}.weight`` [hidden, hidden], ``block.{i}.bias`` [hidden],
#: ``out.weight`` [2, hidden] and ``out.bias`` [2].
BLOCK, OUT = "block.{}.{}", "out.{}"


def head_size(path: str | Path) -> int:
    """Read the hidden size of the head in a file; ValueError if there is none."""
    name = f"'head' {quoted(str(path))}"
    check_readable(str(path), "'head'")
    shapes = tensor_shapes(Path(path), name)
    size = (shapes.get(OUT.format("weight")) or (0,))[-1]
    blocks = (len(shapes) - 2) // 2
    expected: dict[str, tuple[int, ...]] = {
        OUT.format("weight"): (2, size),
        OUT.format("bias"): (2,),
    }
    for block in range(blocks):
        expected[BLOCK.format(block, "weight")] = (size, size)
        expected[BLOCK.format(block, "bias")] = (size,)
    if not size or dict(shapes) != expected:
        raise ValueError(
            f"{name} holds {quoted(dict(shapes))}: an acceptance head is 'out.weight' [2, hidden], "
            f"'out.bias' [2], and 'block.N.weight' [hidden, hidden] with 'block.N.bias' [hidden]"
        )
    return size


def probability(weights: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Return P(accept), float32 [T], of the rows ``hidden`` [T, hidden]."""
    from torch.nn import functional as F

    return F.softmax(logits(weights, hidden), -1)[:, 1]


def logits(weights: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Return float32 [T, 2] of the rows ``hidden`` [T, hidden]: reject, accept."""
    from torch.nn import functional as F

    x = hidden.float()
    for block in range((len(weights) - 2) // 2):
        weight, bias = (weights[BLOCK.format(block, each)] for each in ("weight", "bias"))
        x = x + F.silu(F.linear(x, weight, bias))
    return F.linear(x, weights[OUT.format("weight")], weights[OUT.format("bias")])


class AcceptanceHead:
    """The head of a file, on a device."""

    def __init__(self, path: str | Path, device: torch.device):
        from safetensors.torch import load_file

        # In float32: probabilities are multiplied and compared with a threshold.
        self._weights = {name: each.float().to(device) for name, each in load_file(path).items()}

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return P(accept), float32 [T], of the rows ``hidden`` [T, hidden] behind the draft's
        last norm."""
        return probability(self._weights, hidden)
