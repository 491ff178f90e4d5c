"""What all attention back ends with draft trees share.

A back end of ours subclasses a stock vLLM back end and names its own implementation and, where a
recorded CUDA graph would skip the trees, its own builder. The implementation calls the stock
``forward`` unless a :class:`TreeAttentionMetadata` is attached to the metadata. The class also
states what it ``supports`` and how the pages of its KV cache are read and compacted
(:class:`PageCache`). Everything not stated is refused: back ends that are not declared here, and
constructor arguments of attention that :data:`ARGUMENTS` does not know.

Nothing here imports a device's kernels: a CPU engine imports no CUDA module.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.v1.attention.backend import AttentionType

from vllm_specplus.capabilities import Found, Need, of_kv_cache, sentence
from vllm_specplus.drafting.context_pages import ContextPages
from vllm_specplus.drafting.model import DraftModelError

if TYPE_CHECKING:
    from vllm.v1.worker.utils import AttentionGroup

#: Attribute of a stock attention-metadata object that carries the tree batch.
TREE_ATTRIBUTE = "specplus_tree"

_BACKENDS: set[type] = set()
_Backend = TypeVar("_Backend", bound=type)


def tree_backend(backend: _Backend) -> _Backend:
    """Declare an attention back end that verifies draft trees; a class decorator.

    Only the decorated class itself counts, not what vLLM derives from it at run time (static-sink
    attention, fast prefill; chunked attention where it ``supports`` that): those have builders or
    layers that know no trees.
    """
    for name in ("vllm_name", "supports", "sees_prompt", "divides_metadata", "page_cache"):
        if not hasattr(backend, name):
            raise TypeError(f"{backend.__qualname__} verifies draft trees and must state {name!r}")
    _BACKENDS.add(backend)
    return backend


def is_tree_backend(backend: type) -> bool:
    """Was exactly this class declared by :func:`tree_backend`, or one that serves chunked attention
    and that vLLM has derived this one from for it?"""
    if backend.__name__.startswith("ChunkedLocalAttention_"):
        declared = backend.__bases__[0]
        return declared in _BACKENDS and Need.CHUNKED_ATTENTION in declared.supports
    return backend in _BACKENDS


def chunk_of(layer: Any) -> int:
    """Return how many positions a chunk of an attention layer has; 0: there are none."""
    return getattr(layer, "attention_chunk_size", None) or 0


def ours(layer: Any) -> bool:
    """Does a loaded attention layer verify draft trees?

    True if its back end was declared by :func:`tree_backend` and its implementation is the one
    that the back end names.
    """
    backend = layer.get_attn_backend()
    return is_tree_backend(backend) and type(layer.impl) is backend.get_impl_cls()


@dataclass(slots=True)
class TreeAttentionMetadata:
    """The draft trees of one batch, for all attention layers of one step.

    A *tree row* is one query row of a request that verifies a draft tree: row 0
    of the request is its root (the last sampled token), the others are the
    nodes in topological order. K and V of all rows are already in the paged
    cache, at the consecutive slots ``context_len + row``; only the *visibility*
    differs from causal attention: a row sees the whole context and, of its own
    request's rows, itself and its ancestors.

    Shapes: ``R`` tree requests, ``T`` tree rows in all, ``N`` the largest
    number of rows of one request.
    """

    rows: torch.Tensor
    """int64 [T] on the device: index of each tree row among the batch's rows;
    request by request, rows of one request consecutive."""
    query_start_loc: torch.Tensor
    """int32 [R + 1] on the device: offsets of the requests in ``rows``."""
    context_lens: torch.Tensor
    """int32 [R] on the device: tokens in the cache before the root."""
    block_table: torch.Tensor
    """int32 [R, max_blocks] on the device: KV cache pages of each request."""
    parents: torch.Tensor | None
    """int32 [T] row of the parent within the request, -1 for roots: of the CPU's kernel, which
    climbs them; None elsewhere."""
    ancestors: torch.Tensor | None
    """bool [T, N] on the device: may row i see row j of its request (ancestor-or-self)? None on
    the CPU."""
    max_rows: int
    """N."""
    max_context_len: int
    other_rows: torch.Tensor | None
    """int64 on the device: the batch's other rows (prefill, plain decode,
    chains), or None when every request has a tree."""
    other: Any | None
    """Stock metadata of the other requests, in the order of ``other_rows``."""
    depths: torch.Tensor | None = None
    """int32 [T] on the device: positions less those of the roots, for what goes by positions."""
    first: torch.Tensor | None = None
    """int32 [R] on the device: the first visible token of the cache, None: all are."""


def attach(
    metadata: Mapping[str, Any],
    group: AttentionGroup,
    layers: Mapping[str, Any],
    tree: TreeAttentionMetadata,
) -> None:
    """Give a step's trees to all ``layers`` of a group; raises TypeError if one would ignore them.

    ``metadata`` and ``layers`` hold vLLM's metadata and attention layers by name. The layers of a
    group share one metadata object. This is the only place that attaches trees.
    """
    for name in group.layer_names:
        if not (is_tree_backend(group.backend) and ours(layers[name])):
            raise TypeError(
                f"layer {name!r} is served by {group.backend.get_name()} "
                f"({group.backend.__qualname__}), which would verify a draft tree as if it were a "
                f"chain"
            )
    setattr(metadata[group.layer_names[0]], TREE_ATTRIBUTE, tree)


def tree_metadata(attn_metadata: Any) -> TreeAttentionMetadata | None:
    """Return the tree batch attached to ``attn_metadata``, or None for ordinary steps."""
    return getattr(attn_metadata, TREE_ATTRIBUTE, None)


class PageCache(ABC):
    """The KV caches of all layers of a model, slot by slot.

    A slot is ``page * block_size + offset`` and holds the keys and values of one token in every
    layer. Layers may differ in KV heads and head size, and may share a cache.
    """

    block_size: int

    @staticmethod
    def fits(layer: Any) -> bool:
        """Does a layer's cache have the expected shape: keys and values of one size side by
        side?"""
        shape = layer.kv_cache.shape
        return len(shape) == 4 and shape[3] == 2 * layer.impl.head_size

    @abstractmethod
    def move(self, src: np.ndarray, dst: np.ndarray) -> None:
        """Copy slots ``src`` to ``dst``, int64 [n] on the host, once in every distinct cache.

        The result is that of reading every source before any destination is written.
        Destinations are distinct, and no slot is a source after it was a destination, as in what
        :func:`vllm_specplus.tree.moves` returns.
        """

    @abstractmethod
    def read(self, slots: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield keys and values [n, kv_heads, head_dim] at ``slots`` int64 [n], layer by layer."""

    @staticmethod
    def context_pages(layer: Any) -> ContextPages:
        """Return the pages of a layer as drafts attend to them; DraftModelError if they hold
        something else than keys and values by head."""
        raise DraftModelError(
            "the KV cache of this target holds latents, and the method attends to keys and values: "
            "use another one, such as 'token_recycling'"
        )

    @abstractmethod
    def warm_up(self) -> None:
        """Compile or load what :meth:`move` runs, without changing the cache."""


