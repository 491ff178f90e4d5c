"""What a launch needs of the capability contract (``capabilities.py``), read off vLLM's objects.

Twice: at configuration, from the engine's arguments and the model's config (:func:`of_launch`),
where a mistake costs no loading; and after load, from the layers and their caches
(:func:`check_loaded`), where nothing is left to guess. Nothing else reads vLLM's configs for it,
and importing this module imports neither vLLM nor torch.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vllm_specplus import capabilities
from vllm_specplus.capabilities import Found, Need
from vllm_specplus.engine import names

#: Arguments that are a need if they are given, or more than 0.
GIVEN = {
    "async_scheduling": Need.ASYNC_SCHEDULING,
    "diffusion_config": Need.DIFFUSION,
    "enable_batch_sharded_sampling": Need.BATCH_SHARDED_SAMPLING,
    "enable_dbo": Need.DUAL_BATCH_OVERLAP,
    "enable_elastic_ep": Need.ELASTIC_EXPERTS,
    "enable_expert_parallel": Need.EXPERT_PARALLEL,
    "enable_lora": Need.LORA,
    "enable_prompt_embeds": Need.PROMPT_EMBEDS,
    "enable_return_routed_experts": Need.ROUTED_EXPERTS,
    "enable_trace_replay": Need.TRACE_REPLAY,
    "kv_offloading_size": Need.KV_CONNECTOR,
    "kv_sharing_fast_prefill": Need.KV_FAST_PREFILL,
    "kv_transfer_config": Need.KV_CONNECTOR,
    "return_sampling_mask": Need.SAMPLING_MASK,
    "video_pruning_rate": Need.VIDEO_PRUNING,
    "watermark_config": Need.WATERMARK,
}
#: Arguments that are a need if they are more than 1.
SIZES = {
    "data_parallel_size": Need.DATA_PARALLEL,
    "decode_context_parallel_size": Need.CONTEXT_PARALLEL,
    "pipeline_parallel_size": Need.PIPELINE_PARALLEL,
    "prefill_context_parallel_size": Need.CONTEXT_PARALLEL,
    "tensor_parallel_size": Need.TENSOR_PARALLEL,
    "ubatch_size": Need.DUAL_BATCH_OVERLAP,
}
#: Arguments that are read in ways of their own below.
READ = frozenset(
    {"attention_backend", "attention_config", "kv_cache_dtype", "scheduler_cls", "worker_cls"}
)
#: Words in ``layer_types`` -> what such a layer needs, None: nothing.
LAYER_TYPES = {
    "sliding": Need.SLIDING_WINDOW,
    "chunked": Need.CHUNKED_ATTENTION,
    "sparse": Need.SPARSE_ATTENTION,
    "linear": Need.RECURRENT_LAYERS,
    "mamba": Need.RECURRENT_LAYERS,
    "recurrent": Need.RECURRENT_LAYERS,
    "conv": Need.RECURRENT_LAYERS,
    "full": None,
    "global": None,
    "attention": None,
}


def of_launch(args: Any, model: Any, parallel: Any, device_type: str) -> list[Found]:
    """Return what vLLM's ``EngineArgs``, ``ModelConfig`` and ``ParallelConfig`` need."""
    own = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
    found = [*_of_worker(parallel, device_type, names.WORKERS, own), *_of_arguments(args)]
    found += _of_attention_backend(args, device_type)
    found += _of_kv_dtype(getattr(args, "kv_cache_dtype", "auto"), model)
    found += of_model(model)
    if getattr(args, "disable_hybrid_kv_cache_manager", None) is False and mixes_windows(model):
        found.append(Found(Need.KV_GROUPS, "--no-disable-hybrid-kv-cache-manager"))
    return _once(found)


def _once(found: list[Found]) -> list[Found]:
    """The first of each need."""
    unique: dict[Need, Found] = {}
    for each in found:
        unique.setdefault(each.need, each)
    return list(unique.values())


