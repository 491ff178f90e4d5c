"""Latency under load: Poisson arrivals at several rates against a real ``vllm serve``.

    python benchmarks/open_loop.py --model DIR --dataset question.jsonl \
        [--methods none,ngram,token_recycling] [--rates 0.5,1,2,4] [--requests 48] \
        [--json OUT.json] [--plot OUT.png]

For every repeat and method a fresh server answers all rates, one after the other; every second
repeat takes the methods in reverse. No server sees a prompt twice. All methods and repeats get
the same prompts at the same times, so that ``none`` against itself shows the machine's noise.
Requests are sent when they arrive, however many are still running: above what a server can do
per second, the latencies grow with the length of the measurement.

The requests are sent and measured by vLLM's own load tool, the function behind ``vllm bench
serve``. It is called in this process rather than from the command line, whose datasets of text
need pandas. TPOT is (latency - TTFT) / (output tokens - 1) of a request, "mean" and "p99" are
over the requests. Client and server share the machine, and the result tells the CPU cores that
each (and anything else) kept busy, and how late the client sent a request at worst.

On CPUs the servers compute with a thread per core, tied to none: nothing is kept free for the
client. With VLLM_CPU_OMP_THREADS_BIND=auto in the environment, which the servers inherit, vLLM
ties the threads to cores and leaves one out, its default. Other work on the machine shows as
"other" cores, and makes threads that wait for each other slow: only a quiet machine is worth it.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import gc
import importlib.util
import json
import os
import random
import re
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from vllm_specplus.bench import InputError
from vllm_specplus.bench.dataset import Question, load_dataset, pick
from vllm_specplus.bench.methods import BASELINE, RESERVED_ENGINE_ARGS, MethodSpec, parse_methods
from vllm_specplus.bench.report import describe_hardware, describe_versions
from vllm_specplus.bench.runner import EngineError, describe_machine, error_line
from vllm_specplus.cli.bench import check_model

#: Keys of vLLM's result and their names here.
METRICS = {
    "mean_tpot_ms": "mean TPOT (ms)",
    "p99_tpot_ms": "p99 TPOT (ms)",
    "mean_ttft_ms": "mean TTFT (ms)",
    "p99_ttft_ms": "p99 TTFT (ms)",
    "mean_e2el_ms": "mean latency (ms)",
    "p99_e2el_ms": "p99 latency (ms)",
    "output_throughput": "output tokens/s",
}
FACTS = ("duration", "total_input_tokens", "total_output_tokens", "request_throughput",
         "max_concurrent_requests", "spec_decode_acceptance_length")  # fmt: skip
ENGINE_ARGS = {"max_model_len": 2048, "kv_cache_memory_bytes": 1 << 30}
RESERVED = (*RESERVED_ENGINE_ARGS, "served_model_name", "host", "port")
#: No thread is tied to a core, unless the environment says so.
SERVER_ENV = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
SERVED_NAME = "model"
WARMUP_REQUESTS = 16
STARTUP_S, SHUTDOWN_S = 600, 30


def parse_rates(text: str) -> list[float]:
    try:
        rates = [float(part) for part in text.split(",")]
    except ValueError as exc:
        raise InputError(f"--rates needs numbers separated by commas, not {text!r}") from exc
    if not all(0 < rate < float("inf") for rate in rates) or len(set(rates)) < len(rates):
        raise InputError(f"--rates needs different numbers above 0, not {text!r}")
    return rates


def parse_engine_args(text: str) -> list[str]:
    """Flags of `vllm serve` for a JSON object of engine arguments; null takes a default out."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as exc:
        raise InputError(f"--engine-args is not valid JSON ({exc})") from exc
    if not isinstance(given, dict):
        raise InputError("--engine-args needs a JSON object")
    flags = []
    for key, value in (ENGINE_ARGS | given).items():
        if key.replace("-", "_") in RESERVED:
            raise InputError(f"--engine-args: {key} is set by the benchmark itself")
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            text = value if isinstance(value, str) else json.dumps(value)
            flags += [f"--{name}", text]
    return flags


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """Seconds from the start: a Poisson process, scaled to the rate as `vllm bench serve` does.

    The same seed gives the same pattern at every rate.
    """
    times = np.random.default_rng(seed).exponential(size=count).cumsum()
    return (times * (count / rate / times[-1])).tolist()


