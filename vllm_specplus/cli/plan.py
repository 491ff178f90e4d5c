"""``vllm-specplus plan``: will speculation pay on that hardware, and which, before it is rented."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_specplus.control import memory
from vllm_specplus.files import read_json
from vllm_specplus.planning import devices
from vllm_specplus.planning.acceptance import KNOWN
from vllm_specplus.planning.passes import Time
from vllm_specplus.planning.plan import (
    ERROR_HERE,
    ERROR_PUBLISHED,
    Row,
    Wanted,
    answer,
    room,
    rows,
)
from vllm_specplus.planning.rounds import step
from vllm_specplus.planning.sizes import Shape, check_attention, weight_bits

Model = Annotated[Path, typer.Option(help="Folder of the target; its config.json is enough.")]
Draft = Annotated[
    Path | None, typer.Option(help="Folder of a draft model; its config.json is enough.")
]
Gpu = Annotated[str, typer.Option(help=f"One of {', '.join(devices.DEVICES)}.")]
Ranks = Annotated[int, typer.Option("--tp", min=1, help="GPUs that share the target.")]
Requests = Annotated[int, typer.Option(min=1, help="Requests at once.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens of each request's text.")]
Acceptance = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        max=1.0,
        help="Share of drafted tokens that are right, given that those before them are; not "
        "stated, what is known of each method.",
    ),
]


def plan(
    model: Model,
    gpu: Gpu,
    draft: Draft = None,
    tp: Ranks = 1,
    requests: Requests = 1,
    context: Context = 1024,
    acceptance: Acceptance = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Predict what each method and placement makes of plain decoding's speed, and say why.

    Nothing is run and no weights are read. Exit code 2: the plan cannot be made, and one sentence
    says why.
    """
    try:
        wanted, memory_plan = _asked(model, draft, gpu, tp, requests, context, acceptance)
    except ValueError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(f"Error: {error}", markup=False)
        raise typer.Exit(2) from error
    plain = step(wanted.machine, wanted.target, wanted.load, wanted.ranks)
    found = rows(wanted)
    if as_json:
        typer.echo(json.dumps(_report(wanted, plain, found, memory_plan), indent=2))
    else:
        _print(Console(), wanted, plain, found, memory_plan)


def _asked(
    model: Path, draft: Path | None, gpu: str, tp: int, requests: int, context: int,
    acceptance: float | None,
) -> tuple[Wanted, memory.Plan]:  # fmt: skip
    """What is asked, and what memory it leaves; ValueError, in one sentence, if it cannot be."""
    device = devices.find(gpu)
    shapes = [_shape(folder) for folder in (model, draft) if folder is not None]
    target, small = shapes[0], shapes[1] if draft is not None else None
    for name, heads in (("attention", target.heads), ("key", target.kv_heads)):
        if heads % tp and tp % heads:
            raise ValueError(f"{heads} {name} heads cannot be divided among {tp} ranks")
    wanted = Wanted(target, small, device, tp, requests, context, acceptance)
    return wanted, room(wanted, read_json(model / "config.json", f"{model}/config.json"))


def _shape(folder: Path) -> Shape:
    name = f"{folder}/config.json"
    shape, config = Shape.of(folder), read_json(folder / "config.json", name)
    check_attention(config.get("text_config", config), name)
    return replace(shape, weight_bits=weight_bits(config, name))


def _report(
    wanted: Wanted, plain: Time, found: list[Row], memory_plan: memory.Plan
) -> dict[str, Any]:
    return {
        "device": asdict(wanted.device),
        "ranks": wanted.ranks,
        "requests": wanted.requests,
        "context": wanted.context,
        "plain_ms": 1e3 * plain.total,
        "rows": [row.report() for row in found],
        "answer": answer(found),
        "memory": asdict(memory_plan),
        "median_error": {"here": ERROR_HERE, "published": ERROR_PUBLISHED},
    }


def _print(
    console: Console, wanted: Wanted, plain: Time, found: list[Row], memory_plan: memory.Plan
) -> None:
    device = wanted.device
    console.print(
        f"{wanted.ranks} x {device.name} ({escape(device.source)}), {wanted.requests} in flight, "
        f"texts of {wanted.context} tokens. A plain step takes {1e3 * plain.total:.2f} ms.",
        highlight=False,
    )
    table = Table(
        "method", "drafts on", "levels", "accepted", "tokens", "ms", "times plain", "pays from",
        "decided by", box=None,
    )  # fmt: skip
    for row in found:
        lowest = "never" if row.pays_from is None else f"{row.pays_from:.2f}"
        spent = f"{1e3 * row.draft.total:.2f} + {1e3 * row.verify.total:.2f}"
        table.add_row(
            row.method, row.placement, str(row.levels), f"{row.acceptance:.2f}",
            f"{row.tokens:.2f}", spent, f"{row.ratio:.2f}", lowest, row.decided,
        )  # fmt: skip
    console.print(table, highlight=False)
    for line in (*answer(found), *_memory(wanted, memory_plan), *_sources(wanted, found), _error()):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _memory(wanted: Wanted, found: memory.Plan) -> list[str]:
    """What fits beside the weights, as ``doctor --budget`` says it."""
    if found.nodes is None:
        return [
            f"Memory: {wanted.requests} requests do not fit, even undrafted: "
            f"{memory.human(found.needed)} are needed beside the weights."
        ]
    most = found.batches[8]
    return [
        f"Memory: {wanted.requests} in flight may have trees of {found.nodes} nodes; with 8 nodes "
        f"each, {most} requests fit."
    ]


def _sources(wanted: Wanted, found: list[Row]) -> list[str]:
    """Where rates come from that nobody stated."""
    if wanted.acceptance is not None:
        return []
    named = dict.fromkeys(row.method for row in found)
    return [f"Accepted, {name}: {KNOWN[name].rate:.2f}, {KNOWN[name].source}." for name in named]


def _error() -> str:
    return (
        f"Median error of such ratios: {ERROR_HERE:.0%} of what was measured here on CPUs, "
        f"{ERROR_PUBLISHED:.0%} of published tables, mostly too optimistic; docs/plan.md has the "
        "misses."
    )
