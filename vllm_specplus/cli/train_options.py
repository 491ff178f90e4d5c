"""The options of `vllm-specplus train`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="acceptance_head, dflash, distill, eagle, eagle3, judge, layerskip, long_draft, "
        "router or spec_ee: see docs/training.md, which says what each is for and which keys "
        "--set knows.",
    ),
]
Target = Annotated[Path, typer.Option(help="Folder of the model that the draft is for.")]
Out = Annotated[
    Path,
    typer.Option(help="Folder of the run; result/ in it is served. An ended run goes on."),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines of texts (tokens, prompt and answer, messages, responses of vLLM's "
        "server) or of questions, which the target answers.",
        show_default="the target asks itself",
    ),
]
Tokens = Annotated[int | None, typer.Option(help="Most tokens that the target writes.")]
Epochs = Annotated[int | None, typer.Option(help="Passes over the texts.")]
Minutes = Annotated[float | None, typer.Option(help="Most time to train.")]
BatchTokens = Annotated[
    int | None, typer.Option(help="Positions per step, of all processes together.")
]
LearningRate = Annotated[float | None, typer.Option(help="Its highest.")]
MaxLength = Annotated[int, typer.Option(help="Most tokens of a text.")]
Seed = Annotated[int, typer.Option(help="Of all that is drawn.")]
Products = Annotated[Dtype, typer.Option(help="Of products of matrices.")]
Measure = Annotated[
    Path | None,
    typer.Option(
        help="Texts or questions to measure on, as for --data; nothing is learnt from them.",
        show_default="a twentieth of the texts",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A key of the recipe, in JSON. Repeatable."),
]
Ray = Annotated[bool, typer.Option("--ray", help="Write texts on Ray, one engine for each GPU.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only check memory and disk, and print the time.")
]
Flops = Annotated[
    float | None,
    typer.Option(help="For --dry-run: FLOP/s of a device.", show_default="measured"),
]
