"""What a model and a launch need, by names that back ends, methods and the engine share.

One vocabulary for the capability contract: whoever verifies drafts states the needs it serves,
and whatever else a model or a launch needs is refused at start.
"""

from __future__ import annotations

from enum import StrEnum


class Need(StrEnum):
    """A property of a model or a launch that some part of the engine has to know about."""

    ALIBI = "alibi"
    ATTENTION_SINKS = "attention_sinks"
    CHUNKED_ATTENTION = "chunked_attention"
    CONTEXT_PARALLEL = "context_parallel"
    ENCODER_ATTENTION = "encoder_attention"
    KV_GROUPS = "kv_groups"
    KV_SHARING = "kv_sharing"
    LATENT_ATTENTION = "latent_attention"
    LOGITS_SOFT_CAP = "logits_soft_cap"
    MROPE = "mrope"
    PREFIX_LM = "prefix_lm"
    QUANTIZED_KV = "quantized_kv"
    RECURRENT_LAYERS = "recurrent_layers"
    REFERENCE_WINDOW = "reference_window"
    SLIDING_WINDOW = "sliding_window"
    SPARSE_ATTENTION = "sparse_attention"
    VARIABLE_HEADS = "variable_heads"
