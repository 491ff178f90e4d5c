"""`vllm-specplus arbitrate`: OpenAI's API above a draft, a target and a router, step by step."""

import asyncio
import logging
from typing import Annotated

import typer

FAILED = 2

Model = "http://host:port of a vllm serve, or a model's folder for an engine in this process."


def arbitrate(
    draft: Annotated[str, typer.Option(help=f"The model that writes first: {Model}")],
    target: Annotated[str, typer.Option(help=f"The better one: {Model}")],
    router: Annotated[
        str,
        typer.Option(
            help="The classifier between them (train router): http://host:port of a vllm serve "
            "--runner pooling, or its folder."
        ),
    ],
    threshold: Annotated[
        float,
        typer.Option(help="Scores above it are written anew: below 0 all steps, from 1 on none."),
    ] = 0.7,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Of answers whose clients say nothing.")
    ] = 2048,
    max_steps: Annotated[int, typer.Option(min=1, help="Most steps of an answer.")] = 150,
    step_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens of a step.", show_default="those of the answer"),
    ] = None,
    separator: Annotated[str, typer.Option(help="What ends a step.")] = r"\n\n",
    draft_arg: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Of an engine here, as LLM(...) has it."),
    ] = None,
    target_arg: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="The same for the target.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the pair, for clients.")] = "arbitrage",
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
) -> None:
    """Serve a draft and a target as one model: the draft writes steps, and the target those that
    the router expects it to improve. Lossy: answers are neither model's."""
    from vllm_specplus.arbitrage.arbiter import Limits
    from vllm_specplus.arbitrage.build import Named, arbiter
    from vllm_specplus.arbitrage.engines import EngineError
    from vllm_specplus.arbitrage.server import Serving, application
    from vllm_specplus.bench import InputError
    from vllm_specplus.bench.methods import parse_pairs

    async def serve() -> None:
        import uvicorn

        parts = arbiter(
            Named(draft, parse_pairs(draft_arg or [], "--draft-arg")),
            Named(target, parse_pairs(target_arg or [], "--target-arg")),
            router, Limits(max_steps=max_steps, step_tokens=step_tokens),
            separator.replace(r"\n", "\n"),
        )  # fmt: skip
        async with parts as connected:
            app = application(connected, Serving(name, threshold, max_tokens))
            await uvicorn.Server(uvicorn.Config(app, host, port)).serve()

    logging.basicConfig(level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every step
    try:
        if not separator:
            raise EngineError(r"--separator is empty: name what ends a step, as '\n\n'")
        asyncio.run(serve())
    except (EngineError, InputError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(FAILED) from error
