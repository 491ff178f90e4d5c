"""The options of `vllm-specplus arbitrate`."""

from typing import Annotated

import typer

MODEL = "http://host:port of a vllm serve, or a model's folder for an engine in this process."

Draft = Annotated[str, typer.Option(help=f"The model that writes first: {MODEL}")]
Target = Annotated[str, typer.Option(help=f"The better one: {MODEL}")]
Router = Annotated[
    str,
    typer.Option(
        help="The classifier between them (train router): http://host:port of a vllm serve "
        "--runner pooling, or its folder."
    ),
]
Threshold = Annotated[
    float, typer.Option(help="Scores above it are written anew: below 0 all steps, from 1 on none.")
]
MaxTokens = Annotated[int, typer.Option(min=1, help="Of answers whose clients say nothing.")]
MaxSteps = Annotated[int, typer.Option(min=1, help="Most steps of an answer.")]
StepTokens = Annotated[
    int | None,
    typer.Option(min=1, help="Most tokens of a step.", show_default="those of the answer"),
]
Separator = Annotated[str, typer.Option(help="What ends a step.")]
DraftArgs = Annotated[
    list[str] | None,
    typer.Option(
        "--draft-arg",
        metavar="KEY=VALUE",
        help="Of an engine here, as LLM(...) has it. Repeatable.",
    ),
]
TargetArgs = Annotated[
    list[str] | None,
    typer.Option("--target-arg", metavar="KEY=VALUE", help="The same for the target."),
]
Name = Annotated[str, typer.Option(help="Of the pair, for clients.")]
Host = Annotated[str, typer.Option(help="To listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="To listen on; 0 is any that is free.")]
