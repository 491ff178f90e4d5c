"""Data that a user brings (``--data``): JSON lines of texts, and of questions for the target.

Each row is one of

* ``{"tokens": [...], "start": n}``: a text as ids of the target, whose first ``n`` are the prompt
  (what a run keeps as ``texts.jsonl``); with ``"rejected": [...]`` the indices of those that took
  the place of a rejected draft;
* a response of vLLM's server, as it comes with ``"return_token_ids": true``: served traffic;
* ``{"prompt": ..., "answer": ...}``, for ``judge`` with ``"error": [first, behind] or null``,
  characters of the answer that are wrong;
* ``{"problem": ..., "steps": [{"writer": ..., "text": ...}], "candidate": ..., "draft_score": ...,
  "target_score": ...}``, for ``router``: a step that two models have written, as
  ``vllm_specplus.arbitrage.labels`` keeps them;
* ``{"messages": [...]}`` that end with the assistant's: only that last one is learnt from;
* without an answer, a question: ``{"prompt": ...}``, ``{"messages": [...]}``, ShareGPT's
  ``{"conversations": [...]}``, or Spec-Bench's ``{"question_id": ..., "turns": [...]}``.

Rows may have an ``id``. Questions that are held out (:mod:`splits`) are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from vllm_specplus.arbitrage.steps import Writer, router_text
from vllm_specplus.bench import InputError
from vllm_specplus.bench.dataset import Question, parse_row
from vllm_specplus.files import positive, read_json
from vllm_specplus.strict import StrictModel, quoted, sentences, told
from vllm_specplus.training.errors import TrainingError
from vllm_specplus.training.splits import HeldOut
from vllm_specplus.training.texts import UNKNOWN, Text, prompt_id

ERROR_WANTED = "it must be null, or [first, behind], characters of the answer"


class WrittenStep(StrictModel):
    """A step of an answer, for routers."""

    writer: Writer
    text: str


@dataclass(frozen=True)
class Prompt:
    """What the target has to answer."""

    id: str
    tokens: tuple[int, ...]


@dataclass
class Data:
    """What a file has brought."""

    texts: list[Text] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    """Ids of the questions that were left out because they are held out."""
    wordings: list[str] = field(default_factory=list)
    """What was asked, where it came as text."""


@dataclass(frozen=True)
class Language:
    """How text and tokens of a target belong together."""

    vocab: int
    """Ids that the target knows."""
    tokenizer: Any
    """A tokenizer of transformers; None if the target's folder has none."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without any special ones."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """What the target reads before it answers; without a chat template the contents alone."""
        if not self.tokenizer.chat_template:
            return "\n".join(message["content"] for message in messages)
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )


