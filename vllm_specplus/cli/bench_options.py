"""The options of `vllm-specplus bench`, and what each task does with them."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

TEXT_METHODS = "none,ngram,suffix,token_recycling"
IMAGE_METHODS = 'none,jacobi,jacobi:acceptance={"rule":"gsd"}'
CONTINUOUS_METHODS = "none,cspd"


class Task(StrEnum):
    text = "text"
    image = "image"
    image_continuous = "image-continuous"


METHODS_OF = {
    Task.text: TEXT_METHODS,
    Task.image: IMAGE_METHODS,
    Task.image_continuous: CONTINUOUS_METHODS,
}
TEXT_OPTIONS = (
    "dataset", "max_tokens", "rounds", "repeat", "chat_template", "sequential", "later_turns",
    "rate", "burstiness", "slo_ttft_ms", "slo_tpot_ms",
)  # fmt: skip
#: What a task would ignore.
FOREIGN_OPTIONS = {
    Task.text: ("sheet", "guidance_scale"),
    Task.image: (*TEXT_OPTIONS, "guidance_scale"),
    Task.image_continuous: (*TEXT_OPTIONS, "engine_arg"),
}

Model = Annotated[
    str | None, typer.Option(help="Folder or Hugging Face name of the target model. Needed to run.")
]
DatasetFile = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines, a JSON array or parquet, with rows of Spec-Bench or SPEED-Bench (turns, "
        'category), ShareGPT (conversations), OpenAI {"messages"} or {"prompt"}, and '
        '"max_tokens" of their own if they have it. Needed for text.'
    ),
]
TaskName = Annotated[
    Task,
    typer.Option(
        help="text: answers to a dataset; image: pictures of the model's classes, "
        "judged by the classifier in its folder; image-continuous: the same for models of "
        "latents, without vLLM, in batches of --concurrency."
    ),
]
Methods = Annotated[
    list[str] | None,
    typer.Option(
        help="Methods separated by commas (or the option repeated), each "
        "name[:key=value]... with keys of vLLM's speculative config, e.g. "
        "none,ngram:num_speculative_tokens=4,token_recycling. "
        "Values are JSON, or else strings (tree=2.2.2 is a string, top_k=4 a number).",
        show_default=f"{TEXT_METHODS}; for images {IMAGE_METHODS}; for latents "
        f"{CONTINUOUS_METHODS}",
    ),
]
Concurrency = Annotated[
    str | None,
    typer.Option(
        help="Numbers of requests in flight, separated by commas.",
        show_default="1, or none beside --rate",
    ),
]
Rate = Annotated[
    str | None,
    typer.Option(
        help="Requests per second, separated by commas: an open loop, whose requests come whatever "
        "is in flight."
    ),
]
Burstiness = Annotated[
    float,
    typer.Option(
        help="Of the arrivals at a --rate: 1 is a Poisson process, lower ones come in bursts."
    ),
]
SloTtft = Annotated[
    float | None, typer.Option(help="Objective: most milliseconds to a request's first token.")
]
SloTpot = Annotated[
    float | None,
    typer.Option(help="Objective: most milliseconds per later token, a request's mean."),
]
LaterTurns = Annotated[
    bool,
    typer.Option(
        "--later-turns",
        help="Ask all turns of a conversation, each when the one before is answered; by default "
        "the first alone.",
    ),
]
Compare = Annotated[
    tuple[Path, Path] | None,
    typer.Option(
        metavar="A.json B.json",
        help="Run nothing: compare two files that --json has written, round by round and question "
        "by question.",
    ),
]
MaxTokens = Annotated[int, typer.Option(help="Most tokens per answer; a row may say less.")]
Limit = Annotated[
    int,
    typer.Option(
        help="Most questions to measure, taken evenly from all categories, or pictures to make."
    ),
]
Rounds = Annotated[
    int,
    typer.Option(
        help="Parts of the questions, each compared by itself (on a CPU the methods take turns "
        "within them); fewer at a concurrency that they would be too short for."
    ),
]
Repeat = Annotated[int, typer.Option(help="Repeat everything with fresh engines.")]
Temperature = Annotated[
    float | None, typer.Option(help="0 is greedy.", show_default="0; for images 1")
]
Seed = Annotated[int, typer.Option(help="For sampling, at a temperature above 0.")]
ChatTemplate = Annotated[
    bool,
    typer.Option(
        "--chat-template/--no-chat-template",
        help="Apply the model's chat template to turns and messages.",
    ),
]
EngineArgs = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY=VALUE",
        help="Argument of every engine (vllm.LLM), e.g. max_model_len=4096. Repeatable.",
    ),
]
Sequential = Annotated[
    bool,
    typer.Option(
        "--sequential",
        help="One engine alive at a time, as always on a GPU; for a CPU machine whose memory "
        "does not hold all engines together.",
    ),
]
GuidanceScale = Annotated[
    float, typer.Option(help="For --task image-continuous; 1 is no guidance.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="Write all results to this file.")]
PlotFile = Annotated[Path | None, typer.Option(help="Draw the results into this PNG file.")]
SheetFile = Annotated[
    Path | None, typer.Option(help="Write some of the pictures made into this PNG file.")
]