def _of_worker(
    parallel: Any, device_type: str, workers: Mapping[str, str], v2_runner: bool
) -> Iterator[Found]:
    if device_type not in workers:
        yield Found(Need.DEVICE, repr(device_type))
    ours = {*names.WORKERS.values(), *workers.values()}
    if parallel.worker_cls not in ("auto", *ours):
        yield Found(Need.CUSTOM_WORKER, f"worker_cls={parallel.worker_cls!r}")
    if v2_runner:
        yield Found(Need.V2_RUNNER, "VLLM_USE_V2_MODEL_RUNNER=1")


def _of_arguments(args: Any) -> Iterator[Found]:
    for name, need in GIVEN.items():
        value = getattr(args, name, None)
        if value not in (None, False, 0):
            yield Found(need, "--" + name.replace("_", "-"))
    if getattr(args, "enable_lora", None):
        yield Found(Need.ADAPTED_LAYERS, "--enable-lora")
    for name, need in SIZES.items():
        value = getattr(args, name, 1)
        if value is not None and value > 1:
            yield Found(need, f"{name}={value}")
    if args.scheduler_cls not in (None, names.SCHEDULER):
        yield Found(Need.CUSTOM_SCHEDULER, f"scheduler_cls={args.scheduler_cls!r}")
    attention = getattr(args, "attention_config", None)
    if getattr(attention, "hisparse_config", None) is not None:
        yield Found(Need.SPARSE_ATTENTION, "hisparse_config", "remove it from --attention-config")


def _of_attention_backend(args: Any, device_type: str) -> Iterator[Found]:
    name, ours = _chosen_backend(args), backends(device_type)
    if name is not None and name.upper() not in ours:
        yield Found(
            Need.ATTENTION_BACKEND,
            name,
            f"remove --attention-backend, or choose {' or '.join(ours)}",
        )


def _chosen_backend(args: Any) -> str | None:
    """The attention back end that the user names."""
    chosen = getattr(args, "attention_backend", None) or getattr(
        getattr(args, "attention_config", None), "backend", None
    )
    name = getattr(chosen, "name", chosen)
    return None if name is None or str(name).lower() == "auto" else str(name)


def _of_kv_dtype(asked: str, model: Any) -> Iterator[Found]:
    """Of the argument, or of the checkpoint, which 'auto' goes by."""
    from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

    dtype = resolve_kv_cache_dtype_string(str(asked), model)
    scheme = getattr(getattr(model, "hf_config", None), "quantization_config", None)
    if dtype == "auto" and isinstance(scheme, dict) and scheme.get("kv_cache_scheme"):
        dtype = "fp8"  # vLLM finds that out when it makes the layers
    need = capabilities.of_kv_cache(dtype)
    if need is not None:
        source = f"kv_cache_dtype={asked!r}"
        if asked == "auto":
            source += f", which is {dtype!r} for this checkpoint"
        yield Found(need, source)


def of_model(model: Any) -> list[Found]:
    """Return what vLLM's ``ModelConfig`` says of the model."""
    found = []
    for need, attribute in (
        (Need.RECURRENT_LAYERS, "is_hybrid"),
        (Need.RECURRENT_LAYERS, "is_attention_free"),
        (Need.ENCODER_DECODER, "is_encoder_decoder"),
        (Need.LATENT_ATTENTION, "use_mla"),
        (Need.ALIBI, "uses_alibi"),
        (Need.DIFFUSION, "is_diffusion"),
        (Need.MROPE, "uses_mrope"),
        (Need.PREFIX_LM, "is_mm_prefix_lm"),
        (Need.REFERENCE_WINDOW, "rswa_window"),
        (Need.XDROPE, "uses_xdrope_dim"),
    ):
        if getattr(model, attribute, None):
            found.append(Found(need, _family(model)))
    if getattr(model, "runner_type", "generate") != "generate":
        found.append(Found(Need.POOLING, f"runner={model.runner_type!r}"))
    pruning = getattr(getattr(model, "multimodal_config", None), "video_pruning_rate", None)
    if pruning:
        found.append(Found(Need.VIDEO_PRUNING, f"video_pruning_rate={pruning}"))
    config = getattr(model, "hf_text_config", None)
    return found + list(_of_config(config)) if config is not None else found


