"""Where texts come from: what the writer's process leaves, goes on with, and says."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.training.toy import NOBODY, WORDS, save_target, texts
from vllm_specplus.training import sources, writer
from vllm_specplus.training.data import Prompt, language_of
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.folder import RunFolder
from vllm_specplus.training.sources import Wanted, gather, gather_measured, split
from vllm_specplus.training.splits import committed
from vllm_specplus.training.texts import Text, load_texts, prompt_id, to_line
from vllm_specplus.training.writer import Job, Pen, ask_itself, read_prompts, whole_lines

HELD_OUT = "who plays young damon in the vampire diaries"


class FakePen(Pen):
    """Writes what a rule says; counts the requests."""

    def __init__(self, job: Job, answer):
        super().__init__(job)
        self.answer, self.asked = answer, []

    def write(self, lines):
        for line in lines:
            row = json.loads(line)
            self.asked.append(row)
            own = self.answer(row)
            yield to_line(Text(row["id"], (*row["tokens"], *own), len(row["tokens"]), "target"))


def ids(words: str) -> list[int]:
    return [WORDS.index(word) for word in words.split()]


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return save_target(tmp_path_factory.mktemp("target"))


def job(tmp_path: Path, target: Path, **keys) -> Job:
    defaults = {"model": str(target), "prompts": str(tmp_path / "questions.jsonl"),
                "out": str(tmp_path / "out.jsonl"), "tokens": 10**6, "length": 40}  # fmt: skip
    return Job(**defaults | keys)


def wanted(target: Path, data: Path | None = None, **keys) -> Wanted:
    return Wanted(**{"target": target, "data": data, "tokens": 10**6, "length": 40, "seed": 0,
                     "ray": False} | keys)  # fmt: skip


def test_the_target_asks_itself_behind_the_users_header(tmp_path, target):
    questions = ["what is the a b c", HELD_OUT, "a", "who is in the d e f"]
    pen = FakePen(
        job(tmp_path, target, ask=4),
        lambda row: ids(questions[int(row["id"].split()[-1])] + " <end>"),
    )
    prompts = ask_itself(pen._job, language_of(target), pen)
    assert {tuple(row["tokens"]) for row in pen.asked} == {tuple(ids("<user>"))}
    # Neither the one that is held out, nor the one that is none.
    assert [list(prompt.tokens) for prompt in prompts] == [
        ids(f"<user> {each} <end> <assistant>") for each in (questions[0], questions[3])
    ]


def test_without_a_chat_template_it_cannot(tmp_path):
    bare = save_target(tmp_path / "bare", template=None)
    with pytest.raises(
        TrainingError, match=r"no chat template, .*bring texts or prompts with --data"
    ):
        ask_itself(
            job(tmp_path, bare, ask=4), language_of(bare), FakePen(job(tmp_path, bare), None)
        )


def prompts_file(path: Path, count: int) -> list[Prompt]:
    prompts = [Prompt(f"q{i}", (4 + i, 5)) for i in range(count)]
    writer.write_prompts(path, prompts)
    assert read_prompts(path) == prompts
    return prompts


def written(monkeypatch, job: Job, answer=lambda row: [7, 8, 1]) -> FakePen:
    pen = FakePen(job, answer)
    monkeypatch.setattr(writer, "Pen", lambda job: pen)
    writer.write(job)
    return pen


def test_a_job_that_was_ended_goes_on_with_what_is_missing(tmp_path, target, monkeypatch):
    given = job(tmp_path, target)
    prompts_file(tmp_path / "questions.jsonl", 9)

    def ended_at_the_fifth(row, count=[0]):  # noqa: B006  (counts)
        count[0] += 1
        if count[0] == 5:
            raise KeyboardInterrupt
        return [7, 8, 1]

    with pytest.raises(KeyboardInterrupt):
        written(monkeypatch, given, ended_at_the_fifth)
    out = tmp_path / "out.jsonl"
    with out.open("a") as file:
        file.write('{"id": "q3", "tok')  # a line that was not finished
    pen = written(monkeypatch, given)
    assert len(pen.asked) == 5
    assert sorted(text.id for text in load_texts(out)) == [f"q{i}" for i in range(9)]
    assert {row["temperature"] for row in pen.asked} <= set(writer.ANSWERS)
    # Nothing is left to do.
    assert written(monkeypatch, given).asked == []


def test_a_budget_ends_a_job(tmp_path, target, monkeypatch):
    prompts_file(tmp_path / "questions.jsonl", 9)
    pen = written(monkeypatch, job(tmp_path, target, tokens=12))
    assert len(pen.asked) == 3  # of five tokens each
    assert written(monkeypatch, job(tmp_path, target, tokens=12)).asked == []


def test_answers_fit_into_the_length(tmp_path, target, monkeypatch):
    long = [Prompt("a", tuple(range(30))), Prompt("b", (1,) * 40), Prompt("c", (1, 2))]
    writer.write_prompts(tmp_path / "questions.jsonl", long)
    pen = written(monkeypatch, job(tmp_path, target))
    assert {row["id"]: row["most"] for row in pen.asked} == {"a": 10, "c": 20}


def test_a_file_that_is_cut_is_cut_behind_a_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert whole_lines(path) == []
    path.write_text('{"a": 1}\n{"b": 2}\n{"c"')
    assert whole_lines(path) == [{"a": 1}, {"b": 2}]
    assert path.read_text() == '{"a": 1}\n{"b": 2}\n'


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "out")
    folder.path.mkdir()
    return folder


def quiet() -> Console:
    return Console(quiet=True)


def rows_file(path: Path, *rows: dict) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_given_texts_are_kept_and_held_out_ones_told(tmp_path, target, folder):
    data = rows_file(
        tmp_path / "data.jsonl", {"id": "a", "tokens": [5] * 50, "start": 2},
        {"tokens": [5, 6], "start": 2}, {"prompt": HELD_OUT, "answer": "a"},
    )  # fmt: skip
    told = io.StringIO()
    gather(wanted(target, data), folder, language_of(target), committed(), Console(file=told))
    # Cut to 40 tokens; the second one leaves nothing to learn.
    assert load_texts(folder.texts) == [Text("a", (5,) * 40, 2, "given")]
    assert "1 rows" in told.getvalue()
    assert "held out" in told.getvalue()
    data.unlink()  # it is not read again
    gather(wanted(target, data), folder, language_of(target), committed(), quiet())


def test_texts_that_teach_nothing_are_refused(tmp_path, target, folder):
    data = rows_file(tmp_path / "data.jsonl", {"tokens": [5, 6], "start": 2})
    with pytest.raises(TrainingError, match="no text has anything behind its prompt"):
        gather(wanted(target, data), folder, language_of(target), NOBODY, quiet())
    assert not folder.texts.exists()


@pytest.fixture
def no_engine(monkeypatch):
    """Jobs are done in this process by a rule."""

    def do(job, folder, what, tokens, console):
        writer.write(job)
        return load_texts(Path(job.out))

    monkeypatch.setattr(sources, "do", do)


def test_the_target_answers_questions(tmp_path, target, folder, no_engine, monkeypatch):
    data = rows_file(
        tmp_path / "data.jsonl", {"prompt": "what is a"}, {"tokens": [5, 6], "start": 1}
    )
    given = job(tmp_path, target)
    monkeypatch.setattr(writer, "Pen", lambda job: FakePen(given, lambda row: [7, 1]))
    gather(wanted(target, data), folder, language_of(target), NOBODY, quiet())
    own, answered = load_texts(folder.texts)
    assert own.tokens == (5, 6)
    assert answered.tokens == (*ids("<user> what is a <end> <assistant>"), 7, 1)
    assert answered.writer == "target"


def test_what_is_measured_on_is_answered_greedily_and_not_learnt(
    tmp_path, target, folder, no_engine, monkeypatch
):
    data = rows_file(
        tmp_path / "m.jsonl", {"question_id": 323, "turns": [HELD_OUT]}, {"prompt": "is it a"}
    )
    pen = FakePen(job(tmp_path, target), lambda row: [7, 1])
    monkeypatch.setattr(writer, "Pen", lambda job: pen)
    held = gather_measured(data, wanted(target), folder, language_of(target), quiet())
    assert {row["temperature"] for row in pen.asked} == {0.0}
    measured = load_texts(folder.measured_texts)
    assert len(measured) == 2
    assert held.holds("Is it a")
    assert {prompt_id(text.tokens[: text.start]) for text in measured} <= held.prompts
    # The same questions in the data are not learnt then.
    learnt = rows_file(tmp_path / "d.jsonl", {"prompt": "is it a", "answer": "b"},
                       {"prompt": "is it b", "answer": "b"})  # fmt: skip
    gather(wanted(target, learnt), folder, language_of(target), held, quiet())
    assert [t.tokens for t in load_texts(folder.texts)] == [
        tuple(ids("<user> is <unk> b <end> <assistant> b <end>"))
    ]


def test_a_writer_that_fails_is_told_in_a_sentence(tmp_path, folder, monkeypatch):
    """A target that vLLM cannot load, in the writer's own process."""
    monkeypatch.setattr(sources, "LOOK", 0.01)
    given = Job(model=str(tmp_path / "none"), prompts=str(tmp_path / "q"), out=str(tmp_path / "o"),
                tokens=1, length=8)  # fmt: skip
    with pytest.raises(TrainingError) as told:
        sources.do(given, folder, "texts", 1, quiet())
    assert "none/config.json cannot be read: No such file" in str(told.value)
    assert "\n" not in str(told.value)


