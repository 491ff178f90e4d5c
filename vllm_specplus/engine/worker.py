"""Workers: stock ones that build our model runner and register tree attention.

The back end is registered here and not in the plugin, so that an engine without
a method of ours never sees it.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from vllm_specplus.control.settings import ControlChange
from vllm_specplus.engine import attention
from vllm_specplus.engine.drafter import Drafter


class TreeWorkerMixin:
    """What workers of both devices do besides."""

    model_runner: Any

    def determine_available_memory(self) -> int:
        return self.model_runner.memory_for_kv_cache(super().determine_available_memory())

    def compile_or_warm_up_model(self):
        times = super().compile_or_warm_up_model()
        self.model_runner.profile_step_cost()
        return times

    def reload_weights(self, *args, **kwargs) -> None:
        super().reload_weights(*args, **kwargs)
        self._forget_weights()

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self._forget_weights()

    def _forget_weights(self) -> None:
        """What was learnt are texts of other weights, and some of these may have been copied."""
        attention.forget_weights(attention.cached_layers(self.vllm_config))
        drafter = getattr(self.model_runner, "drafter", None)
        if isinstance(drafter, Drafter):
            drafter.renew(drafter.controller.config)

    def control_speculation(self, change: dict[str, Any]) -> dict[str, Any]:
        """For ``collective_rpc``: changes how much is drafted from the next step on, by the keys of
        ``ControlChange``; none only asks. Returns what holds now, or what is wrong, one sentence
        under "refused"."""
        drafter = getattr(self.model_runner, "drafter", None)
        if not isinstance(drafter, Drafter):
            return {"refused": "nothing is drafted here by a method of vllm-specplus"}
        try:
            if change:
                drafter.controller.change(ControlChange.model_validate(change))
        except ValueError as error:
            return {"refused": str(error)}
        return drafter.controller.config.model_dump()

    def shutdown(self) -> None:
        self.model_runner.close_drafter()
        super().shutdown()


class TreeCPUWorker(TreeWorkerMixin, CPUWorker):
    def _runner_class(self) -> type:
        from vllm_specplus.engine.runner import TreeCPUModelRunner

        return TreeCPUModelRunner

    def init_device(self) -> None:
        import vllm.v1.worker.cpu_worker as module

        attention.register("cpu")
        # The stock method names its runner class; give it ours for the call.
        stock, module.CPUModelRunner = module.CPUModelRunner, self._runner_class()
        try:
            super().init_device()
        finally:
            module.CPUModelRunner = stock


class TreeGPUWorker(TreeWorkerMixin, Worker):
    def _runner_class(self) -> type:
        from vllm_specplus.engine.runner import TreeGPUModelRunner

        return TreeGPUModelRunner

    def _make_model_runner(self):
        attention.register("cuda")
        return self._runner_class()(self.vllm_config, self.device)


class ImageCPUWorker(TreeCPUWorker):
    """With or without drafts."""

    def _runner_class(self) -> type:
        from vllm_specplus.engine import image_rows

        drafted = self.vllm_config.speculative_config is not None
        return super()._runner_class() if drafted else image_rows.ImageCPUModelRunner


class ImageGPUWorker(TreeGPUWorker):
    def _runner_class(self) -> type:
        from vllm_specplus.engine import image_rows

        drafted = self.vllm_config.speculative_config is not None
        return super()._runner_class() if drafted else image_rows.ImageGPUModelRunner


class LatentsCPUWorker(TreeCPUWorker):
    def _runner_class(self) -> type:
        from vllm_specplus.engine import latents

        drafted = self.vllm_config.speculative_config is not None
        return latents.CspdCPUModelRunner if drafted else latents.LatentsCPUModelRunner


class LatentsGPUWorker(TreeGPUWorker):
    def _runner_class(self) -> type:
        from vllm_specplus.engine import latents

        drafted = self.vllm_config.speculative_config is not None
        return latents.CspdGPUModelRunner if drafted else latents.LatentsGPUModelRunner
