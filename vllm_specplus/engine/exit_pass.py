"""The target's pass, ended behind the layer where every text of the batch is known (SpecEE).

vLLM's forward pass stays what it is: a hook on every layer looks at what the layer has made of the
verified rows, where the schedule asks for it, and raises :class:`_Ended` when no row is needed any
longer. That takes a pass which is run as Python, layer by layer: ``--enforce-eager``.

**What the layers behind the exit have of the token.** In the authors' artefact: nothing. Their
cache is one list of keys per layer, and an exited token is missing from those of the layers that
were not run, for ever: later tokens attend there over fewer keys. vLLM's pages have a slot for
every position in every layer, and what is not written is what was there before. So here the keys
and values of the skipped layers are computed from the hidden state at the exit, as CALM
(arXiv 2207.07061) does: the attention of each of them is run, which writes them, and its MLP is
not; what it returns is left out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from vllm_specplus.drafting.exit_predictors import ExitPredictors, features
from vllm_specplus.engine.target_layers import TargetLayers
from vllm_specplus.metrics import Counters
from vllm_specplus.step import Rows

if TYPE_CHECKING:
    from vllm_specplus.engine.batch import Step
    from vllm_specplus.engine.proposing import Proposing
    from vllm_specplus.engine.v1 import V1Batch


class _Ended(Exception):
    """Nothing more of the pass is needed."""


@dataclass(slots=True)
class _Pass:
    """One that may end early."""

    predictors: ExitPredictors
    rows: Rows
    at: torch.Tensor
    """int64 [L] the verified rows, among the batch's."""
    candidates: torch.Tensor
    """int64 [L, k] of each, -1 behind the last one; rows without any cannot exit."""
    asked: frozenset[int]
    """Behind how many layers predictors are asked."""
    able: torch.Tensor
    """bool [L] rows that have candidates and have not exited."""
    output: torch.Tensor
    """[L, V'] slices of the output layer: [L, k, hidden]."""
    tokens: np.ndarray
    """int64 [L] of the rows that have exited, their text; -1 of others."""
    states: dict[int, torch.Tensor] = field(default_factory=dict)
    """Of the rows that have exited: hidden behind the last norm [hidden]."""
    before: torch.Tensor | None = None
    """float32 [L, k] the candidates' probabilities at the last predictor."""
    hidden: torch.Tensor | None = None
    """[T, hidden] behind the layer where it has ended."""
    layers: int = 0
    """How many layers have run then."""


class ExitPass:
    """Runs the target's passes."""

    def __init__(
        self, layers: TargetLayers, output: torch.Tensor, counters: Counters | None = None
    ):
        """``output``: weights [V, hidden] of the target's output layer."""
        self._target, self._output, self._counters = layers, output, counters
        self._pass: _Pass | None = None
        for number, block in enumerate(layers.blocks):
            block.layer.register_forward_hook(self._hook(number + 1))

    def run(
        self, forward: Callable[[], Any], predictors: ExitPredictors, positions: torch.Tensor,
        rows: Rows, at: torch.Tensor, candidates: np.ndarray,
    ) -> Any:  # fmt: skip
        """What ``forward`` returns, or hidden states of the layers that were enough.

        ``positions`` int64 [T]; ``rows``, ``at`` int64 [L]: the verified rows, which are all of the
        batch's that count; ``candidates`` int64 [L, k], -1 behind the last one of each. All
        requests are greedy.
        """
        if (candidates[rows.starts[:-1], 0] < 0).any():  # a request that runs through: all do
            return self._through(forward, predictors)
        ids = torch.from_numpy(candidates).to(at.device)
        self._pass = _Pass(
            predictors, rows, at, ids, predictors.schedule.asked(), ids[:, 0] >= 0,
            self._output[ids.clamp(min=0)].float(), np.full(len(candidates), -1, np.int64),
        )  # fmt: skip
        try:
            return self._through(forward, predictors)
        except _Ended:
            return self._finish(positions, self._pass)
        finally:
            self._pass = None

    def _through(self, forward: Callable[[], Any], predictors: ExitPredictors) -> Any:
        hidden = forward()
        predictors.schedule.exited(self._target.num_layers)
        return hidden

    def _hook(self, layers: int) -> Callable[[nn.Module, tuple, Any], None]:
        def look(module: nn.Module, given: tuple, made: Any) -> None:
            if self._pass is not None and layers in self._pass.asked:
                # Some layers leave what they add apart from what is added to.
                parts = (made,) if isinstance(made, torch.Tensor) else made
                self._look(self._pass, layers, sum(each for each in parts if each is not None))

        return look

    def _look(self, run: _Pass, layers: int, hidden: torch.Tensor) -> None:
        normed = self._target.normed(hidden[run.at])
        logits = (run.output @ normed.float().unsqueeze(-1)).squeeze(-1)
        read, run.before = features(logits, run.candidates < 0, run.before)
        firing = (run.predictors.fire(layers, read) & run.able).nonzero()[:, 0]
        if not len(firing):
            return
        best = self._target.output(normed[firing]).argmax(-1)
        among = (run.candidates[firing] == best[:, None]).any(1)
        run.able[firing[among]] = False
        for row, token in zip(firing[among].tolist(), best[among].tolist(), strict=True):
            run.tokens[row], run.states[row] = token, normed[row]
        if decided(run.rows, run.tokens):
            run.hidden, run.layers = hidden, layers
            raise _Ended

    def _finish(self, positions: torch.Tensor, run: _Pass) -> torch.Tensor:
        """Keys and values of the layers that have not run; hidden states [T, hidden] as ``forward``
        returns them."""
        assert run.hidden is not None
        run.predictors.schedule.exited(run.layers)
        if self._counters is not None:
            self._counters.add("early_exits")
        for block in self._target.blocks[run.layers :]:
            norm, stock = block.placed[0], block.attention
            asks = inspect.signature(stock.forward).parameters
            where = {"positions": positions} if "positions" in asks else {}
            stock(hidden_states=run.hidden if norm is None else norm(run.hidden), **where)
        out = self._target.normed(run.hidden)
        for row, state in run.states.items():
            out[run.at[row]] = state
        return out


