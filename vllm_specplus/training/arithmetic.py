"""A pair of models for arithmetic word questions, for what trades answers for speed: judges and
step-level drafts want a target that is mostly right and a draft that often is not.

    python -m vllm_specplus.training.arithmetic --out DIR [--minutes 38]

``DIR/target`` is to answer at least :data:`TARGET_RIGHT` of the held-out questions of
``bench/arithmetic.py``, ``DIR/draft``, with its own habits of wording, a share within
:data:`DRAFT_RIGHT`; ``DIR/log.json`` has both, with intervals, and all losses. Both are
transformers' Llama, and read words, single digits and marks. The time is divided among them by
what a step takes, measured at the start, so that the command ends when it is told to.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from vllm_specplus.bench.arithmetic import Problem, answer, check, problems
from vllm_specplus.training.loop import train
from vllm_specplus.training.probe import wilson
from vllm_specplus.training.sampling import draw

TARGET_RIGHT, DRAFT_RIGHT = 0.7, (0.2, 0.5)
#: The share of right answers that the draft is wanted at.
DRAFT_GOAL = 0.35
BATCH, CONTEXT, LONGEST = 48, 512, 96
#: Events of the questions of a batch, in turn: answers of one length are padded little.
EVENTS = (2, 3, 4)
#: Questions that a look during the training asks, and those that the end asks.
LOOK, EXAM = 100, 500
#: Questions whose words make the vocabulary: all words there are, with certainty.
WORDS_OF = 4000
UNKNOWN, END, PAD = "<unk>", "<end>", "<pad>"
#: Words that routers put before steps (``arbitrage/steps.py``).
TAGS = "Model 0: Model 1: "


@dataclass(frozen=True)
class Size:
    """Of a model, and how it is trained."""

    hidden: int
    layers: int
    steps: int
    rate: float
    share: float
    """Of the whole time, at most; what is left is for looking at what was learnt."""
    dialect: str


#: Depth makes the target slow beside the draft, as a large model is; width costs training time.
SIZES = {
    "target": Size(128, 8, 4000, 1.5e-3, 0.76, "plain"),
    "draft": Size(64, 2, 2500, 2e-3, 0.12, "wordy"),
}


def make_tokenizer() -> Any:
    """Words with the space before them, digits one by one, and both line ends as one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pieces = r"\n\n| ?[A-Za-z]+| ?\d| ?[^A-Za-z\d\s]|\s"
    split = pre_tokenizers.Split(Regex(pieces), "isolated")
    rng = random.Random(0)
    known: set[str] = set()
    for problem in itertools.islice(problems(0, False), WORDS_OF):
        for dialect in ("plain", "wordy"):
            answered = answer(problem, rng, dialect)
            # (Behind a tag the first word of a step has a space before it.)
            steps = "".join(f"\n{TAGS}{step}" for step in answered.split("\n\n"))
            text = f"{problem.text}\n{answered}{steps}"
            known |= {piece for piece, _ in split.pre_tokenize_str(text)}
    known |= {f"{space}{digit}" for space in ("", " ") for digit in range(10)}
    vocab = {word: i for i, word in enumerate([UNKNOWN, END, PAD, *sorted(known)])}
    made = Tokenizer(models.WordLevel(vocab, UNKNOWN))
    made.pre_tokenizer, made.decoder = split, decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token=UNKNOWN, eos_token=END, pad_token=PAD,
        model_max_length=CONTEXT, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}\n{% endfor %}"
    return tokenizer


def make_model(size: Size, tokenizer: Any) -> nn.Module:
    """A Llama with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=size.hidden, intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers, num_attention_heads=size.hidden // 32,
        num_key_value_heads=size.hidden // 32, head_dim=32, max_position_embeddings=CONTEXT,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def prompt_of(problem: Problem, tokenizer: Any) -> list[int]:
    """What a model reads before it answers: as the chat template has it."""
    return tokenizer.encode(f"{problem.text}\n", add_special_tokens=False)


def batches(tokenizer: Any, dialect: str, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels int64 [BATCH, n] without end; labels are -100 on prompts and padding."""
    drawn, rng = [problems(seed, False, (count,)) for count in EVENTS], random.Random(seed)
    for turn in itertools.count():
        rows = []
        for problem in itertools.islice(drawn[turn % len(drawn)], BATCH):
            prompt = prompt_of(problem, tokenizer)
            own = tokenizer.encode(answer(problem, rng, dialect), add_special_tokens=False)
            rows.append((prompt, [*own, tokenizer.eos_token_id]))
        width = max(len(prompt) + len(own) for prompt, own in rows)
        tokens = torch.full((BATCH, width), tokenizer.pad_token_id)
        labels = torch.full((BATCH, width), -100)
        for row, (prompt, own) in enumerate(rows):
            behind = len(prompt) + len(own)
            tokens[row, :behind] = torch.tensor(prompt + own)
            labels[row, len(prompt) : behind] = torch.tensor(own)
        yield tokens, labels


