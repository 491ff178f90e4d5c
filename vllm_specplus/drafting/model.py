"""A decoder-only draft model from a Hugging Face folder, as addressable layers.

The modules are transformers' own, so a draft computes what its authors trained. Only the
loop over them is ours: a layer ``x -> x + A(x) -> x + M(x)`` is offered as its two parts,
attention ``A`` and MLP ``M``, because layers may be skipped, left early, or have their
attention on another device (EasySpec, arXiv 2502.02493).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_specplus.files import is_file, positive, read_json, tensor_shapes
from vllm_specplus.strict import quoted

if TYPE_CHECKING:
    import torch

    from vllm_specplus.drafting.cache import PagedCache

#: ``model_type`` of the families whose layers are plain ``x + A(x)``, ``x + M(x)``.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
_SIZES = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


class DraftModelError(ValueError):
    """The folder holds no draft for this target; the message says why."""


def read_config(folder: str) -> dict[str, Any]:
    """``config.json`` of a draft that can be run here; DraftModelError if it cannot.

    Reads no weights and imports no torch: for checking a user's configuration.
    """
    path, name = Path(folder), f"draft model {quoted(folder)}"
    if not is_file(path / "config.json"):
        raise DraftModelError(f"{name} is not a Hugging Face folder (it has no config.json)")
    try:
        config = read_json(path / "config.json", f"{name}: its config.json")
        for key in _SIZES:
            positive(config, key, f"{name}: its config.json")
    except ValueError as error:
        raise DraftModelError(str(error)) from None
    family = config.get("model_type")
    if family not in FAMILIES:
        raise DraftModelError(
            f"{name} is of type {quoted(family)} (supported: {', '.join(FAMILIES)})"
        )
    if config.get("sliding_window") and config.get("use_sliding_window", family == "mistral"):
        raise DraftModelError(f"{name} uses sliding-window attention, unsupported")
    if config.get("quantization_config"):
        raise DraftModelError(f"{name} is quantized: use its unquantized original")
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise DraftModelError(
            f"{name} holds no .safetensors file: save its weights as one (pickled files are not "
            f"read)"
        )
    try:
        for file in weights:
            tensor_shapes(file, f"{name}: {file.name}")
    except ValueError as error:
        raise DraftModelError(str(error)) from None
    return config


def check_target(folder: str, target_tokenizer: Any, vocab_size: int) -> None:
    """DraftModelError unless the draft speaks the target's tokens.

    ``target_tokenizer``: Hugging Face tokenizer, None where the engine runs without one;
    then the vocabularies' sizes must do. Models pad their vocabularies differently.
    """
    drafts = read_config(folder)["vocab_size"]
    known = vocab_size if target_tokenizer is None else len(target_tokenizer)
    if not known <= drafts <= vocab_size:
        raise DraftModelError(
            f"draft model {quoted(folder)} has {drafts} token ids, the target {vocab_size}: "
            f"use a draft with the target's tokenizer"
        )
    if target_tokenizer is None:
        return
    from transformers import AutoTokenizer

    from vllm_specplus.retrieval.datastore import tokenizer_fingerprint

    try:
        own = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DraftModelError(f"draft model {folder!r} has no usable tokenizer: {reason}") from None
    if tokenizer_fingerprint(own) != tokenizer_fingerprint(target_tokenizer):
        raise DraftModelError(
            f"draft model {folder!r} has another tokenizer than the target: "
            f"use a draft of the target's family"
        )


class LayeredModel(Protocol):
    """What the draft executor runs: a :class:`DraftModel`, or the target's own layers.

    Shapes as there; what ``rotary`` returns is for ``attention`` only.
    """

    device: torch.device
    dtype: torch.dtype
    num_layers: int
    attention_layers: list[int]
    kv_heads: int
    head_dim: int
    max_positions: int
    vocab_size: int

    def embed(self, tokens: torch.Tensor) -> torch.Tensor: ...
    def rotary(self, positions: torch.Tensor) -> Any: ...
    def attention(
        self, layer: int, hidden: torch.Tensor, rotary: Any, mask: torch.Tensor, cache: PagedCache
    ) -> torch.Tensor: ...
    def mlp(self, layer: int, hidden: torch.Tensor) -> torch.Tensor: ...
    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


class DraftModel:
    """Weights on one device, layer by layer. All calls run without gradients."""

    def __init__(
        self, folder: str, device: torch.device, dtype: torch.dtype, head_tokens: int | None = None
    ):
        """``head_tokens``: predict the first so many ids only."""
        from transformers import AutoModelForCausalLM

        read_config(folder)
        # Safetensors only: nothing in a model folder is executed.
        self._model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True,
            trust_remote_code=False, attn_implementation="sdpa",
        ).eval().requires_grad_(False).to(device)  # fmt: skip
        self.config = self._model.config
        self.layers = self._model.model.layers
        self.num_layers = len(self.layers)
        self.attention_layers = list(range(self.num_layers))
        """Layers whose attention is here."""
        self.device, self.dtype = device, dtype
        heads = self.config.num_attention_heads
        self.head_dim = getattr(self.config, "head_dim", None) or self.config.hidden_size // heads
        self.kv_heads = self.config.num_key_value_heads
        self.max_positions = self.config.max_position_embeddings
        self._like = self._model.model.norm.weight
        self._head = self._model.lm_head.weight[:head_tokens]
        self.vocab_size = len(self._head)

    def keep_attention(self, layers: Iterable[int], mlps: bool) -> None:
        """Hold the attention of ``layers`` only, and the MLPs (with embedding and output
        layer) or none of them: the rest is another device's."""
        self.attention_layers = sorted(layers)
        for number, block in enumerate(self.layers):
            if number not in self.attention_layers:
                block.self_attn = block.input_layernorm = None
            if not mlps:
                block.mlp = block.post_attention_layernorm = None
        if not mlps:
            self._model.lm_head = self._model.model.embed_tokens = self._head = None

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, n] -> [R, n, hidden]."""
        return self._model.model.embed_tokens(tokens)

    def rotary(self, positions: torch.Tensor) -> tuple:
        """cos and sin [R, n, head_dim] at ``positions`` int64 [R, n]."""
        # Only the dtype and device of the first argument matter.
        return self._model.model.rotary_emb(self._like, position_ids=positions)

    def attention(
        self, layer: int, hidden: torch.Tensor, rotary: tuple, mask: torch.Tensor, cache: PagedCache
    ) -> torch.Tensor:
        """A(x): norm, projections, attention over the cache, output projection.

        ``hidden`` [R, n, hidden]; ``mask`` bool [R, 1, n, slots]. Writes the rows' keys and
        values to ``cache`` where its current pass says.
        """
        block = self.layers[layer]
        return block.self_attn(
            hidden_states=block.input_layernorm(hidden),
            position_embeddings=rotary,
            attention_mask=mask,
            past_key_values=cache,
        )[0]

    def mlp(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """M(x): norm and MLP."""
        block = self.layers[layer]
        return block.mlp(block.post_attention_layernorm(hidden))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> float32 [..., vocab_size]."""
        return (self._model.model.norm(hidden) @ self._head.T).float()
