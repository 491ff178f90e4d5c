"""SpecDec++: a small head on the draft model says when to stop drafting.

Source: "SpecDec++: Boosting Speculative Decoding via Adaptive Candidate Lengths"
(arXiv 2405.19715). The head reads the draft's last hidden state (after the final norm) at
a drafted token and gives the probability that the target accepts this token; drafting
stops as soon as a rejection somewhere in the draft has become likely.

Only the draft's *earlier* tokens decide whether the next one is drawn, and a token once
drawn is kept, so the rule is lossless for sampled drafts too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn


class ResidualBlock(nn.Module):
    """x + SiLU(Wx + b)"""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + nn.functional.silu(self.linear(x))


class AcceptanceHead(nn.Module):
    """Residual blocks, then a linear layer to the classes reject (0) and accept (1).

    Parameters are named as in the reference's checkpoints: ``model.<i>.linear.{weight,bias}``
    for block i [H, H] and [H], ``model.<n>.{weight,bias}`` for the last layer [2, H] and [2].
    """

    def __init__(self, hidden_size: int, num_blocks: int, shared: bool = False):
        """``shared``: all blocks are one, applied ``num_blocks`` times. The reference builds
        them by list multiplication, so its heads are of this kind; train new ones without."""
        super().__init__()
        if shared:
            blocks = [ResidualBlock(hidden_size)] * num_blocks
        else:
            blocks = [ResidualBlock(hidden_size) for _ in range(num_blocks)]
        self.model = nn.Sequential(*blocks, nn.Linear(hidden_size, 2))
        self.hidden_size = hidden_size

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [N, 2] of ``hidden`` [N, H], in the weights' dtype; for training."""
        return self.model(hidden)

    @torch.no_grad()
    def acceptance(self, hidden: torch.Tensor) -> torch.Tensor:
        """Probability, float32 [N], that the target accepts each drafted token.

        ``hidden`` [N, H], any float dtype: the draft's last hidden state where it *read*
        the token (one forward later than the one that drew it).
        """
        if hidden.ndim != 2 or hidden.shape[1] != self.hidden_size:
            raise ValueError(
                f"hidden must have shape [N, {self.hidden_size}], not {list(hidden.shape)}"
            )
        logits = self(hidden.to(self.model[-1].weight.dtype))
        return torch.softmax(logits.float(), -1)[:, 1]

    @classmethod
    def load(cls, path: str | Path, shared: bool) -> AcceptanceHead:
        """Read a head from a safetensors file, in the file's dtype; nothing is unpickled.

        H and the number of blocks n come from the last layer's shape and its index.

        ``shared``: the blocks are one weight set, as in every head the reference trained.
        Such a file holds n equal copies or, written by ``safetensors.torch.save_model``,
        the set only once, under any block's name; both are accepted, and memory holds the
        set once. Without ``shared`` the file must hold all n blocks.
        """
        state, hidden_size, num_blocks = _read(Path(path), shared)
        with torch.device("meta"):  # the parameters are replaced, not filled
            head = cls(hidden_size, num_blocks, shared)
        head.load_state_dict(state, assign=True)
        return head.eval()


def _read(path: Path, shared: bool) -> tuple[dict[str, torch.Tensor], int, int]:
    """(complete and checked state dict, hidden size, number of blocks) of a file."""
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error

    last = [int(m[1]) for m in (re.fullmatch(r"model\.(\d+)\.weight", key) for key in state) if m]
    if len(last) != 1:
        raise ValueError(
            f"{path}: expected one last layer named model.<blocks>.weight, found {len(last)}"
        )
    num_blocks = last[0]
    last_weight = f"model.{num_blocks}.weight"
    if (shape := list(state[last_weight].shape))[:1] != [2] or len(shape) != 2:
        raise ValueError(f"{path}: {last_weight} has shape {shape}, not [2, hidden size]")
    hidden_size = shape[1]

    shapes = {last_weight: shape, f"model.{num_blocks}.bias": [2]}
    for i in range(num_blocks):
        shapes[f"model.{i}.linear.weight"] = [hidden_size, hidden_size]
        shapes[f"model.{i}.linear.bias"] = [hidden_size]
    if unknown := sorted(state.keys() - shapes.keys()):
        raise ValueError(f"{path}: not part of a head with {num_blocks} blocks: {unknown}")
    for key, tensor in state.items():
        if list(tensor.shape) != shapes[key]:
            raise ValueError(f"{path}: {key} has shape {list(tensor.shape)}, not {shapes[key]}")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} holds values that are not finite")
    if len(dtypes := {tensor.dtype for tensor in state.values()}) != 1 or not (
        dtypes <= {torch.float16, torch.bfloat16, torch.float32}
    ):
        raise ValueError(
            f"{path}: weights must all be float16, bfloat16 or float32, not "
            f"{', '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))}"
        )

    if shared:
        for kind in ("weight", "bias"):
            names = [f"model.{i}.linear.{kind}" for i in range(num_blocks)]
            copies = [state[name] for name in names if name in state]
            if any(not torch.equal(copy, copies[0]) for copy in copies):
                raise ValueError(
                    f"{path}: the blocks differ in {kind}, so they are not one shared set; "
                    "load this head with shared=False"
                )
            state |= {name: copies[0] for name in names if copies}
    if missing := sorted(shapes.keys() - state.keys()):
        hint = "" if shared else " (do its blocks share one weight set? Then load with shared=True)"
        raise ValueError(f"{path}: missing {missing}{hint}")
    return state, hidden_size, num_blocks


def must_stop(survival: float, drawn: int, threshold: float, minimum: int, maximum: int) -> bool:
    """Is the draft complete, ``drawn`` tokens long?

    ``survival``: product of the acceptance of every drawn token but the newest, which no
    forward has read yet; 1 - survival is the probability of a rejection among them.
    """
    return drawn >= maximum or (drawn >= minimum and 1.0 - survival > threshold)


def draft_length(
    acceptance: Iterable[float], threshold: float, minimum: int = 2, maximum: int = 20
) -> int:
    """Tokens in the draft under SpecDec++'s stop rule.

    ``acceptance``: of d_1, d_2, ..., as far as known, read lazily. The forward that rates
    d_j also draws d_(j+1): that token is there when the rating says stop, and it *stays*.
    It costs nothing more, and its value had no part in the decision. If no rating says
    stop, the result is the number of tokens drawn so far, len(acceptance) + 1.

    ``threshold``: h in [0, 1], the probability of a rejection that is still tolerated;
    ``minimum`` and ``maximum`` (tokens) bound the result, as far as ``acceptance`` reaches.
    """
    if not 0.0 <= threshold <= 1.0:
        raise ValueError(f"threshold must be in [0, 1], not {threshold}")
    if not 1 <= minimum <= maximum:
        raise ValueError(f"need 1 <= minimum <= maximum, not {minimum} and {maximum}")
    ratings = iter(acceptance)
    survival, drawn = 1.0, 1  # d_1: drawn after a verified token
    while not must_stop(survival, drawn, threshold, minimum, maximum):
        rating = next(ratings, None)
        if rating is None:
            break
        survival *= float(rating)
        drawn += 1
    return drawn
