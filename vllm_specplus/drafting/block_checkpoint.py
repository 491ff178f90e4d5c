"""What a block head's folder holds; see ``drafting/block_heads.py``.

Reads shapes, no weights, and imports no torch: for checking a user's configuration. Two writers are
known: ``speculators`` 0.9 (``speculators_model_type``, the layers' config inside), and the heads'
authors, as vLLM reads them.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

from vllm_specplus.drafting.block_config import BlockConfig, Body, ParallelBody, Second
from vllm_specplus.drafting.head_tensors import Shapes, check_tensors, read_shapes
from vllm_specplus.drafting.model import DraftModelError
from vllm_specplus.files import is_file, positive, read_json
from vllm_specplus.strict import quoted

#: Kinds of heads that can be run.
KINDS = ("dflash", "dflash2", "dspark", "medusa", "peagle")
_ARCHITECTURES = {
    "DFlashDraftModel": "dflash",
    "DFlash2DraftModel": "dflash2",
    "Qwen3DSparkModel": "dspark",
    "MedusaModel": "medusa",
    "Eagle3LlamaForCausalLM": "eagle3",
    "Eagle3Qwen3ForCausalLM": "eagle3",
    "LlamaForCausalLMEagle3": "eagle3",
    "PEagleDraftModel": "peagle",
    "PeagleLlamaForCausalLM": "peagle",
    "PeagleQwen3ForCausalLM": "peagle",
}
#: Keys that describe the layers, beside their sizes, as transformers' ``Qwen3Config`` has them.
_LAYER_KEYS = (
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling",
    "rope_parameters",
)  # fmt: skip
#: Where the authors' configs say nothing of it (``speculators`` always do).
_ROPE_THETA = 1e6
#: Most tokens of a block.
_LONGEST_BLOCK = 256
_MARKOV = ("markov_head.markov_w1.weight", "markov_head.markov_w2.weight")
#: Families that the layers of P-EAGLE may be of.
_FAMILIES = ("llama", "qwen3")
#: Keys of its mask token: of ``speculators``, of its authors, of vLLM.
_MASKS = ("mask_token_id", "ptd_token_id", "pard_token")

_Sizes = dict[str, tuple[int, ...]]


def canonical(name: str) -> str:
    """A tensor's name, the same for all writers of checkpoints."""
    name = name.removeprefix("model.").removeprefix("medusa_heads.").removeprefix("medusa_head.")
    if name.startswith("midlayer."):
        return "layers.0." + name.removeprefix("midlayer.")
    if found := re.fullmatch(r"(\d+)\.(\d+)\.linear\.(weight|bias)", name):
        return "blocks.{}.layers.{}.{}".format(*found.groups())
    if found := re.fullmatch(r"(\d+)\.\d+\.weight", name):
        return f"lm_heads.{found[1]}.weight"
    return name


def read_config(folder: str) -> BlockConfig:
    """Check a head's folder; DraftModelError, with a sentence, if it cannot be run here."""
    path, name = Path(folder), f"block head {quoted(folder)}"
    if not is_file(path / "config.json"):
        raise DraftModelError(f"{name} is not a Hugging Face folder (it has no config.json)")
    try:
        raw = read_json(path / "config.json", f"{name}: its config.json")
    except ValueError as error:
        raise DraftModelError(str(error)) from None
    try:
        kind = _kind(raw, name)
        shapes = read_shapes(path, name, canonical)
        if is_file(path / "mask_embedding.pt"):
            raise DraftModelError(
                f"{name} has a mask_embedding.pt, and pickled files are not read: save it in the "
                f"safetensors file as 'mask_embedding'"
            )
        if any(each.get("quantization_config") for each in (raw, _inner(raw))):
            raise DraftModelError(f"{name} is quantized: use its unquantized original")
        if kind == "medusa":
            return _medusa(raw, shapes, name)
        if kind == "peagle":
            return _parallel(raw, shapes, name)
        return _block(kind, raw, shapes, name)
    except DraftModelError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise DraftModelError(
            f"{name}: its config or weights are unreadable: {str(error)[:150]!r}"
        ) from None


