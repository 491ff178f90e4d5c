"""A run from its options to what is served: texts, training, measuring, result."""

from __future__ import annotations

import hashlib
import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from vllm_specplus.files import is_file, read_json
from vllm_specplus.strict import StrictModel, quoted, sentences, told
from vllm_specplus.training import cost_model, sources
from vllm_specplus.training.data import Language, language_of, read_data
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.folder import RunFolder, write_folder, write_text
from vllm_specplus.training.ranks import Ranks, joined
from vllm_specplus.training.recipe import Defaults, Recipe, Setup
from vllm_specplus.training.recipes import recipe_file
from vllm_specplus.training.splits import Gate, HeldOut, committed
from vllm_specplus.training.texts import Text, load_texts
from vllm_specplus.training.trainer import Plan, Trainer

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Options:
    """What a user has said; None is the recipe's default."""

    recipe: str
    target: Path
    out: Path
    data: Path | None = None
    tokens: int | None = None
    epochs: int | None = None
    minutes: float | None = None
    batch_tokens: int | None = None
    learning_rate: float | None = None
    seed: int = 0
    dtype: str = "bfloat16"
    measure: Path | None = None
    max_length: int = 512
    values: dict[str, Any] = field(default_factory=dict)
    """Of ``--set``."""
    ray: bool = False


@dataclass(frozen=True)
class Checked:
    """Options that make sense, with all that follows from them."""

    options: Options
    module: ModuleType
    settings: StrictModel
    plan: Plan
    wanted: sources.Wanted
    language: Language
    shape: cost_model.Shape

    @classmethod
    def of(cls, options: Options) -> Checked:
        """TrainingError says what is wrong with them."""
        module = recipe_file(options.recipe)
        settings = parse_settings(module, options.values)
        defaults: Defaults = module.DEFAULTS
        for name in ("tokens", "epochs", "minutes", "batch_tokens", "learning_rate", "max_length"):
            value = getattr(options, name)
            if value is not None and not value > 0:
                option = name.replace("_", "-")
                raise TrainingError(f"--{option} is {value}: it must be above 0")
        if options.dtype not in DTYPES:
            raise TrainingError(
                f"unknown --dtype {quoted(options.dtype)} (allowed: {', '.join(DTYPES)})"
            )
        for name, file in (("data", options.data), ("measure", options.measure)):
            if file is not None and not is_file(file):
                raise TrainingError(f"--{name} {quoted(file)} is not a file: name an existing one")
        if options.ray and (find_spec("ray") is None or find_spec("pyarrow") is None):
            raise TrainingError("--ray needs Ray Data: pip install 'vllm-specplus[ray]'")
        plan = Plan(
            options.epochs or defaults.epochs, options.batch_tokens or defaults.batch_tokens,
            options.learning_rate or defaults.learning_rate, options.seed, options.minutes,
        )  # fmt: skip
        wanted = sources.Wanted(
            options.target, options.data, options.tokens or defaults.tokens,
            min(options.max_length, context_of(options.target)), options.seed, options.ray,
        )  # fmt: skip
        language, shape = language_of(options.target), cost_model.Shape.of(options.target)
        return cls(options, module, settings, plan, wanted, language, shape)

    def kept(self) -> dict[str, Any]:
        """What a run that goes on must have in common with the one before."""
        options, plan = self.options, self.plan
        settings = json.loads(self.settings.model_dump_json())
        return {
            "recipe": options.recipe,
            **{f"--set {name}": value for name, value in settings.items()},
            "target": str(options.target.resolve()),
            "data": digest(options.data),
            "tokens": self.wanted.tokens,
            "epochs": plan.epochs,
            "minutes": plan.minutes,
            "batch_tokens": plan.batch_tokens,
            "learning_rate": plan.learning_rate,
            "seed": plan.seed,
            "dtype": options.dtype,
            "measure": digest(options.measure),
            "max_length": self.wanted.length,
        }


def parse_settings(module: ModuleType, values: dict[str, Any]) -> StrictModel:
    """A recipe's settings of what ``--set`` gave; TrainingError names those that are allowed."""
    try:
        # As JSON, in which a list may be a tuple.
        return module.Settings.model_validate_json(json.dumps(values))
    except ValidationError as error:
        name = module.__name__.rpartition(".")[2]
        raise TrainingError(told(f"--set of {name}", sentences(error, module.Settings))) from None


