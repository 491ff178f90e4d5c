"""A decoder-only draft model from a Hugging Face folder, as addressable layers.

The modules are transformers' own, so a draft computes what its authors trained. Only the
loop over them is ours: a layer ``x -> x + A(x) -> x + M(x)`` is offered as its two parts,
attention ``A`` and MLP ``M`` with their norms (``layer_parts.py``), because layers may be skipped,
left early, or have their attention on another device (EasySpec, arXiv 2502.02493).
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from vllm_specplus.files import is_file, positive, read_json, tensor_shapes
from vllm_specplus.strict import quoted

if TYPE_CHECKING:
    import torch
    from torch import nn

    from vllm_specplus.drafting.passes import Attend
    from vllm_specplus.drafting.transformers_layer import Given

#: ``model_type`` of the families that are tested. What a layer is made of is found by what it
#: computes: another family of such layers needs a word here and a line in its test.
FAMILIES = (
    "arcee", "exaone4", "gemma", "gemma2", "gemma3_text", "glm4", "helium", "llama", "mistral",
    "mixtral", "olmo", "olmo2", "olmo3", "olmoe", "phi3", "qwen2", "qwen2_moe", "qwen3",
    "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
)  # fmt: skip
#: Those of them whose masks have no windows in transformers, whatever their config says: one
#: converted from another family's may hold a ``sliding_window``.
WITHOUT_WINDOWS = (
    "arcee", "gemma", "glm4", "helium", "llama", "olmo", "olmo2", "olmoe", "seed_oss",
)  # fmt: skip
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
            f"use a draft with the target's tokenizer, or set 'vocabulary' to 'intersection'"
        )
    if target_tokenizer is None:
        return
    from vllm_specplus.retrieval.datastore import tokenizer_fingerprint

    if tokenizer_fingerprint(own_tokenizer(folder)) != tokenizer_fingerprint(target_tokenizer):
        raise DraftModelError(
            f"draft model {folder!r} has another tokenizer than the target: "
            f"use a draft of the target's family, or set 'vocabulary' to 'intersection'"
        )


def own_tokenizer(folder: str) -> Any:
    """The Hugging Face tokenizer of a draft; DraftModelError if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DraftModelError(f"draft model {folder!r} has no usable tokenizer: {reason}") from None


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
        self, layer: int, hidden: torch.Tensor, rotary: Any, attend: Attend
    ) -> torch.Tensor: ...
    def mlp(self, layer: int, hidden: torch.Tensor) -> torch.Tensor: ...
    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


#: Bytes of angles that a quickened model keeps.
MOST_ANGLES = 16 << 20


