"""Distil a small draft for a target model (DistillSpec, arXiv 2310.08461), without a dataset.

    python -m vllm_specplus.training.distill --target DIR --out DIR

1. *Texts.* The target writes them: after the chat template's user header it samples a
   question, then answers it at one of several temperatures. What it writes is what the draft
   will have to predict.
2. *Draft.* A few of the target's own layers, their MLPs cut to the neurons with the
   largest weights, below the target's own embedding and output layer, which stay as they
   are. Only the layers and the last norm are trained, and kept.
3. *Objective.* The divergence of the draft's distribution from the target's, over the
   whole vocabulary at every position of the texts: forward KL, and in the end total variation.
   Acceptance at temperature 1 is ``sum min(p, q)``, one less total variation, and also what
   ``--evaluate`` reports; but far from the target total variation hardly has a gradient
   (compare LK losses, arXiv 2602.23881), and where it starts from is learnt by KL.

The result is a folder in Hugging Face's format that vLLM's own draft-model method loads
too; the layers alone go to ``layers.safetensors`` (see ``cli/model.py``).
"""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

#: Positions per optimiser step, and per slice of logits (small enough for the cache).
BATCH_TOKENS, SLICE = 2048, 128
LEARNING_RATE, WARM_UP = 1e-3, 0.05
#: Share of the time that goes to the second divergence.
FINISH = 0.4
MAX_LENGTH = 320
#: Temperatures of the answers, in turn.
ANSWERS = (0.0, 0.6, 1.0)


# -- divergences ---------------------------------------------------------------------------


