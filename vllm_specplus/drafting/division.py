"""What one of several devices holds of a draft: whole attentions, heads, columns of MLPs, rows of
the vocabulary.

An MLP is divided by its inner units, an attention by its heads (Megatron-LM, arXiv 1909.08053):
every shard computes an addend of what the projection that leads out of it returns, which the shards
sum. Which modules are which goes, as in ``layer_parts.py``, by what they compute: the shares of
every MLP and every divided attention are summed once, and must be the whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import nn

from vllm_specplus.drafting.dense_attention import DenseAttention
from vllm_specplus.drafting.layer_parts import TRIED, UnknownLayers, close
from vllm_specplus.drafting.model import DraftModel

if TYPE_CHECKING:
    from vllm_specplus.drafting.transformers_layer import TransformersLayer

Placement = Literal["one_device", "attentions", "attentions_and_mlps", "tensor_parallel"]
"""What the devices of a draft share, see ``drafting/easyspec.py``."""
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


def layer_owner(layer: int, num_layers: int, size: int, shards: int) -> int:
    """The shard that holds a layer's attention and its keys and values, of groups of ``size``."""
    if layer in (0, num_layers - 1):
        return 0
    return (layer - 1) % size % shards


def layers_of(shard: int, num_layers: int, size: int, shards: int) -> list[int]:
    """The layers whose attention ``shard`` holds."""
    return [j for j in range(num_layers) if layer_owner(j, num_layers, size, shards) == shard]