def of_folder(folder: Path) -> list[Found]:
    """The same of a model's folder, with the dtype that its checkpoint asks of the KV cache."""
    from vllm.engine.arg_utils import EngineArgs

    model = EngineArgs(model=str(folder), skip_tokenizer_init=True).create_model_config()
    found = [*_of_kv_dtype("auto", model), *of_model(model)]
    return _once(found)


def _family(model: Any) -> str:
    config = getattr(model, "hf_config", None)
    return f"a model of type {config.model_type!r}" if hasattr(config, "model_type") else ""


def _of_config(config: Any) -> Iterator[Found]:
    """What a Hugging Face config of a text model says of its attention."""
    family = str(getattr(config, "model_type", ""))
    kinds = dict.fromkeys(getattr(config, "layer_types", None) or ())
    for kind in kinds:
        need = next((need for word, need in LAYER_TYPES.items() if word in kind),
                    Need.UNKNOWN_ATTENTION)  # fmt: skip
        if need is not None and need is not Need.SLIDING_WINDOW:
            yield Found(need, f"layers of type {kind!r}")
    yield from _windows(config, [kind for kind in kinds if "sliding" in kind])
    if getattr(config, "attention_chunk_size", None):
        yield Found(Need.CHUNKED_ATTENTION, f"attention_chunk_size={config.attention_chunk_size}")
    if getattr(config, "attn_logit_softcapping", None):
        yield Found(Need.LOGITS_SOFT_CAP, f"attn_logit_softcapping={config.attn_logit_softcapping}")
    if family == "gpt_oss" or _any(config, "attention_sink_bias", "attention_sink_enabled"):
        yield Found(Need.ATTENTION_SINKS, f"a model of type {family!r}")
    if getattr(config, "sparse_attention_config", None) or hasattr(config, "index_topk"):
        yield Found(Need.SPARSE_ATTENTION, f"a model of type {family!r}")
    for key in ("engram_layer_ids", "ple_layer_ids", "emb_neighbor_num"):
        if getattr(config, key, None):
            yield Found(Need.NGRAM_EMBEDDINGS, key)
    if shared := getattr(config, "num_kv_shared_layers", None):
        yield Found(Need.KV_SHARING, f"num_kv_shared_layers={shared}")


def _any(config: Any, *endings: str) -> bool:
    keys = vars(config) if hasattr(config, "__dict__") else {}
    return any(bool(value) for key, value in keys.items() if key.endswith(endings))


def _windows(config: Any, kinds: list[str]) -> Iterator[Found]:
    """The sliding windows of a model."""
    keys = ("sliding_window", "sliding_windows", "sliding_window_size")
    window = next((value for key in keys if (value := getattr(config, key, None))), None)
    if kinds:
        yield Found(Need.SLIDING_WINDOW, f"layers of type {kinds[0]!r}")
    elif window is not None:
        yield Found(Need.SLIDING_WINDOW, f"sliding_window={window}")


