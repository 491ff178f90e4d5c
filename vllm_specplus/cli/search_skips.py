"""`vllm-specplus search-skips`: which layers a draft leaves out, by measured tokens per second."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vllm_specplus.bench import InputError

if TYPE_CHECKING:
    from vllm import LLM

    from vllm_specplus.drafting.skip_search import Skips

FAILED = 2
#: Draft & Verify's: chains of at most 8, ended by a threshold that follows the acceptance.
DRAFT = {
    "method": "layer_skip", "shape": "chain", "num_speculative_tokens": 8,
    "stop": {"rule": "adaptive_confidence"}, "control": {"policy": "fixed"},
}  # fmt: skip


def search_skips(
    model: Annotated[str, typer.Option(help="Folder or name of the target.")],
    dataset: Annotated[Path, typer.Option(help="Questions, as for bench; the first are asked.")],
    out: Annotated[Path, typer.Option(help="File to write: 'skips' of the method layer_skip.")],
    prompts: Annotated[int, typer.Option(min=1, help="How many questions a trial asks.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 32,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all, earlier ones among them.")] = (
        1000
    ),
    engine_arg: Annotated[
        list[str] | None, typer.Option(help="KEY=VALUE for vLLM, as for bench.")
    ] = None,
) -> None:
    """Search the attention and MLP blocks that the target drafts best without.

    Every trial is kept beside OUT; the same command goes on with a search that was ended. Exit
    code 0: OUT is there; 2: it cannot be, and one sentence says why.
    """
    console = Console(stderr=True, highlight=False)
    try:
        result = _search(
            model, dataset, out, prompts, max_tokens, trials, engine_arg or [], console
        )
    except (InputError, ValueError) as error:
        console.print(f"Error: {error}", markup=False, soft_wrap=True)
        raise typer.Exit(FAILED) from error
    except KeyboardInterrupt:
        console.print("interrupted; the same command goes on", markup=False)
        raise typer.Exit(FAILED) from None
    typer.echo(json.dumps(result))


def _search(
    model: str, dataset: Path, out: Path, prompts: int, max_tokens: int, trials: int,
    engine_args: list[str], console: Console,
) -> dict[str, Any]:  # fmt: skip
    from vllm_specplus.bench.dataset import load_dataset
    from vllm_specplus.bench.methods import parse_engine_args
    from vllm_specplus.bench.skip_trials import SkipTrials
    from vllm_specplus.files import check_writable

    check_writable(str(out), "--out")
    questions = load_dataset(dataset).questions[:prompts]
    if len(questions) < prompts:
        raise InputError(f"{dataset} has {len(questions)} questions: lower --prompts {prompts}")
    given = parse_engine_args(engine_args)
    about = {
        "model": model, "questions": [question.id for question in questions],
        "max_tokens": max_tokens, "engine_args": given,
    }  # fmt: skip
    # Engine and client in one process, which leaves the cores to the engine.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    llm = LLM(
        model, speculative_config=DRAFT,
        worker_extension_cls="vllm_specplus.engine.skip_trials.SkipTrialsExtension", **given,
    )  # fmt: skip
    layers = llm.llm_engine.model_config.get_total_num_hidden_layers()
    search = SkipTrials(out.with_name(f"{out.name}.trials.jsonl"), about, layers)
    asked = [_prompt(llm, question) for question in questions]
    with _bar(console) as bar:
        task = bar.add_task("", total=trials, completed=len(search.trials))
        for _ in search.run(lambda skips: _measure(llm, asked, max_tokens, skips), trials):
            best = search.best
            bar.update(
                task, completed=len(search.trials),
                description=f"best {best.tokens_per_s:.1f} tokens/s, without {best.skips}",
            )  # fmt: skip
            _write(out, search.result())
    result = search.result()
    _write(out, result)
    return result


def _prompt(llm: LLM, question: Any) -> Any:
    """Its token ids."""
    from vllm import TokensPrompt

    tokenizer = llm.get_tokenizer()
    if question.messages is None:
        return TokensPrompt(prompt_token_ids=tokenizer.encode(question.prompt))
    if not tokenizer.chat_template:
        text = question.messages[-1]["content"]
        return TokensPrompt(prompt_token_ids=tokenizer.encode(text))
    text = tokenizer.apply_chat_template(
        list(question.messages), tokenize=False, add_generation_prompt=True
    )
    return TokensPrompt(prompt_token_ids=tokenizer.encode(text, add_special_tokens=False))


def _measure(llm: LLM, prompts: list[Any], max_tokens: int, skips: Skips) -> float:
    """Tokens per second, one request at a time."""
    from vllm import SamplingParams

    left_out = sorted(skips.attention), sorted(skips.mlp)
    if not all(llm.collective_rpc("leave_out", args=left_out)):
        raise InputError("the engine does not draft by layer_skip")
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    started, tokens = time.perf_counter(), 0
    for prompt in prompts:
        (answer,) = llm.generate([prompt], params, use_tqdm=False)
        tokens += len(answer.outputs[0].token_ids)
    return tokens / (time.perf_counter() - started)


def _write(out: Path, result: dict[str, Any]) -> None:
    """In the place of what is there, whole or not at all."""
    part = out.with_name(f"{out.name}.part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(out)


def _bar(console: Console) -> Progress:
    return Progress(
        BarColumn(), MofNCompleteColumn(), TextColumn("left:"), TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False), console=console, transient=True,
    )  # fmt: skip
