"""A recipe, a target and texts so small that runs of them take no time."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch.nn import functional as F

from vllm_specplus.strict import StrictModel
from vllm_specplus.training.cost_model import Work
from vllm_specplus.training.folder import RunFolder
from vllm_specplus.training.measure import Measured
from vllm_specplus.training.ranks import Ranks, joined
from vllm_specplus.training.recipe import Defaults, Setup
from vllm_specplus.training.splits import Gate, HeldOut
from vllm_specplus.training.texts import Text
from vllm_specplus.training.trainer import Plan, Trainer

WORDS = [
    "<unk>", "<end>", "<user>", "<assistant>", *"abcdefghijklmnopqrstuvwxyz", "?", "what", "is",
    "the", "who", "in", "of", "plays", "young", "damon", "vampire", "diaries",
]  # fmt: skip
VOCAB = len(WORDS)
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<assistant> ' }}{{ m.content }}"
    "{{ ' <end> ' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
NOBODY = HeldOut(frozenset(), frozenset())

SUMMARY = "a table of bigrams"
DEFAULTS = Defaults(tokens=1000, epochs=2, batch_tokens=64, learning_rate=0.1)


class Settings(StrictModel):
    """Keys of ``--set``."""

    noise: float = 0.5
    """Of the logits, drawn anew in each step."""
    on_policy: bool = False
    """Whether it writes texts."""
    explode: bool = False
    """Whether its loss is no number."""


class Toy:
    """Logits of the next token by the token before."""

    name = "toy"

    def __init__(self, settings: Settings, vocab: int = VOCAB):
        self.weight = torch.nn.Parameter(torch.zeros(vocab, vocab))
        self.settings = settings
        self.written_for: list[int] = []
        self.seen: list[Text] = []

    def parameters(self):
        return [self.weight]

    def step(self, batch, done, rng):
        self.seen += batch.texts
        noise = torch.rand(batch.tokens.shape, generator=rng) * self.settings.noise
        logits = self.weight[batch.tokens] + noise[..., None] * self.weight[batch.tokens].detach()
        labels = batch.tokens.roll(-1, 1)
        loss = F.cross_entropy(logits[batch.learn], labels[batch.learn])
        if self.settings.explode:
            loss = loss * float("inf")
        loss.backward()
        return {"loss": float(loss.detach()), "noise": float(noise.mean())}

    def state(self):
        return {"weight": self.weight.detach()}

    def load_state(self, state):
        self.weight.data.copy_(state["weight"])

    def texts_for(self, epoch, texts):
        if not self.settings.on_policy:
            return None
        self.written_for.append(epoch)
        # Depends on what was learnt so far, as texts of a draft do.
        own = int(self.weight.detach().abs().sum() * 1000) % VOCAB
        return [Text(t.id, (*t.tokens[: t.start], own, own), t.start, "draft") for t in texts]

    def measure(self, texts):
        return Measured(sum(len(text.tokens) for text in texts), 0.5, 0.25, ())

    def export(self, folder):
        save_file({"weight": self.weight.detach()}, folder / "toy.safetensors")


def build(target: Path, settings: Settings, setup: Setup) -> Toy:
    return Toy(settings)


def work(shape, settings) -> Work:
    return Work(trained=VOCAB**2, multiplied=VOCAB**2, vocab=VOCAB)


def texts(count: int = 40, seed: int = 0) -> list[Text]:
    """Random ones of several lengths, no two behind the same prompt."""
    rng = random.Random(seed)
    return [
        Text(str(i), (4 + i % 26, 4 + i // 26, *rng.choices(range(4, 30), k=rng.randint(2, 14))), 2,
             "target")
        for i in range(count)
    ]  # fmt: skip


def save_target(path: Path, template: str | None = TEMPLATE, vocab: int = VOCAB) -> Path:
    """A target without weights: its configuration and its tokenizer."""
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": vocab,
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    save_tokenizer(path, template)
    return path


def save_tokenizer(path: Path, template: str | None = TEMPLATE) -> None:
    """A token for each of :data:`WORDS`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)


def trainer(
    out: Path, plan: Plan, recipe: Toy | None = None, ranks=None, gate=None, given=None,
    told=None,
) -> Trainer:  # fmt: skip
    """A trainer of the toy in an existing folder; ``gate``: what is held out, and how to read."""
    console = Console(file=told, width=200) if told else Console(quiet=True)
    return Trainer(
        recipe or Toy(Settings()), texts() if given is None else given, plan, RunFolder(out),
        Gate(*(gate or (NOBODY, None)), console), ranks or Ranks(), console,
    )  # fmt: skip


def killed_at(name: str, count: int) -> None:
    """The process is killed, as by ``kill -9``, when ``os.NAME`` is called for the time of that
    number; 0: never."""
    real, calls = getattr(os, name), [0]

    def call(*args, **keys):
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **keys)

    setattr(os, name, call)


def train(
    out: Path, plan: dict, kill: tuple[str, int] = ("", 0), kill_step: int = 0,
    environment: dict[str, str] | None = None, alike: bool = False,
) -> None:  # fmt: skip
    """Trains the toy in this process, which may be killed: at a call of ``os``, or in a step, both
    counted from 1. ``alike``: ranks count alike, whatever they have of a batch."""
    os.environ |= environment or {}
    torch.set_num_threads(1)
    if kill[0]:
        killed_at(*kill)
    plan = dict(plan)
    recipe = Toy(Settings(**plan.pop("settings", {})))
    steps, real = [0], recipe.step

    def step(*args):
        steps[0] += 1
        if steps[0] == kill_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    recipe.step = step
    out.mkdir(exist_ok=True)
    with joined() as ranks:
        if alike:
            real_sum, count = Ranks.sum_gradients, ranks.count
            Ranks.sum_gradients = lambda self, given, weight: real_sum(self, given, 1 / count)
        trainer(out, Plan(**plan), recipe, ranks).run()


def apart(function, *args, **keys):
    """A started process that calls a function of a module: forked from one that has imported torch
    and trained nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.training.warm"])
    process = context.Process(target=function, args=args, kwargs=keys)
    process.start()
    return process


def status(function, *args, **keys) -> int:
    """How such a process ended: 0, -9 if it was killed; anything else is a failure."""
    process = apart(function, *args, **keys)
    process.join(120)
    assert process.exitcode in (0, -9), "see what it has printed"
    return process.exitcode
