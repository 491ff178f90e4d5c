"""docs/fidelity.md is whole, and what it says can be run: configurations, commands, tests."""

from __future__ import annotations

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import typer

from vllm_specplus import registry
from vllm_specplus.bench.methods import parse_methods
from vllm_specplus.cli.main import app
from vllm_specplus.config import AcceptanceConfig, parse

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
#: Title -> text of each section of a method or rule.
SECTIONS = dict(re.findall(r"^### (.+)\n\n((?:(?!^#).*\n)+)", PAGE, re.MULTILINE))
PARTS = ["The same:", "Different:", "Measured both:", "The paper's form:", "To reproduce:"]
#: What follows no paper, and what is named elsewhere in the page.
OURS = {"lossless", "top_k_margin", "synthetic"}
#: What is said of a file that is not there, once all keys are right.
NOT_THERE = re.compile(
    r"is not a (datastore|file|(Hugging Face )?folder)|is neither a folder|cannot be (read|fetched)"
)
#: Options of benchmarks that others than their file add.
SHARED = {"--json"}


def named(section: str) -> set[str]:
    return set(re.findall(r"`([\w+]+)`", section))


def configurations(text: str) -> list[dict]:
    return [json.loads(each) for each in re.findall(r"`(\{\"method\".*?\})`(?:\s|$)", text)]


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(block.replace("\\\n", " ")) for block in blocks]


def value_of(command: list[str], option: str) -> str | None:
    return command[command.index(option) + 1] if option in command else None


def accepted(spec: dict) -> None:
    """Raises ValueError unless the keys are those of the method; files need not be there."""
    try:
        parse(spec)
    except ValueError as error:
        if not NOT_THERE.search(str(error)):
            raise


def test_every_method_and_rule_has_a_section():
    titles = set().union(*map(named, SECTIONS))
    rules = {
        get_args(each.model_fields["rule"].annotation)[0] for each in get_args(AcceptanceConfig)
    }
    methods = {each.name for each in registry.methods() if each.package == "vllm-specplus"}
    assert (methods | rules) - OURS <= titles
    assert {name for name in OURS - {"lossless"} if f"`{name}`" not in PAGE} == set()


def test_every_section_has_a_row():
    rows = [
        line for line in PAGE.splitlines() if line.startswith("| ") and "method" not in line[:9]
    ]
    linked = {anchor for row in rows for anchor in re.findall(r"\(#([\w-]+)\)", row)}
    anchors = {re.sub(r"[`,]", "", title).split()[0].lower() for title in SECTIONS}
    assert linked == anchors
    for row in rows:
        assert "<!--fig " in row or "not measured" in row or set(row) <= set("|- "), row


@pytest.mark.parametrize("title", SECTIONS)
def test_a_section_has_all_parts_in_order(title):
    assert re.findall(r"^\* \*(.+?)\*", SECTIONS[title], re.MULTILINE) == PARTS
    assert commands(SECTIONS[title])


@pytest.mark.parametrize("title", SECTIONS)
def test_the_papers_form_parses(title):
    (form,) = re.findall(r"^\* \*The paper's form:\*(.*(?:\n  .*)*)", SECTIONS[title], re.MULTILINE)
    found = configurations(form)
    assert found or "not selectable" in form
    for spec in found:
        accepted(spec)


@cache
def bench_options() -> set[str]:
    command = typer.main.get_command(app).commands["bench"]
    return {option for each in command.params for option in (*each.opts, *each.secondary_opts)}


@pytest.mark.parametrize("title", SECTIONS)
def test_the_command_exists(title):
    for command in commands(SECTIONS[title]):
        options = {word for word in command if word.startswith("--")}
        if command[:2] == ["vllm-specplus", "bench"]:
            assert options <= bench_options()
        else:
            assert command[0] == "python"
            script = (ROOT / command[1]).read_text(encoding="utf-8")
            assert {each for each in options - SHARED if f'"{each}"' not in script} == set()
        if (value_of(command, "--task") or "").endswith("continuous"):
            continue  # a library's settings, no speculative config
        for method in parse_methods(value_of(command, "--methods") or ""):
            if method.speculative_config and method.name in registry.method_names():
                accepted(method.speculative_config)


def test_planted_faults_are_found():
    for spec in (
        {"method": "suffix_tree", "max_spec_facto": 1.0},
        {"method": "rest", "datastore": "STORE", "tree": "lightest"},
        {"method": "token_recycling", "num_speculative_tokens": 81},
    ):
        with pytest.raises(ValueError, match="speculative_config"):
            accepted(spec)
    accepted({"method": "rest", "datastore": "STORE"})


def test_tests_that_pages_name_exist():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    missing, count = [], 0
    for page in pages:
        for file, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text("utf-8")):
            path = ROOT / file
            source = path.read_text("utf-8") if path.is_file() else ""
            count += 1
            if not re.search(rf"^(?:async )?def {test}\(", source, re.MULTILINE):
                missing.append(f"{page.name}: {file}::{test}")
    assert missing == []
    assert count > 20
