"""SpecEE's predictors: may the target be left here, by what it makes of a few likely tokens?

SpecEE (arXiv 2504.08850, section 4). A draft names k candidates of the next token. Behind a layer
that has a predictor, and the last norm, the target's output layer gives the logits of these k alone
(k rows of it, instead of all). The predictor reads, of a row::

    [the k logits; their softmax over the k; how that has changed since the predictor before]

(3 k numbers; the softmax itself, where there was no predictor before) and says by a layer of ReLUs
and a sigmoid how probable it is that the best of the k is what the whole target would say. In a
tree a row may have fewer candidates than k: those that are missing read as far less probable than
the first, in training too.

Which layers' predictors are asked is *scheduled* on two levels: those where most exits were while
the predictors were trained (offline), and those two layers before, at and two layers behind each of
the last five exits (online).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from vllm_specplus.files import check_readable, tensor_shapes
from vllm_specplus.strict import quoted

if TYPE_CHECKING:  # the front end checks a file without torch
    import torch

#: Exits that the online level remembers, and how far around them it looks.
LAST, AROUND = 5, (-2, 0, 2)

#: How far below the first candidate's logit that of a missing one is.
FAR = 20.0

#: Tensors of a file: the layers that have a predictor, counted as those that have run, int64 [P];
#: those of the offline level, int64 [S]; and of each predictor the two layers of its network.
LAYERS, STATIC = "layers", "static"
HIDDEN, HIDDEN_BIAS, OUT, OUT_BIAS = "hidden.weight", "hidden.bias", "out.weight", "out.bias"


class Sizes(NamedTuple):
    """Of the predictors in a file."""

    predictors: int
    candidates: int


def read_sizes(path: str | Path) -> Sizes:
    """The sizes of the predictors in a file; ValueError if there are none."""
    name = f"'predictors' {quoted(str(path))}"
    check_readable(str(path), "'predictors'")
    shapes = tensor_shapes(Path(path), name)
    static, hidden = shapes.get(STATIC, ()), shapes.get(HIDDEN, ())
    if len(hidden) == 3 and len(static) == 1 and all(hidden) and hidden[2] % 3 == 0:
        count, inner, read = hidden
        expected = {
            LAYERS: (count,), STATIC: static, HIDDEN: hidden, HIDDEN_BIAS: (count, inner),
            OUT: (count, inner), OUT_BIAS: (count,),
        }  # fmt: skip
        if dict(shapes) == expected:
            return Sizes(count, read // 3)
    raise ValueError(
        f"{name} holds {quoted(dict(shapes))}: predictors are what vllm-specplus train spec_ee "
        f"writes"
    )


def features(
    logits: torch.Tensor, missing: torch.Tensor, before: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a predictor reads, float32 [n, 3 k], of the candidates' ``logits`` float32 [n, k], some
    of which are ``missing`` bool [n, k], but never the first; and their softmax, which is
    ``before`` (None: there is none) for the next predictor."""
    import torch

    logits = torch.where(missing, logits[:, :1] - FAR, logits)
    probabilities = logits.softmax(-1)
    change = probabilities if before is None else probabilities - before
    return torch.cat((logits, probabilities, change), -1), probabilities


def scores(
    weights: Mapping[str, torch.Tensor], number: int | slice, read: torch.Tensor
) -> torch.Tensor:
    """Log-odds float32 [n] of the rows ``read`` float32 [n, 3 k], by the predictor of that number;
    of a slice of P predictors [P, n], of ``read`` [P, n, 3 k]."""
    import torch

    hidden, bias, out, out_bias = (
        weights[name][number] for name in (HIDDEN, HIDDEN_BIAS, OUT, OUT_BIAS)
    )
    inner = torch.relu(read @ hidden.transpose(-1, -2) + bias.unsqueeze(-2))
    return (inner @ out.unsqueeze(-1)).squeeze(-1) + out_bias.unsqueeze(-1)


class Schedule:
    """Which predictors are asked in a pass."""

    def __init__(self, layers: list[int], static: list[int]):
        """``layers`` that have a predictor, and those of the offline level: how many have run."""
        self._layers, self._static = frozenset(layers), frozenset(static) & frozenset(layers)
        self._exits: deque[int] = deque(maxlen=LAST)

    def exited(self, layers: int) -> None:
        """A pass ended behind so many layers, maybe all."""
        self._exits.append(layers)

    def asked(self) -> frozenset[int]:
        """Behind how many layers a predictor is asked in the next pass."""
        if len(self._exits) < LAST:
            return self._static
        near = {layers + step for layers in self._exits for step in AROUND}
        return self._static | (near & self._layers)


class ExitPredictors:
    """The predictors of a file, on a device."""

    def __init__(self, path: str | Path, threshold: float, device: torch.device):
        """``threshold``: probability above which a row may exit."""
        from safetensors.torch import load_file

        weights = load_file(path)
        self.layers = weights.pop(LAYERS).tolist()
        """Behind how many layers there is one, ascending."""
        self.schedule = Schedule(self.layers, weights.pop(STATIC).tolist())
        self.candidates = weights[HIDDEN].shape[2] // 3
        self._number = {layers: number for number, layers in enumerate(self.layers)}
        # In float32: a threshold is compared with.
        self._weights = {name: each.float().to(device) for name, each in weights.items()}
        self._threshold = threshold

    def fire(self, layers: int, read: torch.Tensor) -> torch.Tensor:
        """Bool [n]: which rows of ``read`` float32 [n, 3 k] may exit behind so many layers?"""
        return scores(self._weights, self._number[layers], read).sigmoid() > self._threshold