def mixes_windows(model: Any) -> bool:
    """Have some layers of vLLM's ``ModelConfig`` a sliding window or chunks, and others not?"""
    config = getattr(model, "hf_text_config", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    return len(kinds) > 1 and any("sliding" in kind or "chunked" in kind for kind in kinds)


def kept_tokens(model: Any) -> int | None:
    """The window that all layers of vLLM's ``ModelConfig`` have, if texts may exceed it."""
    config = getattr(model, "hf_text_config", None)
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or window >= model.max_model_len:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding"]
    return window if all("sliding" in kind for kind in kinds) else None


def gives_layers(model: Any) -> bool:
    """Does vLLM's class of the model hand out what enters its layers, as EAGLE-3 heads read it?"""
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_eagle3

    served, _ = ModelRegistry.resolve_model_cls(model.architectures, model)
    return supports_eagle3(served)


def has_fp8_cache(args: Any, model: Any) -> bool:
    """Are keys and values kept as bytes?"""
    found = _of_kv_dtype(getattr(args, "kv_cache_dtype", "auto"), model)
    return any(each.need is Need.FP8_KV for each in found)


def of_image_launch(vllm_config: Any, device_type: str, workers: Mapping[str, str]) -> list[Found]:
    """Return what the engine of an image model of ours needs; it brings one of ``workers``."""
    parallel, speculative = vllm_config.parallel_config, vllm_config.speculative_config
    found = [*_of_worker(parallel, device_type, workers, vllm_config.use_v2_model_runner)]
    if vllm_config.scheduler_config.async_scheduling:
        found.append(Found(Need.ASYNC_SCHEDULING, "async_scheduling"))
    for name, need in SIZES.items():
        if getattr(parallel, name, 1) > 1:
            found.append(Found(need, f"{name}={getattr(parallel, name)}"))
    if vllm_config.lora_config is not None:
        found.append(Found(Need.LORA, "--enable-lora"))
    if vllm_config.kv_transfer_config is not None:
        found.append(Found(Need.KV_CONNECTOR, "--kv-transfer-config"))
    if getattr(vllm_config, "quant_config", None) is not None:
        found.append(Found(Need.QUANTIZED_WEIGHTS))
    if speculative is None:
        found.append(Found(Need.NO_METHOD))
    elif speculative.model != names.DRAFTER:
        found.append(Found(Need.FOREIGN_METHOD, repr(speculative.method)))
    return found


def backends(device_type: str) -> dict[str, str]:
    """Our attention back ends for a device: vLLM's name -> place of the class."""
    from vllm_specplus.engine import attention

    return attention.BACKENDS.get(device_type, {})


def served_by_backends(device_type: str) -> dict[str, frozenset[Need]]:
    """Return what each back end of the device serves, by vLLM's names, in the order in which they
    are preferred."""
    served = {}
    for vllm_name, place in backends(device_type).items():
        module, _, name = place.rpartition(".")
        try:
            served[vllm_name] = getattr(importlib.import_module(module), name).supports
        except ImportError:  # a build of vLLM without its kernels; the others may do
            continue
    return served


def served_by_attention(device_type: str, found: Iterable[Found]) -> frozenset[Need]:
    """Return what some back end of the device serves of a model that needs what was ``found``."""
    served = _eligible(served_by_backends(device_type), {each.need for each in found})
    return frozenset().union(*served.values())


def _eligible(
    served: dict[str, frozenset[Need]], needed: Iterable[Need]
) -> dict[str, frozenset[Need]]:
    """Those back ends that have to do with a model: of latents where it ``needed`` that, else the
    others."""
    latent = Need.LATENT_ATTENTION in needed
    return {
        name: needs for name, needs in served.items() if (Need.LATENT_ATTENTION in needs) == latent
    }


def backend_for(args: Any, model: Any, device_type: str) -> str | None:
    """Return the attention back end to ask vLLM for, where not every one of the device serves the
    model and the user names none."""
    needed = {each.need for each in of_model(model) if each.need.part == "attention"}
    served = _eligible(served_by_backends(device_type), needed)
    able = [name for name, needs in served.items() if needed <= needs]
    if _chosen_backend(args) is not None or not able:
        return None
    # Of latents vLLM prefers others, which verify no trees.
    return None if len(able) == len(served) and Need.LATENT_ATTENTION not in needed else able[0]


def misrotates(model: Any, device_type: str) -> bool:
    """Is the model one whose heads vLLM's own rotary kernel for CPUs spoils (0.32)?

    It takes heads for consecutive, and those of multi-head latent attention have other elements
    between them. vLLM's rotation in torch, which compiled engines use anyway, does not.
    """
    return device_type == "cpu" and bool(getattr(model, "use_mla", False))


def check_launch(config: Any, args: Any, model: Any, parallel: Any, device_type: str) -> None:
    """Raise ValueError with one sentence per need of the launch that nobody serves.

    ``config`` is the validated config of a method.
    """
    found = of_launch(args, model, parallel, device_type)
    served = _eligible(served_by_backends(device_type), {each.need for each in found})
    chosen = (_chosen_backend(args) or "").upper()
    if chosen in served:
        found = [_served_elsewhere(each, chosen, served) for each in found]
        served = {chosen: served[chosen]}
    problems = capabilities.gaps(
        found,
        f"speculative method {config.method!r}",
        attention=frozenset().union(*served.values()),
        method=config.serves(),
    )
    if problems:
        raise ValueError("; ".join(problems))


def _served_elsewhere(found: Found, chosen: str, served: Mapping[str, frozenset[Need]]) -> Found:
    """The same, with a remedy if the ``chosen`` back end does not serve it and others do."""
    able = [name for name, needs in served.items() if found.need in needs]
    if not able or chosen in able:
        return found
    return replace(found, remedy=f"remove --attention-backend, or choose {' or '.join(able)}")


def check_image_launch(
    vllm_config: Any,
    device_type: str,
    workers: Mapping[str, str],
    subject: str,
    served: frozenset[Need],
) -> None:
    """The same for an image model of ours, which brings one of ``workers``."""
    problems = capabilities.gaps(
        of_image_launch(vllm_config, device_type, workers), subject, engine=served
    )
    if problems:
        raise ValueError("; ".join(problems))


def check_loaded(layers: Mapping[str, Any], kv_cache_config: Any, method: frozenset[Need]) -> None:
    """Raise ValueError with one sentence per need of the loaded model that nobody serves.

    ``layers`` are those with a KV cache, by name; their implementations have refused arguments
    that they do not know when they were made. ``method`` is what the method serves.
    """
    from vllm_specplus.engine import attention

    foreign = [
        refusal for name, layer in layers.items() if (refusal := attention.refusal(name, layer))
    ]
    if foreign:
        raise ValueError(foreign[0])  # the others read alike
    served = [attention.supports(layer) for layer in layers.values()]
    problems = capabilities.gaps(
        of_caches(kv_cache_config),
        "vllm-specplus",
        attention=frozenset.intersection(*served) if served else frozenset(),
        method=method,
    )
    if problems:
        raise ValueError("; ".join(problems))


def of_caches(kv_cache_config: Any) -> list[Found]:
    """Return what the groups of vLLM's ``KVCacheConfig`` need."""
    groups = kv_cache_config.kv_cache_groups
    found = []
    if len(groups) > 1:
        found.append(Found(Need.KV_GROUPS, f"{len(groups)} of them"))
    for group in groups:
        spec = group.kv_cache_spec
        each = getattr(spec, "kv_cache_specs", None)
        specs = [spec] if each is None else list(each.values())
        found += _of_specs(specs, group.layer_names[0])
        if len({getattr(spec, "num_kv_heads", None) for spec in specs}) > 1:
            found.append(Found(Need.VARIABLE_HEADS))
    return found


#: Kinds of cache by the name of vLLM's class, beside the one of full attention; others are unknown.
_SPECS = {
    "ChunkedLocalAttentionSpec": Need.CHUNKED_ATTENTION,
    "CrossAttentionSpec": Need.ENCODER_ATTENTION,
    "EncoderOnlyAttentionSpec": Need.ENCODER_ATTENTION,
    "MLAAttentionSpec": Need.LATENT_ATTENTION,
    "MambaSpec": Need.RECURRENT_LAYERS,
    "RSWASpec": Need.REFERENCE_WINDOW,
    "SlidingWindowMLASpec": Need.SLIDING_WINDOW,
    "SlidingWindowSpec": Need.SLIDING_WINDOW,
}


def _of_specs(specs: Iterable[Any], layer: str) -> Iterator[Found]:
    for spec in specs:
        kind = type(spec).__name__
        if kind != "FullAttentionSpec":
            yield Found(_SPECS.get(kind, Need.UNKNOWN_ATTENTION), f"{kind} of layer {layer!r}")
            return
        # Without vLLM's hybrid cache manager windows and chunks are kept as full attention.
        if getattr(spec, "sliding_window", None):
            yield Found(Need.SLIDING_WINDOW, f"sliding_window={spec.sliding_window}")
        if getattr(spec, "attention_chunk_size", None):
            yield Found(Need.CHUNKED_ATTENTION, f"attention_chunk_size={spec.attention_chunk_size}")