def decided(rows: Rows, tokens: np.ndarray) -> bool:
    """Is the text of every request known, by the ``tokens`` int64 [L] of the rows that have exited
    (-1: a row that has not)? Only the rows on the path of the text count."""
    for first, end in zip(rows.starts[:-1].tolist(), rows.starts[1:].tolist(), strict=True):
        row: int | None = first
        while row is not None:
            if tokens[row] < 0:
                return False
            below = np.flatnonzero(rows.parents[row + 1 : end] == row - first) + row + 1
            right = below[rows.tokens[below] == tokens[row]]
            row = int(right[0]) if len(right) else None
    return True


def output_weights(model: nn.Module) -> torch.Tensor:
    """The weights [V, hidden] of a target's output layer; ValueError where they cannot be read row
    by row."""
    if hasattr(model, "get_language_model"):
        model = model.get_language_model()
    weight = getattr(getattr(model, "lm_head", None), "weight", None)
    if weight is None or not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError(
            f"the output layer of {type(model).__name__} is quantised or of another kind, and "
            f"method 'spec_ee' reads single rows of it: serve the target with an output layer that "
            f"is not"
        )
    return weight


class ExitPassMixin:
    """Of our runners: the override of the target's forward pass."""

    drafter: Any
    batch: V1Batch
    proposing: Proposing
    vllm_config: Any
    _step: Step | None
    _exits: ExitPass | None = None
    """None: all passes run through."""

    def make_exits(self) -> None:
        """After load: end passes early, if the method has ``predictors``."""
        if getattr(self.drafter.proposer, "predictors", None) is not None:
            model = self.get_model()
            layers = TargetLayers(model, self.vllm_config)
            self._exits = ExitPass(layers, output_weights(model), self.drafter.counters)

    def _model_forward(self, *args, **kwargs):
        forward, step = partial(super()._model_forward, *args, **kwargs), self._step
        if self._exits is None or step is None or not self._may_exit(step):
            return forward()
        proposer, at = self.drafter.proposer, self.batch.to_device(step.batch_rows)
        candidates = proposer.candidates(self.batch.request_ids, step.rows)
        return self._exits.run(
            forward, proposer.predictors, kwargs["positions"], step.rows, at, candidates
        )

    def _may_exit(self, step: Step) -> bool:
        """Do all requests allow a text that is not quite the target's, of its best tokens?"""
        return self.batch.all_greedy_decodes(step) and None not in self.proposing.relaxed_stops()
