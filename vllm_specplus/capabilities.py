"""The contract between what a launch needs and what serves it.

A :class:`Need` is something of a model or of a launch that drafting has to be right with. Each is
served by one part of the plugin: by the engine as a whole (:data:`ENGINE`), by the attention back
end of every layer (``supports`` of its class) or by the drafting method (``supports`` of its
config). What nobody has declared is not served: a need is refused at start, in one sentence that
names it and says what to do, unless its part lists it.

``engine/needs.py`` finds the needs of a launch; this module knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Literal

#: The parts that serve needs.
Part = Literal["engine", "attention", "method"]

_PLAIN = (
    "serve this model without a method of vllm-specplus (vLLM's own, such as 'ngram', may work)"
)
_KV_DTYPE = "set --kv-cache-dtype to bfloat16, or to auto if the checkpoint names no other"
_CONNECTOR = "remove it; --enable-prefix-caching reuses texts within one engine"


class Need(Enum):
    """What a model or a launch may need: who serves it, its name for the user, what to do."""

    ADAPTED_LAYERS = (
        "method",
        "LoRA adapters in the layers that it drafts with",
        "use a method that drafts without the target's layers, such as 'token_recycling', or "
        "remove --enable-lora and serve a model that the adapter is merged into",
    )
    ALIBI = ("attention", "ALiBi position biases", _PLAIN)
    ALIBI_SQRT = ("attention", "ALiBi by square roots of distances", _PLAIN)
    ASYNC_SCHEDULING = (
        "engine",
        "async scheduling, since drafts are made on the host",
        "remove --async-scheduling",
    )
    ATTENTION_BACKEND = (
        "engine",
        "an attention back end that verifies no draft trees",
        "remove --attention-backend, or choose CPU_ATTN on a CPU and FLASH_ATTN or TRITON_ATTN on "
        "a GPU",
    )
    ATTENTION_SINKS = ("attention", "attention sinks", _PLAIN)
    BATCH_SHARDED_SAMPLING = (
        "engine",
        "batch-sharded sampling",
        "remove --enable-batch-sharded-sampling",
    )
    CHUNKED_ATTENTION = ("attention", "chunked attention", _PLAIN)
    CONTEXT_PARALLEL = (
        "engine",
        "decode or prefill context parallelism",
        "set --decode-context-parallel-size and --prefill-context-parallel-size to 1",
    )
    CUSTOM_SCHEDULER = (
        "engine",
        "another scheduler, since it brings its own",
        "leave --scheduler-cls unset",
    )
    CUSTOM_WORKER = (
        "engine",
        "another worker, since it brings its own",
        "leave --worker-cls at 'auto'",
    )
    DATA_PARALLEL = ("engine", "data parallelism", "set --data-parallel-size to 1")
    DEVICE = (
        "engine",
        "this device",
        "run it on a CPU or on an NVIDIA GPU",
    )
    DIFFUSION = ("engine", "text diffusion models", _PLAIN)
    DUAL_BATCH_OVERLAP = ("engine", "dual-batch overlap", "remove --enable-dbo")
    ELASTIC_EXPERTS = (
        "engine",
        "elastic expert parallelism, which rebuilds workers while requests run",
        "remove --enable-elastic-ep",
    )
    ENCODER_ATTENTION = ("attention", "encoder or cross attention", _PLAIN)
    ENCODER_DECODER = ("engine", "encoder-decoder models", _PLAIN)
    EXPERT_PARALLEL = ("engine", "expert parallelism", "remove --enable-expert-parallel")
    FOREIGN_METHOD = (
        "engine",
        "a speculative method of vLLM's own",
        "use a method of vllm-specplus, such as 'jacobi' for pictures of codes and 'cspd' for "
        "latents",
    )
    FP8_KV = ("attention", "an FP8 KV cache", _KV_DTYPE)
    KV_CONNECTOR = ("engine", "a KV connector, which stores drafted tokens' pages", _CONNECTOR)
    KV_FAST_PREFILL = (
        "engine",
        "fast prefill by shared KV caches",
        "remove --kv-sharing-fast-prefill",
    )
    KV_GROUPS = (
        "method",
        "KV caches in several groups, each with pages of its own",
        "set --disable-hybrid-kv-cache-manager, or use a method that does not address the target's "
        "pages, such as 'token_recycling'",
    )
    KV_SHARING = ("attention", "KV caches that layers share", _PLAIN)
    LATENT_ATTENTION = ("attention", "multi-head latent attention", _PLAIN)
    LOGITS_SOFT_CAP = ("attention", "soft-capped attention logits", _PLAIN)
    LORA = (
        "engine",
        "LoRA adapters",
        "remove --enable-lora and serve a model that the adapter is merged into",
    )
    MROPE = (
        "method",
        "rotary positions of several axes (M-RoPE)",
        "use a method that drafts without positions of the target's, such as 'token_recycling'",
    )
    NGRAM_EMBEDDINGS = (
        "engine",
        "embeddings of the tokens before (n-grams), which in a draft are not those beside it",
        _PLAIN,
    )
    NO_METHOD = (
        "engine",
        "decoding without a method of vllm-specplus, whose model runner this model needs",
        'add --speculative-config \'{"method": "jacobi"}\', or another',
    )
    PIPELINE_PARALLEL = (
        "engine",
        "pipeline parallelism",
        "set --pipeline-parallel-size to 1 and use --tensor-parallel-size instead",
    )
    POOLING = ("engine", "models that generate nothing", "remove --speculative-config")
    PREFIX_LM = (
        "attention",
        "pictures whose tokens see each other (prefix-LM ranges)",
        "serve texts only with --language-model-only, or serve this model without a method of "
        "vllm-specplus",
    )
    PROMPT_EMBEDS = (
        "engine",
        "prompt embeddings, since it drafts from token ids",
        "remove --enable-prompt-embeds",
    )
    QUANTIZED_KV = ("attention", "a quantized KV cache", _KV_DTYPE)
    QUANTIZED_WEIGHTS = ("engine", "quantized weights", "remove --quantization")
    RECURRENT_LAYERS = (
        "engine",
        "recurrent layers, whose states cannot be taken back behind a rejected draft",
        _PLAIN,
    )
    REFERENCE_WINDOW = ("attention", "reference sliding-window attention", _PLAIN)
    ROUTED_EXPERTS = (
        "engine",
        "returning routed experts",
        "remove --enable-return-routed-experts",
    )
    SAMPLING_MASK = ("engine", "returning sampling masks", "remove --return-sampling-mask")
    SLIDING_WINDOW = ("attention", "sliding-window attention", _PLAIN)
    SPARSE_ATTENTION = ("attention", "sparse attention", _PLAIN)
    TENSOR_PARALLEL = (
        "engine",
        "tensor parallelism, since it runs on one device",
        "set --tensor-parallel-size to 1",
    )
    TRACE_REPLAY = ("engine", "the replay of traces", "remove --enable-trace-replay")
    UNKNOWN_ATTENTION = ("engine", "a kind of attention that it does not know", _PLAIN)
    V2_RUNNER = (
        "engine",
        "vLLM's V2 model runner",
        "unset VLLM_USE_V2_MODEL_RUNNER",
    )
    VARIABLE_HEADS = ("attention", "layers of different numbers of KV heads", _PLAIN)
    VIDEO_PRUNING = (
        "engine",
        "video pruning, which moves rotary positions while a draft is verified",
        "remove --video-pruning-rate",
    )
    WATERMARK = ("engine", "watermarks, which need vLLM's V2 runner", "remove --watermark-config")
    XDROPE = ("engine", "rotary positions of four axes (XD-RoPE)", _PLAIN)

    @property
    def part(self) -> Part:
        """Who has to serve it."""
        return self.value[0]

    @property
    def what(self) -> str:
        """Its name, for the user."""
        return self.value[1]

    @property
    def remedy(self) -> str:
        """What a user can do who needs it, and it is not served."""
        return self.value[2]


#: What the engine serves whatever the method is. Everything else that falls to it is refused.
ENGINE: frozenset[Need] = frozenset(
    {
        Need.DATA_PARALLEL,
        Need.EXPERT_PARALLEL,
        Need.LORA,
        Need.QUANTIZED_WEIGHTS,
        Need.TENSOR_PARALLEL,
    }
)
#: What a method serves that says nothing of it: it drafts tokens from tokens.
TEXT: frozenset[Need] = frozenset({Need.ADAPTED_LAYERS, Need.KV_GROUPS, Need.MROPE})
#: What models of latents and of captions are served with, by workers of ours (with a method or
#: without), and texts with pictures in them, which have their places from the worker.
LATENTS: frozenset[Need] = frozenset({Need.DATA_PARALLEL, Need.NO_METHOD, Need.QUANTIZED_WEIGHTS})
CAPTIONS: frozenset[Need] = ENGINE | {
    Need.KV_CONNECTOR,
    Need.NO_METHOD,
    Need.PIPELINE_PARALLEL,
}
PICTURES: frozenset[Need] = ENGINE - {Need.LORA, Need.QUANTIZED_WEIGHTS}


@dataclass(frozen=True, slots=True)
class Found:
    """A need that a launch has, and where it comes from."""

    need: Need
    source: str = ""
    """For the user: an argument, a key of the model's config, a layer."""
    remedy: str | None = None
    """What to do instead of the need's own remedy, where the launch tells."""


