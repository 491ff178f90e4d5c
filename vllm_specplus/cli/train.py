"""`vllm-specplus train`: a draft for a model, from the model alone or from texts."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

FAILED = 1
BAD_INPUT = 2
RECIPE_HELP = (
    "distill, eagle, eagle3, judge or layerskip: see docs/training.md, which says what each is for "
    "and which keys --set knows."
)


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


def train(
    name: Annotated[str, typer.Argument(metavar="RECIPE", help=RECIPE_HELP)],
    target: Annotated[Path, typer.Option(help="Folder of the model that the draft is for.")],
    out: Annotated[
        Path,
        typer.Option(help="Folder of the run; result/ in it is served. An ended run goes on."),
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSON lines of texts (tokens, prompt and answer, messages, responses of vLLM's "
            "server) or of questions, which the target answers.",
            show_default="the target asks itself",
        ),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="Most tokens that the target writes.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the texts.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Most time to train.")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Positions per step, of all processes together.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Its highest.")] = None,
    max_length: Annotated[int, typer.Option(help="Most tokens of a text.")] = 512,
    seed: Annotated[int, typer.Option(help="Of all that is drawn.")] = 0,
    dtype: Annotated[Dtype, typer.Option(help="Of products.")] = Dtype.bfloat16,
    measure: Annotated[
        Path | None,
        typer.Option(
            help="Questions to measure on, as for --data; nothing is learnt from them.",
            show_default="a twentieth of the texts",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A key of the recipe, in JSON. Repeatable."
        ),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Write texts on Ray, one engine for each GPU.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only check memory and disk, and print the time.")
    ] = False,
    flops: Annotated[
        float | None,
        typer.Option(help="For --dry-run: FLOP/s of a device.", show_default="measured"),
    ] = None,
) -> None:
    """Train a draft, a head or a judge for TARGET.

    Under torchrun every process has its share of each batch.
    Exit code 0: the result is there; 1: the run could not go on; 2: unusable input.
    """
    errors = Console(stderr=True, highlight=False)
    # Heavy, and of no use to other commands.
    from vllm_specplus.training.errors import TrainingError
    from vllm_specplus.training.run import Options, run
    from vllm_specplus.training.run import dry_run as estimate

    try:
        options = Options(
            name, target, out, data, tokens, epochs, minutes, batch_tokens, learning_rate, seed,
            str(dtype), measure, max_length, parse_values(settings or []), ray,
        )  # fmt: skip
        if dry_run:
            table, missing = estimate(options, flops, errors)
            Console().print(table)
            if missing:
                raise TrainingError(missing)
            return
        report = run(options, errors)
    except TrainingError as error:
        errors.print(f"Error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from error
    if not errors.quiet:
        typer.echo(json.dumps(report))


def parse_values(given: list[str]) -> dict[str, Any]:
    """Keys and values of ``--set``: JSON, or else a string; TrainingError for what has no key."""
    from vllm_specplus.training.errors import TrainingError

    values: dict[str, Any] = {}
    for each in given:
        key, equals, value = each.partition("=")
        if not equals or not key:
            raise TrainingError(f"--set {each!r} is no KEY=VALUE: write it so")
        try:
            values[key] = json.loads(value)
        except ValueError:
            values[key] = value
    return values
