"""How much memory speculation needs, term by term, and what fits a budget.

The idea of accounting for every buffer and sizing drafts by the result is SpecMemo's
(arXiv 2506.01986), of which we know the abstract only. The equations are ours, derived
from vLLM 0.32 and this plugin's runner, not quoted from the paper.

All sizes are bytes on one rank; divisions by ``tensor_parallel`` follow vLLM. A *row* is
a token that the target verifies: each request's newest token (its root) and its drafted
nodes. Terms are upper bounds of what is alive at one time; not all are at once, so their
sum is one too. Not modelled: CUDA graphs, fragmentation, penalties (applied to some rows at a
time, see ``engine/row_penalties.py``) and what logprobs take on top (4 bytes per row and
vocabulary entry).

vLLM measures its peak at start with ``max_num_batched_tokens`` rows of activations and one
row of logits per request (two in its own rejection sampler's dummy run), and gives the rest
to the KV cache. So logits of further rows come *on top* of what it planned
(``engine/memory_plan.py`` takes them off the cache), their
activations are within it, and their KV slots are blocks of the cache that no context can
use meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

#: How the rows' tokens are drawn; see :func:`logits_copies_bytes`.
Sampling = Literal["greedy", "sampled", "judged", "sorted"]

SAMPLER_BYTES: dict[Sampling, int] = {"greedy": 0, "sampled": 12, "judged": 16, "sorted": 21}
"""Bytes per row and vocabulary entry that drawing takes beside the raw logits.

greedy: none, the argmax reads them as they are. sampled: float32 logits, probabilities
and exponential noise (vLLM's ``random_sample``; top-k and top-p work in place). judged: float32
logits, probabilities, the draft's (one row of them for every verified row at most) and what is
left of the target's at the rows that the rule looks at. sorted: top-p where vLLM sorts for want
of Triton, as on CPUs: float32 logits, their sorted values, int64 indices, sorted probabilities and
a mask. ``tests/control/test_memory.py`` measures them. They hold for a half-precision model; of a
float32 one no first copy is made.
"""

ACTIVATION_FACTOR = 8
"""Buffers as wide as a layer's widest that are alive at once: the upper end of the usual
4 to 8. An estimate; compiled and fused layers keep fewer."""

PROMPT_CHUNK = 256
"""Rows of a prompt shown to Token Recycling at once, at most; fewer where a step may verify no more
(``engine/proposing.py``)."""

PLANNED_NODES, MOST_NODES = (0, 4, 8, 16, 32, 80), 80
"""Sizes of trees in a plan, and the largest that ``num_speculative_tokens`` can ask for."""

LOGITS_BUDGET = 2**30
"""What the logits of a step may take where nobody says otherwise: 1 GiB, which vLLM's V2
model runner allows its verification too (``MAX_CHUNK_BYTES``)."""


@dataclass(frozen=True, slots=True)
class ModelDimensions:
    """The sizes that decide what a Llama-like target model needs."""

    layers: int
    kv_heads: int
    """Of the whole model, not of a rank."""
    head_dim: int
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    dtype_bytes: int = 2
    """Bytes per element of activations, KV cache and the output layer's logits."""
    tensor_parallel: int = 1

    def __post_init__(self):
        for name in self.__slots__:
            _positive(getattr(self, name), name)
        heads, ranks = self.kv_heads, self.tensor_parallel
        if heads % ranks and ranks % heads:
            raise ValueError(f"{heads} KV heads cannot be divided among {ranks} ranks")

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], tensor_parallel: int = 1, dtype_bytes: int = 2
    ) -> ModelDimensions:
        """Read the fields of a Hugging Face ``config.json``.

        Of a multimodal model, its ``text_config``. The file's own dtype is not asked:
        vLLM runs float32 checkpoints in half precision too (``--dtype auto``). Raises
        ValueError, naming the field, where one is missing or no positive integer.
        """
        if not isinstance(config, Mapping):
            raise ValueError("config.json does not hold a JSON object")
        where = "config.json"
        if (text := config.get("text_config")) is not None:
            config, where = text, "config.json's text_config"
            if not isinstance(config, Mapping):
                raise ValueError(f"{where} is not a JSON object")
        if config.get("kv_lora_rank"):
            raise ValueError(
                f"{where} has kv_lora_rank: multi-head latent attention caches something other "
                "than keys and values"
            )

        def read(name: str) -> int:
            if config.get(name) is None:
                raise ValueError(f"{where} has no {name}, which every Llama-like model has")
            return _positive(config[name], f"{where}: {name}")

        hidden, heads = read("hidden_size"), read("num_attention_heads")
        # Absent or null where they follow from the others.
        given = {name for name, value in config.items() if value is not None}
        return cls(
            layers=read("num_hidden_layers"),
            kv_heads=read("num_key_value_heads") if "num_key_value_heads" in given else heads,
            head_dim=read("head_dim") if "head_dim" in given else hidden // heads,
            hidden_size=hidden,
            intermediate_size=read("intermediate_size"),
            vocab_size=read("vocab_size"),
            dtype_bytes=dtype_bytes,
            tensor_parallel=tensor_parallel,
        )


