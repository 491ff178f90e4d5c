"""Drafting that all ranks of a tensor-parallel target take part in.

Layers that are divided by heads can only be run by all ranks together: a pass is a series of
vLLM's collectives. The *first* rank decides and drafts. Whatever needs the others it announces,
and they do the same with pages of their own heads: they copy what the target has computed, run a
pass, compute logits. When it has drafted for a step, or failed to, it announces ``None``, and they
go on to the next step.

What fails on the first rank between two passes costs the step's drafts, as with any method. So does
a fault of our attention, the one part of a pass that is ours: it waits until the pass is over
(:class:`LateFault`), since the others are in that pass. A fault of the target's own layers leaves
the ranks in different collectives, as it would in a step of the target, and ends the engine
(:class:`RanksApart`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from vllm_specplus.drafting.model import LayeredModel
from vllm_specplus.drafting.passes import Attend, PagedAttention, Rows
from vllm_specplus.drafting.self_speculation import Pass, SelfDraftExecutor
from vllm_specplus.step import ReadKV


class RanksApart(BaseException):
    """The ranks are in different collectives, and do not meet again.

    It is no ``Exception``, since nothing that guards against faults of drafting may go on from
    here: the process ends, and vLLM's executor, which watches it, ends the engine.
    """


class Ranks(Protocol):
    """How the first rank reaches the others."""

    def announce(self, what: Any = None) -> Any:
        """Return ``what`` of the first rank, on all of them; from host to host."""

    def broadcast(self, tensor: torch.Tensor) -> Any:
        """Fill ``tensor`` with that of the first rank, on all of them."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy what the target holds, see ``SelfDraftExecutor._copy``; int64 [n] each."""

    slots: np.ndarray
    requests: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True, slots=True)
class RunPass:
    """Run a pass, whose tokens and rows are broadcast next."""

    which: Pass
    sizes: tuple[int, ...]
    """Of ``Rows.packed``, the number of rows T first."""


@dataclass(frozen=True, slots=True)
class RunOutput:
    """Compute logits of hidden states, which are broadcast next."""

    shape: tuple[int, ...]
    """[T, hidden]"""


class Lockstep:
    """The ranks of a target, and the executors that run on all of them."""

    def __init__(self, ranks: Ranks):
        self.ranks = ranks
        self._members: list[LockstepExecutor] = []

    def join(self, executor: LockstepExecutor) -> int:
        """Take an executor in, in the same order on every rank; returns its number."""
        self._members.append(executor)
        return len(self._members) - 1

    @contextmanager
    def lead(self) -> Iterator[None]:
        """On the first rank: the others are in :meth:`accompany` meanwhile, and are told of the
        end whatever happens."""
        try:
            yield
        finally:
            if self._members:
                self.ranks.announce(None)

    @torch.inference_mode()
    def accompany(self, read: ReadKV) -> None:
        """On the other ranks: do what the first one does, until it leads no more. ``read`` reads
        what the target holds of this rank's heads."""
        if not self._members:
            return
        while (told := self.ranks.announce()) is not None:
            number, what = told
            self._members[number].follow_first(what, read)


class LateFault:
    """The attention of a pass on one rank; what fails there waits for the end of the pass."""

    def __init__(self, attend: Attend):
        self._attend = attend
        self.fault: Exception | None = None

    def __call__(self, layer, query, keys, values, scale, window=0, soft_cap=0.0):
        if self.fault is None:
            try:
                return self._attend(layer, query, keys, values, scale, window, soft_cap)
            except Exception as fault:
                self.fault = fault
        return torch.zeros_like(query)


@contextmanager
def _collective() -> Iterator[None]:
    """What fails within, between collectives, leaves the ranks apart."""
    try:
        yield
    except Exception as error:
        raise RanksApart(
            "a pass that all ranks draft in broke off on this one, and the others wait in it: the "
            "engine has to end"
        ) from error


class LockstepExecutor(SelfDraftExecutor):
    """Runs the target's layers on all of its ranks. What the base class offers is for the first
    one, and :meth:`follow_first` for the others."""

    def __init__(
        self, model: LayeredModel, max_slots: int, max_nodes: int, lockstep: Lockstep,
        report: Callable[[Exception], None],
    ):  # fmt: skip
        """``report``: of faults on other ranks than the first, which cost acceptance only."""
        super().__init__(model, max_slots, max_nodes)
        self._ranks, self._report = lockstep.ranks, report
        self._number = lockstep.join(self)

    def _announce(self, what: Copy | RunPass | RunOutput) -> None:
        self._ranks.announce((self._number, what))

    def _copy(self, slots, requests, positions, read):
        self._announce(Copy(slots, requests, positions))
        super()._copy(slots, requests, positions, read)

    def _pass(self, which, tokens, rows, look=None):
        # What can fail beforehand does so while nobody waits.
        attend = LateFault(PagedAttention(self.cache, rows))
        tokens, (sizes, raw) = tokens.contiguous(), rows.packed()
        self._announce(RunPass(which, sizes))
        with _collective():
            self._ranks.broadcast(tokens)
            self._ranks.broadcast(raw)
            hidden = self._run(which, tokens, rows, attend, look)
        if attend.fault is not None:
            raise attend.fault
        return hidden

    def _logits(self, hidden):
        hidden = hidden.contiguous()
        self._announce(RunOutput(tuple(hidden.shape)))
        with _collective():
            self._ranks.broadcast(hidden)
            return super()._logits(hidden)

    def follow_first(self, what: Copy | RunPass | RunOutput, read: ReadKV) -> None:
        """Do what the first rank has announced."""
        if isinstance(what, Copy):
            try:
                super()._copy(what.slots, what.requests, what.positions, read)
            except Exception as fault:
                self._report(fault)
        elif isinstance(what, RunPass):
            self._follow_pass(what)
        else:
            hidden = torch.empty(what.shape, dtype=self.model.dtype, device=self.model.device)
            with _collective():
                self._ranks.broadcast(hidden)
                super()._logits(hidden)

    def _follow_pass(self, what: RunPass) -> None:
        device = self.model.device
        with _collective():
            tokens = torch.empty(what.sizes[0], dtype=torch.int64, device=device)
            self._ranks.broadcast(tokens)
            rows = Rows.received(what.sizes, device, self._ranks.broadcast)
            attend = LateFault(PagedAttention(self.cache, rows))
            self._run(what.which, tokens, rows, attend, lambda layers, found: None)
        if attend.fault is not None:
            self._report(attend.fault)
