"""The target's own layers, offered as a draft model (self-speculation).

The modules are vLLM's, with the target's weights, quantised or not. Only their attention is
another one: it reads and writes the draft's cache.

A layer is taken for ``h = x + A(norm(x))``, ``h + M(norm(h))``, whose parts are found by the names
that vLLM gives them. Whether it is one does not go by the model's family: every layer of the loaded
target is run as vLLM runs it and from its parts, and one that differs ends the start.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

from vllm_specplus.drafting.cache import PagedCache

#: What vLLM's models call the norm before attention, attention, the norm before the MLP, the MLP.
NORM = ("input_layernorm", "ln_1", "attention_norm")
ATTENTION = ("self_attn", "attn", "attention")
MLP_NORM = ("post_attention_layernorm", "ln_2", "ffn_norm")
MLP = ("mlp", "feed_forward", "block_sparse_moe")
#: Rows that a layer is tried with, and the largest relative difference of the median row: roundings
#: are smaller, another structure is further off.
TRIED, TOLERANCE = 8, 0.05


class UnknownLayers(ValueError):
    """The target's layers are not of the kind that can be left out."""


class _DraftAttention(nn.Module):
    """Stands where vLLM's ``Attention`` stood: same call, the draft's cache."""

    def __init__(self, layer: int, num_heads: int, kv_heads: int, head_dim: int, scale: float):
        super().__init__()
        self._layer, self._scale = layer, scale
        self._heads, self._kv_heads, self._head_dim = num_heads, kv_heads, head_dim
        self.cache: PagedCache | None = None
        self.mask: torch.Tensor | None = None

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        """[rows, heads * head_dim] each; the rows of ``mask`` bool [R, 1, n, slots]."""
        requests, _, width, _ = self.mask.shape

        def by_head(rows: torch.Tensor, heads: int) -> torch.Tensor:
            return rows.view(requests, width, heads, self._head_dim).transpose(1, 2)

        keys, values = self.cache.update(
            by_head(key, self._kv_heads), by_head(value, self._kv_heads), self._layer
        )
        on_gpu = query.device.type == "cuda"
        if on_gpu:  # with a mask and fewer KV heads, only the slow reference kernel would run
            group = self._heads // self._kv_heads
            keys, values = (x.repeat_interleave(group, 1) for x in (keys, values))
        out = scaled_dot_product_attention(
            by_head(query, self._heads), keys, values,
            attn_mask=self.mask, scale=self._scale, enable_gqa=not on_gpu,
        )  # fmt: skip
        return out.transpose(1, 2).reshape(requests * width, -1)


class _Echo(nn.Module):
    """An attention that mixes no rows: what a layer makes of it shows the layer's structure."""

    def __init__(self, attention: Attention):
        super().__init__()
        self._group = attention.num_heads // attention.num_kv_heads
        self._size = attention.head_size

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_, **__):
        """[n, heads * head_dim] each, fewer heads of ``key`` and ``value``."""
        by_head = (key + value).unflatten(-1, (-1, self._size))
        return query + by_head.repeat_interleave(self._group, -2).flatten(-2)


