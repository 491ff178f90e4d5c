"""A transformers model as what training uses of it: embedding, body, output layer."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vllm_specplus.drafting.model import FAMILIES
from vllm_specplus.files import is_file, positive, read_json
from vllm_specplus.strict import MOST_QUOTED, quoted
from vllm_specplus.training.errors import TrainingError


def read_model_config(folder: Path, what: str) -> dict[str, Any]:
    """``config.json`` of a model that can be trained here, or with; TrainingError, which calls it
    ``what`` ("target", "draft"), for another. Reads no weights."""
    name = f"{what} {quoted(folder)}"
    if not is_file(folder / "config.json"):
        raise TrainingError(
            f"{name} is no Hugging Face folder (it has no config.json): name one that is"
        )
    try:
        config = read_json(folder / "config.json", f"{name}: its config.json")
        for key in ("vocab_size", "hidden_size", "num_hidden_layers"):
            positive(config, key, f"{name}: its config.json")
    except ValueError as error:
        raise TrainingError(str(error)) from None
    if config.get("model_type") not in FAMILIES:
        raise TrainingError(
            f"{name} is of type {quoted(config.get('model_type'))} (allowed: {', '.join(FAMILIES)})"
        )
    if config.get("quantization_config"):
        raise TrainingError(f"{name} is quantized: name its unquantized original")
    return config


def load_model(folder: Path, what: str, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The causal language model of a folder, in eval mode; TrainingError if it cannot be read.

    Nothing that the folder holds is executed, and no pickled file is read.
    """
    from transformers import AutoModelForCausalLM

    read_model_config(folder, what)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True,
            trust_remote_code=False,
        )  # fmt: skip
    except Exception as error:  # of transformers, safetensors or the file system
        reason = (str(error).splitlines() or [""])[0][:MOST_QUOTED]
        raise TrainingError(
            f"{what} {quoted(folder)} cannot be loaded ({reason}): save it again as safetensors"
        ) from None
    return model.eval().to(device)


class LanguageModel:
    """A model that reads texts with what precision a run has asked for.

    It is also a :class:`vllm_specplus.drafting.eagle.Vocabulary`.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        """``model``: transformers' causal language model; ``dtype``: of its products, where its
        weights are float32."""
        self.model, self.dtype, self.config = model, dtype, model.config
        self.body: nn.Module = model.model
        """From embedded tokens to the hidden states behind the last norm."""
        self.vocab_size: int = self.config.vocab_size
        self.hidden_size: int = self.config.hidden_size
        self._cap: float | None = getattr(self.config, "final_logit_softcapping", None)

    @property
    def layers(self) -> nn.ModuleList:
        return self.body.layers

    @property
    def norm_weight(self) -> Tensor:
        """[hidden] of the last norm."""
        return self.body.norm.weight

    @property
    def output_weight(self) -> Tensor:
        """[V, hidden]."""
        return self.model.lm_head.weight

    @property
    def device(self) -> torch.device:
        return self.output_weight.device

    def autocast(self) -> torch.autocast:
        """Products in :attr:`dtype`."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def after(self, layers: int) -> LanguageModel:
        """The same weights, left after the first ``layers`` layers: as ``early_exit`` drafts."""
        left = copy.copy(self)
        left.body = copy.copy(self.body)  # shares its modules, not what it knows about itself
        left.body.config = copy.copy(self.body.config)
        left.body.config.num_hidden_layers = layers
        return left

    def embed(self, tokens: Tensor) -> Tensor:
        """[B, n] -> [B, n, hidden]."""
        return self.body.embed_tokens(tokens)

    def read(self, tokens: Tensor, seen: Tensor | None = None, **given: Any) -> Tensor:
        """Hidden states [B, n, hidden] behind the last norm.

        ``tokens`` int64 [B, n]; ``seen`` bool [B, m] says which of the cached and the read ones
        are text (None: all); ``given`` goes to transformers.
        """
        return self.outputs(tokens, seen, **given).last_hidden_state

    def outputs(self, tokens: Tensor, seen: Tensor | None = None, **given: Any) -> Any:
        """Of :meth:`read`, all that transformers returns."""
        # Layers in training are float32, and so is what goes through them, though the embedding
        # may be the target's own.
        embedded = self.embed(tokens).to(next(self.layers.parameters()).dtype)
        if seen is not None:
            seen = seen.long()
        given.setdefault("use_cache", False)
        with self.autocast():
            return self.body(inputs_embeds=embedded, attention_mask=seen, **given)

    def output(self, normed: Tensor) -> Tensor:
        """[..., hidden] behind the last norm -> float32 logits [..., V]."""
        weight = self.output_weight.to(self.dtype)
        logits = F.linear(normed.to(self.dtype), weight).float()
        return logits if self._cap is None else (logits / self._cap).tanh() * self._cap