def _inner(raw: dict[str, Any]) -> dict[str, Any]:
    """The layers' own config, which `speculators` write inside."""
    return raw.get("transformer_layer_config") or {}


def _kind(raw: dict[str, Any], name: str) -> str:
    """One of :data:`KINDS`; DraftModelError where the head is of another."""
    kind = raw.get("speculators_model_type")
    if kind is None:
        named = [_ARCHITECTURES.get(each) for each in raw.get("architectures") or ()]
        kind = next((each for each in named if each), None)
        if kind == "eagle3" and any(raw.get(key) is not None for key in _MASKS):
            kind = "peagle"
    if kind is None and (raw.get("model_type") == "medusa" or "medusa_num_heads" in raw):
        kind = "medusa"
    if kind in ("eagle3", "eagle"):
        raise DraftModelError(f"{name} is an EAGLE head: use the method 'eagle_tree'")
    if kind not in KINDS:
        what = f"of kind {quoted(kind)}" if kind else "of no kind that its config.json names"
        raise DraftModelError(f"{name} is {what} (supported: {', '.join(KINDS)})")
    return kind


def _numbers(config: dict[str, Any], keys: tuple[str, ...], name: str) -> list[int]:
    """Values of ``keys``; DraftModelError unless they are whole numbers above 0."""
    try:
        return [positive(config, key, f"{name}: its config.json") for key in keys]
    except ValueError as error:
        raise DraftModelError(str(error)) from None


def _decoder(
    of: str, reads: int, hidden: int, heads: tuple[int, int, int | None], inner: int, bias: bool
) -> _Sizes:
    """The tensors of a layer ``of`` that name, whose attention reads ``reads`` units; ``heads``:
    units of its queries, of its keys, and of one head where these are normed, else None."""
    queries, keys, dim = heads
    found: _Sizes = {}
    for part, size in {"q": queries, "k": keys, "v": keys, "o": hidden}.items():
        found[f"{of}.self_attn.{part}_proj.weight"] = size, queries if part == "o" else reads
        if bias:
            found[f"{of}.self_attn.{part}_proj.bias"] = (size,)
    if dim is not None:
        found |= {f"{of}.self_attn.{part}_norm.weight": (dim,) for part in "qk"}
    found |= {f"{of}.mlp.{part}_proj.weight": (inner, hidden) for part in ("gate", "up")}
    found[f"{of}.mlp.down_proj.weight"] = (hidden, inner)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        found[f"{of}.{norm}.weight"] = (hidden,)
    return found


# -- DFlash, DFlash-2 and DSpark ---------------------------------------------------------


