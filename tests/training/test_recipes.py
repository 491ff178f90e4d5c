"""Recipes from a file of texts to what is served, also when they are ended on the way."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file

from tests.training.tiny import save_target, some_texts
from vllm_specplus.config import parse
from vllm_specplus.drafting.acceptance_head import head_size as acceptance_size
from vllm_specplus.drafting.exit_predictors import read_sizes
from vllm_specplus.drafting.model import DraftModel
from vllm_specplus.samplers.judge import head_size
from vllm_specplus.training import run as run_module
from vllm_specplus.training.recipes import (
    acceptance_head,
    dflash,
    distill,
    eagle,
    eagle3,
    judge,
    layerskip,
    long_draft,
    router,
    spec_ee,
)
from vllm_specplus.training.run import Options, run
from vllm_specplus.training.texts import Text, to_line

#: Stands for the folder of a draft model.
DRAFT = "{DRAFT}"
#: Name, settings, and the class whose steps are interrupted.
RUNS = {
    "distill": ("distill", {"layers": [0]}, distill.Distill),
    "distill on-policy": (
        "distill", {"source": "draft", "answer_tokens": 8}, distill.Distill,
    ),
    "distill mixed": (
        "distill", {"source": "mix_token", "answer_tokens": 8}, distill.Distill,
    ),
    "layerskip": ("layerskip", {"exits": [1], "dropout": 0.3}, layerskip.LayerSkip),
    "judge": ("judge", {}, judge.Judge),
    "eagle": ("eagle", {}, eagle.EagleRecipe),
    "eagle3": ("eagle3", {"draft_vocabulary": 30, "noise": 0.1}, eagle3.Eagle3Recipe),
    "acceptance_head": (
        "acceptance_head", {"draft": DRAFT, "blocks": 1}, acceptance_head.AcceptanceHeadRecipe,
    ),
    "spec_ee": ("spec_ee", {"draft": DRAFT, "inner": 8, "static": 1}, spec_ee.SpecEeRecipe),
    "dflash": ("dflash", {"draft_vocabulary": 30, "block": 4}, dflash.DFlashRecipe),
    "dflash glancing": ("dflash", {"glancing": True, "loss": "forward_kl"}, dflash.DFlashRecipe),
    "long_draft": ("long_draft", {"reach": 2000, "window": 9}, long_draft.LongDraftRecipe),
    "router": ("router", {}, router.Router),
    "router's head": ("router", {"learn": "head", "balance": False}, router.Router),
}  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"), layers=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Texts of whose tokens some are known to be wrong, and every second of their last ones."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    lines = []
    for number, text in enumerate(some_texts(40)):
        labels = tuple(-1 if i < 4 else int(token > 9) for i, token in enumerate(text.tokens))
        labels = (*labels[:-1], number % 2)
        lines.append(to_line(Text(text.id, text.tokens, text.start, "traffic", labels)))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def options(target: Path, data: Path, out: Path, name: str) -> Options:
    recipe, settings, _ = RUNS[name]
    if settings.get("draft") == DRAFT:  # the target itself drafts well enough
        settings = settings | {"draft": str(target)}
    return Options(
        recipe, target, out, data, epochs=2, batch_tokens=200, dtype="float32", values=settings
    )


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]


class Ended(Exception):
    """Stands for a killed process: nothing that a run holds in memory survives it."""


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_an_ended_run_goes_on_as_if_it_had_not(target, data, tmp_path, monkeypatch, name):
    """In the middle of its second epoch; its losses, result and figures are the same."""
    monkeypatch.setattr(run_module, "Plan", partial(run_module.Plan, checkpoint_seconds=0.0))
    console = Console(quiet=True)
    whole = run(options(target, data, tmp_path / "whole", name), console)
    expected = losses(tmp_path / "whole")
    steps, step, stop = len(expected), RUNS[name][2].step, 0

    def ending(self, *arguments):
        nonlocal stop
        stop += 1
        if stop > steps - 2:
            raise Ended
        return step(self, *arguments)

    monkeypatch.setattr(RUNS[name][2], "step", ending)
    with pytest.raises(Ended):
        run(options(target, data, tmp_path / "ended", name), console)
    assert not (tmp_path / "ended" / "result").exists()
    monkeypatch.setattr(RUNS[name][2], "step", step)
    report = run(options(target, data, tmp_path / "ended", name), console)
    assert losses(tmp_path / "ended") == pytest.approx(expected, abs=1e-6)
    assert report["measured"] == whole["measured"]
    results = [tmp_path / which / "result" for which in ("whole", "ended")]
    for file in results[0].rglob("*.safetensors"):
        first, second = (load_file(each / file.relative_to(results[0])) for each in results)
        assert all(weight.equal(second[key]) for key, weight in first.items())
    check_result(results[0], name)


def check_result(result: Path, name: str) -> None:
    """It is what the method reads that it is for."""
    import torch

    if name == "judge":
        assert head_size(result / "head.safetensors") == 64
    elif name.startswith("router"):
        assert json.loads((result / "config.json").read_text())["id2label"]["1"] == "target"
    elif name == "acceptance_head":
        assert acceptance_size(result / "head.safetensors") == 64
    elif name == "spec_ee":
        assert read_sizes(result / "predictors.safetensors") == (1, 4)
    elif name == "layerskip":
        method = {"method": "early_exit", "exit_layers": [1]}
        assert parse(method).exit_layers == [1]
        assert DraftModel(str(result), torch.device("cpu"), torch.float32).num_layers == 2
    elif name.startswith("dflash"):
        assert parse({"method": "block_tree", "model": str(result)}).folder == str(result)
    elif name == "long_draft":
        assert parse({"method": "long_draft", "model": str(result)}).model == str(result)
    elif name.startswith("eagle"):
        assert parse({"method": "eagle_tree", "model": str(result)}).model == str(result)
    else:
        assert parse({"method": "draft_tree", "model": str(result)}).model == str(result)
        assert DraftModel(str(result), torch.device("cpu"), torch.float32).num_layers <= 2


def test_on_policy_texts_are_kept_for_the_epoch_they_were_written_for(target, data, tmp_path):
    out = tmp_path / "out"
    run(options(target, data, out, "distill on-policy"), Console(quiet=True))
    first, second = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(out.glob("texts-*.jsonl"))
    )
    assert {row["writer"] for row in first + second} == {"draft"}
    assert [row["id"] for row in first] == [row["id"] for row in second]
    assert [row["tokens"] for row in first] != [row["tokens"] for row in second]