def distinct(caches: Collection[torch.Tensor]) -> list[torch.Tensor]:
    """Return the caches without repeats: layers may share one, which must move only once."""
    return list({cache.data_ptr(): cache for cache in caches}.values())


def common_block_size(caches: Collection[torch.Tensor]) -> int:
    """Return the tokens per page of caches [pages, kv_heads, block_size, 2 * head_dim].

    Raises ValueError if they differ, since a slot's number would then mean two places.
    """
    sizes = {cache.shape[2] for cache in caches}
    if len(sizes) != 1:
        raise ValueError(
            f"vllm-specplus needs one KV cache block size in all layers, not {sorted(sizes)}"
        )
    return sizes.pop()


# What an implementation is constructed with.


def _given(value: Any) -> bool:
    return value is not None


def _means(need: Need, used: Callable[[Any], bool] = _given) -> Callable[[Any], Need | None]:
    return lambda value: need if used(value) else None


#: Arguments that every tree path honours: sizes, and the cache that ``forward`` is given anyway.
HONOURED = frozenset(
    ("num_heads", "head_size", "scale", "num_kv_heads", "kv_sharing_target_layer_name",
     "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "qk_head_dim",
     "v_head_dim", "kv_b_proj")
)  # fmt: skip
#: The others of vLLM's back ends that we stand in for: what a value means, None if nothing.
ARGUMENTS: dict[str, Callable[[Any], Need | None]] = {
    "alibi_slopes": _means(Need.ALIBI),
    "attn_type": _means(Need.ENCODER_ATTENTION, lambda kind: kind != AttentionType.DECODER),
    # Other chunks than those of CHUNKED_ATTENTION: rows look back into so many before their own.
    "chunk_lookback": _means(Need.UNKNOWN_ATTENTION, lambda chunks: chunks >= 0),
    "indexer": _means(Need.SPARSE_ATTENTION),
    "kv_cache_dtype": of_kv_cache,
    "logits_soft_cap": _means(Need.LOGITS_SOFT_CAP, bool),
    "sinks": _means(Need.ATTENTION_SINKS),
    "sliding_window": _means(Need.SLIDING_WINDOW),
    "use_alibi_sqrt": _means(Need.ALIBI_SQRT, bool),
}