class _Block:
    """The parts of one layer of the target; ``experts``: the MLP is divided among some."""

    def __init__(self, number: int, layer: nn.Module):
        self.layer = layer
        self.norm, self.attention, self.mlp_norm, self.mlp = (
            _part(layer, names) for names in (NORM, ATTENTION, MLP_NORM, MLP)
        )
        self._name, stock = _own_attention(self.attention)
        # A twin of the module: the same projections and norms, another attention.
        self.twin = copy.copy(self.attention)
        self.twin._modules = dict(self.attention._modules)
        self.drafts = _DraftAttention(
            number, stock.num_heads, stock.num_kv_heads, stock.head_size, stock.impl.scale
        )
        self.twin._modules[self._name] = self.drafts
        self.kv_heads, self.head_dim = stock.num_kv_heads, stock.head_size
        # By the package: the class has another name in every vLLM.
        self.experts = any(".fused_moe." in type(each).__module__ for each in self.mlp.modules())
        self._echo = _Echo(stock)

    def attend(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """A(norm(x)) of ``rows`` [n, hidden] at ``positions`` int64 [n]."""
        return self.twin(positions=positions, hidden_states=self.norm(rows))

    def check(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """Raise UnknownLayers unless the layer is its parts, by what it makes of ``rows``."""
        with _replaced(self.attention, self._name, self._echo):
            asks = inspect.signature(self.layer.forward).parameters
            rest = {"residual": None} if "residual" in asks else {}
            try:
                out = self.layer(positions=positions, hidden_states=rows.clone(), **rest)
            except TypeError as error:
                raise UnknownLayers(f"vLLM's layer is called otherwise ({error})") from None
            wanted = out if isinstance(out, torch.Tensor) else sum(out)
        with _replaced(self.twin, self._name, self._echo):
            found = rows + self.attend(rows, positions)
            found = found + self.mlp(self.mlp_norm(found))
        difference = (found - wanted).float().norm(dim=-1) / wanted.float().norm(dim=-1)
        if not difference.median() < TOLERANCE:
            raise UnknownLayers("they are not attention and MLP, each behind a norm and added")


def _part(layer: nn.Module, names: tuple[str, ...]) -> nn.Module:
    found = [layer._modules[name] for name in names if layer._modules.get(name) is not None]
    if len(found) != 1:
        raise UnknownLayers(f"{type(layer).__name__} has no {' or '.join(names)}")
    return found[0]


def _own_attention(module: nn.Module) -> tuple[str, Attention]:
    """The name and the one ``Attention`` of vLLM's in a layer's attention ``module``."""
    found = [(name, each) for name, each in module.named_children() if isinstance(each, Attention)]
    if len(found) != 1:
        raise UnknownLayers(f"{type(module).__name__} has no attention of its own")
    ((name, attention),) = found
    if extra := _beyond_plain(attention):
        raise UnknownLayers(f"their attention has {extra}")
    return name, attention


def _beyond_plain(attention: Attention) -> str | None:
    """What an attention has beside queries, keys and values: the draft's has nothing else."""
    implementation = attention.impl
    for name in ("alibi_slopes", "sinks", "kv_sharing_target_layer_name"):
        if getattr(implementation, name, None) is not None:
            return name
    if getattr(implementation, "logits_soft_cap", 0):
        return "logits_soft_cap"
    window = getattr(implementation, "sliding_window", None)
    if window not in (None, -1, (-1, -1)) or getattr(attention, "attention_chunk_size", None):
        return "a window"
    return None


@contextlib.contextmanager
def _replaced(module: nn.Module, name: str, other: nn.Module) -> Iterator[None]:
    before, module._modules[name] = module._modules[name], other
    try:
        yield
    finally:
        module._modules[name] = before


class _Caught(nn.Module):
    """A layer that does nothing but remember what it was given."""

    hidden: torch.Tensor

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor, *args, **kwargs):
        """Return ``hidden_states`` as they came, with a residual of zeros if one is passed on."""
        self.hidden = hidden_states
        asks_for_two = args or "residual" in kwargs
        return (hidden_states, torch.zeros_like(hidden_states)) if asks_for_two else hidden_states


class TargetLayers:
    """What ``drafting.executor`` asks of a draft model, from the loaded target, on one rank.

    Raises UnknownLayers, with a sentence, for a target of other layers.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig):
        config = vllm_config.model_config
        self._model, self._config = model, vllm_config
        try:
            self._inner = model.model
            self._blocks = [_Block(i, layer) for i, layer in enumerate(self._inner.layers)]
            self.device, self.dtype = next(model.parameters()).device, config.dtype
            with torch.inference_mode(), self._context():
                self._check(config.get_hidden_size())
        except (AttributeError, UnknownLayers) as error:
            raise UnknownLayers(
                f"vllm-specplus cannot draft with the layers of {type(model).__name__}: {error}; "
                f"use a method that does not, such as 'token_recycling'"
            ) from None
        self.num_layers = len(self._blocks)
        self.attention_layers = list(range(self.num_layers))
        self.kv_heads, self.head_dim = self._blocks[0].kv_heads, self._blocks[0].head_dim
        self.max_positions = config.max_model_len
        self.vocab_size = config.get_vocab_size()

    def _context(self):
        """What vLLM's layers of experts ask for outside a step of its own."""
        return set_forward_context(None, self._config)

    def _check(self, size: int) -> None:
        """Raise UnknownLayers unless the model is embedding, layers of equal sizes, and a norm."""
        draws = torch.Generator().manual_seed(0)
        rows = torch.randn(TRIED, size, generator=draws).to(self.device, self.dtype)
        positions = torch.arange(TRIED, device=self.device)
        for block in self._blocks:
            block.check(rows, positions)
        if len({(block.kv_heads, block.head_dim) for block in self._blocks}) > 1:
            raise UnknownLayers("their KV heads differ")
        caught, tokens = _Caught(), positions.to(torch.int32)
        layers = nn.ModuleList([caught] * len(self._blocks))
        with _replaced(self._inner, "layers", layers):
            # Of the class: what vLLM has compiled would run the layers.
            type(self._inner).forward(self._inner, tokens, positions, None, None)
        if not torch.equal(caught.hidden, self._inner.embed_input_ids(tokens)):
            raise UnknownLayers("more than their embeddings goes into them")

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, n] -> [R, n, hidden]."""
        return self._inner.embed_input_ids(tokens.flatten()).view(*tokens.shape, -1)

    def rotary(self, positions: torch.Tensor) -> torch.Tensor:
        """vLLM's attention takes the positions, int64 [R * n]."""
        return positions.flatten()

    def attention(
        self, layer: int, hidden: torch.Tensor, rotary: torch.Tensor, mask: torch.Tensor,
        cache: PagedCache,
    ) -> torch.Tensor:  # fmt: skip
        """As ``DraftModel.attention``."""
        block = self._blocks[layer]
        block.drafts.cache, block.drafts.mask = cache, mask
        return block.attend(hidden.flatten(0, 1), rotary).view_as(hidden)

    def mlp(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """As ``DraftModel.mlp``."""
        block = self._blocks[layer]
        with self._context() if block.experts else contextlib.nullcontext():
            return block.mlp(block.mlp_norm(hidden.flatten(0, 1))).view_as(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> float32 [..., vocab_size]."""
        return self.output(self._inner.norm(hidden.flatten(0, -2))).view(*hidden.shape[:-1], -1)

    def output(self, normed: torch.Tensor) -> torch.Tensor:
        """The output layer alone: [..., hidden] -> float32 [..., vocab_size]."""
        rows = normed.flatten(0, -2)
        return self._model.compute_logits(rows).float().view(*normed.shape[:-1], -1)
