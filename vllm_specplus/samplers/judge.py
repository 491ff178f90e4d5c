"""Judge Decoding's head: is a drafted token a valid continuation? (arXiv 2501.19309). **Lossy.**

A linear layer on the target's hidden state *at the token's own row*, after the target has read it,
says how valid the token is; a score above a threshold accepts it, whatever the target would have
drawn. The published heads read the last layer's output before the final norm; vLLM's models
return it after the norm, so that is what a head here is trained on
(``vllm-specplus train judge``).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vllm_specplus.files import check_readable, tensor_shapes
from vllm_specplus.strict import quoted

if TYPE_CHECKING:  # the front end checks a head without torch
    import torch

#: Tensors of a head's file: [hidden] and [1].
WEIGHT, BIAS = "weight", "bias"


def head_size(path: str | Path) -> int:
    """Reads the hidden size of the head in a file; ValueError if there is none."""
    check_readable(str(path), "'head'")
    shapes = tensor_shapes(Path(path), f"'head' {quoted(path)}")
    if set(shapes) != {WEIGHT, BIAS} or len(shapes[WEIGHT]) != 1 or shapes[BIAS] != (1,):
        raise ValueError(
            f"'head' {quoted(path)} holds {quoted(shapes)}: a judge is 'weight' [hidden] and "
            f"'bias' [1]"
        )
    return shapes[WEIGHT][0]


class JudgeHead:
    """The linear layer and its sigmoid."""

    def __init__(self, path: str | Path, device: torch.device):
        from safetensors.torch import load_file

        tensors = load_file(path)
        # In float32: a threshold is compared with.
        self.weight = tensors[WEIGHT].float().to(device)
        self.bias = tensors[BIAS].float().to(device)

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores ``hidden`` [L, hidden]: float32 [L], 0 to 1."""
        return (hidden.float() @ self.weight + self.bias).sigmoid()
