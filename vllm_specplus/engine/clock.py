"""What a step takes: measured at start by its rows, and corrected while serving."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm import __version__ as vllm_version
from vllm.distributed import get_tp_group

from vllm_specplus.control.cost import (
    PROFILE_ROUNDS,
    PROFILE_ROWS,
    CostCurve,
    CostProfile,
    StepCost,
    StepShape,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_specplus.engine.drafter import Drafter

#: Row counts at which steps with drafts are profiled: what they take beyond plain ones hardly
#: bends in between.
DRAFTED_ROWS = (2, 3, 4, 6, 8, 12, 16, 24, 33, 48, 64, 96, 129, 192, 256)
DRAFTED_ROUNDS = 3


@dataclass(slots=True)
class _Running:
    """A step that is being timed, from its start to the next one's."""

    started: float
    request_ids: frozenset[str]
    shape: StepShape
    drafting: float
    """Value of the drafting counter when it started."""


class StepClock:
    """Tells the controller how long the steps took, drafting apart."""

    def __init__(self, drafter: Drafter):
        self._drafter = drafter
        self._running: _Running | None = None

    def start(self, started: float, drafting: float, request_ids, shape: StepShape) -> None:
        """A step of this shape began at ``started``, the drafting counter being ``drafting``."""
        self._running = _Running(started, frozenset(request_ids), shape, drafting)

    @property
    def drafting(self) -> float:
        """Seconds spent drafting since the engine began."""
        return self._drafter.counters["draft_seconds"]

    def stop(self, request_ids) -> None:
        """The last step ends where the next one begins, if the engine was never idle."""
        step, self._running = self._running, None
        # A request of that step goes on: the scheduler had no reason to wait.
        if step is None or step.request_ids.isdisjoint(request_ids):
            return
        seconds = time.perf_counter() - step.started
        drafting = self.drafting - step.drafting
        self._drafter.controller.step_took(step.shape, seconds - drafting, drafting)


class StepProfiler:
    """Measures (or reads) what a step costs, once the model is warm."""

    def __init__(
        self, vllm_config: VllmConfig, device: torch.device, run: Callable[[int, str], None]
    ):
        """``run(rows, kind)`` runs the target over ``rows`` rows, as ``kind``: "plain" (one row
        per request), "chain" or "tree" (requests with as many drafted nodes as may be)."""
        self._config, self._device, self._run = vllm_config, device, run

    def profile(self, cost_file: str | None, most_rows: int, trees: bool) -> StepCost | None:
        """What the controller predicts with, of steps with ``trees`` too; None on ranks that do
        not decide.

        Collective: every rank of a tensor-parallel group must call it alike.
        """
        group = get_tp_group()
        # Rank 0's answer: the file may be on its machine only, and measuring is collective.
        kept = group.broadcast_object(bool(cost_file) and Path(cost_file).exists(), src=0)
        profile = None if kept else self._measure(max(min(most_rows, PROFILE_ROWS[-1]), 2), trees)
        if group.rank_in_group:
            return None
        if kept:
            profile = CostProfile.load(cost_file, self._key())
        elif cost_file:
            profile.save(cost_file, self._key())
        return StepCost(profile)

    def _measure(self, most: int, trees: bool) -> CostProfile:
        """Plain steps row by row; of steps with drafts, what trees take more than chains of the
        same requests. All else that drafts cost depends on how many requests they are of, and is
        learnt from the steps that are run."""
        plain = self._curve("plain", PROFILE_ROWS, PROFILE_ROUNDS, most)
        if not trees:
            return CostProfile(plain)
        chain, tree = (
            self._curve(kind, DRAFTED_ROWS, DRAFTED_ROUNDS, most) for kind in ("chain", "tree")
        )
        more = np.maximum(tree.seconds - chain.seconds, 0.0)
        seconds = plain.seconds + np.interp(plain.rows, tree.rows, more)
        return CostProfile(plain, tree=CostCurve(plain.rows, seconds))

    def _curve(self, kind: str, counts: tuple[int, ...], rounds: int, most: int) -> CostCurve:
        rows = [n for n in counts if n <= most]
        if len(rows) < 2:
            rows = [1, 2]
        # Rounds over all counts, so that a busy moment of the machine spoils one value of
        # each; the same calls on every rank, since the forward pass is collective.
        seconds = [[self._time(n, kind) for n in rows] for _ in range(rounds)]
        return CostCurve.fit(np.array(rows, np.int64), np.array(seconds))

    def _time(self, rows: int, kind: str) -> float:
        self._synchronize()
        start = time.perf_counter()
        self._run(rows, kind)
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _key(self) -> dict[str, Any]:
        """What a profile depends on."""
        model, compilation = self._config.model_config, self._config.compilation_config
        if self._device.type == "cpu":
            device = f"{platform.machine()}, {torch.get_num_threads()} threads"
        else:
            device = torch.cuda.get_device_name(self._device)
        return {
            "model": model.model,
            "dtype": str(model.dtype).removeprefix("torch."),
            "quantization": model.quantization,
            "device": device,
            "vllm": vllm_version,
            "tensor_parallel_size": self._config.parallel_config.tensor_parallel_size,
            "compilation": compilation.mode.name,
            "cudagraphs": compilation.cudagraph_mode.name,
        }
