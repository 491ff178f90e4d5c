"""How a report is shown: tables on the terminal and a plot."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vllm_specplus.bench.methods import BASELINE
from vllm_specplus.bench.report import BenchReport, Percentiles, RunReport
from vllm_specplus.bench.tails import Tails

GIB = 1 << 30
NOTHING = "–"

# Share of the machine's cores that other processes may use in a round without a remark.
QUIET_SHARE = 0.05

# Acceptance at greater depths is in the JSON file.
DEPTHS_SHOWN = 6


def print_report(console: Console, report: BenchReport) -> None:
    """Print what was measured, and what failed and where its log is."""
    if report.runs:
        console.print(_speed_table(report.runs))
        if all(run.method != BASELINE for run in report.runs):
            console.print(f"No ratios: {BASELINE} was not measured (add it to --methods).")
        disturbance = max(item.other_cpu_share for run in report.runs for item in run.rounds)
        if disturbance > QUIET_SHARE:
            console.print(
                f"The machine was not quiet: in one round other processes used {disturbance:.0%} "
                "of its cores, so the times may be off."
            )
        console.print(_latency_table(report.runs))
        console.print(_draft_table(report.runs))
        for line in losses(report.runs):
            console.print(line, markup=False, highlight=False)
        console.print(_category_table(report.runs))
    for failure in report.failures:
        console.print(
            f"[red]{escape(failure.method)}, {failure.load}, failed[/] ({failure.stage}): ",
            end="",
        )
        console.print(failure.error, markup=False, highlight=False)
        console.print(f"  log: {failure.log}", markup=False, highlight=False, soft_wrap=True)


def _speed_table(runs: Sequence[RunReport]) -> Table:
    table = _table(
        "Throughput",
        "median of the rounds; below it min–max, for ratios their 95 % interval "
        "(noise: 1 is inside)",
        "tokens/s",
        f"vs\n{BASELINE}",
        "vs best\nvLLM",
        "tokens/\nstep",
    )
    for run in runs:
        table.add_row(
            escape(run.method),
            run.load.short,
            _spread(run.tokens_per_s, run.tokens_per_s_min, run.tokens_per_s_max, ".0f"),
            _ratio(run),
            _number(run.ratio_vs_best_native, ".2f"),
            _number(run.tokens_per_step, ".2f"),
        )
    return table


def _ratio(run: RunReport) -> str:
    if run.ratio_vs_none_interval is None or run.method == BASELINE:
        return _number(run.ratio_vs_none, ".2f")
    low, high = run.ratio_vs_none_interval
    return f"{run.ratio_vs_none:.2f}\n{low:.2f}–{high:.2f}{' noise' * (low <= 1 <= high)}"


def _latency_table(runs: Sequence[RunReport]) -> Table:
    objectives = any(run.slo_attainment is not None for run in runs)
    table = _table(
        "Latency",
        "ms over the requests: p50, below it p95 / p99, and p99 to that of "
        f"{BASELINE} with its 95 % interval",
        "first token",
        "later tokens",
        "whole answer",
        *(["kept\nSLO"] if objectives else []),
    )
    for run in runs:
        table.add_row(
            escape(run.method),
            run.load.short,
            _percentiles(run.ttft_ms, ".0f") + _tail(run, run.ttft_vs_none),
            _percentiles(run.tpot_ms, ".1f") + _tail(run, run.tpot_vs_none),
            _percentiles(run.latency_ms, ".0f"),
            *([_number(run.slo_attainment, ".1%")] if objectives else []),
        )
    return table


def _percentiles(values: Percentiles | None, spec: str) -> str:
    if values is None:
        return NOTHING
    return f"{values.p50:{spec}}\n{values.p95:{spec}} / {values.p99:{spec}}"


def _tail(run: RunReport, tails: Tails | None) -> str:
    if tails is None or run.method == BASELINE:
        return ""
    return f"\n{tails.p99.ratio:.2f} ({tails.p99.low:.2f}–{tails.p99.high:.2f})"


def _draft_table(runs: Sequence[RunReport]) -> Table:
    table = _table(
        "Drafts, answers and resources",
        "accepted: share of drafts accepted down to depth 1, 2, ...; "
        f"margin: nats between {BASELINE}'s two best tokens where answers part, median, max",
        "tokens/\ndraft",
        "accepted",
        f"same as\n{BASELINE}",
        "margin",
        "peak\nGiB",
        "start\ns",
    )
    for run in runs:
        shares = [f"{share:.2f}" for share in run.acceptance_per_depth or []][:DEPTHS_SHOWN]
        lines = [" ".join(shares[start : start + 3]) for start in range(0, len(shares), 3)]
        margins = [item.margin_nats for item in run.differences if item.margin_nats is not None]
        table.add_row(
            escape(run.method),
            run.load.short,
            _number(run.drafted_per_draft, ".1f"),
            "\n".join(lines) or NOTHING,
            _number(run.identical_share, ".1%"),
            f"{median(margins):.3f}\n{max(margins):.3f}" if margins else NOTHING,
            _number((run.gpu_bytes or run.peak_rss_bytes) / GIB, ".1f"),
            _number(run.startup_s, ".0f"),
        )
    return table


def losses(runs: Sequence[RunReport]) -> Iterator[str]:
    """What relaxed acceptance costs: a line per lossy run."""
    exact = {run.load: run.nats_below_best for run in runs if run.method == BASELINE}
    for run in runs:
        own = exact.get(run.load)
        if run.method != BASELINE and run.nats_below_best is not None and own is not None:
            yield (
                f"{run.method} ({run.load}) is LOSSY: its tokens are "
                f"{run.nats_below_best:.3f} nats below the model's best one on average, "
                f"{BASELINE}'s {own:.3f}."
            )


def _category_table(runs: Sequence[RunReport]) -> Table:
    """The transposed table, one row per run, would be too wide for Spec-Bench's categories."""
    drafting = [run for run in runs if run.speculative_config is not None]
    table = Table(
        title="Tokens per step by category",
        caption="in brackets: requests in flight, or their rate",
        box=SIMPLE_HEAD,
    )
    table.add_column("category", no_wrap=True)
    for run in drafting:
        heading = f"{escape(run.method)}\n({run.load.short})"
        table.add_column(heading, justify="right", overflow="fold")
    categories = dict.fromkeys(
        category for run in drafting for category in run.tokens_per_step_by_category
    )
    for category in categories:
        values = [run.tokens_per_step_by_category.get(category) for run in drafting]
        table.add_row(category, *(_number(value, ".2f") for value in values))
    return table


