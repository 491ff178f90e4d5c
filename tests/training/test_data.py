"""Data of users: what rows may be, and what is said of those that are none."""

from __future__ import annotations

import json

import pytest

from tests.training.toy import NOBODY, VOCAB, WORDS, save_target
from vllm_specplus.training.data import Language, language_of, read_data
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.splits import committed

QUESTION = "Who plays young Damon in the Vampire Diaries"  # Spec-Bench's 323


@pytest.fixture(scope="module")
def language(tmp_path_factory) -> Language:
    return language_of(save_target(tmp_path_factory.mktemp("target")))


@pytest.fixture
def read(tmp_path, language):
    def read(*rows, held_out=NOBODY, language=language):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
        return read_data(path, language, held_out)

    return read


def ids(words: str) -> tuple[int, ...]:
    return tuple(WORDS.index(word) for word in words.split())


PROMPT = ids("<user> what is a <end> <assistant>")


def test_texts_of_all_kinds(read):
    usual = {"id": "x", "tokens": [5, 6, 7], "start": 2}
    data = read(
        usual,
        {"prompt": "what is a", "answer": "the b"},
        "",
        {"messages": [{"role": "user", "content": "what is a"},
                      {"role": "assistant", "content": "the b"}]},
        {"choices": [{"prompt_token_ids": [4, 5], "token_ids": [6, 1]}]},
        {"prompt_token_ids": [4, 5], "choices": [{"token_ids": [7]}, {"token_ids": [8]}]},
    )  # fmt: skip
    tokens, answered, chat, *traffic = data.texts
    assert (tokens.id, tokens.tokens, tokens.start, tokens.writer) == ("x", (5, 6, 7), 2, "given")
    for text in (answered, chat):
        assert text.tokens == PROMPT + ids("the b <end>")
        assert text.start == len(PROMPT)
    assert answered.id == chat.id
    assert [(t.tokens, t.start, t.writer) for t in traffic] == [
        ((4, 5, 6, 1), 2, "traffic"), ((4, 5, 7), 2, "traffic"), ((4, 5, 8), 2, "traffic"),
    ]  # fmt: skip
    assert data.prompts == []


def test_questions_of_all_kinds(read):
    data = read(
        {"prompt": "what is a"},
        {"question_id": 7, "turns": ["what is a", "is the b"]},
        {"id": "m", "messages": [{"role": "user", "content": "what is a"}]},
        {"conversations": [{"from": "human", "value": "what is a"}, {"from": "gpt", "value": "b"}]},
    )  # fmt: skip
    bare, turns, chat, sharegpt = data.prompts
    assert bare.tokens == turns.tokens == chat.tokens == sharegpt.tokens == PROMPT
    assert (turns.id, chat.id) == ("7", "m")
    assert data.texts == []


def test_what_is_wrong_by_characters_is_labelled_by_tokens(read):
    wrong = {"prompt": "what is a", "answer": "the b c d", "error": [4, 7]}
    right = {"prompt": "what is a", "answer": "the b", "error": None}
    first, second = read(wrong, right).texts
    before = (-1,) * len(PROMPT)
    assert first.labels == (*before, 1, 0, 0, -1, -1)
    assert second.labels == (*before, 1, 1, -1)


def test_rejected_drafts_are_labelled(read):
    (text,) = read({"tokens": [5, 6, 7, 8], "start": 1, "rejected": [2]}).texts
    assert text.labels == (-1, 1, 0, 1)


def test_held_out_questions_are_left_out(read):
    copies = [
        {"question_id": 323, "turns": ["is it a copy that was translated?"]},
        {"question_id": "mine", "turns": [f"{QUESTION}?"]},
        {"prompt": f"Tell me:\n{QUESTION.upper()}, please.", "answer": "a"},
        {"messages": [{"role": "user", "content": QUESTION.replace(" ", "  ")}]},
    ]
    data = read(*copies, {"id": 323, "prompt": "what is a"}, held_out=committed())
    assert len(data.held_out) == 4
    assert [prompt.id for prompt in data.prompts] == ["323"]
    assert data.wordings == ["what is a"]
    with pytest.raises(TrainingError, match="all of its questions are held out"):
        read(*copies, held_out=committed())
    # The list decides, nothing else.
    assert len(read(*copies).prompts) == 3


GOOD = {"tokens": [5], "start": 0}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"tokens": [1,', r"line 2: not valid JSON .*: mend or remove it"),
        ("[1]", "line 2: a row must be a JSON object"),
        ({"tokens": [VOCAB]}, rf"the id {VOCAB}, but the target knows 0 to {VOCAB - 1}: .*another"),
        ({"tokens": []}, "tokens is .*: it must be a list of ids, not empty"),
        ({"tokens": [1.5]}, "it must be a list of ids"),
        ({"tokens": [True]}, "it must be a list of ids"),
        ({"tokens": [1, 2], "start": 3}, "start is 3: it must be the number of prompt tokens"),
        ({"tokens": [1, 2], "labels": [1]}, "there are 1 labels for 2 tokens"),
        ({"tokens": [1, 2], "labels": [1, 2]}, "labels are .*each must be 1, 0 or -1"),
        ({"tokens": [1, 2], "start": 1, "rejected": [0]}, "rejected is .*behind the prompt"),
        ({"prompt": "a", "answer": ""}, "the answer is '': it must be a text"),
        ({"prompt": 3, "answer": "a"}, "the prompt is 3: it must be a text"),
        ({"prompt": "a", "answer": "b", "eror": None}, "unknown key 'eror' .allowed: answer, "),
        ({"prompt": "a", "answer": "b", "error": [0, 9]}, "error is .*characters of the answer"),
        ({"prompt": "a", "answer": "b", "error": 1}, "error is 1: it must be null, or"),
        ({"choices": [{"text": "a"}]}, 'ask the server with "return_token_ids": true'),
        ({"messages": []}, "messages has no message of the user"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no message of the user"),
        ({"text": "a"}, "a row needs exactly one of turns, messages"),
    ],
)  # fmt: skip
def test_a_row_that_is_none_is_told_in_one_sentence(read, row, message):
    with pytest.raises(TrainingError, match=message) as told:
        read(GOOD, row)
    assert "data.jsonl, line 2: " in str(told.value)
    assert "\n" not in str(told.value)


def test_files_that_cannot_be_read(tmp_path, language):
    with pytest.raises(TrainingError, match="No such file"):
        read_data(tmp_path / "none.jsonl", language, NOBODY)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(TrainingError, match="nothing to learn from: it has no rows"):
        read_data(tmp_path / "empty.jsonl", language, NOBODY)
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TrainingError, match="cannot be read"):
        read_data(tmp_path / "binary.jsonl", language, NOBODY)


def test_without_a_tokenizer_tokens_can_be_read(read):
    bare = Language(VOCAB, None)
    assert len(read(GOOD, language=bare).texts) == 1
    with pytest.raises(TrainingError, match="the target's folder no tokenizer: write tokens"):
        read({"prompt": "a"}, language=bare)


def test_targets_that_are_none(tmp_path):
    with pytest.raises(TrainingError, match=r"config.json cannot be read.*; name the folder of a"):
        language_of(tmp_path)
    other = save_target(tmp_path / "other", vocab=VOCAB - 1)
    with pytest.raises(TrainingError, match="it belongs to another model"):
        language_of(other)
    (other / "tokenizer.json").write_text("{}")
    with pytest.raises(TrainingError, match="cannot be read"):
        language_of(other)