def deal(
    questions: Sequence[Question], parts: int, size: int, seed: int
) -> tuple[list[list[Question]], list[Question]]:
    """Disjoint parts with the same mix of categories, in random order, and a part to warm up."""
    measured, rest = pick(questions, parts * size)
    if len(measured) < parts * size:
        raise InputError(
            f"{parts} rates with {size} requests each and one request for warming up need "
            f"{parts * size + 1} different prompts; the dataset has {len(questions)}"
        )
    measured.sort(key=lambda question: question.category)
    dealt = [measured[part::parts] for part in range(parts)]
    for part in dealt:
        random.Random(seed).shuffle(part)
    return dealt, rest[:WARMUP_REQUESTS]


@contextmanager
def serve(model: str, method: MethodSpec, flags: list[str], log: Path) -> Iterator[tuple[str, int]]:
    """Address and process id of a server, which ends with the block, however that ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", model, *flags]
    command += ["--served-model-name", SERVED_NAME, "--host", "127.0.0.1", "--port", str(port)]
    if method.speculative_config:
        command += ["--speculative-config", json.dumps(method.speculative_config)]
    with log.open("w") as out:  # a session of its own: Ctrl-C is for the client alone
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=SERVER_ENV | os.environ, start_new_session=True
        )
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + STARTUP_S
    try:
        while not healthy(url):
            if process.poll() is not None or time.monotonic() > deadline:
                how = "did not start" if process.poll() is None else "the engine process ended"
                raise EngineError(error_line(f"vllm serve with {method.label}: {how}", log), log)
            time.sleep(0.5)
        yield url, process.pid
    finally:
        try:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(SHUTDOWN_S)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def healthy(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
        return answer.status == 200
    return False


def cpu_seconds(pid: int) -> dict[str, float]:
    """CPU time so far of this process, of the server's, and of the whole machine."""
    server = 0.0
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            server += sum(process.cpu_times()[:2])
    times = psutil.cpu_times()
    busy = times.user + times.nice + times.system + times.irq + times.softirq
    return {"client": time.process_time(), "server": server, "all": busy}


def measure(
    args: argparse.Namespace,
    tokenizer: Any,
    log: Path,
    server: tuple[str, int],
    questions: Sequence[Question],
    rate: float,
) -> dict[str, Any]:
    """Send the questions at the rate and return what vLLM's load tool measured."""
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.serve import TaskType, benchmark

    url, pid = server
    times = arrivals(len(questions), rate, args.seed)
    chats = [
        list(question.messages or [{"role": "user", "content": question.prompt}])
        for question in questions
    ]
    requests = [
        SampleRequest("", 0, args.max_tokens, timestamp=at, chat_messages=chat)
        for chat, at in zip(chats, times, strict=True)
    ]
    before, start = cpu_seconds(pid), time.perf_counter()
    with log.open("a") as out, redirect_stdout(out):
        result = asyncio.run(
            benchmark(
                task_type=TaskType.GENERATION, endpoint_type="openai-chat",
                api_url=f"{url}/v1/chat/completions", base_url=url, model_id=SERVED_NAME,
                model_name=SERVED_NAME, tokenizer=tokenizer, input_requests=requests,
                request_rate=float("inf"), burstiness=1.0, self_timed=True, max_concurrency=None,
                ignore_eos=args.ignore_eos, extra_body={"temperature": 0}, logprobs=None,
                selected_percentile_metrics=["ttft", "tpot", "e2el"], selected_percentiles=[99.0],
                num_warmups=0, ready_check_timeout_sec=0, disable_tqdm=True, profile=False,
                goodput_config_dict={}, lora_modules=None, extra_headers=None,
            )
        )  # fmt: skip
    wall, after = time.perf_counter() - start, cpu_seconds(pid)
    if result["failed"]:
        error = next(filter(None, result["errors"]), "no answer").strip().splitlines()[-1]
        raise EngineError(f"{result['failed']} of {len(requests)} requests failed: {error}", log)
    cores = {who: (after[who] - before[who]) / wall for who in before}
    sent = np.array(result["start_times"]) - result["start_times"][0]
    return {
        "requests": len(requests),
        **{key: float(result[key]) for key in (*METRICS, *FACTS) if key in result},
        "client_cores": cores["client"],
        "server_cores": cores["server"],
        "other_cores": max(0.0, cores["all"] - cores["client"] - cores["server"]),
        "latest_send_ms": 1e3 * float(np.max(sent - (np.array(times) - times[0]))),
    }


