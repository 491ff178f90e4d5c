"""The house's rules: what may import what, and how long a thing may get.

Imports within functions and for type checkers only count as others do: they too say who knows whom.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "vllm_specplus"
ROOT = Path(__file__).parent.parent / PACKAGE
#: Parts of the package from the ground up. Each imports from lower floors and, without circles,
#: from its own.
FLOORS = (
    (
        "strict",
        "files",
        "tree",
        "step",
        "target",
        "capabilities",
        "metrics",
        "compat",
        "registry",
        "preloads",
    ),
    ("kernels", "retrieval", "control", "samplers", "planning"),
    ("drafting", "image", "config"),
    ("proposer", "proposers", "overlap"),
    ("engine", "speculative_config"),
    ("plugin",),
    ("training", "bench", "cli", "testing", "arbitrage"),
)
FLOOR = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
#: Nouns that know nothing of ours.
GROUND = ("step", "strict", "tree")
LONGEST_CLASS, LONGEST_FUNCTION = 250, 60
LONGEST_FILE = {"engine/runner.py": 350}


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its name below it, as ``engine.runner``."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    """Modules of ours that a module imports, wherever the import stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}:{node.lineno}: relative import"
            found |= {f"{node.module}.{a.name}" for a in node.names} | {node.module}
    inside = {each.removeprefix(f"{PACKAGE}.") for each in found if each.startswith(f"{PACKAGE}.")}
    return (inside & known) - {name, ""} - packages_of(name)


def packages_of(name: str) -> set[str]:
    """The packages a module is in: importing from a sibling names them too."""
    parts = name.split(".")
    return {".".join(parts[:i]) for i in range(1, len(parts))}


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    trees = modules()
    return {name: imports(name, tree, set(trees)) for name, tree in trees.items()}


def part_of(module: str) -> str:
    return module.split(".")[0]


def upward(graph: dict[str, set[str]]) -> Iterator[str]:
    """Imports from a higher floor."""
    for name, imported in graph.items():
        for other in sorted(imported) if name else ():
            if FLOOR[part_of(other)] > FLOOR[part_of(name)]:
                yield f"{name} imports {other} from above"


def circles(graph: dict[str, set[str]]) -> Iterator[str]:
    """Groups of modules each of which reaches itself."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        todo = list(graph[start])
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += graph.get(name, ())
        reached[start] = seen
    rings = {
        tuple(sorted(b for b in graph if b in reached[a] and a in reached[b]))
        for a in graph
        if a in reached[a]
    }
    return (f"circle: {', '.join(ring)}" for ring in sorted(rings))


def of_parts(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between folders."""
    parts: dict[str, set[str]] = {}
    for name, imported in graph.items():
        own = part_of(name)
        parts.setdefault(own, set()).update({part_of(each) for each in imported} - {own})
    return parts


def too_long() -> Iterator[str]:
    """Classes, functions and files over their limits."""
    for path in sorted(ROOT.rglob("*.py")):
        place, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        most = LONGEST_FILE.get(place)
        if most and len(text.splitlines()) >= most:
            yield f"{place}: not under {most} lines"
        for node in ast.walk(ast.parse(text)):
            lines = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
            if isinstance(node, ast.ClassDef) and lines > LONGEST_CLASS:
                yield f"{place}: class {node.name} has over {LONGEST_CLASS} lines"
            is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if is_function and lines > LONGEST_FUNCTION and not place.startswith("kernels/"):
                yield f"{place}: function {node.name} has over {LONGEST_FUNCTION} lines"


def test_every_part_has_a_floor(graph):
    assert {part_of(name) for name in graph if name} <= set(FLOOR)


def test_the_rules_are_kept(graph):
    broken = {*upward(graph), *circles(graph), *too_long()}
    broken |= {each.replace("circle", "circle of folders") for each in circles(of_parts(graph))}
    assert sorted(broken) == []


@pytest.mark.parametrize("part", GROUND)
def test_the_ground_floor_imports_nothing_of_ours(graph, part):
    assert graph[part] == set()


def test_a_broken_rule_is_seen():
    planted = {
        "step": {"engine.runner"},
        "engine.runner": {"engine.batch"},
        "engine.batch": {"engine.runner", "step"},
    }
    assert list(upward(planted)) == ["step imports engine.runner from above"]
    assert list(circles(planted)) == ["circle: engine.batch, engine.runner, step"]
    assert list(circles(of_parts(planted))) == ["circle: engine, step"]
    assert list(circles({"a": {"b"}, "b": set()})) == []


def test_imports_within_functions_and_for_types_count():
    text = "if TYPE_CHECKING:\n    from vllm_specplus.engine import runner\n"
    text += "def f():\n    import vllm_specplus.cli.main\n"
    known = {"engine", "engine.runner", "cli.main", "step"}
    assert imports("step", ast.parse(text), known) == {"engine", "engine.runner", "cli.main"}