def check_arguments(
    stock_init: Callable[..., None], supports: frozenset[Need], args: tuple, kwargs: dict
) -> None:
    """Refuse what the tree path of an implementation would ignore; raises NotImplementedError.

    ``stock_init`` is the bound constructor of the stock implementation that ``args`` and
    ``kwargs`` go to. An argument that neither :data:`HONOURED` nor :data:`ARGUMENTS` knows may
    only have its default value.
    """
    parameters = inspect.signature(stock_init).parameters
    for name, value in _bound(stock_init, args, kwargs).items():
        default = parameters[name].default if name in parameters else None
        if name in ARGUMENTS:
            need = ARGUMENTS[name](value)
            if need is not None:
                _require(need, supports, name)
        elif name not in HONOURED and not _equal(value, default):
            shown = value if isinstance(value, (bool, int, float, str)) else type(value)
            raise NotImplementedError(
                f"vllm-specplus does not know the attention argument {name}={shown!r} of this "
                f"model, which its draft trees might ignore: serve the model without vllm-specplus"
            )


def _bound(function: Callable[..., None], args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by name, those that it takes as ``**kwargs`` too."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    arguments = dict(bound.arguments)
    for name, parameter in bound.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= arguments.pop(name, {})
    return arguments


def _equal(value: Any, default: Any) -> bool:
    """Are two plain values equal? A tensor or an array is never a default."""
    return value is default or (
        type(value) is type(default) and not hasattr(value, "shape") and value == default
    )


def _require(need: Need, supports: frozenset[Need], source: str = "") -> None:
    if need not in supports:
        raise NotImplementedError(sentence("vllm-specplus", Found(need, source)))


def check_launch(supports: frozenset[Need], context_parallel: int) -> None:
    """Refuse what an engine's config does to all its attention; raises NotImplementedError.

    ``context_parallel`` is the number of ranks that share the context of a request.
    """
    config = get_current_vllm_config_or_none()
    model = None if config is None else config.model_config
    if context_parallel > 1:
        _require(Need.CONTEXT_PARALLEL, supports)
    if model is not None and model.rswa_window:
        _require(Need.REFERENCE_WINDOW, supports)


class TreePath:
    """Mixin before a stock implementation: how the tree rows of a batch are attended to.

    One subclass calls :meth:`_tree_forward` in place of the stock attention; a further one
    implements it and states what it ``supports``.
    """

    supports: ClassVar[frozenset[Need]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        check_arguments(super().__init__, self.supports, args, kwargs)
        super().__init__(*args, **kwargs)
        check_launch(self.supports, self.dcp_world_size)

    def _tree_forward(
        self,
        layer: Any,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        tree: TreeAttentionMetadata,
        output: torch.Tensor,
    ) -> None:
        """Write the attention of the tree's rows into ``output`` [n, H, D], of latents
        [n, H, kv_lora_rank]."""
        raise NotImplementedError

    def features(self, layer: Any) -> tuple:
        """Return what selects other variants of compiled kernels, besides sizes."""
        return ()

    def forget_weights(self) -> None:
        """Take anew what was copied of the layer's weights; nothing, if nothing is."""

    def warm_up(self, layer: Any, dtype: torch.dtype, max_rows: int) -> None:
        """Compile or load what attends to trees of up to ``max_rows`` rows, whose queries have
        ``dtype``."""
        raise NotImplementedError


class TreeAttention(TreePath):
    """Of keys and values by head: attends to the tree rows of a batch apart."""

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output,
        output_scale=None, output_block_scale=None,
    ):  # fmt: skip
        """Attend as in the stock implementation: ``query`` and ``output`` [num_tokens, H, D],
        ``kv_cache`` [num_blocks, KH, block_size, 2 * D]."""
        tree = tree_metadata(attn_metadata)
        if tree is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        if tree.other_rows is not None:
            other_query = query.index_select(0, tree.other_rows)
            other_output = torch.empty_like(other_query)
            # K and V of these rows are read from the cache; ``key`` and ``value`` are unused.
            super().forward(layer, other_query, key, value, kv_cache, tree.other, other_output)
            output.index_copy_(0, tree.other_rows, other_output.view(-1, *output.shape[1:]))
        self._tree_forward(layer, query, kv_cache, tree, output)
        return output


class PictureAttention:
    """Mixin before an implementation with trees, of the branch that does not see the prompt.

    The rows of a picture see the picture, and what its text without a prompt begins with; they are
    the "tree rows" here, a "request" being one picture in one request. Any other row sees itself
    alone: its output is its value.
    """

    def forward(
        self, layer, query, key, value, kv_cache, attn_metadata, output,
        output_scale=None, output_block_scale=None,
    ):  # fmt: skip
        """Attend, as ``TreeAttention.forward``; without metadata the model is being warmed up."""
        pictures = tree_metadata(attn_metadata)
        if pictures is None:
            return output.zero_()
        if pictures.other_rows is not None:
            own = value[pictures.other_rows].repeat_interleave(self.num_queries_per_kv, 1)
            output.index_copy_(0, pictures.other_rows, own)
        if pictures.max_rows:
            self._tree_forward(layer, query, kv_cache, pictures, output)
        return output
