"""Train the head of the acceptance rule ``judge`` (Judge Decoding, arXiv 2501.19309, section 4).

    python -m vllm_specplus.training.judge --target DIR --data answers.jsonl --out head.safetensors

A line of the data is an answer of which somebody knows where it goes wrong, by characters::

    {"prompt": "What is 7 times 8?", "answer": "7 times 8 is 54.", "error": [13, 15]}

or ``"error": null`` for one that is right. Tokens before the error are valid, those in it are not,
those behind it say nothing. The classes are weighted to count alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file
from torch.nn import functional as F

from vllm_specplus.samplers.judge import BIAS, WEIGHT
from vllm_specplus.strict import StrictModel

#: Of the squared weights, per example: hidden states have more dimensions than errors are known.
DECAY = 1e-3


class Answer(StrictModel):
    prompt: str
    answer: str
    error: tuple[int, int] | None
    """First character that is wrong, and the first behind it; None: it is right."""


def read_answers(path: Path) -> list[Answer]:
    """ValueError names the first line that is none."""
    answers = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            answer = Answer.model_validate_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error.errors()[0]['msg']}") from None
        if answer.error and not 0 <= answer.error[0] < answer.error[1] <= len(answer.answer):
            raise ValueError(f"{path}, line {number}: error {answer.error} is not in the answer")
        answers.append(answer)
    return answers


def labels(offsets: list[tuple[int, int]], error: tuple[int, int] | None) -> list[int]:
    """1 valid, 0 not, -1 nothing known, of tokens at characters ``offsets`` of an answer."""
    if error is None:
        return [1] * len(offsets)
    begin, end = error
    return [1 if b <= begin else 0 if a < end else -1 for a, b in offsets]


@torch.inference_mode()
def examples(model, tokenizer, answers: list[Answer]) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states float32 [n, hidden] at the answers' tokens (transformers' last ones, after the
    final norm, as in vLLM) and their labels [n]."""
    features, known = [], []
    for answer in answers:
        chat = [{"role": "user", "content": answer.prompt}]
        head = answer.prompt
        if tokenizer.chat_template:
            head = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        before = tokenizer(head, add_special_tokens=False)["input_ids"]
        own = tokenizer(answer.answer, add_special_tokens=False, return_offsets_mapping=True)
        said = labels(own["offset_mapping"], answer.error)
        ids = torch.tensor([before + own["input_ids"]])
        hidden = model(ids, output_hidden_states=True).hidden_states[-1][0, len(before) :]
        keep = [i for i, label in enumerate(said) if label >= 0]
        features.append(hidden[keep].float())
        known += [said[i] for i in keep]
    return torch.cat(features), torch.tensor(known)


def fit(features: torch.Tensor, known: torch.Tensor) -> dict[str, torch.Tensor]:
    """The head of logistic regression; ValueError if a class is missing."""
    share = known.float().mean()
    if not 0 < share < 1:
        raise ValueError("the answers show only one of valid and wrong tokens: both are needed")
    weight = torch.zeros(features.shape[1], requires_grad=True)
    bias = torch.zeros(1, requires_grad=True)
    counts = torch.where(known == 1, 0.5 / share, 0.5 / (1 - share))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        error = (
            F.binary_cross_entropy_with_logits(features @ weight + bias, known.float(), counts)
            + DECAY * weight.square().sum()
        )
        error.backward()
        return error

    optimizer.step(loss)
    return {WEIGHT: weight.detach(), BIAS: bias.detach()}


def recall(
    head: dict[str, torch.Tensor], features: torch.Tensor, known: torch.Tensor
) -> dict[str, float]:
    """Shares of the valid and of the wrong tokens that a threshold of 0.5 tells right."""
    valid = features @ head[WEIGHT] + head[BIAS] > 0
    return {
        "valid": float(valid[known == 1].float().mean()),
        "wrong": float((~valid[known == 0]).float().mean()),
    }


def main(
    target: Annotated[Path, typer.Option(help="Hugging Face folder of the target.")],
    data: Annotated[Path, typer.Option(help="JSON lines, see above.")],
    out: Annotated[Path, typer.Option(help="File to write, *.safetensors.")],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    answers = read_answers(data)
    tokenizer = AutoTokenizer.from_pretrained(target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    # Every fifth answer is not learnt from, but asked.
    held = answers[::5]
    features, known = examples(model, tokenizer, [a for i, a in enumerate(answers) if i % 5])
    head = fit(features, known)
    typer.echo(json.dumps({
        "tokens": len(known), "wrong": int((known == 0).sum()),
        "held out": recall(head, *examples(model, tokenizer, held)),
    }))  # fmt: skip
    save_file(head, out)


if __name__ == "__main__":
    typer.run(main)
