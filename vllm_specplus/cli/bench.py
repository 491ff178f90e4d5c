"""`vllm-specplus bench`: methods side by side on one model and one dataset."""

import importlib.util
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vllm_specplus.bench import InputError
from vllm_specplus.bench.compare import print_comparison, read_report
from vllm_specplus.bench.dataset import Dataset, Question, load_dataset, pick
from vllm_specplus.bench.images import (
    ImageBench,
    ImageReport,
    print_image_report,
    save_image_plot,
    save_sheet,
    sheet_of,
)
from vllm_specplus.bench.loads import parse_loads
from vllm_specplus.bench.methods import (
    BASELINE,
    parse_concurrencies,
    parse_engine_args,
    parse_methods,
)
from vllm_specplus.bench.protocol import MachineInfo
from vllm_specplus.bench.render import print_report, save_plot
from vllm_specplus.bench.report import (
    BenchReport,
    Objectives,
    build_failures,
    build_runs,
    describe_hardware,
    describe_versions,
)
from vllm_specplus.bench.runner import Benchmark, EngineError, Notify, Plan, describe_machine
from vllm_specplus.cli import bench_options as options
from vllm_specplus.registry import method_names

FAILED = 1
BAD_INPUT = 2


def bench(
    context: typer.Context,
    model: options.Model = None,
    dataset: options.DatasetFile = None,
    task: options.TaskName = options.Task.text,
    methods: options.Methods = None,
    concurrency: options.Concurrency = None,
    rate: options.Rate = None,
    burstiness: options.Burstiness = 1.0,
    slo_ttft_ms: options.SloTtft = None,
    slo_tpot_ms: options.SloTpot = None,
    later_turns: options.LaterTurns = False,
    max_tokens: options.MaxTokens = 128,
    limit: options.Limit = 48,
    rounds: options.Rounds = 4,
    repeat: options.Repeat = 1,
    temperature: options.Temperature = None,
    seed: options.Seed = 0,
    chat_template: options.ChatTemplate = True,
    engine_arg: options.EngineArgs = None,
    sequential: options.Sequential = False,
    guidance_scale: options.GuidanceScale = 1.0,
    json_path: options.JsonFile = None,
    plot: options.PlotFile = None,
    sheet: options.SheetFile = None,
    compare: options.Compare = None,
) -> None:
    """Compare methods on one model and dataset: speed, latency, acceptance, equal answers.

    Every method sees every question once per load, in an engine that knows nothing before; the
    methods take turns.
    Exit code 0: all measured; 1: a method failed, the others were measured; 2: unusable input.
    """
    errors = Console(stderr=True, highlight=False)
    names, in_flight = ",".join(methods or [options.METHODS_OF[task]]), concurrency or "1"
    if temperature is None:
        temperature = 0.0 if task is options.Task.text else 1.0
    with bad_input_told(errors):
        if compare is not None:
            print_comparison(Console(), *map(read_report, compare))
            return
        check_model(model)
        check_options(max_tokens, limit, rounds, repeat, temperature, json_path, plot, sheet)
        check_task(task, context)
        if task is not options.Task.text:
            bench_pictures(
                task, model, names, in_flight, limit, temperature, guidance_scale, seed,
                engine_arg or [], errors, json_path, plot, sheet,
            )  # fmt: skip
            return
        questions = load_texts(dataset, chat_template, later_turns, errors)
        measured, warmup = pick(questions, limit)
        loads = parse_loads(concurrency, rate, burstiness)
        plan = Plan(
            model, parse_methods(names), loads, measured, warmup, rounds, repeat, max_tokens,
            temperature, seed, chat_template, parse_engine_args(engine_arg or []), sequential,
        )  # fmt: skip
    objectives = Objectives(ttft_ms=slo_ttft_ms, tpot_ms=slo_tpot_ms)
    bench_texts(plan, objectives, str(dataset), errors, json_path, plot)


@contextmanager
def bad_input_told(errors: Console) -> Iterator[None]:
    """Tell what cannot be used in one line, and exit."""
    try:
        yield
    except InputError as exc:
        errors.print(f"Error: {exc}", markup=False, soft_wrap=True)
        raise typer.Exit(BAD_INPUT) from exc


def load_texts(
    dataset: Path | None, chat_template: bool, later_turns: bool, errors: Console
) -> list[Question]:
    """The questions of the file; InputError for those that cannot be asked."""
    if dataset is None:
        raise InputError("--dataset is needed for --task text")
    if later_turns and not chat_template:
        raise InputError("--later-turns needs the chat template: remove --no-chat-template")
    data = load_dataset(dataset, later_turns)
    check_raw_prompts(data, chat_template)
    if data.duplicates:
        errors.print(f"{data.duplicates} rows that repeat an earlier prompt are left out.")
    return data.questions


