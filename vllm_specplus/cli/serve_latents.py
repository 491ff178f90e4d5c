"""`vllm-specplus serve-latents`: the images route for masked models of latents."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

FAILED = 2


def serve_latents(
    folder: Annotated[Path, typer.Argument(help="Folder of the model, its draft and its vae/.")],
    recipe: Annotated[
        str,
        typer.Option(help="How pictures are drawn, JSON: "
                     '\'{"iterations": 64, "guidance_scale": 3.0, "cspd": {"window": 4}}\'.'),
    ] = "{}",
    batch: Annotated[int, typer.Option(min=1, help="Most pictures made together.")] = 64,
    name: Annotated[
        str | None, typer.Option("--served-model-name", help="By default the folder's.")
    ] = None,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    device: Annotated[str, typer.Option(help="Of the model, as torch names it.")] = "cpu",
    api_key: Annotated[
        str | None, typer.Option(help="What clients have to send; or VLLM_API_KEY.")
    ] = None,
) -> None:  # fmt: skip
    """Serve /v1/images/generations for a model of latents that is no model of vLLM's, such as MAR.

    Exit code 2: it cannot be served, and one sentence says why.
    """
    # Heavy, and of no use to other commands.
    import uvicorn
    from pydantic import ValidationError

    from vllm_specplus.engine.latents_server import make_app
    from vllm_specplus.image.continuous.batches import Batches
    from vllm_specplus.image.continuous.folder import LatentsFolder
    from vllm_specplus.image.continuous.generation import Recipe
    from vllm_specplus.strict import sentences, told

    try:
        wanted = Recipe.model_validate_json(recipe)
        batches = Batches(LatentsFolder.load(folder), wanted, batch, device)
    except ValidationError as error:
        _refuse(told("--recipe", sentences(error, Recipe)))
    except (ValueError, FileNotFoundError, RuntimeError, AssertionError) as error:
        _refuse(str(error))
    key = api_key or os.environ.get("VLLM_API_KEY")
    app = make_app(batches, name or folder.resolve().name, key)
    try:
        uvicorn.run(app, host=host, port=port, log_level="info")
    finally:
        batches.close()


def _refuse(message: str) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(f"Error: {message}", markup=False, soft_wrap=True)
    raise typer.Exit(FAILED)
