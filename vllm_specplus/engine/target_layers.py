"""The target's own layers, offered as a draft model (self-speculation).

The modules are vLLM's, with the target's weights, quantised or not, and its sums over ranks. Only
their attention is another one: it reads and writes the draft's cache.

They are taken apart as ``drafting/layer_parts.py`` does it: the module that holds vLLM's attention
is A's, and what is compared is vLLM's own layer. A target with a layer of another kind is refused.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models import supports_multimodal

from vllm_specplus.drafting.layer_parts import TOLERANCE, TRIED, LayerParts, UnknownLayers, close
from vllm_specplus.drafting.passes import Attend


class _DraftAttention(nn.Module):
    """Stands where vLLM's ``Attention`` stood: same call, the attention of a draft's pass."""

    attend: Attend

    def __init__(self, layer: int, stock: Attention):
        super().__init__()
        self._layer, self._scale = layer, stock.impl.scale
        self.heads, self.kv_heads, self.head_dim = (
            stock.num_heads, stock.num_kv_heads, stock.head_size
        )  # fmt: skip
        self._window = stock.sliding_window or 0

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        """[T, heads * head_dim] each."""
        by_head = (
            each.view(len(each), heads, self.head_dim)
            for each, heads in ((query, self.heads), (key, self.kv_heads), (value, self.kv_heads))
        )
        return self.attend(self._layer, *by_head, self._scale, self._window).flatten(1)


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


class _Block(LayerParts[torch.Tensor]):
    """The parts of one layer of the target; its attention is given positions, int64 [n]."""

    def __init__(self, number: int, layer: nn.Module, context: Callable[[], Any]):
        """``context``: of vLLM's forward passes, which layers of experts ask for."""
        super().__init__(layer, _attends)
        self.layer = layer
        self._name, stock = _own_attention(self.attention)
        # A twin of the module: the same projections and norms, another attention.
        self._twin = copy.copy(self.attention)
        self._twin._modules = dict(self.attention._modules)
        self.drafts = _DraftAttention(number, stock)
        self._twin._modules[self._name] = self.drafts
        self._asks = inspect.signature(self.attention.forward).parameters
        self._echo = _Echo(stock)
        # By the package: the class has another name in every vLLM.
        experts = any(".fused_moe." in type(each).__module__ for each in self.mlp.modules())
        self._context = context if experts else contextlib.nullcontext

    def mix(self, normed: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """Return the attention of ``normed`` [n, hidden]."""
        where = {"positions": given} if "positions" in self._asks else {}
        return self._twin(hidden_states=normed, **where)

    def transform(self, normed: torch.Tensor) -> torch.Tensor:
        """Return the MLP of ``normed`` [n, hidden]."""
        with self._context():
            return self.mlp(normed)

    def find_places(self, rows: torch.Tensor, positions: torch.Tensor) -> None:
        """Place the norms by what vLLM's layer makes of ``rows``; raise UnknownLayers if they have
        no places."""
        wanted = self._by_the_layer(rows, positions)
        with _replaced(self._twin, self._name, self._echo):
            self.place(rows, wanted, positions)

    def _by_the_layer(self, rows: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What vLLM's layer computes, with an attention that mixes no rows."""
        asks = inspect.signature(self.layer.forward).parameters
        given = {"positions": positions, "hidden_states": rows.clone(), "residual": None}
        with _replaced(self.attention, self._name, self._echo):
            try:
                out = self.layer(**{name: each for name, each in given.items() if name in asks})
                return out if isinstance(out, torch.Tensor) else sum(out)
            except TypeError as error:
                raise UnknownLayers(f"vLLM calls its layers otherwise ({error})") from None


def _attends(module: nn.Module) -> bool:
    return any(isinstance(each, Attention) for each in module.modules())


def _own_attention(module: nn.Module) -> tuple[str, Attention]:
    """The name and the one ``Attention`` of vLLM's in a layer's attention ``module``."""
    found = [(name, each) for name, each in module.named_children() if isinstance(each, Attention)]
    if len(found) != 1:
        raise UnknownLayers(f"{type(module).__name__} has no attention of its own")
    ((name, attention),) = found
    for extra in ("alibi_slopes", "sinks", "kv_sharing_target_layer_name", "logits_soft_cap"):
        value = getattr(attention.impl, extra, None)
        if value is not None and not (isinstance(value, (int, float)) and value == 0):
            raise UnknownLayers(f"their attention has {extra}")
    if getattr(attention, "attention_chunk_size", None):
        raise UnknownLayers("their attention has chunks")
    return name, attention


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
    """What ``drafting.executor`` asks of a draft model, from the loaded target.

    Of a target on several ranks every one has the keys and values of its heads, and all calls are
    collective, with the same rows everywhere; making it is as well. Raises UnknownLayers, with a
    sentence, for a target of other layers.
    """

    def __init__(self, model: nn.Module, vllm_config: VllmConfig):
        config = vllm_config.model_config
        family = type(model).__name__
        self._config = vllm_config
        try:
            if supports_multimodal(model):  # drafts go on from text
                model = model.get_language_model()
            self._inner, self._logits = model.model, model.compute_logits
            layers = enumerate(self._inner.layers)
            self.blocks = [_Block(i, layer, self._context) for i, layer in layers]
            self.device, self.dtype = next(model.parameters()).device, config.dtype
            with torch.inference_mode(), self._context():
                self._check(config.get_hidden_size())
        except (AttributeError, NotImplementedError, UnknownLayers) as error:
            raise UnknownLayers(
                f"vllm-specplus cannot draft with the layers of {family}: {error}; "
                f"use a method that does not, such as 'token_recycling'"
            ) from None
        self.num_layers = len(self.blocks)
        self.attention_layers = list(range(self.num_layers))
        first = self.blocks[0].drafts
        self.kv_heads, self.head_dim = first.kv_heads, first.head_dim
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
        for block in self.blocks:
            block.find_places(rows, positions)
        if len({(each.drafts.kv_heads, each.drafts.head_dim) for each in self.blocks}) > 1:
            raise UnknownLayers("their KV heads differ")
        caught, tokens = _Caught(), positions.to(torch.int32)
        layers = nn.ModuleList([caught] * len(self.blocks))
        with _replaced(self._inner, "layers", layers):
            # Of the class: what vLLM has compiled would run the layers.
            out = type(self._inner).forward(self._inner, tokens, positions, None, None)
        embedded = self._inner.embed_input_ids(tokens).float()
        self._factor = float((caught.hidden.float() * embedded).sum() / embedded.square().sum())
        difference = caught.hidden.float() - self._factor * embedded
        if not difference.norm() < TOLERANCE * caught.hidden.float().norm():
            raise UnknownLayers("more than their embeddings goes into them")
        # Of some models the last norm belongs to the output layer.
        self._norm = self._inner.norm if close(out, self._inner.norm(caught.hidden)) else None
        if self._norm is None and not close(out, caught.hidden):
            raise UnknownLayers("more than a norm is behind them")

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[T] -> [T, hidden]."""
        rows = self._inner.embed_input_ids(tokens)
        # Some multiply what they embed, all by the same.
        return rows if self._factor == 1 else rows * self._factor

    def rotary(self, positions: torch.Tensor) -> torch.Tensor:
        """vLLM's attention takes the positions, int64 [T]."""
        return positions

    def attention(
        self, layer: int, hidden: torch.Tensor, rotary: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """As ``DraftModel.attention``."""
        block = self.blocks[layer]
        block.drafts.attend = attend
        return block.attend(hidden, rotary)

    def mlp(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """As ``DraftModel.mlp``."""
        return self.blocks[layer].feed(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> float32 [..., vocab_size]."""
        rows = hidden.flatten(0, -2)
        return self.output(self.normed(rows)).view(*hidden.shape[:-1], -1)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] behind the last norm, where the target and not its output layer has one."""
        return hidden if self._norm is None else self._norm(hidden)

    def output(self, normed: torch.Tensor) -> torch.Tensor:
        """The output layer alone: [..., hidden] -> float32 [..., vocab_size]."""
        rows = normed.flatten(0, -2)
        return self._logits(rows).float().view(*normed.shape[:-1], -1)