def bench_texts(
    plan: Plan, objectives: Objectives, dataset: str, errors: Console, json_path: Path | None,
    plot: Path | None,
) -> None:  # fmt: skip
    """Measure, print, and write what was asked for."""
    if BASELINE not in [method.name for method in plan.methods]:
        errors.print(f"Without {BASELINE} in --methods there are no ratios.")

    logs = Path(tempfile.mkdtemp(prefix="vllm-specplus-bench-"))
    try:
        machine = describe_machine(logs / "describe.log")
    except EngineError as exc:
        errors.print(f"Error: vLLM cannot be used: {exc}", markup=False, soft_wrap=True)
        errors.print(f"  log: {exc.log}", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED) from exc

    def save(benchmark: Benchmark) -> None:
        if json_path:
            build_report(plan, machine, benchmark, objectives, sources).save(json_path)

    sources = {"dataset": dataset, "log_dir": str(logs)}
    benchmark = run(plan, machine, logs, errors, save)
    report = build_report(plan, machine, benchmark, objectives, sources)
    print_report(Console(), report)
    if plot and report.runs:
        save_plot(report, plot)
    if report.failures:
        raise typer.Exit(FAILED)


def bench_pictures(
    task: options.Task, model: str, methods: str, in_flight: str, limit: int, temperature: float,
    guidance_scale: float, seed: int, engine_arg: list[str], errors: Console,
    json_path: Path | None, plot: Path | None, sheet: Path | None,
) -> None:  # fmt: skip
    """The tasks of image models."""
    if task is options.Task.image:
        pictures = bench_images(
            model, methods, in_flight, limit, temperature, seed, engine_arg, errors
        )
        finish_images(pictures, json_path, plot, sheet)
    else:
        bench_continuous(
            model, methods, in_flight, limit, temperature, guidance_scale, seed, errors, json_path,
            plot, sheet,
        )  # fmt: skip


def bench_images(
    model: str, methods: str, concurrency: str, pictures: int,
    temperature: float, seed: int, engine_args: list[str], console: Console,
) -> ImageBench:  # fmt: skip
    """Measure; InputError for what does not go with images."""
    in_flight = parse_concurrencies(concurrency)
    if len(in_flight) > 1:
        raise InputError("--task image takes one --concurrency")

    specs = parse_methods(methods)
    with progress(console) as (notify, expect):
        bench = ImageBench(
            str(Path(model).expanduser()), specs, pictures, in_flight[0],
            temperature, seed, parse_engine_args(engine_args), notify,
        )  # fmt: skip
        expect(len(specs) * pictures)
        bench.run()
    return bench


def finish_images(
    bench: ImageBench, json_path: Path | None, plot: Path | None, sheet: Path | None
) -> None:
    """Print, and write what was asked for."""
    with tempfile.TemporaryDirectory(prefix="vllm-specplus-bench-") as folder:
        machine = describe_machine(Path(folder) / "describe.log")
    report = ImageReport(
        model=bench.model,
        versions=describe_versions(machine),
        machine=describe_hardware(machine),
        command=shlex.join(sys.argv),
        settings={
            "methods": [method.label for method in bench.methods],
            "concurrency": bench.in_flight, "pictures": len(bench.labels),
            "temperature": bench.temperature, "seed": bench.seed,
            "engine_args": bench.engine_args,
        },
        runs=bench.runs,
        failures=bench.failures,
    )  # fmt: skip
    if json_path:
        report.save(json_path)
    print_image_report(Console(), report)
    if plot and report.runs:
        save_image_plot(report.runs, plot)
    if sheet and report.runs:
        save_sheet(sheet_of(bench), sheet)
    if report.failures:
        raise typer.Exit(FAILED)


def bench_continuous(
    model: str, methods: str, batches: str, pictures: int, temperature: float,
    guidance_scale: float, seed: int, console: Console,
    json_path: Path | None, plot: Path | None, sheet: Path | None,
) -> None:  # fmt: skip
    """Measure, print, and write what was asked for; InputError for what cannot be measured."""
    from vllm_specplus.bench import continuous  # imports torch: not at every command

    with progress(console) as (notify, expect):
        bench = continuous.ContinuousBench(
            model, parse_methods(methods), pictures, parse_concurrencies(batches), temperature,
            guidance_scale, seed, notify,
        )  # fmt: skip
        expect(bench.total)
        bench.run()
    with tempfile.TemporaryDirectory(prefix="vllm-specplus-bench-") as folder:
        machine = describe_machine(Path(folder) / "describe.log")
    report = continuous.ContinuousReport(
        model=bench.model,
        versions=describe_versions(machine),
        machine=describe_hardware(machine),
        command=shlex.join(sys.argv),
        settings=bench.settings(),
        runs=bench.runs,
    )
    if json_path:
        report.save(json_path)
    continuous.print_continuous_report(Console(), report)
    if plot:
        continuous.save_continuous_plot(report, plot)
    if sheet:
        save_sheet(continuous.sheet_of(bench), sheet)


