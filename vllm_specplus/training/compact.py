"""An EAGLE-3 head in one file, without what its target has: how the demo's head is kept.

Its output layer is rows of its target's, as long as ``learn_output`` is false, and more than half
of its weights.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vllm_specplus.files import read_json
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.export import stored, write_head


def compact(head: Path, target: Path, file: Path) -> None:
    """Write an EAGLE-3 head as one file, without the output layer that is its target's.

    Raises TrainingError if it has another: then the head's folder is all there is.
    """
    weights = load_file(head / "model.safetensors")
    output = weights.pop("lm_head.weight", None)
    offsets = weights.get("d2t")
    ids = None if offsets is None else torch.arange(len(offsets)) + offsets
    if output is None or ids is None or not torch.equal(output, stored(output_layer(target)[ids])):
        raise TrainingError(
            f"{head} has no output layer that is its target's for some tokens: keep the folder, or "
            f"train with learn_output=false"
        )
    del weights["t2d"]  # follows from d2t
    config = read_json(head / "config.json", f"{head}: its config.json")
    config["speculators_config"]["verifier"]["name_or_path"] = target.name
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}-") as scratch:
        made = Path(scratch) / file.name
        save_file(weights, made, metadata={"format": "pt", "config": json.dumps(config)})
        made.replace(file)


def expand(file: Path, target: Path, folder: Path) -> None:
    """Write the folder of a head that :func:`compact` wrote; it appears whole or not at all.

    Raises OSError if there is a folder of that name with something in it.
    """
    with safe_open(file, framework="pt") as kept:
        metadata = kept.metadata() or {}
    if "config" not in metadata:
        raise TrainingError(f"{file} is no compact head: it has no configuration in its metadata")
    config, weights = json.loads(metadata["config"]), load_file(file)
    layer, output = config["transformer_layer_config"], output_layer(target)
    if output.shape != (layer["vocab_size"], layer["hidden_size"]):
        raise TrainingError(
            f"{file} was made for a target of {layer['vocab_size']} tokens and "
            f"{layer['hidden_size']} units, and {target} has {len(output)} and {output.shape[1]}: "
            f"name the target that it was trained for"
        )
    ids = torch.arange(len(weights["d2t"])) + weights["d2t"]
    known = torch.zeros(len(output), dtype=torch.bool)
    known[ids] = True
    weights |= {"t2d": known, "lm_head.weight": output[ids]}
    config["speculators_config"]["verifier"]["name_or_path"] = str(target)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        write_head(made, config, weights)
        made.rename(folder)


def output_layer(target: Path) -> Tensor:
    """The target's output layer [vocabulary, hidden], which may be its embedding."""
    files = sorted(target.glob("*.safetensors"))
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        found = _find(files, name)
        if found is not None:
            return found
    raise TrainingError(f"target {target} has no output layer in a .safetensors file: save one")


def _find(files: Iterable[Path], name: str) -> Tensor | None:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            if name in tensors.keys():  # noqa: SIM118  (not a mapping)
                return tensors.get_tensor(name)
    return None
