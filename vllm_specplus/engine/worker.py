"""Workers: stock ones that build our model runner and register tree attention.

The back end is registered here and not in the plugin, so that an engine without
a method of ours never sees it.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_worker import Worker

from vllm_specplus.engine import attention


class TreeCPUWorker(CPUWorker):
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

    def determine_available_memory(self) -> int:
        return self.model_runner.memory_for_kv_cache(super().determine_available_memory())

    def compile_or_warm_up_model(self):
        times = super().compile_or_warm_up_model()
        self.model_runner.profile_step_cost()
        return times

    def shutdown(self) -> None:
        self.model_runner.close_drafter()
        super().shutdown()


class TreeGPUWorker(Worker):
    def _runner_class(self) -> type:
        from vllm_specplus.engine.runner import TreeGPUModelRunner

        return TreeGPUModelRunner

    def _make_model_runner(self):
        attention.register("cuda")
        return self._runner_class()(self.vllm_config, self.device)

    def determine_available_memory(self) -> int:
        return self.model_runner.memory_for_kv_cache(super().determine_available_memory())

    def compile_or_warm_up_model(self):
        times = super().compile_or_warm_up_model()
        self.model_runner.profile_step_cost()
        return times

    def shutdown(self) -> None:
        self.model_runner.close_drafter()
        super().shutdown()


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
