"""Keeps the figures in README.md and docs/ equal to the committed results they come from.

``python scripts/figures.py`` writes them anew, and benchmarks/results/README.md too; ``--check``
only says, a sentence each, what is out of date and which figures come from no file. Marks are
comments, which nobody sees on the rendered page:

``<!--fig FILE EXPRESSION; EXPRESSION-->1.32 to 1.54<!--/-->``
    As many numbers as the expressions have values, replaced in turn and rounded as they are
    written. FILE is a JSON file in benchmarks/results without its ending, or, after a slash, in the
    repository.

``<!--table FILE / rows: EXPRESSION | EXPRESSION / columns: EXPRESSION; EXPRESSION | EXPRESSION-->``
    On three or more lines above a table. What stands first (rows or columns) names an entry for
    each of them, or one expression all of them by ``label``, what is written in their first cell;
    the other says which figures of the entry their cells show. Cells without a digit are left
    alone, ``none`` is for those that are no results.

``<!--fig none: REASON-->12 %<!--/-->``
    No result of ours. Alone on a line the mark holds for the paragraph, list or table that follows,
    as ``<!--fig none in this section: REASON-->`` to the next heading of the same rank.

Code is never a result, so that a default is best written as code.

An expression is a path through the file with a few operations: ``runs(method='none').tokens_per_s``
(a call picks entries of a list, ``*`` in a text stands for anything), ``times['2']['one core']``,
``+ - * /``, ``min``, ``max``, ``median``, ``percent``, and ``'other/file'`` as a start of its own.
"""

from __future__ import annotations

import ast
import functools
import json
import operator
import re
import statistics
import sys
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = "benchmarks/results"
INDEX = f"{RESULTS}/README.md"

COMMENT = r"(?P<body>(?:(?!--).)+?)-->"
FIGURE = re.compile(rf"<!--fig {COMMENT}(?P<text>(?:(?!<!--).)*?)<!--/-->", re.DOTALL)
TABLE = re.compile(rf"^<!--table {COMMENT}\n(?P<text>(?:\|[^\n]*\n)+)", re.DOTALL | re.MULTILINE)
NOTE = re.compile(rf"^<!--fig none(?P<section> in this section)?: {COMMENT}\n", re.M | re.S)
MARK = re.compile(r"<!--(?:fig|table|/)")
NUMBER = re.compile(r"(?<![\w.])[+-]?\d+(?:,\d{3})*(?:\.\d+)?")

CODE = re.compile(r"^(?P<fence>[ \t]*```).*?^(?P=fence)[^\n]*$|(?<!`)`[^`]+`(?!`)", re.M | re.S)
# Targets of links, and numbers of papers and versions.
NAMES = re.compile(
    r"\]\([^)]*\)|(?:\[|arXiv )\d{4}\.\d{5}"
    r"|(?:vLLM|Python|temperature)[ |]+\d[\d.]*|(?<=[A-Za-z])-\d[\d.]*|\d+\.\d+\.\d+"
)
UNITS = (
    "x|×|%|ms|µs|us|s|seconds?|minutes?|hours?|nats?|times|-fold|bytes|[kKMG]i?B|"
    "(?:tokens|pictures|nodes)(?:/s| per (?:step|second|node|picture))|"
    "launches|messages|copies|broadcasts|all-reduces"
)
RESULT = re.compile(
    rf"{NUMBER.pattern}(?:[ -]?(?:{UNITS})(?!\w)|(?<=\.\d)|(?<=\.\d\d)|(?<=\.\d{{3}}))"
)
HEADS = re.compile(r"^\|[^\n]*\n(?=\|[-| ]+\n)", re.MULTILINE)
CELL = re.compile(rf"^[*(\s±]*{NUMBER.pattern}")


class Fault(ValueError):
    """A figure that does not come from its file, in a sentence."""


# Expressions: Python's syntax, of which only what is written out here means anything.

OPERATORS: dict[type, Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv
}  # fmt: skip
FUNCTIONS: dict[str, Any] = {
    "min": min,
    "max": max,
    "median": statistics.median,
    "percent": lambda values: [100 * each for each in values],
}


@functools.cache
def document(root: Path, name: str) -> Any:
    """Reads a JSON file by the name that marks give it."""
    path = root / f"{name[1:]}.json" if name.startswith("/") else root / RESULTS / f"{name}.json"
    if not path.is_file():
        raise Fault(f"there is no file {path.relative_to(root).as_posix()}")
    return json.loads(path.read_text(encoding="utf-8"))


