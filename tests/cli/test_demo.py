"""The demo without an engine: preparing the model, comparing answers, judging differences."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from vllm_specplus.cli import demo, model
from vllm_specplus.cli.main import app


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    """Replaces download and conversion; returns the list of folders converted."""
    done = []

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        done.append(folder)

    monkeypatch.setenv("VLLM_SPECPLUS_CACHE", str(tmp_path))
    monkeypatch.setattr(model, "_download", lambda folder: folder / "model.gguf")
    monkeypatch.setattr(model, "convert", convert)
    return done


def test_model_is_prepared_once(conversions, tmp_path, capsys):
    folder = model.prepare_model()
    assert folder == tmp_path / model.NAME
    assert (folder / "config.json").exists()
    assert "Preparing" in capsys.readouterr().err
    assert model.prepare_model() == folder
    assert len(conversions) == 1
    assert capsys.readouterr() == ("", "")
    assert list(tmp_path.iterdir()) == [folder]  # no scratch folder is left


def test_model_in_a_folder_of_ones_own(conversions, tmp_path):
    result = CliRunner().invoke(app, ["prepare-model", "--out", str(tmp_path / "a" / "b")])
    assert result.exit_code == 0
    assert result.stdout.strip() == str(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b" / "config.json").exists()


def test_failed_conversion_leaves_nothing(conversions, monkeypatch, tmp_path):
    def fail(gguf, folder):
        folder.mkdir()
        raise model.ModelError("gguf missing")

    monkeypatch.setattr(model, "convert", fail)
    result = CliRunner().invoke(app, ["prepare-model"])
    assert result.exit_code == 1
    assert "gguf missing" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_two_processes_prepare_at_once(conversions, monkeypatch, tmp_path):
    convert, target = model.convert, tmp_path / model.NAME

    def convert_more_slowly_than_another(gguf, folder):
        convert(gguf, target)
        convert(gguf, folder)

    monkeypatch.setattr(model, "convert", convert_more_slowly_than_another)
    assert model.prepare_model() == target
    assert list(tmp_path.iterdir()) == [target]


def test_unwritable_target(conversions, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(model.ModelError, match="cannot write"):
        model.prepare_model(tmp_path / "mine")


def test_download_error_is_told_in_pips_words(monkeypatch, tmp_path):
    def pip(command, **_):
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        return SimpleNamespace(returncode=1, stderr="WARNING: a\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(model.ModelError, match="ERROR: no network"):
        model._download(tmp_path)


def answer(tokens, seconds=1.0, steps=1):
    return demo.Answer([1, 2], tokens, f"text of {tokens}", seconds, steps)


class FakeLLM:
    """Knows the logprobs of the token after a prompt."""

    def __init__(self, logprobs):
        self.logprobs = {token: SimpleNamespace(logprob=value) for token, value in logprobs.items()}

    def generate(self, prompt, params, use_tqdm):
        self.prompt = prompt["prompt_token_ids"]
        return [SimpleNamespace(outputs=[SimpleNamespace(logprobs=[self.logprobs])])]

    def get_tokenizer(self):
        return SimpleNamespace(decode=lambda tokens: f"<{tokens[0]}>")


def test_equal_answers_have_no_difference():
    assert demo._difference(FakeLLM({}), answer([5, 6]), answer([5, 6])) is None


def test_difference_is_the_first_one_with_plain_decodings_view_of_it():
    llm = FakeLLM({7: -0.5, 8: -0.625})
    found = demo._difference(llm, answer([5, 6, 7, 9]), answer([5, 6, 8, 10]))
    assert llm.prompt == [1, 2, 5, 6]
    assert found == demo.Difference(2, plain="<7>", specplus="<8>", gap=0.125)
    assert "Token 3 is '<8>', without the plugin '<7>'" in demo._explain(found)
    assert "near-tie" in demo._explain(found)


@pytest.mark.parametrize("logprobs", [{7: -0.1, 8: -3.0}, {7: -0.1}])
def test_difference_that_rounding_does_not_explain(logprobs):
    found = demo._difference(FakeLLM(logprobs), answer([7]), answer([8]))
    assert "please report it" in demo._explain(found)


def test_report(monkeypatch):
    monkeypatch.setattr(demo, "PROMPTS", {"One": "first?", "Two": "second?"})
    console = Console(record=True, width=100)
    plain = [answer([1] * 10, seconds=2.0, steps=10), answer([2] * 10, seconds=2.0, steps=10)]
    specplus = [answer([1] * 10, seconds=1.0, steps=4), answer([3] * 10, seconds=1.0, steps=4)]
    demo._report(console, plain, specplus, [None, demo.Difference(0, "a", "[b]", 0.1)])
    text = console.export_text()
    rows = {line.split("│")[1].strip(): line.split() for line in text.splitlines() if "│" in line}
    assert rows["One"][3:16:2] == ["yes", "10", "2.50", "5", "10", "2.00x"]
    assert rows["Two"][3] == "no"
    assert "1 of 2" in text
    assert "'[b]'" in text