#: vLLM's names of KV caches that hold keys and values as the model computes them, and of those of
#: bytes, with one scale for all keys of a layer and one for all values.
PLAIN_KV = ("auto", "bfloat16", "float16")
FP8_KV = ("fp8", "fp8_e4m3", "fp8_e5m2")


def of_kv_cache(dtype: str) -> Need | None:
    """Return what a KV cache of vLLM's name ``dtype`` needs; None: nothing."""
    if dtype in PLAIN_KV:
        return None
    return Need.FP8_KV if dtype in FP8_KV else Need.QUANTIZED_KV


def gaps(
    found: Iterable[Found],
    subject: str,
    *,
    engine: frozenset[Need] = ENGINE,
    attention: frozenset[Need] = frozenset(),
    method: frozenset[Need] = TEXT,
) -> list[str]:
    """Return one sentence per need that the part it falls to does not serve.

    ``subject`` is what the user chose, such as "speculative method 'rest'".
    """
    served = {"engine": engine, "attention": attention, "method": method}
    return [sentence(subject, each) for each in found if each.need not in served[each.need.part]]


def sentence(subject: str, found: Found) -> str:
    """Say what is not served, where it comes from, and what to do."""
    source = f" ({found.source})" if found.source else ""
    remedy = found.remedy or found.need.remedy
    return f"{subject} does not work with {found.need.what}{source}: {remedy}"
