"""Texts and the file that keeps them."""

from __future__ import annotations

import pytest

from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.texts import Text, load_texts, prompt_id, to_line

TEXTS = [
    Text("81", (5, 6, 7, 8), 2, "target"),
    Text("b", (1,), 0, "draft", (0,)),
]  # fmt: skip


def test_what_is_kept_is_read(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(f"{to_line(text)}\n" for text in TEXTS))
    assert load_texts(path) == TEXTS


@pytest.mark.parametrize("line", ['{"id": "a"}', "[1]", '{"id": "a", "tok', "3"])
def test_a_damaged_line_is_named(tmp_path, line):
    path = tmp_path / "texts.jsonl"
    path.write_text(f"{to_line(TEXTS[0])}\n{line}\n")
    with pytest.raises(TrainingError, match=r"line 2 is no text of a run: remove the file"):
        load_texts(path)


def test_a_cut_text_keeps_what_belongs_together():
    text = Text("a", (5, 6, 7, 8), 3, "given", (-1, -1, -1, 1))
    assert text.cut(4) is text
    assert text.cut(2) == Text("a", (5, 6), 2, "given", (-1, -1))


def test_prompts_have_ids_of_their_tokens():
    assert prompt_id([1, 23]) == prompt_id((1, 23))
    assert len({prompt_id(each) for each in ([1, 23], [12, 3], [123], [])}) == 4
