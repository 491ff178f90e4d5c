"""The ``vllm.general_plugins`` entry point: our methods in ``--speculative-config``.

vLLM calls :func:`register` in the front end, in the engine core and in every
worker. It maps a config whose ``method`` is ours onto vLLM's ``custom_class``, lets a head of
`speculators` bring its target, lets vLLM's admission check read our part of a request, and
registers our image models; nothing else, so loading the plugin is harmless when it is not used.
"""

from __future__ import annotations

import copy
import functools
import logging
from typing import Any

from vllm_specplus import compat, speculative_config
from vllm_specplus.capabilities import Need
from vllm_specplus.config import MethodConfig, parse
from vllm_specplus.control import requests
from vllm_specplus.engine import needs
from vllm_specplus.engine.names import CONFIG_KEY, DRAFTER, SCHEDULER, WORKERS
from vllm_specplus.target import Target

logger = logging.getLogger("vllm.specplus")


def register() -> None:
    """Wrap ``EngineArgs.create_speculative_config``, ``create_engine_config``, the flags of its
    parser, whose choices lack our methods, and the checks of ``SamplingParams``; once."""
    problem = compat.unsupported_version()
    if problem:
        _refuse_ours(problem)
        return
    compat.let_vllm_scan_numba()
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_speculative_config
    if getattr(original, "_specplus", False):
        return

    @functools.wraps(original)
    def create_speculative_config(self, target_model_config, target_parallel_config):
        raw = speculative_config.ours(self)
        if raw is not None:
            _configure(self, raw, target_model_config, target_parallel_config)
        return original(self, target_model_config, target_parallel_config)

    create_speculative_config._specplus = True
    EngineArgs.create_speculative_config = create_speculative_config
    make = EngineArgs.create_engine_config

    @functools.wraps(make)
    def create_engine_config(self, *args, **kwargs):
        speculative_config.take_speculator(self)
        return make(self, *args, **kwargs)

    EngineArgs.create_engine_config = create_engine_config
    flags = EngineArgs.add_cli_args

    @functools.wraps(flags)
    def add_cli_args(parser):
        parser = flags(parser)
        speculative_config.admit_flags(parser)
        return parser

    EngineArgs.add_cli_args = staticmethod(add_cli_args)
    _register_models()
    _check_requests()


def _refuse_ours(problem: str) -> None:
    """Outside the supported range: change nothing, but tell whoever names a method of ours."""
    try:
        from vllm.engine.arg_utils import EngineArgs

        original = EngineArgs.create_speculative_config
    except (ImportError, AttributeError):
        logger.warning("vllm-specplus is inactive: %s", problem)
        return
    if getattr(original, "_specplus", False):
        return

    @functools.wraps(original)
    def create_speculative_config(self, *args, **kwargs):
        if (method := speculative_config.method_of_ours(self)) is not None:
            raise ValueError(
                f"speculative method {method!r} is one of vllm-specplus, and {problem}: "
                f"install a vLLM of that range, or a vllm-specplus that supports yours"
            )
        return original(self, *args, **kwargs)

    create_speculative_config._specplus = True
    EngineArgs.create_speculative_config = create_speculative_config


def _register_models() -> None:
    """Make vLLM know our image models; they are imported when one is served."""
    from transformers import AutoConfig
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY

    from vllm_specplus.engine.models import MODELS
    from vllm_specplus.engine.models.serving import (
        RENDERERS,
        ServeCaptions,
        ServeLatents,
        ServeTextWithPictures,
    )
    from vllm_specplus.image import chameleon
    from vllm_specplus.image.continuous.causal import ARCHITECTURE, CausalLatentsConfig
    from vllm_specplus.image.llamagen import TEXT_ARCHITECTURE, LlamaGenConfig

    for name, place in MODELS.items():
        ModelRegistry.register_model(name, place)
    for config in (LlamaGenConfig, CausalLatentsConfig):
        AutoConfig.register(config.model_type, config, exist_ok=True)
    MODELS_CONFIG_MAP[ARCHITECTURE] = ServeLatents
    MODELS_CONFIG_MAP[TEXT_ARCHITECTURE] = ServeCaptions
    for name in (chameleon.CHAMELEON, chameleon.LUMINA):
        MODELS_CONFIG_MAP[name] = ServeTextWithPictures
    for mode, place in RENDERERS.items():
        RENDERER_REGISTRY.register(mode, *place)