def check_model(model: str | None) -> None:
    """Refuse a path that is not there; anything else may be a name that vLLM can load."""
    if model is None:
        raise InputError("--model is needed, unless two results are compared (--compare)")
    if model.startswith(("/", "./", "../", "~")) and not Path(model).expanduser().is_dir():
        raise InputError(f"--model: the folder {model} does not exist")


def check_options(
    max_tokens: int,
    limit: int,
    rounds: int,
    repeat: int,
    temperature: float,
    json_path: Path | None,
    plot: Path | None,
    sheet: Path | None,
) -> None:
    """Refuse what would only fail after minutes of measuring."""
    numbers = {"max-tokens": max_tokens, "limit": limit, "rounds": rounds, "repeat": repeat}
    for name, value in numbers.items():
        if value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    if temperature < 0:
        raise InputError(f"--temperature must be at least 0, not {temperature}")
    for name, path in {"json": json_path, "plot": plot, "sheet": sheet}.items():
        if path and not path.resolve().parent.is_dir():
            raise InputError(f"--{name}: the folder {path.resolve().parent} does not exist")
    for name, path in {"plot": plot, "sheet": sheet}.items():
        if path and importlib.util.find_spec("matplotlib") is None:
            raise InputError(f"--{name} needs matplotlib: pip install 'vllm-specplus[bench]'")


def check_task(task: options.Task, context: typer.Context) -> None:
    """Refuse options that another task has and this one would ignore."""
    for name in options.FOREIGN_OPTIONS[task]:
        if context.get_parameter_source(name).name != "DEFAULT":
            others = [
                str(other) for other in options.Task if name not in options.FOREIGN_OPTIONS[other]
            ]
            raise InputError(
                f"--{name.replace('_', '-')} is for --task {' or '.join(others)}: remove it"
            )


def check_raw_prompts(data: Dataset, chat_template: bool) -> None:
    """Without the template only a lone user message can be sent."""
    for question in data.questions:
        if not chat_template and question.messages and len(question.messages) > 1:
            raise InputError(
                f"question {question.id} has messages before the user's, "
                "which --no-chat-template cannot send"
            )


def run(
    plan: Plan,
    machine: MachineInfo,
    logs: Path,
    console: Console,
    save: Callable[[Benchmark], None],
) -> Benchmark:
    """Measure with a progress bar."""
    with progress(console) as (notify, expect):
        expect(len(plan.methods) * len(plan.loads) * plan.repeat * len(plan.measured))
        benchmark = Benchmark(plan, machine, logs, notify, save)
        benchmark.run()
    return benchmark


@contextmanager
def progress(console: Console) -> Iterator[tuple[Notify, Callable[[int], None]]]:
    """What tells a progress bar, with the time left, what is done; and what begins it, told how
    much is to do: before, whatever else is said stands alone."""
    # Drawn at events only: a redrawing thread would take CPU time from what is measured.
    bar = Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=console,
        auto_refresh=False,
        transient=True,
    )
    tasks = []

    def expect(total: int) -> None:
        bar.start()
        tasks.append(bar.add_task("", total=total))

    def notify(what: str | None, settled: int) -> None:
        bar.update(tasks[0], description=what, advance=settled, refresh=True)
        if what and not console.is_terminal:
            console.print(what, markup=False)

    try:
        yield notify, expect
    finally:
        if tasks:
            bar.stop()


def build_report(
    plan: Plan, machine: MachineInfo, benchmark: Benchmark, objectives: Objectives,
    sources: dict[str, Any],
) -> BenchReport:  # fmt: skip
    """Everything that is known at the end, in the form of the JSON file."""
    return BenchReport(
        model=plan.model,
        versions=describe_versions(machine),
        machine=describe_hardware(machine),
        command=shlex.join(sys.argv),
        settings={
            **sources,
            "methods": [method.label for method in plan.methods],
            "concurrency": [load.in_flight for load in plan.loads if load.rate is None],
            "rate": [load.rate for load in plan.loads if load.rate is not None],
            "objectives": objectives.model_dump(),
            "limit": len(plan.measured),
            "rounds": plan.rounds,
            "repeat": plan.repeat,
            "max_tokens": plan.max_tokens,
            "temperature": plan.temperature,
            "seed": plan.seed,
            "chat_template": plan.chat_template,
            "engine_args": benchmark.engine_args,
            "engines_alive": "one" if benchmark.sequential else "all, stopped while not measured",
            "engine_core_in_process": machine.in_process,
        },
        runs=build_runs(
            benchmark.sessions,
            ours=method_names(),
            categories={question.id: question.category for question in plan.measured},
            temperature=plan.temperature,
            objectives=objectives,
        ),
        failures=build_failures(benchmark.failures),
    )