def right_answers(model: nn.Module, tokenizer: Any, asked: Sequence[Problem]) -> int:
    """How many of the questions a model answers right, greedily."""
    prompts = [prompt_of(problem, tokenizer) for problem in asked]
    ends = {tokenizer.eos_token_id}
    with torch.inference_mode():
        written = draw([model], 1.0, prompts, 0.0, LONGEST, ends, torch.Generator())
    texts = [tokenizer.decode(own, skip_special_tokens=True) for own in written]
    return sum(check(problem, text).right for problem, text in zip(asked, texts, strict=True))


def steps_within(seconds: float, most: int, step: Callable[[], object]) -> int:
    """How many times ``step`` can be done in so many seconds, at most ``most``; measured by doing
    it."""
    step()
    began = time.perf_counter()
    for _ in range(3):
        step()
    each = (time.perf_counter() - began) / 3
    return max(min(most, int(seconds / each)), 1)


def fit(name: str, tokenizer: Any, seconds: float, seed: int) -> tuple[nn.Module, dict[str, Any]]:
    """One of the two models, trained, and its log. Of the draft the state is kept that comes
    nearest to :data:`DRAFT_GOAL`."""
    size = SIZES[name]
    model = make_model(size, tokenizer)
    drawn = batches(tokenizer, size.dialect, seed)
    held = problems(seed, True)
    asked = list(itertools.islice(held, LOOK))
    best: tuple[float, dict[str, torch.Tensor]] | None = None

    def loss() -> torch.Tensor:
        tokens, labels = next(drawn)
        return model(input_ids=tokens, labels=labels).loss

    def look() -> dict[str, float]:
        nonlocal best
        share = right_answers(model, tokenizer, asked) / LOOK
        away = abs(share - DRAFT_GOAL)
        if name == "draft" and (best is None or away < best[0]):
            best = away, {key: each.clone() for key, each in model.state_dict().items()}
        return {"right": share}

    steps = steps_within(seconds * size.share, size.steps, lambda: loss().backward())
    log = train(name, model, loss, steps, size.rate, 0.02, look, reports=30)
    if best is not None:
        model.load_state_dict(best[1])
    exam = list(itertools.islice(held, EXAM))
    right = right_answers(model, tokenizer, exam)
    low, high = wilson(right, EXAM)
    figures = {
        "hidden": size.hidden, "layers": size.layers, "steps": steps, "asked": EXAM,
        "right": right / EXAM, "right_low": low, "right_high": high, "log": log,
    }  # fmt: skip
    print(name, {key: figures[key] for key in ("right", "right_low", "right_high")}, flush=True)
    return model, figures


def shortcoming(found: dict[str, dict[str, Any]]) -> str | None:
    """What is wrong with a trained pair, in a sentence."""
    target, draft = found["target"]["right"], found["draft"]["right"]
    if target < TARGET_RIGHT:
        return (
            f"the target is right {target:.0%} of the time, {TARGET_RIGHT:.0%} are wanted: give it "
            f"more --minutes"
        )
    if not DRAFT_RIGHT[0] <= draft <= DRAFT_RIGHT[1]:
        low, high = DRAFT_RIGHT
        return (
            f"the draft is right {draft:.0%} of the time, {low:.0%} to {high:.0%} are wanted: take "
            f"another --seed"
        )
    return None


def main(
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    minutes: Annotated[float, typer.Option(min=0.1, help="Most time to train.")] = 38.0,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Train the pair; exit code 1 if it is not as wanted."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    found = {}
    for name in SIZES:
        model, found[name] = fit(name, tokenizer, 60 * minutes, seed)
        model.save_pretrained(out / name)
        tokenizer.save_pretrained(out / name)
    settings = {"minutes": minutes, "seed": seed, "batch": BATCH}
    (out / "log.json").write_text(json.dumps(found | {"settings": settings}, indent=1) + "\n")
    if (problem := shortcoming(found)) is not None:
        typer.echo(f"Error: {problem}", err=True)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