def language_of(target: Path) -> Language:
    """The vocabulary and the tokenizer of a target's folder; TrainingError if there is no model, or
    if the tokenizer is another model's."""
    try:
        config = read_json(target / "config.json", f"{target}/config.json")
        config = config.get("text_config", config)
        vocab = positive(config, "vocab_size", f"{target}/config.json")
    except ValueError as error:
        raise TrainingError(f"--target: {error}; name the folder of a model") from None
    if not any((target / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        return Language(vocab, None)
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(target, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0][:200]
        raise TrainingError(f"the tokenizer of {target} cannot be read: {first}") from None
    if len(tokenizer) > vocab:
        raise TrainingError(
            f"the tokenizer of {target} has {len(tokenizer):,} tokens, but its model knows "
            f"{vocab:,}: it belongs to another model, put the right one into the folder"
        )
    return Language(vocab, tokenizer)


def read_data(path: Path, language: Language, held_out: HeldOut) -> Data:
    """The texts and questions of a file; TrainingError names the first line that is neither."""
    data = Data()
    for number, row in rows(path):
        try:
            _take(row, data, language, held_out)
        except (TrainingError, InputError) as error:
            raise TrainingError(f"{path}, line {number}: {error}") from None
    if not data.texts and not data.prompts:
        why = "all of its questions are held out" if data.held_out else "it has no rows"
        raise TrainingError(f"{path} has nothing to learn from: {why}; name another file")
    return data


def rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of each line that is not empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrainingError(
            f"{path} cannot be read ({reason}): name a file of JSON lines"
        ) from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TrainingError(
                f"{path}, line {number}: not valid JSON ({str(error)[:80]}): mend or remove it"
            ) from None


def _take(row: Any, data: Data, language: Language, held_out: HeldOut) -> None:
    """Adds what a row holds to ``data``; TrainingError or InputError say what is wrong with it."""
    if not isinstance(row, dict):
        raise TrainingError("a row must be a JSON object")
    if "tokens" in row:
        data.texts.append(of_tokens(row, language))
    elif "choices" in row:
        data.texts += of_traffic(row, language)
    elif language.tokenizer is None:
        raise TrainingError(
            "it has no tokens, and the target's folder no tokenizer: write tokens, or add one"
        )
    elif "candidate" in row:
        text, asked = of_step(row, language)
        keep_or_drop(data, held_out, text.id, asked, text)
    elif "answer" in row or _last_role(row) == "assistant":
        text, asked = answered(row, language)
        keep_or_drop(data, held_out, text.id, asked, text)
    else:
        question = parse_row(row, default_id="")
        asked = wording(question)
        messages = question.messages or ({"role": "user", "content": asked},)
        tokens = tuple(language.encode(language.prompt(list(messages))))
        prompt = Prompt(question.id or prompt_id(tokens), tokens)
        listed = "turns" in row and question.id in held_out.ids
        keep_or_drop(data, held_out, prompt.id, asked, prompt, listed)


def keep_or_drop(
    data: Data, held_out: HeldOut, name: str, asked: str, what: Text | Prompt, listed: bool = False
) -> None:
    """Adds a text or a prompt, unless what was ``asked`` is held out."""
    if listed or held_out.holds(asked):
        data.held_out.append(name)
        return
    data.wordings.append(asked)
    if isinstance(what, Text):
        data.texts.append(what)
    else:
        data.prompts.append(what)


def wording(question: Question) -> str:
    """What a question says, without a template."""
    return question.prompt or "\n".join(each["content"] for each in question.messages or ())


def _last_role(row: dict) -> Any:
    messages = row.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    return last.get("role") if isinstance(last, dict) else None


def of_tokens(row: dict, language: Language) -> Text:
    """The text of a row of tokens."""
    tokens = checked_tokens(row["tokens"], "tokens", language)
    start = row.get("start", 0)
    if type(start) is not int or not 0 <= start <= len(tokens):
        raise TrainingError(f"start is {quoted(start)}: it must be the number of prompt tokens")
    labels = checked_labels(row, len(tokens), start)
    writer = row.get("writer", "given")
    return Text(identity(row, tokens[:start]), tokens, start, str(writer), labels)


def checked_labels(row: dict, count: int, start: int) -> tuple[int, ...]:
    """What a row says of each of its ``count`` tokens, by ``labels``, or by the indices of tokens
    that took the place of a ``rejected`` draft when the text was served."""
    if "rejected" in row:
        rejected = row["rejected"]
        good = isinstance(rejected, list) and all(type(each) is int for each in rejected)
        if not good or not all(start <= each < count for each in rejected):
            raise TrainingError(
                f"rejected is {quoted(rejected)}: it must list indices of tokens behind the prompt"
            )
        wrong = set(rejected)
        return (*[UNKNOWN] * start, *(int(i not in wrong) for i in range(start, count)))
    labels = row.get("labels", [])
    known = {1, 0, UNKNOWN}
    if not isinstance(labels, list) or not all(type(e) is int and e in known for e in labels):
        raise TrainingError(f"labels are {quoted(labels)}: each must be 1, 0 or -1")
    if labels and len(labels) != count:
        raise TrainingError(
            f"there are {len(labels)} labels for {count} tokens: write one for each"
        )
    return tuple(labels)


def of_traffic(row: dict, language: Language) -> list[Text]:
    """The texts of a response of vLLM's server (completions or chat), one a choice."""
    texts = []
    choices = row["choices"]
    for choice in choices if isinstance(choices, list) else ():
        place = choice if isinstance(choice, dict) else {}
        prompt = place.get("prompt_token_ids") or row.get("prompt_token_ids")
        own = place.get("token_ids")
        if prompt is None or own is None:
            raise TrainingError(
                "the response has no prompt_token_ids and token_ids: ask the server with "
                '"return_token_ids": true'
            )
        before = checked_tokens(prompt, "prompt_token_ids", language)
        tokens = before + checked_tokens(own, "token_ids", language)
        texts.append(Text(prompt_id(before), tokens, len(before), "traffic"))
    return texts


class StepRow(StrictModel):
    """A step that a draft and a target have written behind the same text."""

    id: str | None = None
    problem: Annotated[str, Field(min_length=1)]
    steps: list[WrittenStep]
    """Those before it."""
    candidate: str
    """The draft's."""
    draft_score: float
    target_score: float


def of_step(row: dict, language: Language) -> tuple[Text, str]:
    """What a router reads of a step, labelled at its last token: 1 where the target's step was the
    better one; and the question."""
    try:
        # As JSON, in which an enumeration is its values.
        step = StepRow.model_validate_json(json.dumps(row))
    except ValidationError as error:
        raise TrainingError(told("the step", sentences(error, StepRow))) from None
    before = [(each.writer, each.text) for each in step.steps]
    # With special tokens: as vLLM and transformers read texts that are to be classified.
    tokens, start = (
        language.tokenizer(text)["input_ids"]
        for text in (router_text(step.problem, before, step.candidate), f"{step.problem}\n")
    )
    label = int(step.target_score > step.draft_score)
    labels = (*[UNKNOWN] * (len(tokens) - 1), label)
    name = step.id or prompt_id(start)
    # The end of the question's tokens is its own, whatever follows.
    known = min(len(start), len(tokens) - 1)
    return Text(name, tuple(tokens), known, "given", labels), step.problem


def answered(row: dict, language: Language) -> tuple[Text, str]:
    """The text of a row with an answer, and what was asked."""
    if "answer" in row:
        allowed = {"prompt", "answer", "error", "id", "category"}
        if unknown := sorted(set(row) - allowed):
            raise TrainingError(
                f"unknown key {quoted(unknown[0])} (allowed: {', '.join(sorted(allowed))})"
            )
        asked, answer = row.get("prompt"), row["answer"]
        messages = [{"role": "user", "content": asked}]
    else:
        # Checks all but the last message, which is the answer.
        question = parse_row({"messages": row["messages"][:-1]}, default_id="")
        asked, answer = wording(question), row["messages"][-1].get("content")
        messages = row["messages"][:-1]
    for name, value in (("prompt", asked), ("answer", answer)):
        if not isinstance(value, str) or not value.strip():
            raise TrainingError(
                f"the {name} is {quoted(value)}: it must be a text that is not empty"
            )
    before = language.encode(language.prompt(messages))
    own, labels = labelled(answer, row, language)
    if (end := language.tokenizer.eos_token_id) is not None:
        own, labels = [*own, end], [*labels, UNKNOWN]
    known = [UNKNOWN] * len(before) + labels if "error" in row else []
    tokens = (*before, *own)
    return Text(identity(row, before), tokens, len(before), "given", tuple(known)), asked


def labelled(answer: str, row: dict, language: Language) -> tuple[list[int], list[int]]:
    """The tokens of an answer, and what its row's ``error`` says of each: right before it, wrong in
    it, nothing behind it."""
    if row.get("error") is None:
        tokens = language.encode(answer)
        return tokens, [1] * len(tokens)
    error = row["error"]
    pair = isinstance(error, list) and [type(each) for each in error] == [int, int]
    if not pair or not 0 <= error[0] < error[1] <= len(answer):
        raise TrainingError(f"error is {quoted(error)}: {ERROR_WANTED}")
    if not language.tokenizer.is_fast:
        raise TrainingError("error needs a tokenizer that knows characters: add a tokenizer.json")
    coded = language.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)
    begin, end = error
    spans = coded["offset_mapping"]
    return coded["input_ids"], [1 if b <= begin else 0 if a < end else UNKNOWN for a, b in spans]


def checked_tokens(value: Any, key: str, language: Language) -> tuple[int, ...]:
    """Ids as a row gives them; TrainingError unless the target knows them."""
    if not isinstance(value, list) or not value or not all(type(each) is int for each in value):
        raise TrainingError(f"{key} is {quoted(value)}: it must be a list of ids, not empty")
    if wrong := next((each for each in value if not 0 <= each < language.vocab), None):
        raise TrainingError(
            f"{key} has the id {wrong}, but the target knows 0 to {language.vocab - 1}: these are "
            f"tokens of another vocabulary, write them with the target's tokenizer"
        )
    return tuple(value)


def identity(row: dict, before: tuple[int, ...] | list[int]) -> str:
    """The id of a row, or one made of its prompt."""
    return str(row.get("id", row.get("question_id", prompt_id(before))))
