"""Questions that nothing learns from: the list, how they are recognised, and that there is no way
around."""

from __future__ import annotations

import ast
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.training.toy import NOBODY, WORDS, texts
from vllm_specplus.training import splits
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.splits import Gate, HeldOut, committed, fingerprint
from vllm_specplus.training.texts import Text, prompt_id

ROOT = Path(__file__).parents[2]
QUESTION = "Who plays young Damon in the Vampire Diaries?"  # Spec-Bench's 323
WHOLE_LIST = 240


def test_the_list_is_all_of_spec_bench_without_its_texts():
    rows = json.loads(splits.LIST.read_text())["questions"]
    assert len({row["id"] for row in rows}) == WHOLE_LIST
    assert {"81", "323", "559"} <= committed().ids
    hashes = [each for row in rows for each in row["runs"]]
    # None is found by what others ask as well: templates.
    assert len(set(hashes)) == len(hashes)
    assert "Damon" not in splits.LIST.read_text()


@pytest.mark.parametrize(
    "copy",
    [
        QUESTION,
        QUESTION.lower().rstrip("?"),
        f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n",
        "Who plays   young\nDamon, in *the* Vampire-Diaries",
        "Ｗｈｏ plays young Damon in the Vampire Diaries",  # full width
        "Some researchers state that forests do not only provide benefits. Then: "
        + QUESTION + " Answer in one word.",
    ],
)  # fmt: skip
def test_copies_are_recognised(copy):
    assert committed().holds(copy)


@pytest.mark.parametrize(
    "other",
    [
        "", "Who plays young Damon?", "Who plays old Damon in the Vampire Diaries?",
        "What is the capital of France, and how many people live in it today?",
    ],
)  # fmt: skip
def test_other_questions_are_not(other):
    assert not committed().holds(other)


def test_short_questions_are_recognised_as_a_whole():
    held = NOBODY.and_also(["Who are you?"])
    assert held.holds("who are YOU")
    assert not held.holds("Tell me who are you and what you do all day long")
    assert len(fingerprint("Who are you?")) == 1


def test_the_gate_reads_what_tokens_say():
    def decode(tokens):
        return " ".join(WORDS[token] for token in tokens)

    asked = [WORDS.index(word) for word in QUESTION.lower().rstrip("?").split()]
    held = Text("1", (*asked, 5), len(asked), "target")
    written = Text("2", (4, *asked), 1, "target")  # the target asked it itself
    told = io.StringIO()
    gate = Gate(committed(), decode, Console(file=told, width=200))
    assert gate.admit([*texts(5), held, written]) == texts(5)
    assert "2 of 7 texts hold questions that are held out" in told.getvalue()
    with pytest.raises(TrainingError, match="nothing is left to learn from: bring others"):
        gate.admit([held])
    # What makes the difference is the list.
    assert len(Gate(NOBODY, decode, Console(quiet=True)).admit([held, written])) == 2


def test_without_a_tokenizer_known_prompts_are_recognised():
    first, *others = texts(5)
    held = HeldOut(frozenset(), frozenset(), frozenset({prompt_id(first.tokens[: first.start])}))
    assert Gate(held, None, Console(quiet=True)).admit([first, *others]) == others


def calls(tree: ast.AST, name: str) -> int:
    """How often something of this name is called."""
    nodes = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return sum(getattr(each, "attr", getattr(each, "id", None)) == name for each in nodes)


def trees() -> dict[str, ast.Module]:
    folder = ROOT / "vllm_specplus" / "training"
    return {
        path.relative_to(folder).as_posix(): ast.parse(path.read_text())
        for path in folder.rglob("*.py")
    }


def test_what_is_learnt_from_has_passed_the_gate():
    """Batches with gradients are made in one place, of texts that the gate has admitted; what
    recipes see before, to count their vocabulary or to standardise states, is admitted by the run.
    Files that make others, to measure, are listed here."""
    measuring = {
        "measure.py", "recipes/acceptance_head.py", "recipes/judge.py", "recipes/layerskip.py",
        "recipes/router.py", "recipes/spec_ee.py",
    }  # fmt: skip
    making = {name for name, tree in trees().items() if calls(tree, "Batches")}
    assert making - measuring == {"trainer.py"}
    for name in measuring & making:
        for node in ast.walk(trees()[name]):
            if isinstance(node, ast.FunctionDef) and calls(node, "Batches"):
                allowed = {"measure"} | ({"_moments"} if name == "recipes/judge.py" else set())
                assert node.name in allowed, f"{name}: {node.name} makes batches"
    # Pictures hold no questions: the second one divides what its target has drawn itself.
    makers = {"run.py", "picture_head.py"}
    assert {n for n, tree in trees().items() if calls(tree, "Setup")} == makers
    # The run's texts, and those of an epoch.
    assert calls(trees()["trainer.py"], "admit") == 2
    (finish,) = (
        node for node in ast.walk(trees()["run.py"])
        if isinstance(node, ast.FunctionDef) and calls(node, "Setup")
    )  # fmt: skip
    assert calls(finish, "admit") == 1


def test_nothing_in_the_package_holds_a_question():
    """Neither prompts, nor tables that were learnt from them as text."""
    for path in (ROOT / "vllm_specplus").rglob("*"):
        if path.suffix in (".json", ".jsonl", ".txt", ".py", ".md"):
            assert not committed().holds(path.read_text(encoding="utf-8")), path