class ModelShare(DraftModel):
    """What one shard holds of a draft. It computes the parts that it has whole as the draft does,
    and of the others its addend or its columns (``mixed`` of its heads, and the methods below)."""

    def __init__(
        self, whole: DraftModel, layers: list[TransformersLayer], attentions: Iterable[int]
    ):
        """``layers`` of parts of the ``whole``, of which ``attentions`` attend here."""
        vars(self).update(vars(whole))
        self.layers = layers
        self.attention_layers = sorted(attentions)
        self._first_token = 0

    def mlp_share(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """An addend of M(x) [T, hidden], before what comes behind the MLP."""
        return self.layers[layer].transformed(hidden)

    def behind_mlp(self, layer: int, out: torch.Tensor) -> torch.Tensor:
        """M(x) of the sum of all shards' :meth:`mlp_share`."""
        return self.layers[layer].behind_transform(out)

    def behind_attention(self, layer: int, out: torch.Tensor) -> torch.Tensor:
        """A(x) of the sum of all shards' ``mixed``."""
        return self.layers[layer].behind_mix(out)

    def embed_share(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> [T, hidden]: rows of the tokens that are here, 0 for the others."""
        own = tokens - self._first_token
        here = (own >= 0) & (own < self._embed.weight.shape[0])
        return self.embed(torch.where(here, own, 0)) * here[:, None]

    def logits_share(self, hidden: torch.Tensor) -> torch.Tensor:
        """[T, hidden] -> [T, ceil(vocab_size / shards)], in the draft's dtype: the columns of the
        tokens that are here, in the order of the shards; 0 beyond the last token."""
        return self._norm(hidden) @ self._head.T

    def whole_logits(self, shares: list[torch.Tensor]) -> torch.Tensor:
        """Float32 [T, vocab_size] of the ``logits_share`` of all shards."""
        logits = torch.cat(shares, -1)[:, : self.vocab_size].float()
        return logits if self._cap is None else (logits / self._cap).tanh() * self._cap

    def divide_vocabulary(self, rank: int, shards: int) -> None:
        """Hold the tokens of one shard only, of embedding and output layer."""
        count = -(-self._embed.weight.shape[0] // shards)
        self._first_token = rank * count
        rows = self._embed.weight[self._first_token : self._first_token + count]
        self._embed = _remade(self._embed, weight=rows)
        self._embed.padding_idx = None
        count = -(-self.vocab_size // shards)
        head = self._head.new_zeros(count, self._head.shape[1])
        here = self._head[rank * count : (rank + 1) * count]
        head[: len(here)] = here
        self._head = head


def share_of(
    whole: DraftModel, placement: Placement, rank: int, shards: int, group_size: int
) -> ModelShare:
    """What shard ``rank`` of ``shards`` holds of ``whole``, which stays as it is; parts that are
    divided are copied. UnknownLayers if they are not of the kind that can be."""
    if placement == "one_device":
        return ModelShare(whole, list(whole.layers), whole.attention_layers)
    if placement == "tensor_parallel":
        attentions = list(whole.attention_layers)
        heads = heads_of(rank, whole.kv_heads, shards)
        layers = [
            each.with_parts(
                divide_heads(each.attention, heads, whole.kv_heads),
                divide_mlp(each.mlp, rank, shards),
            )
            for each in whole.layers
        ]
    else:
        attentions = layers_of(rank, whole.num_layers, group_size, shards)
        layers = []
        for number, each in enumerate(whole.layers):
            mlp = each.mlp if rank == 0 else None
            if placement == "attentions_and_mlps":
                mlp = divide_mlp(each.mlp, rank, shards)
            layers.append(each.with_parts(each.attention if number in attentions else None, mlp))
    share = ModelShare(whole, layers, attentions)
    if placement == "tensor_parallel":
        share.kv_heads = len(heads)
    if placement != "attentions":
        share.divide_vocabulary(rank, shards)
    elif rank:
        share._head = share._embed = None
    return share


def divide_mlp(mlp: nn.Module, rank: int, shards: int) -> nn.Module:
    """The inner units of one shard: projections that lead in by rows, the last one by columns."""
    linear = {name: part for name, part in mlp.named_children() if isinstance(part, nn.Linear)}
    others = [part for part in mlp.children() if not isinstance(part, nn.Linear)]
    if len(linear) < 2 or any(list(part.parameters()) for part in others):
        raise UnknownLayers(f"{type(mlp).__name__} is not made of projections only (experts?)")
    *inward, (last, down) = linear.items()
    units = down.in_features
    parts = {last: _columns(down, rank, shards)}
    for name, part in inward:
        joined, rest = divmod(part.out_features, units)
        if rest or not joined:
            raise UnknownLayers(f"{type(mlp).__name__} has inner layers of different sizes")
        parts[name] = _rows(part, joined, rank, shards)
    return _remade(mlp, parts)


def heads_of(rank: int, kv_heads: int, shards: int) -> range:
    """The heads of keys that a shard holds, as many on each as possible; UnknownLayers if there are
    fewer than shards."""
    if kv_heads < shards:
        raise UnknownLayers(f"they have {kv_heads} heads of keys, too few for {shards} shards")
    own, more = divmod(kv_heads, shards)
    first = rank * own + min(rank, more)
    return range(first, first + own + (rank < more))


def divide_heads(attention: nn.Module, heads: range, kv_heads: int) -> nn.Module:
    """These heads of keys, of ``kv_heads``, and the query heads that read them. Norms of single
    heads stay as they are."""
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    children = dict(attention.named_children())
    others = [part for name, part in children.items() if name not in names]
    sizes = {parameter.numel() for part in others for parameter in part.parameters()}
    if not children.keys() >= set(names) or sizes - {attention.head_dim}:
        raise UnknownLayers(f"{type(attention).__name__} has projections of several heads at once")
    own = slice(heads.start, heads.stop)

    def rows(whole: torch.Tensor) -> torch.Tensor:
        return whole.unflatten(0, (kv_heads, -1))[own].flatten(0, 1)

    parts = {}
    for name in names[:3]:
        linear = children[name]
        bias = None if linear.bias is None else rows(linear.bias)
        parts[name] = _linear(linear, rows(linear.weight), bias)
    out = children["o_proj"]
    columns = out.weight.unflatten(1, (kv_heads, -1))[:, own].flatten(1)
    parts["o_proj"] = _linear(out, columns, None if heads.start else out.bias)
    return _remade(attention, parts)


def _rows(linear: nn.Linear, joined: int, rank: int, shards: int) -> nn.Linear:
    """Of a projection whose outputs are ``joined`` parts of as many units, one shard's units."""

    def own(whole: torch.Tensor) -> torch.Tensor:
        units = whole.unflatten(0, (joined, -1)).tensor_split(shards, 1)[rank]
        return units.flatten(0, 1)

    bias = None if linear.bias is None else own(linear.bias)
    return _linear(linear, own(linear.weight), bias)


def _columns(linear: nn.Linear, rank: int, shards: int) -> nn.Linear:
    """Of a projection out of units that are divided; one shard alone adds the bias."""
    weight = linear.weight.tensor_split(shards, 1)[rank]
    return _linear(linear, weight, None if rank else linear.bias)


def _linear(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    share = _remade(linear, weight=weight, bias=bias)
    share.out_features, share.in_features = weight.shape
    return share


def _remade(
    module: nn.Module, children: dict[str, nn.Module] | None = None, **weights: torch.Tensor | None
) -> nn.Module:
    """A module like ``module`` with these children and copies of these weights, which share no
    memory with those of the whole: that is let go."""
    made = copy.copy(module)
    made._modules = module._modules | (children or {})
    made._parameters = module._parameters | {
        name: None if weight is None else nn.Parameter(weight.clone().contiguous(), False)
        for name, weight in weights.items()
    }
    return made


@torch.inference_mode()
def check_divisible(whole: DraftModel, placement: Placement, shards: int) -> None:
    """Raise UnknownLayers unless the shards' MLPs, and their heads where these are divided, add up
    to those of ``whole``. Needs memory for one layer more."""
    if placement not in ("attentions_and_mlps", "tensor_parallel"):
        return
    divides_heads = placement == "tensor_parallel"
    heads = [heads_of(r, whole.kv_heads, shards) for r in range(shards)] if divides_heads else []
    places = torch.arange(TRIED, device=whole.device)
    rotary = whole.rotary(places)
    attend = DenseAttention((places <= places[:, None])[None, None])
    hidden = whole.embed(places % whole.vocab_size)
    for number, layer in enumerate(whole.layers):
        given = whole._given(number, rotary, attend)
        shares = (layer.with_parts(None, divide_mlp(layer.mlp, r, shards)) for r in range(shards))
        _check_sum(layer.transformed(hidden), (each.transformed(hidden) for each in shares))
        if divides_heads:
            shares = (
                layer.with_parts(divide_heads(layer.attention, own, whole.kv_heads), None)
                for own in heads
            )
            _check_sum(layer.mixed(hidden, given), (each.mixed(hidden, given) for each in shares))
        hidden = hidden + layer.attend(hidden, given)
        hidden = hidden + layer.feed(hidden)


def _check_sum(wanted: torch.Tensor, addends: Iterable[torch.Tensor]) -> None:
    total = torch.zeros_like(wanted, dtype=torch.float32)
    try:
        for each in addends:
            total += each
    except UnknownLayers:
        raise
    except (RuntimeError, TypeError, ValueError) as error:  # some shape is not what it seemed
        raise UnknownLayers(f"a share of a divided layer fails: {error}") from error
    if not close(total, wanted):
        raise UnknownLayers("the shares of a divided layer do not add up to it")
