"""Judge Decoding's head: is a drafted token a valid continuation? (arXiv 2501.19309). **Lossy.**

A linear layer on the target's hidden state *at the token's own row*, after the target has read it,
says how valid the token is; a score above a threshold accepts it, whatever the target would have
drawn. The published heads read what leaves the last layer, before the final norm; a head's file
says which of the two it reads, and what threshold it was calibrated to. Heads are made by
``vllm-specplus train judge``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_specplus.files import check_readable, tensor_shapes
from vllm_specplus.strict import quoted

if TYPE_CHECKING:  # the front end checks a head without torch
    import torch

#: Tensors of a head's file: [hidden] and [1].
WEIGHT, BIAS = "weight", "bias"
#: Keys of its metadata, both optional.
STATES, THRESHOLD = "states", "threshold"
#: What ``states`` may say.
BEFORE_NORM, AFTER_NORM = "before_norm", "after_norm"
#: The paper's, for heads that were not calibrated.
USUAL = 0.5


@dataclass(frozen=True)
class HeadFile:
    """What a head's file says, beside its weights."""

    size: int
    """Hidden units that it reads."""
    before_norm: bool
    """Does it read the states before the target's last norm?"""
    threshold: float
    """Above which it accepts, where the user says nothing."""


def read_head(path: str | Path) -> HeadFile:
    """Reads about the head in a file; ValueError if there is none."""
    from safetensors import safe_open

    check_readable(str(path), "'head'")
    shapes = tensor_shapes(Path(path), f"'head' {quoted(path)}")
    if set(shapes) != {WEIGHT, BIAS} or len(shapes[WEIGHT]) != 1 or shapes[BIAS] != (1,):
        raise ValueError(
            f"'head' {quoted(path)} holds {quoted(shapes)}: a judge is 'weight' [hidden] and "
            f"'bias' [1]"
        )
    with safe_open(path, framework="numpy") as file:
        told: Mapping[str, str] = file.metadata() or {}
    states = told.get(STATES, AFTER_NORM)  # of heads that do not say it
    if states not in (BEFORE_NORM, AFTER_NORM):
        raise ValueError(
            f"'head' {quoted(path)} reads states {quoted(states)} (allowed: {BEFORE_NORM}, "
            f"{AFTER_NORM})"
        )
    try:
        threshold = float(told.get(THRESHOLD, USUAL))
    except ValueError:
        threshold = -1.0
    if not 0 <= threshold <= 1:
        raise ValueError(
            f"'head' {quoted(path)} has the threshold {quoted(told[THRESHOLD])}: it must be in "
            f"[0, 1]"
        )
    return HeadFile(shapes[WEIGHT][0], states == BEFORE_NORM, threshold)


def head_size(path: str | Path) -> int:
    """Reads the hidden size of the head in a file; ValueError if there is none."""
    return read_head(path).size


class JudgeHead:
    """The linear layer and its sigmoid."""

    def __init__(self, path: str | Path, device: torch.device):
        from safetensors.torch import load_file

        tensors = load_file(path)
        # In float32: a threshold is compared with.
        self.weight = tensors[WEIGHT].float().to(device)
        self.bias = tensors[BIAS].float().to(device)
        self.threshold = read_head(path).threshold

    def scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """Scores ``hidden`` [L, hidden]: float32 [L], 0 to 1."""
        return (hidden.float() @ self.weight + self.bias).sigmoid()
