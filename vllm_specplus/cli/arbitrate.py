"""`vllm-specplus arbitrate`: OpenAI's API above a draft, a target and a router, step by step."""

import asyncio
import logging
import os

import typer

from vllm_specplus.cli import arbitrate_options as options

FAILED = 2


def arbitrate(
    draft: options.Draft,
    target: options.Target,
    router: options.Router,
    threshold: options.Threshold = 0.7,
    max_tokens: options.MaxTokens = 2048,
    max_steps: options.MaxSteps = 150,
    step_tokens: options.StepTokens = None,
    separator: options.Separator = r"\n\n",
    draft_arg: options.DraftArgs = None,
    target_arg: options.TargetArgs = None,
    name: options.Name = "arbitrage",
    host: options.Host = "127.0.0.1",
    port: options.Port = 8080,
) -> None:
    """Serve a draft and a target as one model: the draft writes steps, and the target those that
    the router expects it to improve. Lossy: answers are neither model's."""
    from vllm_specplus.arbitrage.arbiter import Limits
    from vllm_specplus.arbitrage.build import Named, arbiter
    from vllm_specplus.arbitrage.engines import EngineError
    from vllm_specplus.arbitrage.server import Serving, application
    from vllm_specplus.bench import InputError
    from vllm_specplus.bench.methods import parse_pairs

    # As vLLM's servers read it.
    key = os.environ.get("VLLM_API_KEY")

    async def serve() -> None:
        import uvicorn

        parts = arbiter(
            Named(draft, parse_pairs(draft_arg or [], "--draft-arg")),
            Named(target, parse_pairs(target_arg or [], "--target-arg")),
            router, Limits(max_steps=max_steps, step_tokens=step_tokens),
            separator.replace(r"\n", "\n"), key,
        )  # fmt: skip
        async with parts as connected:
            app = application(connected, Serving(name, threshold, max_tokens, key))
            await uvicorn.Server(uvicorn.Config(app, host, port)).serve()

    typer.echo("arbitrate is lossy: answers are neither model's", err=True)
    logging.basicConfig(level=logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every step
    try:
        if not separator:
            raise EngineError(r"--separator is empty: name what ends a step, as '\n\n'")
        asyncio.run(serve())
    except (EngineError, InputError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(FAILED) from error