# -- terms --------------------------------------------------------------------


def kv_token_bytes(dims: ModelDimensions) -> int:
    """Keys and values of one token in all layers.

    With more ranks than KV heads vLLM replicates them: a rank has at least one.
    """
    heads = max(1, dims.kv_heads // dims.tensor_parallel)
    return 2 * dims.layers * heads * dims.head_dim * dims.dtype_bytes


def kv_bytes(dims: ModelDimensions, requests: int, tokens: int, block_size: int) -> int:
    """KV cache of ``requests`` texts of ``tokens`` tokens each, in whole blocks."""
    return requests * _ceil(tokens, block_size) * block_size * kv_token_bytes(dims)


def kv_nodes_bytes(dims: ModelDimensions, requests: int, nodes: int, block_size: int = 1) -> int:
    """KV slots of drafted nodes, reused as soon as the step is over.

    ``block_size`` 1 counts the slots themselves; vLLM's counts the blocks they can take
    at worst, which is when the context has just filled its last one.
    """
    return kv_bytes(dims, requests, nodes, block_size)


def logits_bytes(dims: ModelDimensions, rows: int) -> int:
    """Raw logits of ``rows`` rows as the output layer gives them, in the model's dtype.

    Each rank holds the whole vocabulary: vLLM gathers before it samples. (Overriding
    ``head_dtype`` to float32 doubles them.)
    """
    return rows * dims.vocab_size * dims.dtype_bytes


def logits_row_bytes(
    vocab_size: int, dtype_bytes: int, tensor_parallel: int = 1, sampling: Sampling = "sampled"
) -> int:
    """One verified row: its raw logits, and the most that is alive beside them.

    That is while gathering or while drawing. Gathering over ranks (vLLM's ``all_gather``
    along the vocabulary) keeps the rank's own part and the gathered tensor before its
    dimensions are put in order. Those are gone when the sampler makes its copies, so the
    larger of the two counts.
    """
    gather = 0
    if tensor_parallel > 1:
        gather = (_ceil(vocab_size, tensor_parallel) + vocab_size) * dtype_bytes
    return vocab_size * dtype_bytes + max(gather, vocab_size * SAMPLER_BYTES[sampling])


def logits_copies_bytes(dims: ModelDimensions, rows: int, sampling: Sampling = "sampled") -> int:
    """What :func:`logits_row_bytes` counts beside the raw logits, for ``rows`` rows."""
    row = logits_row_bytes(dims.vocab_size, dims.dtype_bytes, dims.tensor_parallel, sampling)
    return rows * row - logits_bytes(dims, rows)


def tree_mask_bytes(requests: int, nodes: int) -> int:
    """The ancestor masks, a bool per pair of a request's rows; CPU kernels need none."""
    return requests * (nodes + 1) ** 2 if nodes else 0


def activation_bytes(dims: ModelDimensions, rows: int) -> int:
    """Activations of ``rows`` rows inside one layer, roughly (``ACTIVATION_FACTOR``)."""
    width = max(dims.hidden_size, _ceil(dims.intermediate_size, dims.tensor_parallel))
    return rows * ACTIVATION_FACTOR * width * dims.dtype_bytes


def prompt_logits_bytes(dims: ModelDimensions, rows: int = PROMPT_CHUNK) -> int:
    """Logits of the prompt rows that Token Recycling learns from (``seed_from_prompt``)."""
    return logits_bytes(dims, rows) + logits_copies_bytes(dims, rows, "greedy")


def token_recycling_bytes(
    vocab_size: int, top_k: int = 8, pair_slots: int = 16384, pair_width: int = 4
) -> int:
    """Token Recycling's state on the host, all int32: the matrix [V, k] and the pair
    table's keys [slots, 2] and rows [slots, min(k, width)]. The paper's own code has an
    int64 matrix, twice as large."""
    return 4 * (vocab_size * top_k + pair_slots * (2 + min(top_k, pair_width)))


# -- sums ---------------------------------------------------------------------


def speculation_bytes(
    dims: ModelDimensions,
    requests: int,
    nodes: int,
    block_size: int = 16,
    sampling: Sampling = "sampled",
) -> dict[str, int]:
    """What drafting ``nodes`` nodes for each of ``requests`` adds to plain decoding.

    Term -> bytes; all are 0 without nodes. ``kv_nodes`` is room in the KV cache,
    ``proposer`` host memory.
    """
    drafted = requests * nodes
    return {
        "kv_nodes": kv_nodes_bytes(dims, requests, nodes, block_size),
        "logits": logits_bytes(dims, drafted),
        "logits_copies": logits_copies_bytes(dims, drafted, sampling),
        "tree_mask": tree_mask_bytes(requests, nodes),
        "activations": activation_bytes(dims, drafted),
        "prompt_logits": prompt_logits_bytes(dims) if drafted else 0,
        "proposer": token_recycling_bytes(dims.vocab_size) if drafted else 0,
    }


def row_bytes(dims: ModelDimensions, sampling: Sampling = "sampled") -> int:
    """One verified row without its KV slot."""
    return (
        logits_bytes(dims, 1) + logits_copies_bytes(dims, 1, sampling) + activation_bytes(dims, 1)
    )


def node_bytes(dims: ModelDimensions, sampling: Sampling = "sampled") -> int:
    """One more drafted node of one request: its KV slot and its row."""
    return kv_token_bytes(dims) + row_bytes(dims, sampling)


def request_bytes(
    dims: ModelDimensions,
    context: int,
    nodes: int,
    block_size: int = 16,
    sampling: Sampling = "sampled",
) -> int:
    """One request with ``context`` tokens, the newest (its root) among them, and its draft.

    Without nodes this is plain decoding: the KV of the context and one row.
    """
    return (
        kv_bytes(dims, 1, context + nodes, block_size)
        + (nodes + 1) * row_bytes(dims, sampling)
        + tree_mask_bytes(1, nodes)
    )


# -- what fits ----------------------------------------------------------------


def max_rows(
    dims: ModelDimensions,
    logits_budget_bytes: int = LOGITS_BUDGET,
    sampling: Sampling = "sampled",
) -> int:
    """How many rows a step may verify so that their logits and copies fit the budget.

    May be less than the number of requests, even 0; roots have to be verified anyway.
    """
    row = logits_row_bytes(dims.vocab_size, dims.dtype_bytes, dims.tensor_parallel, sampling)
    return max(logits_budget_bytes, 0) // row


def largest_batches(
    dims: ModelDimensions,
    free_bytes: int,
    fixed_bytes: int,
    context: int,
    node_counts: Iterable[int],
    block_size: int = 16,
    sampling: Sampling = "sampled",
) -> dict[int, int]:
    """Node count -> most requests of ``context`` tokens that fit when each drafts so many.

    ``fixed_bytes`` of the ``free_bytes`` go to what does not depend on the batch: weights,
    CUDA graphs, on a CPU the proposer's state. Raises ValueError if they already exceed it.
    Which count is best depends on acceptance and time, see ``budget``.
    """
    if fixed_bytes > free_bytes:
        raise ValueError(
            f"weights and other fixed data need {human(fixed_bytes)}, "
            f"but only {human(free_bytes)} are free"
        )
    return {
        nodes: (free_bytes - fixed_bytes)
        // request_bytes(dims, context, nodes, block_size, sampling)
        for nodes in node_counts
    }


@dataclass(frozen=True, slots=True)
class Plan:
    """What a budget holds."""

    batches: dict[int, int]
    """Nodes that each request drafts -> most requests."""
    nodes: int | None
    """Most nodes that each of the asked number of requests can draft; None: not even undrafted they
    fit."""
    needed: int
    """Bytes that they need then."""


def plan(
    dims: ModelDimensions, budget_bytes: int, context: int, requests: int, block_size: int = 16
) -> Plan:
    """The largest batch for trees of some sizes, and the largest tree for ``requests`` texts of
    ``context`` tokens, in ``budget_bytes`` beside the weights; where drafts are looked up by Token
    Recycling and tokens are sampled."""
    state = token_recycling_bytes(dims.vocab_size)
    batches = largest_batches(
        dims, max(budget_bytes, state), state, context, PLANNED_NODES, block_size
    )

    def needed(nodes: int) -> int:
        return (state if nodes else 0) + requests * request_bytes(dims, context, nodes, block_size)

    fits = [nodes for nodes in range(MOST_NODES + 1) if needed(nodes) <= budget_bytes]
    most = max(fits, default=None)
    return Plan(batches, most, needed(most or 0))


def human(size: int) -> str:
    """``size`` bytes in the largest unit that leaves at least one of it: "1.5 MiB"."""
    number, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        # Rounded first: 1024.0 KiB would be 1.0 MiB.
        if round(number, 1) < 1024:
            break
        number, unit = number / 1024, larger
    return f"{size} bytes" if unit == "bytes" else f"{number:.1f} {unit}"


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)


def _positive(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, not a positive integer")
    return value
