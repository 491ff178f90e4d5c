"""Image models: what they have to know about the rows of a step beside their tokens, and the
runners that serve them without drafts."""

from __future__ import annotations

import numpy as np
import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_specplus.control.requests import guidance
from vllm_specplus.engine.v1 import V1Batch


class ImageRowsMixin:
    """Tells an image model the guidance of each row, and where the picture of its request
    begins."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batch = V1Batch(self)

    def _prepare_inputs(self, scheduler_output, num_scheduled_tokens):
        out = super()._prepare_inputs(scheduler_output, num_scheduled_tokens)
        self._tell_image_model(num_scheduled_tokens)
        return out

    def _tell_image_model(self, num_scheduled: np.ndarray) -> None:
        """``num_scheduled`` int32 [R] rows of each request."""
        model = self.get_model()
        buffer = getattr(model, "guidance", None)
        if buffer is not None:
            own = model.config.guidance_scale or 1.0
            asked = (self._guidance_of(name) for name in self.batch.request_ids)
            scales = np.array([own if scale is None else scale for scale in asked], np.float32)
            self._put_rows(buffer[:, 0], scales, num_scheduled)
        starts = getattr(model, "picture_starts", None)
        if starts is not None:
            self._put_rows(starts, self.batch.num_prompt.astype(np.int64), num_scheduled)

    def _guidance_of(self, request_id: str) -> float | None:
        """What a request asks for; None: the model's own."""
        params = self.batch.params(request_id)
        return guidance(None if params is None else params.extra_args, possible=True)

    def _put_rows(
        self, buffer: torch.Tensor, values: np.ndarray, num_scheduled: np.ndarray
    ) -> None:
        """Write each request's value for all of its rows."""
        rows = np.repeat(values, num_scheduled)
        buffer[: len(rows)] = self.batch.to_device(rows)


class DiscardedDrawsMixin:
    """vLLM takes a discarded draw back by moving the generator's offset, which CPU generators do
    not have: a seeded request whose prompt is read in chunks stops the stock engine. Ours has
    not drawn for it: hide it."""

    def _bookkeeping_sync(self, *args, **kwargs):
        generators = self.input_batch.generators
        discarded = np.flatnonzero(self.discard_request_mask.np[: self.input_batch.num_reqs])
        hidden = {i: generators.pop(i) for i in discarded.tolist() if i in generators}
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(hidden)


class UndraftedMixin:
    """A stock runner under a worker of ours."""

    def memory_for_kv_cache(self, available: int) -> int:
        """All of it: nothing is drafted."""
        return available

    def profile_step_cost(self) -> None:
        """Measure nothing: nothing would be decided by it."""

    def close_drafter(self) -> None:
        """Close nothing: there is no drafter."""


class ImageCPUModelRunner(UndraftedMixin, ImageRowsMixin, DiscardedDrawsMixin, CPUModelRunner):
    pass


class ImageGPUModelRunner(UndraftedMixin, ImageRowsMixin, GPUModelRunner):
    pass