def _table(title: str, caption: str, *columns: str) -> Table:
    """A table with a row per run that fits into 80 characters: only the label may be folded."""
    table = Table(
        title=title, caption=caption, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False
    )
    table.add_column("method", overflow="fold")
    for name in ("load", *columns):
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _number(value: float | None, spec: str) -> str:
    return NOTHING if value is None else format(value, spec)


def _spread(value: float | None, low: float | None, high: float | None, spec: str) -> str:
    if value is None:
        return NOTHING
    return f"{value:{spec}}\n{low:{spec}}–{high:{spec}}"


def save_plot(report: BenchReport, path: Path) -> None:
    """Draw the ratios to `none` (tokens/s if it was not measured) and the tokens per step."""
    # Not at the top: matplotlib is an optional dependency. The figure needs no display.
    from matplotlib.figure import Figure

    with_ratios = any(run.ratio_vs_none is not None for run in report.runs)
    runs = [run for run in report.runs if not with_ratios or run.ratio_vs_none is not None]
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    speed, steps = figure.subplots(1, 2)
    if with_ratios:
        _bars(
            speed,
            runs,
            [(run.ratio_vs_none, run.ratio_vs_none_min, run.ratio_vs_none_max) for run in runs],
        )
        speed.axhline(1, color="black", linewidth=0.8)
        speed.set_title(f"Throughput relative to {BASELINE} (median, min – max of rounds)")
    else:
        _bars(
            speed,
            runs,
            [(run.tokens_per_s, run.tokens_per_s_min, run.tokens_per_s_max) for run in runs],
        )
        speed.set_title("Tokens per second (median, min – max of rounds)")
    _bars(steps, runs, [(run.tokens_per_step or 0.0,) * 3 for run in runs])
    steps.set_title("Tokens per step and request")
    handles, labels = speed.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, len(labels)))
    machine = report.machine["device_name"] or report.machine["cpu_model"]
    figure.suptitle(f"{Path(report.model).name}, {machine}, vLLM {report.versions['vllm']}")
    figure.savefig(path, dpi=150)


def _bars(axes, runs: Sequence[RunReport], spreads: Sequence[tuple[float, float, float]]) -> None:
    """One bar per run, grouped by load and coloured by method, with min-max whiskers."""
    methods = list(dict.fromkeys(run.method for run in runs))
    groups = list(dict.fromkeys(run.load for run in runs))
    width = 0.8 / len(methods)
    for offset, method in enumerate(methods):
        chosen = [
            (groups.index(run.load), spread)
            for run, spread in zip(runs, spreads, strict=True)
            if run.method == method
        ]
        axes.bar(
            [group + (offset - (len(methods) - 1) / 2) * width for group, _ in chosen],
            [value for _, (value, _, _) in chosen],
            width,
            yerr=[
                [value - low for _, (value, low, _) in chosen],
                [high - value for _, (value, _, high) in chosen],
            ],
            capsize=2,
            label=method,
        )
    axes.set_xticks(range(len(groups)), [str(group) for group in groups])