def forward_kl(p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(p || q) [N] of ``p`` [N, V] and ``log_q`` [N, V]."""
    return torch.special.entr(p).sum(-1).neg() - (p * log_q).sum(-1)


def reverse_kl(p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """KL(q || p)"""
    q = log_q.exp()
    return (q * (log_q - p.clamp(min=1e-30).log())).sum(-1)


def jensen_shannon(p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """Mean divergence of both from their mean."""
    q = log_q.exp()
    middle = ((p + q) / 2).clamp(min=1e-30).log()
    return (forward_kl(p, middle) + forward_kl(q, middle)) / 2


def total_variation(p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """1 - acceptance."""
    return (p - log_q.exp()).abs().sum(-1) / 2


DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "total_variation": total_variation,
}


# -- texts -----------------------------------------------------------------------------------


def write_texts(target: str, tokens: int, seed: int) -> list[list[int]]:
    """Token ids of conversations the target made up, about so many tokens in all."""
    import os

    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(target, max_model_len=2 * MAX_LENGTH, max_num_seqs=64, seed=seed,
              kv_cache_memory_bytes=1 << 30, disable_log_stats=True)  # fmt: skip
    tokenizer = llm.get_tokenizer()
    chat = [{"role": "user", "content": "\0"}]
    header, _ = tokenizer.apply_chat_template(chat, tokenize=False).split("\0")
    prompt = tokenizer.encode(header, add_special_tokens=False)
    count = max(tokens // 160, 8)
    ask = SamplingParams(temperature=0.9, max_tokens=96)
    asked = llm.generate([TokensPrompt(prompt_token_ids=prompt)] * count, [
        ask.clone() for _ in range(count)
    ])  # fmt: skip
    questions = [out.outputs[0].text.strip() for out in asked]
    chats = [[{"role": "user", "content": q}] for q in questions if len(q) > 8]
    answers = llm.chat(chats, [
        SamplingParams(temperature=ANSWERS[i % len(ANSWERS)], max_tokens=MAX_LENGTH // 2)
        for i in range(len(chats))
    ])  # fmt: skip
    texts = [[*out.prompt_token_ids, *out.outputs[0].token_ids] for out in answers]
    llm.llm_engine.engine_core.shutdown()
    return [text[:MAX_LENGTH] for text in texts]


def hold_out(texts: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """A twentieth of the texts, at least one, to measure acceptance on; and those to learn."""
    count = max(len(texts) // 20, 1)
    return texts[:count], texts[count:]


# -- draft -------------------------------------------------------------------------------------


def make_draft(target, layers: list[int], intermediate_size: int):
    """A draft of the target's ``layers``, embedding and output layer (transformers models)."""
    from transformers import AutoModelForCausalLM

    config = type(target.config)(**target.config.to_dict())
    config.num_hidden_layers = len(layers)
    config.intermediate_size = intermediate_size
    if hasattr(config, "layer_types"):
        config.layer_types = None
    draft = AutoModelForCausalLM.from_config(config).to(torch.float32)
    draft.model.embed_tokens.weight = target.model.embed_tokens.weight
    draft.lm_head.weight = target.lm_head.weight
    draft.model.norm.load_state_dict(target.model.norm.state_dict())
    for new, old in zip(draft.model.layers, layers, strict=True):
        state = target.model.layers[old].state_dict()
        gate, up, down = (state[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        weight = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
        kept = weight.topk(intermediate_size).indices.sort().values
        state["mlp.gate_proj.weight"], state["mlp.up_proj.weight"] = gate[kept], up[kept]
        state["mlp.down_proj.weight"] = down[:, kept]
        new.load_state_dict(state)
    draft.requires_grad_(False)
    draft.model.layers.requires_grad_(True)
    draft.model.norm.requires_grad_(True)
    return draft


def own_weights(draft) -> dict[str, torch.Tensor]:
    """What training changes, as bfloat16."""
    return {
        name: value.detach().to(torch.bfloat16).contiguous()
        for name, value in draft.state_dict().items()
        if name.startswith(("model.layers.", "model.norm."))
    }


# -- training ------------------------------------------------------------------------------------


def hidden_rows(model, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Last hidden states [N, d] at the positions of ``mask``."""
    with torch.autocast("cpu", torch.bfloat16):
        return model.model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state[mask]


class Lessons:
    """Texts, and the target's last hidden states at all their positions, computed once."""

    def __init__(self, target, texts: list[list[int]]):
        self.texts = texts
        self.states: list[torch.Tensor] = [torch.empty(0)] * len(texts)
        """bfloat16 [n, d] of each text."""
        with torch.no_grad():
            for group in self._groups():
                tokens, mask = self._pad(group)
                states = hidden_rows(target, tokens, mask).to(torch.bfloat16)
                lengths = [len(texts[i]) for i in group]
                for i, of_text in zip(group, states.split(lengths), strict=True):
                    self.states[i] = of_text.clone()

    def batches(self, rng: random.Random) -> Iterator[tuple[torch.Tensor, ...]]:
        """Padded (tokens [B, n], mask [B, n]) of texts of similar length, in random order, and
        the target's states [N, d] at the positions of the mask."""
        groups = self._groups()
        rng.shuffle(groups)
        for group in groups:
            yield *self._pad(group), torch.cat([self.states[i] for i in group])

    def _groups(self) -> list[list[int]]:
        order = sorted(range(len(self.texts)), key=lambda i: (len(self.texts[i]), i))
        groups, group = [], []
        for i in order:
            if group and (len(group) + 1) * len(self.texts[i]) > BATCH_TOKENS:
                groups.append(group)
                group = []
            group.append(i)
        return [*groups, group]

    def _pad(self, group: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(len(self.texts[i]) for i in group)
        tokens = torch.zeros(len(group), width, dtype=torch.long)
        mask = torch.zeros(len(group), width, dtype=torch.bool)
        for row, i in enumerate(group):
            tokens[row, : len(self.texts[i])] = torch.tensor(self.texts[i])
            mask[row, : len(self.texts[i])] = True
        return tokens, mask


#: Of a batch of lessons, hidden states [M, d] behind the last norm of target and draft.
Rows = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
#: [N] of ``p``, ``log_q`` [N, V], of the target's and the draft's hidden states [N, d], and of
#: the share of the time that is over.
Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


def follow(
    rows: Rows, loss: Loss, weights: list[torch.nn.Parameter], target,
    lessons: Lessons, minutes: float, seed: int,
) -> int:  # fmt: skip
    """Passes over ``lessons`` until the time is up, towards what the target predicts; returns
    the number of steps."""
    optimiser = torch.optim.AdamW(weights, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    head = target.lm_head.weight.detach().to(torch.bfloat16)
    rng, start, steps = random.Random(seed), time.monotonic(), 0
    while True:
        for batch in lessons.batches(rng):
            done = (time.monotonic() - start) / (60 * minutes)
            if done >= 1:
                return steps
            # The schedule follows the clock: it is what the run is bounded by.
            rate = min(done / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * done))
            for group in optimiser.param_groups:
                group["lr"] = LEARNING_RATE * max(rate, 0.01)
            target_states, draft_states = rows(*batch)
            leaf, total = draft_states.detach().requires_grad_(), 0.0
            for at in range(0, len(leaf), SLICE):
                here = slice(at, at + SLICE)
                with torch.no_grad():
                    p = (target_states[here].to(torch.bfloat16) @ head.T).float().softmax(-1)
                log_q = (leaf[here].to(torch.bfloat16) @ head.T).float().log_softmax(-1)
                part = loss(p, log_q, target_states[here], leaf[here], done).sum() / len(leaf)
                part.backward()
                total += float(part.detach())
            optimiser.zero_grad()
            draft_states.backward(leaf.grad.to(draft_states.dtype))
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimiser.step()
            steps += 1
            if steps % 20 == 0:
                typer.echo(f"step {steps}, {100 * done:.0f} % of the time: loss {total:.3f}")


@torch.inference_mode()
def acceptance(rows: Rows, target, lessons: Lessons) -> dict[str, float]:
    """Over all positions: at temperature 1 (sum of min(p, q)), and greedy."""
    soft = hard = count = 0.0
    head = target.lm_head.weight.to(torch.bfloat16)
    for batch in lessons.batches(random.Random(0)):
        pair = rows(*batch)
        for at in range(0, len(pair[0]), SLICE):
            p, q = (
                (h[at : at + SLICE].to(torch.bfloat16) @ head.T).float().softmax(-1) for h in pair
            )
            soft += float(torch.minimum(p, q).sum())
            hard += float((p.argmax(-1) == q.argmax(-1)).sum())
            count += len(p)
    return {"temperature 1": soft / count, "greedy": hard / count, "positions": count}


def rows_of(draft) -> Rows:
    """Of a model that reads the same texts."""

    def rows(tokens, mask, states) -> tuple[torch.Tensor, torch.Tensor]:
        return states, hidden_rows(draft, tokens, mask)

    return rows


def train(
    draft, target, texts: list[list[int]], divergences: tuple[str, str], minutes: float, seed: int
) -> int:
    """Passes over ``texts`` until the time is up, by the second of ``divergences`` in the last
    ``FINISH`` of it; returns the number of steps."""
    weights = [w for w in draft.parameters() if w.requires_grad]
    first, last = (DIVERGENCES[name] for name in divergences)

    def loss(p, log_q, target_states, draft_states, done):
        return (first if done < 1 - FINISH else last)(p, log_q)

    lessons = Lessons(target, texts)
    return follow(rows_of(draft), loss, weights, target, lessons, minutes, seed)


def evaluate(draft, target, texts: list[list[int]]) -> dict[str, float]:
    """Acceptance over all positions; see :func:`acceptance`."""
    return acceptance(rows_of(draft), target, Lessons(target, texts))


def load(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, use_safetensors=True
    ).eval()


def main(
    target: Annotated[Path, typer.Option(help="Folder of the target model.")],
    out: Annotated[Path, typer.Option(help="Folder of the draft; texts are kept there too.")],
    tokens: Annotated[int, typer.Option(help="Tokens of text to write.")] = 200_000,
    minutes: Annotated[float, typer.Option(help="Time to train.")] = 12.0,
    layers: Annotated[str, typer.Option(help="Target layers to start from.")] = "0,29",
    intermediate_size: Annotated[int, typer.Option(help="Width of the draft's MLPs.")] = 1152,
    divergence: Annotated[str, typer.Option(help=", ".join(DIVERGENCES))] = "forward_kl",
    finish: Annotated[
        str, typer.Option(help=f"Divergence in the last {FINISH:.0%} of the time.")
    ] = "total_variation",
    seed: Annotated[int, typer.Option()] = 0,
    evaluate_only: Annotated[bool, typer.Option("--evaluate", help="Only measure OUT.")] = False,
) -> None:
    """Distil a draft of TARGET into OUT, or measure one."""
    from safetensors.torch import save_file

    for name in (divergence, finish):
        if name not in DIVERGENCES:
            raise typer.BadParameter(f"{name!r} (allowed: {', '.join(DIVERGENCES)})")
    out.mkdir(parents=True, exist_ok=True)
    kept = out / "texts.json"
    if not kept.exists():
        kept.write_text(json.dumps(write_texts(str(target), tokens, seed)))
    texts = json.loads(kept.read_text())
    held_out, texts = hold_out(texts)
    teacher = load(target)
    if evaluate_only:
        typer.echo(json.dumps(evaluate(load(out), teacher, held_out)))
        return
    torch.manual_seed(seed)
    draft = make_draft(teacher, [int(layer) for layer in layers.split(",")], intermediate_size)
    steps = train(draft, teacher, texts, (divergence, finish), minutes, seed)
    save_file(own_weights(draft), out / "layers.safetensors")
    draft.to(torch.bfloat16).save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (target / name).exists():
            shutil.copy(target / name, out / name)
    figures = evaluate(load(out), teacher, held_out)
    typer.echo(json.dumps({"texts": len(texts), "steps": steps, **figures}))


if __name__ == "__main__":
    typer.run(main)
