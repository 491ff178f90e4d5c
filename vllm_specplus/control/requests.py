"""What a single request may ask for: ``extra_args={"specplus": {...}}``.

vLLM's ``vllm_xargs``, in which it travels over HTTP, admits strings and numbers but no objects:
there each key is a flat one, ``{"vllm_xargs": {"specplus.enabled": false}}``, or the object is JSON
text. Both spellings are understood wherever ``extra_args`` come from.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import Field, ValidationError

from vllm_specplus.control.settings import Milliseconds
from vllm_specplus.strict import StrictModel, nearest, quoted, sentences, told

KEY, GUIDANCE = "specplus", "guidance_scale"
#: The strongest guidance. Scales in use end at about 30; logits of any model, times this, are far
#: inside of float32, where an infinite one would reach every request of the batch as NaN.
MOST_GUIDANCE = 1000.0
#: Where the scheduler puts vLLM's own ``cache_salt`` of a request, which workers do not get.
SALT = "specplus_cache_salt"
#: Begins the salts of captions, before their length and the salt that the user gave.
CAPTION = "specplus caption "


class RequestControls(StrictModel):
    """A request's own limits, below those of the engine."""

    enabled: bool = True
    """False: decode this request without drafts."""
    max_nodes: Annotated[int, Field(ge=0, le=80)] | None = None
    """Most nodes drafted per step; the engine's limit stays in force above it."""
    lossless: bool = False
    """Verify this request losslessly, whatever acceptance rule the engine has."""
    tpot_ms: Milliseconds | None = None
    """Its own target of time per token, for the objective "slo"."""
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    """Drafts from other requests' texts come only from requests of the same salt."""

    @property
    def limit(self) -> int | None:
        """Most nodes per step, None = the engine's limit."""
        return self.max_nodes if self.enabled else 0


DEFAULT = RequestControls()


def carry_salt(extra_args: dict[str, Any] | None, salt: str | None) -> dict[str, Any] | None:
    """``extra_args`` that tell workers the request's ``cache_salt``, whatever a client wrote in
    its place. The caption's part of a salt says nothing about whose it is."""
    if salt and salt.startswith(CAPTION):
        salt = salt.removeprefix(CAPTION).partition(" ")[2]
    if not salt and SALT not in (extra_args or {}):
        return extra_args
    others = {key: value for key, value in (extra_args or {}).items() if key != SALT}
    return others | {SALT: salt} if salt else others


def salt_of(extra_args: dict[str, Any] | None, controls: RequestControls) -> str:
    """Whose a request is: vLLM's ``cache_salt``, or ours where there is none."""
    return (extra_args or {}).get(SALT) or controls.cache_salt


def guidance(extra_args: dict[str, Any] | None, possible: bool) -> float | None:
    """A request's ``guidance_scale`` (a key of its own in ``extra_args``), None: the model's.

    ValueError with one sentence if it is no number from 0 to :data:`MOST_GUIDANCE`, or if the
    engine cannot follow it: ``possible`` is for image models that are served with a method of ours.
    """
    scale = (extra_args or {}).get(GUIDANCE)
    if scale is None:
        return None
    number = isinstance(scale, int | float) and not isinstance(scale, bool)
    if not (number and 0 <= scale <= MOST_GUIDANCE):
        raise ValueError(
            f"{GUIDANCE} is {quoted(scale)}: it must be a number from 0 to {MOST_GUIDANCE:g}, "
            f"such as 3.0"
        )
    if not possible:
        raise ValueError(
            f"{GUIDANCE} is for image models with guidance, served with a speculative method of "
            f"vllm-specplus: remove it"
        )
    return float(scale)


def parse(extra_args: dict[str, Any] | None) -> RequestControls:
    """Read a request's controls; ValueError with one sentence for the client."""
    given = extra_args or {}
    ours = {key: value for key, value in given.items() if key.startswith(KEY) and key != SALT}
    if not ours:
        return DEFAULT
    controls = _validated(_object(ours.pop(KEY, None)), strict=True)
    prefix = f"{KEY}."
    for key in ours:
        if not key.startswith(prefix):
            meant = nearest(key, [prefix + name for name in RequestControls.model_fields])
            raise ValueError(
                f"{KEY}: unknown key {quoted(key)}: write {meant or prefix + 'max_nodes'!r}, or "
                f'{KEY!r} with an object such as {{"max_nodes": 8}}'
            )
    # Of a protocol that knows no booleans, or strings alone.
    flat = _validated({key.removeprefix(prefix): v for key, v in ours.items()}, strict=False)
    if twice := sorted(controls.model_fields_set & flat.model_fields_set):
        raise ValueError(
            f"{KEY}: {twice[0]!r} is given twice, in {KEY!r} and as {prefix + twice[0]!r}: remove "
            f"one of them"
        )
    return controls.model_copy(update={k: getattr(flat, k) for k in flat.model_fields_set})


def _object(raw: Any) -> dict[str, Any]:
    """The object under :data:`KEY`, which may be JSON text."""
    if isinstance(raw, str):
        try:
            raw = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f'{KEY}: not valid JSON ({str(error)[:80]}); write for example {{"enabled": false}}'
            ) from None
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ValueError(f'{KEY}: must be an object such as {{"max_nodes": 8}}, not {quoted(raw)}')
    return raw


def _validated(keys: dict[str, Any], strict: bool) -> RequestControls:
    try:
        return RequestControls.model_validate(keys, strict=strict)
    except ValidationError as error:
        raise ValueError(told(KEY, sentences(error, RequestControls))) from None


def check_reasoning(params: Any) -> None:
    """ValueError with one sentence if ``params``, vLLM's ``SamplingParams``, limits how long a
    model thinks: the limit ends thinking after a row, and a draft goes on behind it."""
    if getattr(params, "thinking_token_budget", None) is not None:
        raise ValueError(
            "thinking_token_budget does not work with a speculative method of vllm-specplus: "
            "remove it, or limit the whole answer with max_tokens"
        )


#: What a request for latents leaves alone, being for distributions over tokens -> what does.
_OF_TOKENS: dict[str, tuple] = {
    "top_p": (1.0,), "top_k": (0, -1), "min_p": (0.0,), "min_tokens": (0,),
    "presence_penalty": (0.0,), "frequency_penalty": (0.0,), "repetition_penalty": (1.0,),
    "stop": ([],), "stop_token_ids": ([],), "bad_words": ([],), "allowed_token_ids": (),
    "logit_bias": (), "structured_outputs": (), "prompt_logprobs": (), "logprob_token_ids": (),
}  # fmt: skip


def check_latents(params: Any, size: int) -> None:
    """ValueError with one sentence if ``params``, vLLM's ``SamplingParams``, asks a model of
    latents of ``size`` channels for what it cannot do."""
    for key, harmless in _OF_TOKENS.items():
        if getattr(params, key, None) not in (None, *harmless):
            raise ValueError(f"{key} is for tokens, and this model generates latents: remove it")
    if params.temperature <= 0:
        raise ValueError("temperature is 0: latents are drawn, set it above 0")
    if params.logprobs != size:
        raise ValueError(
            f"logprobs is {params.logprobs}: latents come back in their place, one channel each: "
            f"set it to {size}"
        )