def _block(kind: str, raw: dict[str, Any], shapes: Shapes, name: str) -> BlockConfig:
    theirs = "speculators_model_type" not in raw  # the authors' own format
    extra = raw.get("dflash_config") or {}
    config = raw | _inner(raw) | extra
    vocab, block, layers = _numbers(config, ("vocab_size", "block_size", "num_hidden_layers"), name)
    if "fc.weight" not in shapes:
        raise DraftModelError(f"{name} is incomplete: it lacks fc.weight")
    hidden, reads = shapes["fc.weight"]
    # What enters layer n is the output of layer n - 1.
    ids = config.get("target_layer_ids") if theirs else config.get("aux_hidden_state_layer_ids")
    layer_ids = tuple(i + 1 for i in ids) if theirs else tuple(ids)
    whole = all(isinstance(i, int) for i in layer_ids)
    if not whole or list(layer_ids) != sorted(set(layer_ids)) or layer_ids[0] < 0:
        raise DraftModelError(
            f"{name} reads the target's layers {quoted(ids)}, which must be whole numbers in "
            f"ascending order"
        )
    target = int(config.get("target_hidden_size") or hidden)
    if reads != target * len(layer_ids):
        raise DraftModelError(
            f"{name} reads {reads} units, which are not the states of {len(layer_ids)} layers of "
            f"{target} units"
        )
    from_anchor = bool(config.get("sample_from_anchor", kind == "dspark"))
    if theirs and config.get("dspark_bonus_anchor"):
        from_anchor = False
    if not 1 <= block - (not from_anchor) <= block <= _LONGEST_BLOCK:
        raise DraftModelError(
            f"{name} has blocks of {quoted(block)}: at most {_LONGEST_BLOCK}, and such that "
            f"predict a token, are allowed"
        )
    mask = config.get("mask_token_id")
    if mask is None:
        raise DraftModelError(f"{name} says nowhere which token is its mask: add 'mask_token_id'")
    layer, expected = _layers(config, shapes, layers, hidden, name)
    second = _second(config, shapes, block, hidden, expected, name) if kind == "dflash2" else None
    _check_vocabulary(kind, config, shapes, expected, target, name)
    if theirs and not any(config.get(key) for key in ("rope_theta", "rope_parameters")):
        layer["rope_theta"] = _ROPE_THETA
    windows, causal = _attention(config, layers, theirs, name)
    confidence = _confidence(config, shapes) if kind == "dspark" else None
    body = Body(
        layer, block, from_anchor, int(mask), windows, not theirs, causal, confidence, second
    )  # fmt: skip
    most = int(config.get("max_position_embeddings") or 32768)
    return BlockConfig(kind, block - (not from_anchor), target, vocab, layer_ids, most, body)


