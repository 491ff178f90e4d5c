"""`vllm-specplus plan`: the question that it was made for, and what it refuses."""

from __future__ import annotations

import json
import re

import pytest
from typer.testing import CliRunner

from tests.planning.shapes import LLAMA_8B, LLAMA_70B, save
from vllm_specplus.cli.main import app
from vllm_specplus.planning.plan import ERROR_PUBLISHED


@pytest.fixture
def run(tmp_path):
    """Runs plan for 70B + 8B; --model and --draft may be other folders."""
    save(tmp_path / "target", LLAMA_70B)
    save(tmp_path / "draft", LLAMA_8B)

    def invoke(*options: str, model: str = "target", draft: str | None = "draft"):
        named = ["--model", str(tmp_path / model)]
        named += ["--draft", str(tmp_path / draft)] if draft else []
        result = CliRunner().invoke(app, ["plan", *named, *options], env={"COLUMNS": "200"})
        assert result.exception is None or isinstance(result.exception, SystemExit)
        return result

    return invoke


def test_will_easyspec_pay_on_eight_a100(run):
    result = run("--gpu", "A100-80GB", "--tp", "8")
    assert result.exit_code == 0
    told = r"EasySpec B: \d\.\d\d times the draft on one device, so it pays while it keeps \d+ %"
    assert re.search(told, result.output)
    assert re.search(r"EasySpec B: .*; decided by, per level: weights -\d", result.output)
    assert f"{ERROR_PUBLISHED:.0%} of published tables" in result.output
    assert "Memory: 1 in flight may have trees of" in result.output
    assert "Accepted, draft_tree: 0.70, arXiv" in result.output


def test_programs_get_json(run):
    found = json.loads(run("--gpu", "h100", "--tp", "4", "--json").stdout)
    rows = {(row["method"], row["placement"]): row for row in found["rows"]}
    assert ("easyspec", "EasySpec A") in rows
    assert ("draft_tree", "tensor parallel") in rows
    ratios = [row["ratio"] for row in found["rows"]]
    assert ratios == sorted(ratios, reverse=True)
    assert set(rows["eagle_tree", "one device"]["draft_ms"]) == {
        "weights", "arithmetic", "kernels", "messages", "host",
    }  # fmt: skip
    assert found["device"]["source"].startswith("NVIDIA")
    assert found["memory"]["nodes"] == 80


def test_a_stated_acceptance_holds_for_all_and_needs_no_source(run):
    result = run("--gpu", "H100", "--tp", "4", "--acceptance", "0.9")
    assert "Accepted," not in result.output
    stated = json.loads(run("--gpu", "H100", "--tp", "4", "--acceptance", "0.9", "--json").stdout)
    assert {row["acceptance"] for row in stated["rows"]} == {0.9}


@pytest.mark.parametrize(
    ("options", "folders", "said"),
    [
        (["--gpu", "A100"], {}, "'A100' comes in several sizes: write A100-40GB or"),
        (["--gpu", "abacus"], {}, "no data sheet of 'abacus' is known"),
        (["--gpu", "H100", "--tp", "3"], {}, "64 attention heads cannot be divided among 3 ranks"),
        (["--gpu", "H100"], {}, "raise --tp, or name another --gpu"),
        (["--gpu", "H100"], {"model": "nowhere"}, "config.json cannot be read"),
        (["--gpu", "H100", "--tp", "8"], {"draft": "nowhere"}, "config.json cannot be read"),
        (["--gpu", "H100", "--tp", "8"], {"model": "latent"}, "latent attention caches something"),
        (["--gpu", "H100", "--tp", "8"], {"model": "hybrid"}, "'linear_attention'"),
        (["--gpu", "H100", "--tp", "8"], {"model": "odd"}, "how many bits a weight has"),
        (["--gpu", "H100", "--tp", "8"], {"model": "text"}, "must be a whole number above 0"),
        (["--gpu", "H100", "--tp", "8"], {"model": "list"}, "it must be a JSON object"),
        (["--gpu", "H100", "--tp", "8"], {"draft": "expertless"}, "has no 'num_experts_per_tok'"),
    ],
)
def test_what_cannot_be_planned_gets_a_sentence(run, tmp_path, options, folders, said):
    save(tmp_path / "latent", LLAMA_70B, kv_lora_rank=512)
    save(tmp_path / "hybrid", LLAMA_70B, layer_types=["linear_attention"])
    save(tmp_path / "odd", LLAMA_70B, quantization_config={"quant_method": "new"})
    save(tmp_path / "text", LLAMA_70B, hidden_size="8192")
    save(tmp_path / "expertless", LLAMA_8B, num_experts=8)
    (tmp_path / "list").mkdir()
    (tmp_path / "list/config.json").write_text("[]")
    result = run(*options, **folders)
    assert result.exit_code == 2
    assert said in result.output
    assert len(result.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "option", [("--tp", "0"), ("--requests", "0"), ("--context", "-1"), ("--acceptance", "1.5")]
)
def test_numbers_out_of_their_bounds(run, option):
    assert run("--gpu", "H100", *option).exit_code == 2
