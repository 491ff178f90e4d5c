"""How some models are to be served, by vLLM's own hook for a model's needs.

Models of latents: vLLM knows tokens, and latents are beside them. Hence our worker, with or without
speculation; no prefix cache, since equal tokens are different latents; and prompts of one label.

Models of captions: captions are prompt embeddings, which vLLM has to be told to take; and where a
picture begins is told to the model by our worker, with or without speculation.

Models of texts with pictures in them: what may follow a token and what it is compared with depends
on where its picture begins, which only our model runner says. Hence a method of ours.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.renderers.base import BaseRenderer

from vllm_specplus import capabilities
from vllm_specplus.control.requests import CAPTION
from vllm_specplus.engine import names, needs
from vllm_specplus.image import chameleon
from vllm_specplus.image.llamagen import PROJECTION, project

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.inputs import EmbedsInput, EmbedsPrompt

logger = init_logger(__name__)

#: What reads our prompts: vLLM's names for it, and where it is.
LABELS_MODE, CAPTIONS_MODE = "specplus_labels", "specplus_captions"
RENDERERS = {
    LABELS_MODE: ("vllm_specplus.engine.models.serving", "LabelRenderer"),
    CAPTIONS_MODE: ("vllm_specplus.engine.models.serving", "CaptionRenderer"),
}
#: Where the front end finds how captions are projected.
WEIGHTS = "model.safetensors"


class ServeLatents(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        model_config.tokenizer_mode = LABELS_MODE
        model_config.skip_tokenizer_init = True

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        device = current_platform.device_type
        needs.check_image_launch(
            vllm_config, device, names.LATENTS_WORKERS, "a model of latents", capabilities.LATENTS
        )
        vllm_config.parallel_config.worker_cls = names.LATENTS_WORKERS[device]
        vllm_config.scheduler_config.async_scheduling = False
        if vllm_config.cache_config.enable_prefix_caching:
            logger.info("Prefix caching is off: equal tokens stand for different latents")
            vllm_config.cache_config.enable_prefix_caching = False


class ServeCaptions(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        if not (Path(model_config.model) / WEIGHTS).is_file():
            raise ValueError(
                f"a model of captions is a folder with {WEIGHTS}, as vllm_specplus.image.convert "
                f"writes it; {model_config.model!r} is none"
            )
        model_config.tokenizer_mode = CAPTIONS_MODE
        model_config.skip_tokenizer_init = True
        model_config.enable_prompt_embeds = True

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        device = current_platform.device_type
        needs.check_image_launch(
            vllm_config, device, names.CAPTION_WORKERS, "a model of captions",
            capabilities.CAPTIONS,
        )  # fmt: skip
        vllm_config.parallel_config.worker_cls = names.CAPTION_WORKERS[device]
        vllm_config.scheduler_config.async_scheduling = False


class ServeTextWithPictures(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        chameleon.complete(model_config.hf_config)

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        needs.check_image_launch(
            vllm_config, current_platform.device_type, names.WORKERS,
            "a model of texts with pictures", capabilities.PICTURES,
        )  # fmt: skip


class ImageRenderer(BaseRenderer):
    def warmup(self, chat_params) -> None:
        """No chat, no template."""

    def render_messages(self, messages, params):
        raise VLLMValidationError("this model makes pictures: it cannot chat")


class LabelRenderer(ImageRenderer):
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


class CaptionRenderer(ImageRenderer):
    """Prompts of a caption's states, which become the embeddings that the model reads."""

    def validate_token_ids(self, token_ids, *, parameter=None) -> None:
        raise VLLMValidationError(self._allowed, parameter=parameter)

    def _tokenize_prompt(self, prompt, params):
        raise VLLMValidationError(self._allowed, parameter="prompt")

    @property
    def _allowed(self) -> str:
        config = self.model_config.hf_config
        return (
            f"a prompt of this model is what its text encoder says of a caption, prompt_embeds of "
            f"shape (1 to {config.caption_tokens}, {config.caption_size}): take "
            f"image.pictures.pictures_of(...).prompt(caption), or send the caption to "
            f"/v1/images/generations"
        )

    def _process_embeds(self, prompt: EmbedsPrompt) -> EmbedsInput:
        states, config = prompt["prompt_embeds"], self.model_config.hf_config
        fits = states.ndim == 2 and states.shape[1] == config.caption_size
        fits = fits and states.is_floating_point() and 1 <= len(states) <= config.caption_tokens
        if not fits or "prompt_token_ids" in prompt:
            raise VLLMValidationError(self._allowed, parameter="prompt_embeds")
        count = len(states)
        embeds = project(states.cpu().float(), *self._projection).to(self.model_config.dtype)
        # What guidance compares with depends on a caption's length, from its first position on:
        # no caption may continue the cached beginning of one of another length.
        salt = f"{CAPTION}{count} {prompt.get('cache_salt', '')}"
        own = {"cache_salt": salt, "prompt_embeds": embeds}
        # A token of its own, so that no method takes a caption's positions for codes.
        own["prompt_token_ids"] = [config.label_token(0)] * count
        own["prompt_is_token_ids"] = [False] * count
        return super()._process_embeds(prompt | own)

    @cached_property
    def _projection(self) -> list[torch.Tensor]:
        with safe_open(Path(self.model_config.model) / WEIGHTS, "pt") as file:
            return [file.get_tensor(name).float() for name in PROJECTION]