def part(value: Any, key: Any) -> Any:
    """Returns what has this key; of a list of objects, what each has there."""
    if isinstance(value, list) and not isinstance(key, int):
        return [part(each, key) for each in value]
    try:
        return value[key]
    except (KeyError, IndexError, TypeError):
        raise Fault(f"nothing is called {key!r}") from None


def picked(entries: Any, wanted: dict[str, Any]) -> Any:
    """Returns the entry of a list that has these values, or a list if several do."""
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise Fault("only of a list of objects an entry can be picked")
    found = [each for each in entries if all(fits(each.get(k), v) for k, v in wanted.items())]
    if not found:
        raise Fault(f"no entry has {', '.join(f'{k}={v!r}' for k, v in wanted.items())}")
    return found[0] if len(found) == 1 else found


def fits(value: Any, wanted: Any) -> bool:
    """Says whether a value is the wanted one, in which ``*`` stands for anything."""
    if isinstance(value, str) and isinstance(wanted, str):
        return fnmatchcase(value, wanted.replace("[", "[[]"))
    return value == wanted


def flat(value: Any) -> list:
    """Returns the numbers of nested lists, or of a single value, in one list."""
    return [each for item in value for each in flat(item)] if isinstance(value, list) else [value]


def combined(operation: Any, left: Any, right: Any) -> Any:
    """Combines two numbers, lists one by one, or a number with all of a list."""
    a, b = flat(left), flat(right)
    a, b = a * len(b) if len(a) == 1 else a, b * len(a) if len(b) == 1 else b
    values = [operation(x, y) for x, y in zip(a, b, strict=True)]
    return values[0] if len(values) == 1 else values


def value_of(node: ast.expr, names: dict[str, Any], root: Path, first: bool = False) -> Any:
    """Returns the value of a parsed expression; ``first`` is where a text names a file."""
    of = functools.partial(value_of, names=names, root=root)
    match node:
        case ast.Constant(value=str(name)) if first:
            return document(root, name)
        case ast.Constant(value):
            return value
        case ast.Name(name):
            return part(names, name)
        case ast.Attribute(inner, name):
            return part(of(inner, first=True), name)
        case ast.Subscript(inner, key):
            return part(of(inner, first=True), of(key))
        case ast.BinOp(left, sign, right) if type(sign) in OPERATORS:
            return combined(OPERATORS[type(sign)], of(left), of(right))
        case ast.Call(ast.Name(name), arguments, []) if name in FUNCTIONS:
            return FUNCTIONS[name](flat([of(each) for each in arguments]))
        case ast.Call(inner, [], keywords) if keywords:
            return picked(of(inner), {str(each.arg): of(each.value) for each in keywords})
    raise Fault(f"'{ast.unparse(node)}' is not among the operations")


def evaluate(expression: str, names: dict[str, Any], root: Path) -> Any:
    """Returns what an expression names."""
    try:
        return value_of(ast.parse(" ".join(expression.split()), mode="eval").body, names, root)
    except SyntaxError:
        raise Fault("the expression is none") from None


def values(expressions: str, names: dict[str, Any], root: Path) -> list[float]:
    """Returns the numbers that expressions name, in turn."""
    found = flat([evaluate(each, names, root) for each in expressions.split(";")])
    if not all(isinstance(each, int | float) for each in found):
        raise Fault("it names something that is no number")
    return found


def filled(text: str, numbers: list[float]) -> str:
    """Replaces the numbers of a text in turn, each rounded as the old one is written."""
    written = NUMBER.findall(text)
    if len(written) != len(numbers):
        raise Fault(f"{len(numbers)} values are named for {len(written)} numbers")
    rest = iter(numbers)

    def number(match: re.Match[str]) -> str:
        old = match[0]
        decimals = len(old.partition(".")[2])
        sign, comma = "+" if old[0] == "+" else "", "," if "," in old else ""
        value = round(next(rest), decimals) + 0.0  # no -0
        return f"{value:{sign}{comma}.{decimals}f}"

    return NUMBER.sub(number, text)


# Marks and what they generate.


def figure(match: re.Match[str], root: Path) -> str:
    """Returns a marked place with the figures of its file."""
    body = match["body"].strip()
    if body.startswith("none: "):
        return match[0]
    name, _, expressions = body.partition(" ")
    text = filled(match["text"], values(expressions, document(root, name), root))
    return match[0].removesuffix(match["text"] + "<!--/-->") + text + "<!--/-->"