def _layers(
    config: dict[str, Any], shapes: Shapes, layers: int, hidden: int, name: str
) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """Keys of ``Qwen3Config``, and the tensors of the layers, by what is in ``shapes``."""
    for key in ("attention_value_scale", "attention_sink_bias", "add_swa_attention_sink_bias"):
        if config.get(key):
            raise DraftModelError(f"{name} has {key!r}, which is not supported: use another head")
    if config.get("is_neox_style") is False:
        raise DraftModelError(
            f"{name} rotates neighbouring units, which is not supported: use another head"
        )
    attention = "layers.0.self_attn"
    for tensor in (f"{attention}.{each}" for each in ("k_norm", "q_proj", "k_proj")):
        if f"{tensor}.weight" not in shapes:
            raise DraftModelError(f"{name} is incomplete: it lacks {tensor}.weight")
    (dim,) = shapes[f"{attention}.k_norm.weight"]
    queries, keys = (shapes[f"{attention}.{each}_proj.weight"][0] for each in "qk")
    if queries % dim or keys % dim or (queries // dim) % (keys // dim):
        raise DraftModelError(
            f"{name} has queries of {queries} and keys of {keys} units, which are no heads of {dim}"
        )
    inner = shapes.get("layers.0.mlp.gate_proj.weight", (0,))[0]
    bias = bool(config.get("attention_bias"))
    expected: dict[str, tuple[int, ...]] = {
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    found = {each.split(".")[1] for each in shapes if each.startswith("layers.")}
    for i in range(min(layers, len(found) + 1)):  # one that lacks is enough
        expected |= _decoder(f"layers.{i}", hidden, hidden, (queries, keys, dim), inner, bias)
    layer = {key: config[key] for key in _LAYER_KEYS if config.get(key) is not None}
    rope = layer.get("rope_parameters") or {}
    if "sliding_attention" in rope:  # by kinds of layers, of which `speculators` rotate as one
        layer["rope_parameters"] = rope["sliding_attention"]
    layer |= {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": queries // dim, "num_key_value_heads": keys // dim,
        "head_dim": dim, "attention_bias": bias,
    }  # fmt: skip
    return layer, expected


def _confidence(config: dict[str, Any], shapes: Shapes) -> Literal["row", "token"] | None:
    """See ``Body.confidence``."""
    if not config.get("enable_confidence_head") or "confidence_head.proj.weight" not in shapes:
        return None
    by_token = config.get("confidence_head_with_markov") and config.get("markov_rank")
    return "token" if by_token else "row"


def _second(
    config: dict[str, Any], shapes: Shapes, block: int, hidden: int, expected: _Sizes, name: str
) -> Second:
    """What DFlash-2 adds; its tensors are added to the ``expected`` ones."""
    keys = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
    taps, group, rank, candidates = _numbers(config, keys, name)
    if taps > block or hidden % group:
        raise DraftModelError(
            f"{name} has convolutions of {taps} rows and {group} units, which do not fit into "
            f"blocks of {block} rows and {hidden} units"
        )
    if "d2t" in shapes or config.get("sample_from_anchor"):
        raise DraftModelError(
            f"{name} has a vocabulary of its own, or predicts from the newest token's row, which "
            f"DFlash-2 does not"
        )
    layers = {each.split(".")[1] for each in expected if each.startswith("layers.")}
    for part in (f"layers.{i}.{each}_conv" for i in layers for each in ("attention", "mlp")):
        expected[f"{part}.base_kernel"] = (2, taps, hidden)
        expected[f"{part}.kernel_projection.weight"] = (2 * taps * hidden // group, hidden)
    for part in ("predecessor", "successor"):
        expected[f"candidate_selector.{part}_codebook"] = (int(config["vocab_size"]), rank)
    expected["candidate_selector.hidden_projection.weight"] = (rank, hidden)
    scales = [float(config.get(key) or 1) for key in ("input_embedding_scale", "output_multiplier")]
    cap = float(config.get("final_logit_softcapping") or 0)
    return Second(taps, group, candidates, *scales, max(cap, 0.0))


def _attention(
    config: dict[str, Any], layers: int, theirs: bool, name: str
) -> tuple[tuple[int | None, ...], tuple[bool, ...]]:
    """Each layer's window, and whether it is causal within a block.

    vLLM reads ``"sliding_window_non_causal": false`` as causal in all layers; ``speculators``, who
    train the heads, mean those with a window.
    """
    kinds = list(config.get("layer_types") or ())
    if kinds and len(kinds) != layers:
        raise DraftModelError(f"{name} has {layers} layers, and 'layer_types' of {len(kinds)}")
    windowed = [kind == "sliding_attention" for kind in kinds or [""] * layers]
    window = config.get("swa_window_size") or config.get("sliding_window")
    causal = list(windowed)
    if not theirs:
        if not config.get("use_sliding_window"):
            window, windowed = None, [False] * layers
        causal = [each and not config.get("sliding_window_non_causal") for each in windowed]
    else:
        if config.get("use_swa") and not any(windowed):
            windowed = [True] * layers
        said = config.get("is_causal", config.get("causal"))
        causal = causal if said is None else [bool(said)] * layers
    if any(windowed) and window is None:
        raise DraftModelError(
            f"{name} has layers with windows and says not which: set 'sliding_window'"
        )
    return tuple(int(window or 0) if each else None for each in windowed), tuple(causal)


def _check_vocabulary(
    kind: str, config: dict[str, Any], shapes: Shapes, expected: dict[str, tuple[int, ...]],
    target: int, name: str,
) -> None:  # fmt: skip
    """DraftModelError unless the head can read and predict tokens; checks all other tensors too."""
    vocab, hidden = int(config["vocab_size"]), expected["norm.weight"][0]
    own = int(config.get("draft_vocab_size") or vocab)
    if "d2t" in shapes:
        (own,) = shapes["d2t"]
        if "lm_head.weight" not in shapes:
            raise DraftModelError(
                f"{name} says with d2t which tokens it predicts, but has no lm_head.weight for them"
            )
    elif own != vocab:
        raise DraftModelError(
            f"{name} predicts {own} of {vocab} tokens and says not which: it lacks d2t"
        )
    optional: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (vocab, hidden), "lm_head.weight": (own, hidden), "d2t": (own,),
        "t2d": (vocab,), "mask_embedding": (hidden,), "fc.weight": shapes["fc.weight"],
    }  # fmt: skip
    if kind == "peagle":
        del optional["mask_embedding"]
    if kind == "dspark":
        head = config.get("markov_head_type", "vanilla")
        if head != "vanilla":
            raise DraftModelError(
                f"{name} has a Markov head of type {quoted(head)} (supported: 'vanilla')"
            )
        rank = int(config.get("markov_rank") or 0)
        if rank:
            expected = expected | dict(zip(_MARKOV, ((vocab, rank), (own, rank)), strict=True))
        units = hidden + (rank if config.get("confidence_head_with_markov") else 0)
        optional |= {
            "confidence_head.proj.weight": (1, units), "confidence_head.proj.bias": (1,),
        }  # fmt: skip
    check_tensors(shapes, expected, optional, name)
    for tensor, use in (("embed_tokens", "embedding"), ("lm_head", "output layer")):
        if f"{tensor}.weight" not in shapes and hidden != target:
            raise DraftModelError(
                f"{name} has {hidden} units and cannot use the {use} of its target, of {target}"
            )


# -- P-EAGLE -------------------------------------------------------------------------------


def _parallel(raw: dict[str, Any], shapes: Shapes, name: str) -> BlockConfig:
    config = raw | _inner(raw) | (raw.get("eagle_config") or {})
    family = config.get("model_type")
    if family not in _FAMILIES:
        raise DraftModelError(
            f"{name} has layers of type {quoted(family)} (supported: {', '.join(_FAMILIES)})"
        )
    for tensor in ("fc.weight", "mask_hidden"):
        if tensor not in shapes:
            raise DraftModelError(f"{name} is incomplete: it lacks {tensor}")
    hidden, reads = shapes["fc.weight"]
    target = int(config.get("target_hidden_size") or hidden)
    ids = config.get("eagle_aux_hidden_state_layer_ids") or ()
    states = len(ids or range(3))
    if not all(isinstance(i, int) and i >= 0 for i in ids):
        raise DraftModelError(
            f"{name} reads the target's layers {quoted(ids)}, which must be whole numbers"
        )
    if reads != target * states or math.prod(shapes["mask_hidden"]) != reads:
        raise DraftModelError(
            f"{name} reads {reads} units, and {math.prod(shapes['mask_hidden'])} for a mask, which "
            f"are not the states of {states} layers of {target} units"
        )
    mask = next((config[key] for key in _MASKS if config.get(key) is not None), None)
    if mask is None:
        raise DraftModelError(f"{name} says nowhere which token is its mask: add 'mask_token_id'")
    if "sliding_attention" in (config.get("layer_types") or ()):
        raise DraftModelError(f"{name} has layers with windows, which are not supported")
    layer, expected = _parallel_layers(config, shapes, hidden, name)
    expected["mask_hidden"] = shapes["mask_hidden"]
    if "input_norm.weight" in shapes:
        expected["input_norm.weight"] = (reads,)
    if "fc_norm.0.weight" in shapes:
        expected |= {f"fc_norm.{i}.weight": (target,) for i in range(states)}
    _check_vocabulary("peagle", config, shapes, expected, target, name)
    # Of heads that `speculators` train, as vLLM reads them: unlike those of EAGLE-3.
    before = bool(config.get("norm_before_residual", False))
    body = ParallelBody(family, layer, int(mask), before)
    most = int(config.get("max_position_embeddings") or 32768)
    depth = _depth(raw, config, name)
    return BlockConfig("peagle", depth, target, config["vocab_size"], tuple(ids), most, body)


def _parallel_layers(
    config: dict[str, Any], shapes: Shapes, hidden: int, name: str
) -> tuple[dict[str, Any], _Sizes]:
    """Keys of the layers' config, and their tensors."""
    _, layers, heads, inner = _numbers(
        config,
        ("vocab_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        name,
    )
    key_heads = int(config.get("num_key_value_heads") or heads)
    dim = int(config.get("head_dim") or hidden // heads)
    if heads % key_heads:
        raise DraftModelError(f"{name} has {heads} heads, which cannot share {key_heads} of keys")
    bias, normed = bool(config.get("attention_bias")), config["model_type"] == "qwen3"
    sizes = heads * dim, key_heads * dim, dim if normed else None
    expected: _Sizes = {"norm.weight": (hidden,), "layers.0.hidden_norm.weight": (hidden,)}
    found = {each.split(".")[1] for each in shapes if each.startswith("layers.")}
    for i in range(min(layers, len(found) + 1)):  # one that lacks is enough
        reads = hidden if i else 2 * hidden
        expected |= _decoder(f"layers.{i}", reads, hidden, sizes, inner, bias)
    layer = {key: config[key] for key in _LAYER_KEYS if config.get(key) is not None}
    layer |= {
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": dim,
        "attention_bias": bias,
    }  # fmt: skip
    return layer, expected


def _depth(raw: dict[str, Any], config: dict[str, Any], name: str) -> int:
    """How many tokens a pass was trained to predict."""
    methods = (raw.get("speculators_config") or {}).get("proposal_methods") or [{}]
    said = [methods[0].get("speculative_tokens"), config.get("num_depths")]
    depth = next((each for each in said if each is not None), None)
    if not isinstance(depth, int) or not 1 <= depth <= _LONGEST_BLOCK:
        raise DraftModelError(
            f"{name} predicts {quoted(depth)} tokens at once: say in its config.json how many it "
            f"was trained for, as 'num_depths', 1 to {_LONGEST_BLOCK}"
        )
    return depth


# -- Medusa --------------------------------------------------------------------------------


def _medusa(raw: dict[str, Any], shapes: Shapes, name: str) -> BlockConfig:
    found = [re.fullmatch(r"blocks\.(\d+)\.layers\.(\d+)\.weight", each) for each in shapes]
    numbers = [(int(each[1]), int(each[2])) for each in found if each]
    if not numbers:
        raise DraftModelError(f"{name} is incomplete: it lacks blocks.0.layers.0.weight")
    heads = int(raw.get("num_heads") or raw.get("medusa_num_heads") or 0)
    layers = int(raw.get("num_hidden_layers") or raw.get("medusa_num_layers") or 0)
    # More than are there are as wrong as one more.
    heads = min(heads, len(numbers) + 1) or 1 + max(head for head, _ in numbers)
    layers = min(layers, len(numbers) + 1) or 1 + max(layer for _, layer in numbers)
    hidden = shapes["blocks.{}.layers.{}.weight".format(*numbers[0])][0]
    expected = {
        f"blocks.{i}.layers.{j}.weight": (hidden, hidden)
        for i in range(heads)
        for j in range(layers)
    }
    optional: dict[str, tuple[int, ...]] = {
        each.replace("weight", "bias"): (hidden,) for each in expected
    }
    outputs = [each for each in shapes if each.startswith("lm_heads.")]
    rows = {shapes[each] for each in outputs}
    if len(rows) > 1 or any(each[1] != hidden for each in rows):
        raise DraftModelError(f"{name} has output layers of different sizes: {sorted(rows)}")
    vocab = raw.get("vocab_size")
    if rows:
        ((own, _),) = rows
        shared = raw.get("original_lm_head") or len(outputs) == 0
        expected |= {f"lm_heads.{i}.weight": (own, hidden) for i in range(1 if shared else heads)}
        vocab = vocab or (None if "token_map" in shapes else own)
    if "token_map" in shapes:
        optional["token_map"] = shapes["token_map"]
        if not rows:
            raise DraftModelError(
                f"{name} says with token_map which tokens it predicts, but has no output layer for "
                f"them"
            )
    elif rows and own != vocab:
        raise DraftModelError(f"{name} predicts {own} of {vocab} tokens and says not which")
    check_tensors(shapes, expected, optional, name)
    return BlockConfig("medusa", heads, hidden, vocab, None, None, None)