def _check_requests() -> None:
    """Wrap ``SamplingParams.verify``, vLLM's admission check, for our ``extra_args``, and the part
    of it that refuses parameters beside speculation, for those that our methods serve.

    The public hook for it, a logits processor's ``validate_params``, is refused by vLLM
    together with any speculation.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    from vllm_specplus.image.continuous.causal import MODEL_TYPE as LATENTS
    from vllm_specplus.image.llamagen import MODEL_TYPE as CODES

    original = SamplingParams.verify

    @functools.wraps(original)
    def verify(self, model_config, speculative_config, *args, **kwargs):
        original(self, model_config, speculative_config, *args, **kwargs)
        ours = getattr(speculative_config, "model", None) == DRAFTER
        target = model_config.hf_text_config
        try:
            if ours:
                requests.parse(self.extra_args)
                requests.check_reasoning(self)
            latents = target.model_type == LATENTS
            # Models that are served by a worker of ours in any case.
            told = latents or getattr(target, "caption_size", None) is not None
            if ours or latents or target.model_type == CODES:  # else the key is somebody else's
                guided = getattr(target, "guidance_scale", None) is not None
                requests.guidance(self.extra_args, possible=(ours or told) and guided)
            if latents:
                requests.check_latents(self, target.size)
        except ValueError as error:
            raise VLLMValidationError(str(error), parameter=requests.KEY) from None

    SamplingParams.verify = verify
    refuses = SamplingParams._validate_spec_decode

    @functools.wraps(refuses)
    def _validate_spec_decode(self, speculative_config):
        if getattr(speculative_config, "model", None) == DRAFTER:
            self = copy.copy(self)
            self.min_p, self.logit_bias = 0.0, None  # served at every row
        refuses(self, speculative_config)

    SamplingParams._validate_spec_decode = _validate_spec_decode


def _configure(args: Any, raw: dict, model_config: Any, parallel_config: Any) -> None:
    """Rewrite the engine arguments for a method of ours; raises ValueError on conflict."""
    from vllm.platforms import current_platform
    from vllm.tokenizers import cached_tokenizer_from_config

    from vllm_specplus.engine import counts
    from vllm_specplus.image.continuous.causal import MODEL_TYPE as LATENTS

    if missing := compat.first_problem():
        raise ValueError(
            f"vllm-specplus cannot run on vLLM {compat.vllm_version()}: {missing.target} "
            f"{missing.text}; see `vllm-specplus doctor`"
        )
    config = parse(raw)
    needs.check_launch(config, args, model_config, parallel_config, current_platform.device_type)
    generates = model_config.hf_text_config
    latents = generates.to_dict() if generates.model_type == LATENTS else None
    target = Target(
        load_tokenizer=lambda: cached_tokenizer_from_config(model_config),
        vocab_size=model_config.get_vocab_size(),
        family=model_config.hf_config.model_type,
        num_layers=model_config.get_total_num_hidden_layers(),
        tensor_parallel_size=parallel_config.tensor_parallel_size,
        hidden_size=model_config.get_hidden_size(),
        gives_layers=lambda: needs.gives_layers(model_config),
        has_codebook=latents is None and hasattr(generates, "codebook_size"),
        latents=latents,
        keeps=needs.kept_tokens(model_config),
        eager=bool(getattr(args, "enforce_eager", False)),
        fp8_cache=needs.has_fp8_cache(args, model_config),
        device_type=current_platform.device_type,
    )
    chosen = args.disable_hybrid_kv_cache_manager is not None
    if not chosen and needs.mixes_windows(model_config) and Need.KV_GROUPS not in config.serves():
        # Layers with a window keep what is behind it, so that all layers have the same pages.
        args.disable_hybrid_kv_cache_manager = True
    backend = needs.backend_for(args, model_config, current_platform.device_type)
    if backend is not None:
        logger.info("attention back end %s, which verifies trees of this model", backend)
        args.attention_backend = backend
    if needs.misrotates(model_config, current_platform.device_type):
        args.compilation_config.custom_ops.append("-rotary_embedding")
    config.check_kind(target)
    config.check_acceptance(target)
    config.check_target(target)
    args.speculative_config = {
        "method": "custom_class",
        "model": DRAFTER,
        "num_speculative_tokens": config.num_speculative_tokens,
    }
    args.spec_method = args.spec_model = args.spec_tokens = None
    args.additional_config = {**(args.additional_config or {}), CONFIG_KEY: worker_config(config)}
    parallel_config.worker_cls = WORKERS[current_platform.device_type]
    args.scheduler_cls = SCHEDULER
    if not config.lossless:
        logger.warning(
            "acceptance rule %r is lossy: answers will differ from the model's own",
            config.accepts_by,
        )
    counts.serve()


def worker_config(config: MethodConfig) -> dict[str, Any]:
    """The JSON that travels in ``additional_config`` to every worker."""
    # Only what the user set: defaults are conflicts elsewhere when written out.
    return {"config": config.model_dump(exclude_unset=True, by_alias=True)}