def table(match: re.Match[str], root: Path) -> str:
    """Returns a marked table with the figures of its file."""
    form = r"(\S+)\s+(rows|columns):(.*)\n(?:rows|columns):(.*)"
    if not (parts := re.fullmatch(form, match["body"].strip(), re.DOTALL)):
        raise Fault(
            "a table is marked with its file, and with rows and columns on lines of their own"
        )
    names = document(root, parts[1])
    by_rows = parts[2] == "rows"
    lines = [line.split("|")[1:-1] for line in match["text"].splitlines()]
    body = lines[2:] if by_rows else list(zip(*lines, strict=True))[1:]
    labels = [cells[0].strip(" *`") for cells in body]
    entries, shown = parts[3].split("|"), parts[4].split("|")
    entries = entries * len(body) if len(entries) == 1 else entries
    first = 1 if by_rows else 2  # cells of an entry before its figures
    if len(entries) != len(body) or any(len(cells) - first != len(shown) for cells in body):
        raise Fault(f"{len(entries)} entries of {len(shown)} cells are named, the table has others")
    written = [
        [*cells[:first], *cells_of(entry, label, cells[first:], shown, names, root)]
        for entry, label, cells in zip(entries, labels, body, strict=True)
    ]
    if by_rows:
        lines[2:] = written
    else:
        lines = [list(line) for line in zip(next(zip(*lines, strict=True)), *written, strict=True)]
    text = "".join(f"|{'|'.join(cells)}|\n" for cells in lines)
    return match[0].removesuffix(match["text"]) + text


def cells_of(
    entry: str, label: str, cells: Any, shown: list[str], names: dict[str, Any], root: Path
) -> Iterator[str]:
    """Yields the cells of one entry with its figures."""
    labelled = names | {"label": float(label) if NUMBER.fullmatch(label) else label}
    found = evaluate(entry, labelled, root)
    own = labelled | (found if isinstance(found, dict) else {}) | {"entry": found}
    for cell, expressions in zip(cells, shown, strict=True):
        if not NUMBER.search(cell) or expressions.strip() == "none":
            yield cell
        else:
            try:
                yield filled(cell, values(expressions, own, root))
            except Fault as fault:
                raise Fault(f"{fault} ('{expressions.strip()}' of '{label}')") from None


def rewritten(name: str, text: str, root: Path) -> tuple[str, list[str]]:
    """Returns a page with the figures of its files, and a sentence for each that was another."""
    faults: list[str] = []

    def replaced(match: re.Match[str], make: Any) -> str:
        place = f"{name}:{text.count(chr(10), 0, match.start()) + 1}"
        try:
            new = make(match, root)
        except (ArithmeticError, TypeError, ValueError) as fault:
            faults.append(f"{place}: {' '.join(match['body'].split())[:160]}: {fault}.")
            return match[0]
        if new != match[0]:
            old, now = match[0].split("-->", 1)[1], new.split("-->", 1)[1]
            faults.append(f"{place}: {difference(old, now)}.")
        return new

    # Tables first: their cells hold no other marks, and no line is added or taken.
    page = TABLE.sub(functools.partial(replaced, make=table), text)
    return FIGURE.sub(functools.partial(replaced, make=figure), page), faults


def difference(old: str, new: str) -> str:
    """Says which line is the first that differs."""
    pairs = zip(old.splitlines(), new.splitlines(), strict=True)
    old, new = next((a, b) for a, b in pairs if a != b)
    return f"it says '{old.replace('<!--/-->', '')}', its file '{new.replace('<!--/-->', '')}'"


# Figures that come from no file.


def spaces(text: str) -> str:
    """Returns as many spaces, so that lines stay where they are."""
    return re.sub(r"\S", " ", text)


def without(pattern: re.Pattern[str], text: str) -> str:
    """Returns a text with spaces for what a pattern matches."""
    return pattern.sub(lambda match: spaces(match[0]), text)


def unmarked(name: str, text: str) -> Iterator[str]:
    """Yields a sentence for each line with figures of no file or with a mark that is none."""
    text = without(FIGURE, without(TABLE, without(CODE, text)))
    while note := NOTE.search(text):
        end = section_end(text, note.end()) if note["section"] else block_end(text, note.end())
        text = text[: note.start()] + spaces(text[note.start() : end]) + text[end:]
    text = without(HEADS, without(NAMES, text))
    for number, line in enumerate(text.splitlines(), 1):
        place = f"{name}:{number}"
        if MARK.search(line):
            yield f"{place}: this mark is not understood."
        if found := [f"'{each}'" for each in figures_in(line)]:
            yield f"{place}: no file backs {', '.join(found)}, and no mark says why."


def figures_in(line: str) -> Iterator[str]:
    """Yields what looks like a result: numbers with a unit, fractions, numbers of cells."""
    if not line.startswith("|"):
        yield from (match[0] for match in RESULT.finditer(line))
    for cell in line.split("|")[2:-1] if line.startswith("|") else ():
        found = [match[0] for match in RESULT.finditer(cell)]
        yield from found or [match[0].strip(" *") for match in [CELL.search(cell)] if match]


