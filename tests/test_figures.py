"""``scripts/figures.py``: figures of the pages are those of their files, and faults are found."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("figures", ROOT / "scripts" / "figures.py")
figures = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(figures)

RUNS = [
    {"method": "none", "load": 1, "tokens_per_s": 50.0, "ratio": 1.0, "by_depth": None},
    {"method": "tree:n=2", "load": 1, "tokens_per_s": 82.0, "ratio": 1.644, "by_depth": [0.5, 0.2]},
    {"method": "none", "load": 8, "tokens_per_s": 200.0, "ratio": 1.0, "by_depth": None},
    {"method": "tree:n=2", "load": 8, "tokens_per_s": 1250.0, "ratio": -0.0001, "by_depth": []},
]
RESULT = {"command": "benchmarks/speed.py --json x", "versions": {"vllm": "0.32.0"}, "runs": RUNS}
PAGE = """# Speed

At one request <!--fig text/speed runs(method='tree*', load=1).ratio-->1.64<!--/-->x.

<!--table text/speed
rows: runs(load=label)
columns: entry(method='none').tokens_per_s | entry(method='tree*').tokens_per_s
    | entry(method='tree*').tokens_per_s / entry(method='none').tokens_per_s
-->
| in flight | `none` | tree | ratio |
|---|---|---|---|
| 1 | 50 | **82** | 1.64 |
| 8 | 200 | 1,250 | |
"""


@pytest.fixture
def site(tmp_path):
    """A checkout of one page and one result, without a fault."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks/results/text").mkdir(parents=True)
    (tmp_path / "README.md").write_text("# Nothing\n")
    (tmp_path / "docs/speed.md").write_text(PAGE)
    (tmp_path / "benchmarks/results/text/speed.json").write_text(json.dumps(RESULT))
    index = tmp_path / figures.INDEX
    index.write_text(figures.index(tmp_path)[0])
    index.write_text(index.read_text().replace("json) | | `speed", "json) | speed | `speed"))
    assert figures.checked(tmp_path)[1] == []
    return tmp_path


def change(site, old, new):
    """The faults of the page with something else in it, which the script cannot all mend."""
    path = site / "docs/speed.md"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    return figures.checked(site)[1]


def test_the_pages_and_the_index_are_those_of_the_files():
    assert figures.checked(ROOT)[1] == []


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("-->1.64<", "-->1.65<", "docs/speed.md:3: it says '1.65', its file '1.64'."),
        (
            "| 8 | 200 |",
            "| 8 | 201 |",
            "docs/speed.md:5: it says '| 8 | 201 | 1,250 | |', its file '| 8 | 200 | 1,250 | |'.",
        ),
    ],
)
def test_a_stale_figure_is_found_and_mended(site, old, new, said):
    assert change(site, old, new) == [said]
    assert figures.checked(site)[0][site / "docs/speed.md"] == PAGE


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("(method='tree*', load=1)", "(method='graph')", "no entry has method='graph'"),
        ("load=1).ratio", "load=1).ration", "nothing is called 'ration'"),
        ("runs(method='tree*', load=1).ratio", "runs.ratio", "4 values are named for 1 numbers"),
        ("fig text/speed", "fig text/sped", "there is no file benchmarks/results/text/sped.json"),
        ("load=1).ratio", "load=1).method", "it names something that is no number"),
        ("runs(method='tree*', load=1).ratio", "__import__('os')", "not among the operations"),
        ("runs(method='tree*', load=1).ratio", "runs[", "the expression is none"),
        ("rows: runs(load=label)", "rows: runs | runs | runs", "3 entries of 3 cells are named"),
        ("columns: entry", "figures: entry", "with rows and columns on lines of their own"),
        ("| entry(method='tree*').tokens_per_s\n", "| nodes\n", "('nodes' of '1')"),
    ],
)
def test_an_expression_that_names_nothing_gets_a_sentence(site, old, new, said):
    faults = change(site, old, new)
    assert len(faults) == 1
    assert said in faults[0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("It is 1.9x as fast.", "no file backs '1.9x', and no mark"),
        ("A step takes 44 ms.", "'44 ms'"),
        ("It gains 31 %.", "'31 %'"),
        ("Acceptance rises to 0.62.", "'0.62'"),
        ("It draws 1,250 tokens/s in 7 launches.", "'1,250 tokens/s', '7 launches'"),
        ("| a | b |\n|---|---|\n| one | **41** |", "'41'"),
        ("Here <!--fug text/speed runs-->1.64<!--/-->x.", "'1.64'"),
        ("Here <!--fig text/speed runs-->", "this mark is not understood"),
    ],
)
def test_a_figure_without_a_file_is_found(site, text, found):
    faults = change(site, "# Speed\n", f"# Speed\n\n{text}\n")
    assert any(found in fault for fault in faults)