def context_of(target: Path) -> int:
    """Most tokens of a text that the target can read."""
    try:
        config = read_json(target / "config.json", f"{target}/config.json")
    except ValueError as error:
        raise TrainingError(f"--target: {error}; name the folder of a model") from None
    config = config.get("text_config", config)
    return int(config.get("max_position_embeddings") or 1 << 30)


def digest(path: Path | None) -> str | None:
    """What tells a file's content from another's."""
    return path and hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def run(options: Options, console: Console) -> dict[str, Any]:
    """Trains, measures and writes the result, from where an earlier run of the same options was
    ended; returns what was measured, on every rank."""
    checked = Checked.of(options)
    folder = RunFolder(options.out)
    with joined() as ranks, folder.held() if ranks.first else nullcontext():
        console.quiet = console.quiet or not ranks.first
        held_out = committed()
        if ranks.first:
            folder.take_settings(checked.kept())
        if ranks.shared(folder.result.exists()):
            console.print(f"{folder.result} is there: this run has ended", markup=False)
            return read_json(folder.measured, str(folder.measured))
        if ranks.first:
            held_out = gather(checked, folder, console)
        return finish(checked, folder, ranks.shared(held_out), ranks, console)


def gather(checked: Checked, folder: RunFolder, console: Console) -> HeldOut:
    """Has all texts written; returns what must not be learnt from."""
    held_out, wanted, language = committed(), checked.wanted, checked.language
    if checked.options.measure:
        more = sources.gather_measured(checked.options.measure, wanted, folder, language, console)
        held_out = HeldOut(held_out.ids, held_out.hashes | more.hashes, more.prompts)
    sources.gather(wanted, folder, language, held_out, console)
    return held_out


def finish(
    checked: Checked, folder: RunFolder, held_out: HeldOut, ranks: Ranks, console: Console
) -> dict[str, Any]:
    """Trains on the texts of the folder; returns what was measured."""
    tokenizer, options, plan = checked.language.tokenizer, checked.options, checked.plan
    gate = Gate(held_out, tokenizer and (lambda tokens: tokenizer.decode(tokens)), console)
    texts = load_texts(folder.texts)
    if options.measure:
        measured, learnt = load_texts(folder.measured_texts), texts
    else:
        measured, learnt = sources.split(texts, plan.seed)
    learnt = gate.admit(learnt)
    torch.manual_seed(plan.seed)
    setup = Setup(DTYPES[options.dtype], ranks.device, plan.seed, learnt)
    recipe = checked.module.build(options.target, checked.settings, setup)
    trainer = Trainer(recipe, learnt, plan, folder, gate, ranks, console)
    trainer.run()
    if ranks.first:
        said = sources.summary(learnt) | {"steps": trainer.steps}
        publish(recipe, measured, said, folder)
    ranks.shared(None)
    return read_json(folder.measured, str(folder.measured))


def publish(recipe: Recipe, measured: list[Text], said: dict[str, int], folder: RunFolder) -> None:
    """Measures what was trained, and writes what is served."""
    report = {"recipe": recipe.name, **said, "measured": recipe.measure(measured).to_json()}
    write_text(folder.measured, json.dumps(report, indent=1) + "\n")
    write_folder(folder.result, recipe.export)


def dry_run(options: Options, flops: float | None, console: Console) -> tuple[Table, str | None]:
    """What a run of these options would cost, and a sentence if this machine cannot do it. Nothing
    is written; data is read, and found to be good."""
    checked = Checked.of(options)
    with joined() as ranks:
        machine = cost_model.this_machine(
            options.out, ranks.device, DTYPES[options.dtype], flops, ranks.count
        )
    tokens = written = checked.wanted.tokens
    if options.data:
        data = read_data(options.data, checked.language, committed())
        given = sum(len(text.tokens) for text in data.texts)
        written = written if data.prompts else 0
        tokens = given + written
    work = checked.module.work(checked.shape, checked.settings)
    plan = checked.plan
    cost = cost_model.cost(
        checked.shape, work, machine, tokens=tokens, written=written, epochs=plan.epochs,
        batch_tokens=plan.batch_tokens, width=DTYPES[options.dtype].itemsize,
    )  # fmt: skip
    console.print(
        f"{options.recipe}: {asdict(work)['trained'] / 1e6:.1f} M trained parameters, {tokens:,} "
        f"tokens, {plan.epochs} epochs", markup=False,
    )  # fmt: skip
    return cost_model.table(cost, machine), cost_model.shortage(cost, machine)
