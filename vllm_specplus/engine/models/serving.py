"""How some models are to be served, by vLLM's own hook for a model's needs.

Models of latents: vLLM knows tokens, and latents are beside them. Hence our worker, with or without
speculation; no prefix cache, since equal tokens are different latents; and prompts of one label.

Models of texts with pictures in them: what may follow a token and what it is compared with depends
on where its picture begins, which only our model runner says. Hence a method of ours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.renderers.base import BaseRenderer

from vllm_specplus import plugin
from vllm_specplus.image import chameleon

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

logger = init_logger(__name__)

#: What reads our prompts: vLLM's name for it, and where it is.
RENDERER_MODE = "specplus_labels"
RENDERER = ("vllm_specplus.engine.models.serving", "LabelRenderer")
WORKERS = {
    "cpu": "vllm_specplus.engine.worker.LatentsCPUWorker",
    "cuda": "vllm_specplus.engine.worker.LatentsGPUWorker",
}


class ServeLatents(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        model_config.tokenizer_mode = RENDERER_MODE
        model_config.skip_tokenizer_init = True

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        for problem in conflicts(vllm_config, current_platform.device_type):
            raise ValueError(f"a model of latents {problem}")
        vllm_config.parallel_config.worker_cls = WORKERS[current_platform.device_type]
        vllm_config.scheduler_config.async_scheduling = False
        if vllm_config.cache_config.enable_prefix_caching:
            logger.info("Prefix caching is off: equal tokens stand for different latents")
            vllm_config.cache_config.enable_prefix_caching = False


def conflicts(vllm_config: VllmConfig, device_type: str):
    """Yield what in an engine's config a model of latents cannot work with, and what to do."""
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    if device_type not in WORKERS:
        yield f"runs on CPU and CUDA, not on {device_type!r}"
    if parallel.worker_cls not in ("auto", *plugin.WORKERS.values(), *WORKERS.values()):
        yield f"brings its own worker: leave worker_cls at 'auto', not {parallel.worker_cls!r}"
    if parallel.world_size > 1:
        yield "runs on one device: leave tensor_parallel_size and pipeline_parallel_size at 1"
    if vllm_config.use_v2_model_runner:
        yield "needs vLLM's V1 model runner: unset VLLM_USE_V2_MODEL_RUNNER"
    if vllm_config.scheduler_config.async_scheduling:
        yield "cannot use async scheduling: remove --async-scheduling"
    if vllm_config.lora_config is not None:
        yield "does not support LoRA adapters: remove enable_lora"
    if vllm_config.kv_transfer_config is not None:
        yield "has latents beside its cache, which no KV connector carries: remove it"
    if speculative is not None and speculative.model != plugin.DRAFTER:
        yield f"cannot be drafted by {speculative.method!r}, which drafts tokens: use method 'cspd'"


class ServeTextWithPictures(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        chameleon.complete(model_config.hf_config)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        if getattr(vllm_config.speculative_config, "model", None) != plugin.DRAFTER:
            raise ValueError(
                "a model of texts with pictures needs the model runner of vllm-specplus, which its "
                'methods bring: add --speculative-config \'{"method": "jacobi"}\', or another'
            )
        if vllm_config.quant_config is not None:
            raise ValueError("a model of texts with pictures is not quantized: remove quantization")


class LabelRenderer(BaseRenderer):
    """Prompts of one label's token, and nothing else."""

    def validate_token_ids(self, token_ids, *, parameter=None) -> None:
        config = self.model_config.hf_config
        first, last = config.label_token(0), config.label_token(config.num_classes)
        if len(token_ids) != 1 or not first <= token_ids[0] <= last:
            raise VLLMValidationError(
                f"a prompt of this model is the token of one label ({first} to {last - 1}, or "
                f"{last} for any), not {list(token_ids)[:8]}",
                parameter=parameter,
            )

    def warmup(self, chat_params) -> None:
        """No chat, no template."""

    def render_messages(self, messages, params):
        raise VLLMValidationError("this model makes pictures of labels: it cannot chat")
