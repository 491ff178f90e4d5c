"""The nouns of step-level speculation, and the text that a router reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

SEPARATOR = "\n\n"


class Writer(StrEnum):
    """Who has written a step."""

    DRAFT = "draft"
    TARGET = "target"


#: What stands before a step in a router's text.
TAGS = {Writer.DRAFT: "Model 0: ", Writer.TARGET: "Model 1: "}


class End(StrEnum):
    """Why a step ends where it does."""

    SEPARATOR = "separator"
    ANSWER = "answer"
    """The model has ended its answer, or written a stop string of the client's."""
    LENGTH = "length"
    """It has as many tokens as it may have, or its model's context is full."""


@dataclass(frozen=True)
class Written:
    """What an engine wrote of a step."""

    text: str
    """With the separator, if it ends with it."""
    tokens: int
    """Of the engine's own tokenizer."""
    end: End
    read: int = 0
    """Tokens of the text before it."""


@dataclass(frozen=True)
class Step:
    """A step of an answer."""

    writer: Writer
    text: str
    tokens: int
    end: End
    read: int = 0
    """Tokens that its writer has read before it."""
    score: float | None = None
    """The router's, of the draft's step, in [0, 1]; None: it was not asked."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """What ``draft``, ``router`` and ``target`` took."""


@dataclass(frozen=True)
class Job:
    """What is to be answered."""

    problem: str
    """The question alone, as the router reads it."""
    prompts: Mapping[Writer, str]
    """The text behind which each model writes: its own chat template around the question. Without
    the draft's the target writes alone."""
    max_tokens: int
    """Of all steps together, each counted by the tokenizer of its writer."""
    threshold: float
    """The target writes where the router's score is above it: below 0 always, from 1 on never."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Of vLLM's sampling parameters, those that hold for every step."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Strings that end the answer, besides a model's own end."""
    cache_salt: str | None = None
    """Keeps what the engines cache of this text apart from the texts of others."""
    special_tokens: bool = True
    """Do the models' tokenizers put special tokens before the prompt? Not if a template did."""


def router_text(problem: str, steps: Sequence[tuple[Writer, str]], candidate: str) -> str:
    """The text whose last token a router judges: the question, the steps so far with the names of
    their writers, and the draft's next one. Separators stay."""
    told = [*steps, (Writer.DRAFT, candidate)]
    return f"{problem}\n" + "".join(f"{TAGS[writer]}{text}" for writer, text in told)
