"""What a user may write in ``--speculative-config``; every mistake is caught here.

One model per method. Unknown keys are errors; values are not coerced. Nothing
here imports vLLM.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class MethodConfig(BaseModel):
    """Keys every method of ours understands."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    method: str
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)]
    """Most nodes drafted per request and step."""


class TokenRecyclingConfig(MethodConfig):
    """``{"method": "token_recycling", ...}``; see ``proposers/token_recycling.py``."""

    method: Literal["token_recycling"] = "token_recycling"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 12
    tree: Literal["best_first", "2.2.2"] = "best_first"
    """Grown best first by acceptance probability, or the paper's static template."""
    top_k: Annotated[int, Field(ge=1, le=16)] = 8
    """Successors kept per token."""
    pair_keys: bool = True
    """Also keep successors keyed by the last two tokens."""
    match_context: bool = True
    """Merge the continuation of the longest match in the request's own text."""
    seed_from_prompt: bool = True
    """Fill the matrix from the prompt's logits (costs the output layer per prompt token)."""
    load_matrix: str | None = None
    """Start from a matrix written by ``save_matrix``."""
    save_matrix: str | None = None
    """Write the matrix here when the engine shuts down."""

    @model_validator(mode="after")
    def _files_can_be_used(self):
        if self.load_matrix and not Path(self.load_matrix).is_file():
            raise ValueError(f"load_matrix {self.load_matrix!r} is not a file")
        if self.save_matrix and not Path(self.save_matrix).resolve().parent.is_dir():
            raise ValueError(f"save_matrix {self.save_matrix!r} is in a folder that does not exist")
        return self

    @model_validator(mode="after")
    def _template_is_the_papers(self):
        if self.tree == "2.2.2":
            if self.top_k < 8:
                raise ValueError('tree "2.2.2" uses ranks 0..7: set top_k to 8 or more')
            for key in ("pair_keys", "match_context"):
                if getattr(self, key) and key in self.model_fields_set:
                    raise ValueError(
                        f'tree "2.2.2" is the paper\'s static tree and cannot use {key}: '
                        f'remove it, or use tree "best_first"'
                    )
        return self


#: method name -> its model.
METHODS: dict[str, type[MethodConfig]] = {"token_recycling": TokenRecyclingConfig}


def parse(raw: dict[str, Any]) -> MethodConfig:
    """Validate a user's speculative config for one of our methods.

    Raises ValueError with one sentence per mistake: what is wrong, what is allowed.
    """
    method = raw.get("method")
    if method not in METHODS:
        raise ValueError(
            f"speculative_config: unknown method {method!r}; vllm-specplus has "
            f"{', '.join(sorted(METHODS))}"
        )
    model = METHODS[method]
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = [_sentence(e, model) for e in error.errors()]
        raise ValueError(f"speculative_config for {method!r}: {'; '.join(problems)}") from None


def _sentence(error: dict[str, Any], model: type[MethodConfig]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r} (allowed: {', '.join(model.model_fields)})"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    message = error["msg"][0].lower() + error["msg"][1:]
    return f"{key!r} is {error['input']!r}: {message}"
