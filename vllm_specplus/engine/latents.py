"""Model runners for models whose tokens are latents, with and without CSpD.

vLLM schedules placeholder tokens; the latents are in slots, one per request. One step::

    _prepare_inputs   the latents that the step's rows read go into the model
    (forward)
    _sample           the head draws at every row; drafts are judged
    (drafting)        proposers/cspd.py drafts into the slots

A request's latents come back as its logprobs: value i is channel i, of token id i + 1. They are
the one thing of floats that vLLM returns for every token.
"""

from __future__ import annotations

import random
import time

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_specplus.control import requests as request_controls
from vllm_specplus.engine.image_rows import DiscardedDrawsMixin, UndraftedMixin
from vllm_specplus.engine.runner import TreeCPUModelRunner, TreeGPUModelRunner
from vllm_specplus.engine.v1 import V1Batch
from vllm_specplus.image.continuous.chain import Noise, denoise
from vllm_specplus.image.continuous.decoding import Settings
from vllm_specplus.image.continuous.slots import Drawn, LatentSlots, Picture, Windows
from vllm_specplus.step import Acceptance, LatentStep


class LatentsMixin:
    """Every row of a step draws a latent."""

    rule = "exact"
    window = 0
    """Most latents drafted per request and step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batch = V1Batch(self)

    def load_model(self, *args, **kwargs) -> None:
        super().load_model(*args, **kwargs)
        config = self.get_model().config
        settings = Settings(config.grid_size**2, config.size, config.schedule())
        guided = config.guidance_scale is not None
        self.slots = LatentSlots(
            settings, self.scheduler_config.max_num_seqs, self.window, guided, self.device
        )
        # For requests that name no seed.
        self._seeds = random.Random(self.model_config.seed)

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        out = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        view = self.batch.view(scheduler_output, num_scheduled_tokens)
        for name in view.request_ids:
            if name not in self.slots:
                self.slots.take(name, self._picture(name))
        slot = self.slots.of(view.request_ids)
        count = np.array([1 + len(drafts) for drafts in view.drafts], np.int64)
        computed = view.num_computed.astype(np.int64)
        self._windows = Windows(slot, computed + num_scheduled_tokens - count, count)
        # What every row reads, windows or not.
        ends = np.cumsum(num_scheduled_tokens)
        within = np.arange(ends[-1]) - np.repeat(ends - num_scheduled_tokens, num_scheduled_tokens)
        place = self.batch.to_device(np.repeat(computed, num_scheduled_tokens) + within)
        rows = self.slots.inputs(self.batch.to_device(np.repeat(slot, num_scheduled_tokens)), place)
        self.get_model().latents[: len(rows)] = rows
        return out

    def _picture(self, request_id: str) -> Picture:
        params, config = self.batch.params(request_id), self.get_model().config
        scale = request_controls.guidance(params.extra_args, possible=True)
        return Picture(
            label=self.batch.prompt(request_id)[0] - config.label_token(0),
            seed=self._seeds.getrandbits(63) if params.seed is None else params.seed,
            temperature=params.temperature,
            guidance=(config.guidance_scale or 1.0) if scale is None else scale,
        )

    def _sample(self, logits, spec_decode_metadata) -> SamplerOutput:
        conditions, windows = logits, self._windows
        if self.slots.guided:
            slot = self.batch.to_device(np.repeat(windows.slot, windows.count))
            conditions = torch.cat((conditions, self.slots.guidance[slot, None]), -1)
        drawn = self.slots.verify(
            self.get_model(), conditions, windows, self.batch.discarded, self.rule
        )
        column = np.arange(drawn.lengths.max())
        path = np.where(column < drawn.lengths[:, None], column, -1).astype(np.int32)
        self._drawn(path, drawn)
        return SamplerOutput(
            sampled_token_ids=torch.from_numpy(np.minimum(path, 0)),
            logprobs_tensors=self._as_logprobs(path),
        )

    def _drawn(self, path: np.ndarray, drawn: Drawn) -> None:
        """The step's outcome: accepted rows int32 [R, width] (-1 padded) and their number."""

    def _as_logprobs(self, path: np.ndarray) -> LogprobsTensors:
        """The latents of ``path``, one by one, behind a column for the placeholder itself."""
        width = path.shape[1]
        slot = self.batch.to_device(np.repeat(self._windows.slot, width))
        place = np.repeat(self._windows.first, width) + np.maximum(path, 0).reshape(-1)
        values = self.slots.latents[slot, self.batch.to_device(place)]
        ids = torch.arange(values.shape[1] + 1, dtype=torch.int32, device=self.device)
        return LogprobsTensors(
            logprob_token_ids=ids.expand(len(values), -1).contiguous(),
            logprobs=torch.nn.functional.pad(values, (1, 0)),
            selected_token_ranks=torch.zeros(len(values), dtype=torch.int32, device=self.device),
        )

    def _on_request_state_removed(self, req_id, req_state) -> None:
        super()._on_request_state_removed(req_id, req_state)
        self.slots.free(req_id)


class LatentsCPUModelRunner(LatentsMixin, UndraftedMixin, DiscardedDrawsMixin, CPUModelRunner):
    pass


class LatentsGPUModelRunner(LatentsMixin, UndraftedMixin, GPUModelRunner):
    pass


class CspdMixin(LatentsMixin):
    """Over a runner of ours: rows behind the first are drafts."""

    def load_model(self, *args, **kwargs) -> None:
        config = self.drafter.config
        self.rule, self.window = config.verification, config.num_speculative_tokens
        super().load_model(*args, **kwargs)

    def _sample(self, logits, spec_decode_metadata) -> SamplerOutput:
        start = time.perf_counter()
        out = super()._sample(logits, spec_decode_metadata)
        self.drafter.counters.add("verify_seconds", time.perf_counter() - start)
        return out

    def _drawn(self, path, drawn):
        step = self._step
        step.acceptance = Acceptance(path, drawn.lengths.astype(np.int32), np.minimum(path, 0))
        step.broken = drawn.broken
        step.top_ids = np.empty((len(step.rows.tokens), 0), np.int32)
        self.drafter.counters.add("residuals_given_up", drawn.given_up)

    def _latents(self) -> LatentStep:
        return LatentStep(self.slots, self._windows.slot)

    def _after_forward(self, hidden: torch.Tensor) -> None:
        conditions = self.model.compute_logits(hidden)
        if self.slots.guided:
            conditions = torch.nn.functional.pad(conditions, (0, 1))
        settings = self.slots.settings
        start = torch.zeros((len(conditions), settings.size), device=self.device)
        steps = start[:, None].expand(-1, settings.schedule.steps, -1)
        noise = Noise(start, steps, start[:, 0])
        denoise(self.get_model().head, settings.schedule, conditions, noise)


class CspdCPUModelRunner(CspdMixin, TreeCPUModelRunner):
    pass


class CspdGPUModelRunner(CspdMixin, TreeGPUModelRunner):
    pass