def block_end(text: str, start: int) -> int:
    """Returns where the paragraph, list or table ends that a place is in."""
    end = text.find("\n\n", start)
    return len(text) if end < 0 else end


def section_end(text: str, start: int) -> int:
    """Returns where the section ends that a place is in."""
    ranks = re.findall(r"^(#+) ", text[:start], re.MULTILINE)
    next_heading = re.compile(rf"^#{{1,{len(ranks[-1]) if ranks else 1}}} ", re.MULTILINE)
    end = next_heading.search(text, start)
    return end.start() if end else len(text)


def starts_of_lines(name: str, text: str) -> Iterator[str]:
    """Yields a sentence for each mark that starts a line, which would end its paragraph."""
    for match in FIGURE.finditer(text):
        if match.start() == 0 or text[match.start() - 1] == "\n":
            line = text.count("\n", 0, match.start()) + 1
            yield f"{name}:{line}: a mark may not start a line within a paragraph."


# The index of the results.

HEAD = """# Results

Each file holds what one command measured, with the command itself; `make figures` writes this page
and the figures in the README and the docs from them.

"""
COLUMNS = "| file | what | by | machine | version | read by |\n|---|---|---|---|---|---|\n"
ROW = re.compile(r"^\| \[([^\]]+)\]\([^)]*\) \|([^|]*)\|", re.MULTILINE)


def index(root: Path) -> tuple[str, list[str]]:
    """Returns the page that lists the results, and a sentence for each fault in it.

    What a file is about is kept from the page as it is; all else comes from the files' heads.
    """
    path = root / INDEX
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    about = {name: words.strip() for name, words in ROW.findall(old)}
    texts = {p: p.read_text(encoding="utf-8") for p in pages(root)}
    text, folder, faults = HEAD, None, []
    for file in sorted((root / RESULTS).rglob("*.json"), key=lambda p: (p.parent, p)):
        name = file.relative_to(root / RESULTS).as_posix()
        if file.parent != folder:
            folder = file.parent
            title = "Commits" if folder == root / RESULTS else folder.name.capitalize()
            text += f"{'' if text.endswith(HEAD) else chr(10)}## {title}\n\n"
            text += COLUMNS
        head = json.loads(file.read_text(encoding="utf-8"))
        users = [p.name for p, page in texts.items() if name.removesuffix(".json") in page]
        source = origin(head if isinstance(head, dict) else {})
        cells = [f"[{name}]({name})", about.get(name, ""), *source, ", ".join(users)]
        text += f"|{'|'.join(f' {cell} ' if cell else ' ' for cell in cells)}|\n"
        if name not in about:
            faults.append(f"{INDEX}: {name} is missing.")
        elif not about[name]:
            faults.append(f"{INDEX}: it does not say what {name} is about.")
    if not faults and text != old:
        faults.append(f"{INDEX}: it is out of date.")
    return text, faults


def origin(head: dict[str, Any]) -> tuple[str, str, str]:
    """Returns program, machine and version as a result's head gives them."""
    setting = head.get("setting", {})
    head = setting | head
    program = " ".join(re.findall(r"\w+\.py|vllm-specplus \w+", head.get("command", ""))[:1])
    machine, versions = head.get("machine", ""), head.get("versions", {})
    if isinstance(machine, dict):
        device = machine.get("device_name") or machine.get("cpu_model", "")
        machine = f"{device}, {machine.get('cpu_cores')} cores"
    elif "cores" in head:
        machine += f", {head['cores']} cores"
    version = versions.get("vllm") or head.get("vllm", "")
    version = f"vLLM {version}" if version else ""
    if "commit" in versions:
        version += f"; {versions['commit']}"
    if "before" in setting:
        version += f"; {setting['before']} and {setting.get('now', 'now')}"
    return f"`{program}`" if program else "", machine, version


def pages(root: Path) -> list[Path]:
    """Lists the pages whose figures are checked."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def checked(root: Path) -> tuple[dict[Path, str], list[str]]:
    """Returns every page as it should be, and a sentence for each fault of what is."""
    new, faults = {}, []
    for path in pages(root):
        name, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        new[path], found = rewritten(name, text, root)
        faults += [*found, *unmarked(name, text), *starts_of_lines(name, text)]
    new[root / INDEX], found = index(root)
    return new, faults + found


def main() -> None:
    new, faults = checked(ROOT)
    if "--check" not in sys.argv:
        for path, text in new.items():
            path.write_text(text, encoding="utf-8")
        faults = checked(ROOT)[1]
    print("\n".join(faults) or "Every figure is that of its file.")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
