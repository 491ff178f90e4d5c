"""The target's embedding and output layer, as heads use them, whatever layers are between.

They are the modules that vLLM's own heads share: an embedding without the factor that some models
have behind it. Of ranks that have a part of the vocabulary each, the one that drafts gets a copy of
all of it once, when the target is loaded: a head is small, and asking the other ranks in the
middle of a draft would cost more than it computes.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import embedding, linear
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models import supports_multimodal

from vllm_specplus.drafting.model import DraftModelError

#: How vLLM's models name what is between their embedding and the output layer, and the embedding.
_BODIES = ("model", "transformer", "gpt_neox")
_EMBEDDINGS = (
    "embed_tokens", "embedding", "word_embeddings", "wte", "embed_in", "tok_embeddings",
    "embeddings",
)  # fmt: skip
#: Models of vLLM whose ``compute_logits`` begins with the last norm. The states they hand out have
#: not passed it; what a head computes has passed its own.
_NORM_LATE = ("MiMoForCausalLM", "Step3p5ForCausalLM")


class TargetVocabulary:
    """A ``drafting.eagle.Vocabulary`` of a target on one rank."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._embedding, self._logits = _embedding(model), model.compute_logits
        if type(model).__name__ in _NORM_LATE:
            self._logits = functools.partial(model.logits_processor, model.lm_head)

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[...] -> [..., hidden]."""
        return self._embedding(tokens.flatten()).unflatten(0, tokens.shape)

    def output(self, normed: torch.Tensor) -> torch.Tensor:
        """[..., hidden], behind the last norm -> float32 logits [..., vocab]."""
        rows = normed.flatten(0, -2)
        return self._logits(rows).float().view(*normed.shape[:-1], -1)

    def parts(self) -> tuple[dict[str, torch.Tensor], int, float | None, float]:
        """As :meth:`WholeVocabulary.parts`; DraftModelError if they do not make the same logits."""
        whole = _whole(self._model, lambda part: part)
        assert whole is not None
        rows = self.embed(torch.arange(4, device=self._embedding.weight.device))
        if not torch.allclose(whole.output(rows), self.output(rows), atol=1e-2, rtol=1e-2):
            raise DraftModelError(
                f"{type(self._model).__name__} makes its logits by more than an output layer, "
                f"which a draft in another process cannot: leave 'overlap' out"
            )
        return whole.parts()


class WholeVocabulary:
    """The same of a target that is divided among ranks: copies of all of its rows."""

    def __init__(self, rows: torch.Tensor, output: torch.Tensor, bias: Any, processor: Any):
        """``rows`` [padded vocabulary, hidden] of the embedding; ``output`` of the output layer,
        with its ``bias`` [padded vocabulary] or None; ``processor``: vLLM's of logits."""
        self._rows, self._output, self._bias = rows, output, bias
        self._size = processor.org_vocab_size
        self._cap, self._scale = processor.soft_cap, processor.scale

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """As :meth:`TargetVocabulary.embed`."""
        return embedding(tokens, self._rows)

    def output(self, normed: torch.Tensor) -> torch.Tensor:
        """As :meth:`TargetVocabulary.output`."""
        logits = linear(normed.to(self._output.dtype), self._output, self._bias)
        logits = logits[..., : self._size].float()
        if self._cap is not None:
            logits = (logits / self._cap).tanh() * self._cap
        return logits * self._scale

    def parts(self) -> tuple[dict[str, torch.Tensor], int, float | None, float]:
        """All that it is, for another process: tensors "rows" and, where the output layer has its
        own, "output" and "bias"; the vocabulary's size; soft cap and scale of the logits."""
        tensors = {"rows": self._rows}
        if self._output is not self._rows:
            tensors["output"] = self._output
        if self._bias is not None:
            tensors["bias"] = self._bias
        return tensors, self._size, self._cap, self._scale


def load_vocabulary(model: nn.Module) -> TargetVocabulary | WholeVocabulary | None:
    """The vocabulary of the loaded target; None on ranks that do not draft.

    Collective: every rank of a tensor-parallel group must call it alike. DraftModelError says, in
    one sentence, why the target has none that can be used.
    """
    if supports_multimodal(model):  # drafts go on from text
        model = model.get_language_model()
    group = get_tp_group()
    if group.world_size == 1:
        return TargetVocabulary(model)
    return _whole(model, _gathered)


def _whole(
    model: nn.Module, gathered: Callable[[torch.Tensor], torch.Tensor | None]
) -> WholeVocabulary | None:
    """The vocabulary of all ranks, whose parts of a tensor ``gathered`` makes one of; None where
    that gives None."""
    own = _embedding(model)
    head = getattr(model, "lm_head", own)
    for what, layer in (("embedding", own), ("output layer", head)):
        if not isinstance(layer.quant_method, UnquantizedEmbeddingMethod):
            raise DraftModelError(
                f"heads need a copy of the target's {what}, which is quantized: set "
                f"tensor_parallel_size to 1, and leave 'overlap' out"
            )
    rows = gathered(own.weight)
    output = rows if head.weight is own.weight else gathered(head.weight)
    bias = getattr(head, "bias", None)
    bias = None if bias is None else gathered(bias)
    if rows is None or output is None:
        return None
    return WholeVocabulary(rows, output, bias, model.logits_processor)


def _embedding(model: nn.Module) -> VocabParallelEmbedding:
    for body, name in itertools.product(_BODIES, _EMBEDDINGS):
        found = getattr(getattr(model, body, None), name, None)
        if isinstance(found, VocabParallelEmbedding):
            return found
    raise DraftModelError(
        f"{type(model).__name__} has no embedding that a head could use: use a method that drafts "
        f"without one, such as 'token_recycling'"
    )


def _gathered(part: torch.Tensor) -> torch.Tensor | None:
    """The parts of all ranks, one behind the other, on the first one; None on the others."""
    group = get_tp_group()
    first = group.rank_in_group == 0
    parts = [torch.empty_like(part) for _ in range(group.world_size)] if first else None
    torch.distributed.gather(
        part.data.contiguous(), parts, dst=group.ranks[0], group=group.device_group
    )
    return None if parts is None else torch.cat(parts)
