"""`vllm-specplus train`: a draft for a model, from the model alone or from texts."""

import json
from typing import Any

import typer
from rich.console import Console

from vllm_specplus.cli import train_options as options

FAILED = 2


def train(
    name: options.Recipe,
    target: options.Target,
    out: options.Out,
    data: options.Data = None,
    tokens: options.Tokens = None,
    epochs: options.Epochs = None,
    minutes: options.Minutes = None,
    batch_tokens: options.BatchTokens = None,
    learning_rate: options.LearningRate = None,
    max_length: options.MaxLength = 512,
    seed: options.Seed = 0,
    dtype: options.Products = options.Dtype.bfloat16,
    measure: options.Measure = None,
    settings: options.Settings = None,
    ray: options.Ray = False,
    dry_run: options.DryRun = False,
    flops: options.Flops = None,
) -> None:
    """Train a draft, a head or a judge for TARGET.

    Under torchrun every process has its share of each batch. Exit code 0: the result is there; 2:
    it cannot be, and one sentence says why.
    """
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    # Heavy, and of no use to other commands.
    from vllm_specplus.training.errors import TrainingError
    from vllm_specplus.training.run import Options, run
    from vllm_specplus.training.run import dry_run as estimate

    try:
        wanted = Options(
            name, target, out, data, tokens, epochs, minutes, batch_tokens, learning_rate, seed,
            str(dtype), measure, max_length, parse_values(settings or []), ray,
        )  # fmt: skip
        if dry_run:
            table, missing = estimate(wanted, flops, errors)
            Console().print(table)
            if missing:
                raise TrainingError(missing)
            return
        report = run(wanted, errors)
    except TrainingError as error:
        errors.print(f"Error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED) from error
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