class DraftModel:
    """Weights on one device, layer by layer. All calls run without gradients."""

    def __init__(
        self, folder: str, device: torch.device, dtype: torch.dtype, head_tokens: int | None = None
    ):
        """``head_tokens``: predict the first so many ids only. DraftModelError if the layers are
        not of the kind that can be divided."""
        import torch
        from transformers import AutoModelForCausalLM

        from vllm_specplus.drafting.layer_parts import UnknownLayers
        from vllm_specplus.drafting.transformers_layer import TransformersLayer

        read_config(folder)
        # Safetensors only: nothing in a model folder is executed.
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True,
            trust_remote_code=False, attn_implementation="sdpa",
        ).eval().requires_grad_(False).to(device)  # fmt: skip
        self.config = config = model.config
        if getattr(config, "attn_logit_softcapping", None) is not None:
            model.set_attn_implementation("eager")  # torch's own attention does not know it
        self._cap = getattr(config, "final_logit_softcapping", None)
        self._embed, self._norm = model.model.embed_tokens, model.model.norm
        self._head = model.lm_head.weight[:head_tokens]
        self._rotary, self._kinds = model.model.rotary_emb, _rotary_kinds(model.model)
        self._angles: tuple[torch.Tensor, torch.Tensor] | None = None
        self.device, self.dtype = device, dtype
        blocks = model.model.layers
        self.layers = [
            TransformersLayer(block, _window(config, i)) for i, block in enumerate(blocks)
        ]
        self.num_layers = len(self.layers)
        self.attention_layers = list(range(self.num_layers))
        """Layers whose attention is here."""
        self.head_dim = self.layers[0].attention.head_dim
        self.kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.max_positions = config.max_position_embeddings
        self.vocab_size = len(self._head)
        try:
            with torch.inference_mode():
                self._check(model)
        except UnknownLayers as error:
            raise DraftModelError(
                f"draft model {quoted(folder)} cannot be run layer by layer: {error}"
            ) from None

    def _check(self, model: nn.Module) -> None:
        """Take the layers apart; raise UnknownLayers unless all together are the ``model``."""
        import torch

        from vllm_specplus.drafting.dense_attention import DenseAttention
        from vllm_specplus.drafting.layer_parts import TRIED, UnknownLayers, close
        from vllm_specplus.drafting.transformers_layer import PASSED_IN

        tokens = torch.arange(TRIED, device=self.device) % self.vocab_size
        known = model(tokens[None], output_hidden_states=True, use_cache=False)
        model.set_attn_implementation(PASSED_IN)
        rows = known.hidden_states[0]
        embedded = self._embed(tokens)
        # Some multiply what they embed, all by the same.
        factor = float((rows.float() * embedded).sum() / embedded.float().square().sum())
        self._factor = 1.0 if abs(factor - 1) < 1e-3 else factor
        places = torch.arange(TRIED, device=self.device)
        rotary = self.rotary(places)
        attend = DenseAttention((places <= places[:, None])[None, None])
        hidden = self.embed(tokens)
        for number, block in enumerate(model.model.layers):
            layer, given = self.layers[number], self._given(number, rotary, attend)
            made = block(hidden[None], **layer.arguments(given))
            layer.place(hidden, (made if isinstance(made, torch.Tensor) else made[0])[0], given)
            hidden = hidden + layer.attend(hidden, given)
            hidden = hidden + layer.feed(hidden)
        if not close(self.logits(hidden), known.logits[0, :, : self.vocab_size]):
            raise UnknownLayers("more than its layers goes into its logits")

    def quicken(self) -> None:
        """Run layers of Llama's kind with less beside their matrix products, on the CPU. For a
        model that stays as it is: of one that shards hold, each quickens its own share."""
        import torch

        from vllm_specplus.drafting.lean_layer import LeanLayer, LeanNorm, is_lean, is_lean_norm

        if self._is_plain_rotary():
            places = torch.arange(self.max_positions, device=self.device)
            with torch.inference_mode():
                self._angles = self.rotary(places)
        self.layers = [LeanLayer(each) if is_lean(each) else each for each in self.layers]
        if is_lean_norm(self._norm):
            self._norm = LeanNorm(self._norm)

    def _is_plain_rotary(self) -> bool:
        """Are all angles of a position the same whenever they are asked for, and few?"""
        held = 2 * self.max_positions * self.head_dim * self.dtype.itemsize
        kind = getattr(self._rotary, "rope_type", None)
        return not self._kinds and kind == "default" and held <= MOST_ANGLES

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [T] -> [T, hidden]."""
        rows = self._embed(tokens)
        return rows if self._factor == 1 else rows * self._factor

    def rotary(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin at ``positions`` int64 [T]: [T, head_dim], or [T, kinds, head_dim] where
        layers differ."""
        import torch

        if self._angles is not None:
            cos, sin = self._angles
            return cos[positions], sin[positions]
        # Only the dtype and device of the first argument matter.
        like = torch.empty(0, dtype=self.dtype, device=self.device)
        if not self._kinds:
            cos, sin = self._rotary(like, position_ids=positions[None])
            return cos[0], sin[0]
        each = [self._rotary(like, position_ids=positions[None], layer_type=k) for k in self._kinds]
        cos, sin = (torch.cat(parts).transpose(0, 1) for parts in zip(*each, strict=True))
        return cos, sin

    def _given(self, layer: int, rotary: tuple, attend: Attend) -> Given:
        from vllm_specplus.drafting.transformers_layer import Given

        if self._kinds:
            kind = self._kinds.index(self.config.layer_types[layer])
            rotary = rotary[0][:, kind], rotary[1][:, kind]
        return Given(rotary, attend)

    def attention(
        self, layer: int, hidden: torch.Tensor, rotary: tuple, attend: Attend
    ) -> torch.Tensor:
        """A(x): norms, projections, the attention that is passed in, output projection.

        ``hidden`` [T, hidden]; ``attend`` also keeps the rows' keys and values.
        """
        return self.layers[layer].attend(hidden, self._given(layer, rotary, attend))

    def mixed(
        self, layer: int, hidden: torch.Tensor, rotary: tuple, attend: Attend
    ) -> torch.Tensor:
        """As :meth:`attention`, without a norm that comes behind the output projection."""
        return self.layers[layer].mixed(hidden, self._given(layer, rotary, attend))

    def mlp(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """M(x): norms and MLP."""
        return self.layers[layer].feed(hidden)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] behind the last norm."""
        return self._norm(hidden)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> float32 [..., vocab_size]."""
        logits = (self._norm(hidden) @ self._head.T).float()
        return logits if self._cap is None else (logits / self._cap).tanh() * self._cap


def _rotary_kinds(model: nn.Module) -> list[str]:
    """The kinds of layers that have rotary positions of their own; [] if all have the same."""
    asks = inspect.signature(model.rotary_emb.forward).parameters
    return sorted(set(model.config.layer_types)) if "layer_type" in asks else []


def _window(config: Any, layer: int) -> int | None:
    """How many positions a layer of transformers' ``config`` sees; None: all."""
    if config.model_type in WITHOUT_WINDOWS or not getattr(config, "use_sliding_window", True):
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)