def summarize(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By rate and method, for every metric: each repeat, their median, and ratios to `none`.

    A ratio is that of the same repeat. `noise` of a rate is the largest value of `none` over the
    smallest, None with fewer than two repeats.
    """
    values: dict[tuple[float, str, str], dict[int, float]] = {}
    for run in runs:
        for metric in METRICS:
            key = run["rate"], run["method"], metric
            values.setdefault(key, {})[run["repeat"]] = run[metric]
    rows = []
    for rate, method in dict.fromkeys((run["rate"], run["method"]) for run in runs):
        row: dict[str, Any] = {"rate": rate, "method": method}
        for metric in METRICS:
            own, base = values[rate, method, metric], values.get((rate, BASELINE, metric), {})
            ratios = [own[r] / base[r] for r in own if base.get(r)]
            repeated = len(base) > 1 and min(base.values()) > 0
            noise = max(base.values()) / min(base.values()) if repeated else None
            row[metric] = {
                "median": statistics.median(own.values()),
                "repeats": list(own.values()),
                "ratio_vs_none": statistics.median(ratios) if ratios else None,
                "ratios_vs_none": ratios,
                "noise": noise,
            }
        rows.append(row)
    return sorted(rows, key=lambda row: row["rate"])


def print_summary(rows: Sequence[dict[str, Any]]) -> None:
    width = max(len(row["method"]) for row in rows)
    print("\nMedian of the repeats (ratio to none; for none: largest / smallest repeat)")
    print(f"{'req/s':>6} {'':{width}}" + "".join(f"{name:>20}" for name in METRICS.values()))
    for row in rows:
        cells = []
        for metric in METRICS:
            cell = row[metric]
            factor = cell["noise" if row["method"] == BASELINE else "ratio_vs_none"]
            shown = f" ({factor:.2f})" if factor else ""
            cells.append(f"{cell['median']:.1f}{shown}".rjust(20))
        print(f"{row['rate']:6g} {row['method']:{width}}{''.join(cells)}")


def save_plot(rows: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Every metric over the rate: the median, and a bar from the lowest to the highest repeat."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 7), layout="constrained")
    order = ["mean_tpot_ms", "mean_ttft_ms", "mean_e2el_ms"]
    order += ["p99_tpot_ms", "p99_ttft_ms", "output_throughput"]
    for axes, metric in zip(figure.subplots(2, 3).flat, order, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            chosen = [row for row in rows if row["method"] == method]
            rates = [row["rate"] for row in chosen]
            middle = np.array([row[metric]["median"] for row in chosen])
            ends = [[end(row[metric]["repeats"]) for row in chosen] for end in (min, max)]
            spread = [middle - ends[0], ends[1] - middle]
            axes.errorbar(rates, middle, spread, marker="o", capsize=3, label=method)
        axes.set_xscale("log", base=2)
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
        if "ttft" in metric:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set_title(METRICS[metric])
        axes.set_xlabel("requests per second")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def run(args: argparse.Namespace) -> None:
    methods, rates = parse_methods(args.methods), parse_rates(args.rates)
    flags = parse_engine_args(args.engine_args)
    check_model(args.model)
    for name in ("requests", "max_tokens", "repeats"):
        if getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    for path in filter(None, (args.json, args.plot)):
        if not path.resolve().parent.is_dir():
            raise InputError(f"the folder {path.resolve().parent} does not exist")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise InputError("--plot needs matplotlib: pip install 'vllm-specplus[bench]'")
    questions = load_dataset(args.dataset).questions
    dealt, warmup = deal(questions, len(rates), args.requests, args.seed)

    logs = Path(tempfile.mkdtemp(prefix="vllm-specplus-open-loop-"))
    machine = describe_machine(logs / "describe.log")
    from vllm.tokenizers import get_tokenizer
    from vllm.utils.gc_utils import freeze_gc_heap

    client = partial(measure, args, get_tokenizer(args.model), logs / "client.log")
    freeze_gc_heap()  # as in `vllm bench serve`: no pauses for what is here to stay
    atexit.register(gc.unfreeze)  # or the bindings of Triton complain about leaks
    relevant = re.compile("OMP_|KMP_|GOMP_|VLLM_|LD_PRELOAD")
    environment = {k: v for k, v in (SERVER_ENV | os.environ).items() if relevant.match(k)}
    report: dict[str, Any] = {
        "model": args.model,
        "versions": describe_versions(machine),
        "machine": {k: v for k, v in describe_hardware(machine).items() if k != "threads"},
        "command": shlex.join(sys.argv),
        "settings": {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()}
        | {"server_flags": flags, "server_env": environment, "log_dir": str(logs)},
        "runs": (runs := []),
    }
    for repeat in range(args.repeats):
        for method in methods[::-1] if repeat % 2 else methods:
            log = logs / f"{repeat}-{methods.index(method)}-{method.name}.log"
            with serve(args.model, method, flags, log) as server:
                client(server, warmup, max(rates))
                for rate, part in zip(rates, dealt, strict=True):
                    result = client(server, part, rate)
                    runs.append({"repeat": repeat, "method": method.label, "rate": rate, **result})
                    print(
                        f"repeat {repeat}, {method.label}, {rate:g} req/s: "
                        f"TPOT {result['mean_tpot_ms']:.1f} (p99 {result['p99_tpot_ms']:.1f}) ms, "
                        f"TTFT {result['mean_ttft_ms']:.0f} (p99 {result['p99_ttft_ms']:.0f}) ms, "
                        f"{result['output_throughput']:.1f} tokens/s; busy cores: "
                        f"client {result['client_cores']:.2f}, server "
                        f"{result['server_cores']:.2f}, other {result['other_cores']:.2f}",
                        flush=True,
                    )
            report["summary"] = summarize(runs)
            if args.json:  # after every server: an interrupted run keeps what it has
                args.json.write_text(json.dumps(report, indent=1) + "\n")
    print_summary(report["summary"])
    if args.plot:
        name = machine.device_name or report["machine"]["cpu_model"]
        title = f"{Path(args.model).name}, {name}, vLLM {report['versions']['vllm']}"
        save_plot(report["summary"], title, args.plot)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", required=True, help="folder or Hugging Face name")
    parser.add_argument("--dataset", required=True, type=Path, help="JSON lines, e.g. Spec-Bench")
    parser.add_argument("--methods", default="none,ngram,token_recycling",
                        help="as for vllm-specplus bench")  # fmt: skip
    parser.add_argument("--rates", default="0.5,1,2,4", help="requests per second")
    parser.add_argument("--requests", type=int, default=48, help="for every rate")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the arrivals")
    parser.add_argument("--ignore-eos", action="store_true", help="answers of --max-tokens all")
    parser.add_argument("--engine-args", default="{}", help="JSON, in addition to or instead of "
                        + json.dumps(ENGINE_ARGS))  # fmt: skip
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: ends the server too
    try:
        run(parser.parse_args())
    except InputError as exc:
        print(f"Error: {exc}", file=sys.stderr)
        return 2
    except EngineError as exc:
        print(f"Error: {exc}\n  log: {exc.log}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