@pytest.mark.parametrize(
    "text",
    [
        "The paper has <!--fig none: from the paper-->1.9x<!--/-->.",
        "<!--fig none: defaults-->\n| key | default |\n|---|---|\n| `top_k` | 8 |",
        "## More\n\n<!--fig none in this section: bounds-->\nIn 30 s.\n\nAt most 2 GB.\n\n## End",
        "vLLM 0.32 and Python 3.11, 2 cores, SmolLM-1.7B, `margin=0.3`, [2401.10774](https://a/1.5x)",
        "```\n12 ms\n```",
        "| in 2 ms | 1.5 |\n|---|---|\n| 64 MB | yes |",
    ],
)
def test_what_is_no_result_is_left_alone(site, text):
    assert change(site, "# Speed\n", f"# Speed\n\n{text}\n") == []


def test_a_mark_of_a_section_ends_with_it(site):
    note = "## More\n\n<!--fig none in this section: settings-->\n30 s.\n\n## End\n\n31 s.\n"
    assert len(change(site, "# Speed\n", f"# Speed\n\n{note}")) == 1


def test_a_mark_that_starts_a_line_is_found(site):
    faults = change(site, "At one request <!--", "At one request\n<!--")
    assert faults == ["docs/speed.md:4: a mark may not start a line within a paragraph."]


def test_a_result_that_the_index_lacks_is_found(site):
    (site / "benchmarks/results/text/more.json").write_text("{}")
    assert figures.checked(site)[1] == [f"{figures.INDEX}: text/more.json is missing."]
    (site / figures.INDEX).write_text(figures.index(site)[0])
    assert figures.checked(site)[1] == [
        f"{figures.INDEX}: it does not say what text/more.json is about."
    ]


def test_a_result_that_is_gone_is_found(site):
    (site / "benchmarks/results/text/speed.json").unlink()
    figures.document.cache_clear()
    faults = figures.checked(site)[1]
    assert len(faults) == 3
    assert faults[-1] == f"{figures.INDEX}: it is out of date."


@pytest.mark.parametrize(
    ("expression", "text", "filled"),
    [
        ("runs(load=8, method='tree*').tokens_per_s", "+1,000.0", "+1,250.0"),
        ("runs(load=8, method='tree*').ratio", "1.0", "0.0"),
        ("percent(1 - runs[0].ratio / runs[1].ratio)", "1 %", "39 %"),
        ("min(runs.ratio); max(runs.ratio)", "1.00-2.00", "0.00-1.64"),
        ("median(runs.tokens_per_s)", "1", "141"),
        ("runs[1].by_depth", "1.0, 1.0", "0.5, 0.2"),
        ("runs(load=8).tokens_per_s / runs(load=1).tokens_per_s", "1.0 and 2", "4.0 and 15"),
        ("'text/speed'.runs[0].tokens_per_s", "1", "50"),
    ],
)
def test_values_and_how_they_are_written(site, expression, text, filled):
    names = figures.document(site, "text/speed")
    assert figures.filled(text, figures.values(expression, names, site)) == filled
