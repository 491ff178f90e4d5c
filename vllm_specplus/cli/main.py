"""The `vllm-specplus` command. Sub-commands live in modules of their own."""

from typing import Annotated

import typer

from vllm_specplus import __version__
from vllm_specplus.cli import datastore
from vllm_specplus.cli.arbitrate import arbitrate
from vllm_specplus.cli.bench import bench
from vllm_specplus.cli.demo import demo
from vllm_specplus.cli.doctor import doctor
from vllm_specplus.cli.model import prepare_model_command
from vllm_specplus.cli.plan import plan
from vllm_specplus.cli.search_skips import search_skips
from vllm_specplus.cli.serve_latents import serve_latents
from vllm_specplus.cli.train import train

app = typer.Typer(
    name="vllm-specplus",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Draft-tree speculative decoding in stock vLLM."""


app.command("arbitrate")(arbitrate)
app.command("bench")(bench)
app.add_typer(datastore.app, name="datastore")
app.command("demo")(demo)
app.command("doctor")(doctor)
app.command("plan")(plan)
app.command("prepare-model")(prepare_model_command)
app.command("search-skips")(search_skips)
app.command("serve-latents")(serve_latents)
app.command("train")(train)

if __name__ == "__main__":
    app()
