"""What engines add to data sheets: launches, work of the host, and what is reached of a bandwidth.

A constant is a count of a public implementation or comes from runs *without* speculation
(``benchmarks/data/plain_decoding.json``, which a test compares); none was fitted to a speed-up.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Of a data sheet's bandwidth and arithmetic. Bandwidth: Llama-2-7B on an A100 in gpt-fast, after
#: its short kernels are taken off. Arithmetic: the usual share of large matrix products.
MEMORY_SHARE, COMPUTE_SHARE = 0.73, 0.7
#: Seconds of a short kernel within a CUDA graph (NVIDIA, "Getting Started with CUDA Graphs").
SHORT_KERNEL = 3.4e-6
#: Seconds that Python and PyTorch take to launch one operation: transformers' plain decoding of
#: Llama-2-7B and 13B on an A100, by the launches below.
LAUNCH = 15.8e-6


@dataclass(frozen=True)
class Software:
    """How an engine runs a forward pass and a round."""

    name: str
    graphs: bool
    """Whether the target's pass is launched at once."""
    attention_kernels: int
    """Of one layer; with graphs those that are short, without them all that are launched."""
    mlp_kernels: int
    pass_kernels: int
    """Beside the layers: embedding, masks, last norm, output layer."""
    draft_launches: int
    """By the host, to choose a level's tokens and describe its rows."""
    round_launches: int
    """By the host, to judge a round's tokens and to move what was accepted."""
    step: float
    """Seconds of the host per step that nothing hides."""


#: vLLM 0.32 on CUDA. Attention: norm, rotary embedding, cache write, attention; MLP: norm,
#: activation. Drafting loops in Python. ``step``: Llama-3.1-8B on an H100, one request.
VLLM = Software("vLLM", True, 4, 2, 3, 30, 15, 0.27e-3)
#: The reference codes of papers, on transformers in eager mode. A norm is 8 operations, a rotary
#: embedding 12, attention by products and softmax 6, cache 2, projections 4, MLP 5, sums 1.
TRANSFORMERS = Software("transformers", False, 34, 14, 22, 30, 40, 0.0)
