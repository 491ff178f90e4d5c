"""What stands under ``--speculative-config``: whose it is, and mistakes that nobody could read.

Methods are vLLM's, ours, or of packages that add theirs; what is vLLM's goes on to vLLM as it
was written. A mistake that vLLM would answer without knowing of our methods, or with a traceback,
is answered here.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from vllm_specplus import registry
from vllm_specplus.strict import nearest, quoted, told

FLAG = "--speculative-config"
_EXAMPLE = '{"method": "token_recycling"}'
#: vLLM's short flags -> the keys that they set.
_SHORT = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}


def ours(args: Any) -> dict[str, Any] | None:
    """The user's speculative config if it names a method of ours, keys with underscores, else None.

    ``args`` are vLLM's ``EngineArgs``; its short flags are taken over as vLLM does. Raises
    ValueError, in one sentence, for what neither vLLM nor we could read.
    """
    given = getattr(args, "speculative_config", None)
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise ValueError(
            f"speculative_config is {quoted(given)}: it must be a JSON object such as {_EXAMPLE}"
        )
    for key in given:
        if not isinstance(key, str):
            raise ValueError(
                f"speculative_config has the key {quoted(key)}: keys are strings, as in {_EXAMPLE}"
            )
    raw = {key.replace("-", "_"): value for key, value in given.items()}
    for flag, key in _SHORT.items():
        value = getattr(args, flag, None)
        if value is None:
            continue
        if key in raw:
            if _named(raw) in registry.method_names():
                raise ValueError(
                    f"--{flag.replace('_', '-')} and --speculative-config[{key!r}] are mutually "
                    f"exclusive: keep one of them"
                )
            return None  # vLLM's own method: vLLM reports it
        raw[key] = value
    if not raw or not _is_ours(raw, model=raw.get("model")):
        return None
    if len(raw) < len(given):
        twice = next(k for k in given if "-" in k and k.replace("-", "_") in given)
        raise ValueError(
            f"speculative_config has {twice!r} and {twice.replace('-', '_')!r}, which are one key: "
            f"remove one of them"
        )
    return raw


def method_of_ours(args: Any) -> str | None:
    """The method that ``args`` name if it is ours; for a vLLM that we know nothing about."""
    given = getattr(args, "speculative_config", None)
    raw = given if isinstance(given, dict) else {}
    method = _named({"method": getattr(args, "spec_method", None)} | raw)
    return method if method in registry.method_names() else None


def take_speculator(args: Any) -> None:
    """Where a method of ours is asked for and the model is one of `speculators`, which is a head:
    serve the target that it names, and draft with the head if the method is for such heads and is
    given no other.

    vLLM does the same before it makes a model's config, but puts its own method in the place of
    whatever is asked for. ``args`` are vLLM's ``EngineArgs``.
    """
    method, given = method_of_ours(args), args.speculative_config or {}
    if method is None or not isinstance(given, dict):
        return
    from vllm.transformers_utils.config import maybe_override_with_speculators
    from vllm.transformers_utils.utils import is_cloud_storage

    if is_cloud_storage(args.model):
        return
    target, tokenizer, head = maybe_override_with_speculators(
        args.model, args.tokenizer, args.trust_remote_code, args.revision, hf_token=args.hf_token
    )
    if head is None:
        return
    if not isinstance(target, str) or not target:
        raise ValueError(
            f"{quoted(args.model)} is a head of `speculators` and names no target: serve the "
            f"target, and name the head as 'model' under {FLAG}"
        )
    args.model, args.tokenizer = target, tokenizer
    named = given.get("model") or args.spec_model
    if named is None and registry.config_class(method).takes_speculators:
        args.speculative_config = {**given, "model": head["model"]}


def _named(raw: dict[str, Any]) -> str | None:
    method = raw.get("method")
    return method if isinstance(method, str) else None


def _is_ours(raw: dict[str, Any], model: Any) -> bool:
    """Is the method ours? ValueError if it is nobody's."""
    method = raw.get("method")
    if method is None:
        if model is None:
            _check_keys(raw)
        return False  # vLLM finds the method by the model
    names = registry.method_names()
    if not isinstance(method, str):
        raise ValueError(
            f"speculative_config: 'method' is {quoted(method)}: it must be one name, such as "
            f'"token_recycling" (allowed: {", ".join(names)}, or a method of vLLM\'s own)'
        )
    if method in names:
        return True
    if not registry.is_vllms(method):
        meant = nearest(method, names)
        hint = f", did you mean {meant!r}?" if meant else ""
        problem = (
            f"unknown method {quoted(method)}{hint} (vllm-specplus has {', '.join(names)}; vLLM "
            f"has ngram, suffix, draft_model, eagle3, mtp and others)"
        )
        raise ValueError(told("speculative_config", [problem]))
    return False


def _check_keys(raw: dict[str, Any]) -> None:
    """Nothing says which method is meant: ValueError if vLLM does not know the keys either."""
    from vllm.config import SpeculativeConfig

    unknown = [key for key in raw if key not in SpeculativeConfig.__dataclass_fields__]
    if not unknown:
        return
    near = next((key for key in unknown if nearest(key, ["method"])), None)
    what = f"has {quoted(near)} where 'method' is meant" if near else "lacks the key 'method'"
    raise ValueError(f"speculative_config {what}: write for example {_EXAMPLE}")


def parse_text(text: str) -> Any:
    """The value of ``--speculative-config`` on a command line."""
    if text in ("", "None"):
        return None
    try:
        return json.loads(text)
    except RecursionError:
        problem = "is nested too deep"
    except ValueError as error:
        problem = f"is no JSON ({str(error)[:80]})"
    raise argparse.ArgumentTypeError(
        f"{quoted(text)} {problem}: write a JSON object such as '{_EXAMPLE}'"
    )


def admit_flags(parser: argparse.ArgumentParser) -> None:
    """Let the flags of vLLM's parser take our methods, and tell mistakes in a sentence."""
    for action in parser._actions:
        if action.dest == "spec_method":
            action.choices = None  # vLLM's own; ours and others' are checked with the rest
        elif action.dest == "speculative_config":
            action.type = parse_text