def test_what_ended_a_writer_is_told(tmp_path):
    log = tmp_path / "writer.log"
    log.write_text("loading\nTraceback\nRuntimeError: out of memory\n")
    assert sources.failure(log) == (
        f"the target's texts could not be written (RuntimeError: out of memory): see {log}"
    )
    log.write_text("Error: no model\nsomething at exit\n")
    assert sources.failure(log) == "no model"
    log.write_text("")
    assert "ended from outside" in sources.failure(log)


@pytest.mark.parametrize(("count", "measured"), [(2, 1), (40, 2), (2500, 125), (9000, 200)])
def test_a_twentieth_is_measured_on(count, measured):
    given = [Text(str(i), (i, 1, 2), 1, "target") for i in range(count)]
    held, learnt = split(given, seed=0)
    assert len(held) == measured
    assert {*held} | {*learnt} == {*given}
    assert split(given[::-1], 0)[0] == held  # whatever order they came in
    assert count < 40 or split(given, 1)[0] != held


def test_texts_of_one_prompt_stay_together():
    given = [Text(f"{i} {j}", (i, j, 2), 1, "target") for i in range(30) for j in range(5)]
    held, learnt = split(given, 0)
    assert not {text.tokens[0] for text in held} & {text.tokens[0] for text in learnt}
    with pytest.raises(TrainingError, match="there is one prompt in all"):
        split(given[:5], 0)
    uneven = [Text(str(j), (1, j), 1, "target") for j in range(99)]
    assert split([*uneven, Text("x", (2, 3), 1, "target")], 0)[1]


def test_tokens_are_counted_while_they_are_written(tmp_path):
    path = tmp_path / "texts.jsonl"
    assert sources.count_tokens(path) == 0
    given = texts(7)
    path.write_text("".join(f"{to_line(text)}\n" for text in given) + '{"id": "1", "tok')
    assert sources.count_tokens(path) == sum(len(text.tokens) for text in given)
