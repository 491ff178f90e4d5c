"""The methods to compare and the arguments of their engines, as typed on the command line."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_specplus.bench import InputError

BASELINE = "none"

# For ngram, vLLM demands num_speculative_tokens, and calls its default n-grams (of exactly 5
# tokens) arbitrary. `suffix` runs as vLLM sets it up; our own methods have defaults of their own.
DEFAULT_OPTIONS: dict[str, dict[str, Any]] = {
    "ngram": {"num_speculative_tokens": 8, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
    "ngram_gpu": {"num_speculative_tokens": 8, "prompt_lookup_min": 2, "prompt_lookup_max": 4},
}

# Set by the benchmark itself.
RESERVED_ENGINE_ARGS = ("model", "speculative_config", "disable_log_stats", "worker_extension_cls")

_NAME = re.compile(r"[A-Za-z_]\w*")
_OPENING = {"[": "]", "{": "}"}


@dataclass(frozen=True)
class MethodSpec:
    """One method of the comparison.

    `label` is what the user typed, `name` the method alone, and `speculative_config` what vLLM
    gets (None for the baseline, which decodes without drafts).
    """

    label: str
    name: str
    speculative_config: dict[str, Any] | None

    @property
    def lossy(self) -> bool:
        """Does it change what is answered?"""
        config = self.speculative_config or {}
        if config.get("allow_lossy"):
            return True
        acceptance = config.get("acceptance")
        return isinstance(acceptance, dict) and acceptance.get("rule", "lossless") != "lossless"


#: The baseline a second time.
AGAIN = MethodSpec(f"{BASELINE} again", BASELINE, None)


def parse_methods(text: str) -> list[MethodSpec]:
    """Parse `name[:key=value]...[,name...]`; commas and colons inside brackets or quotes are kept.

    A value is JSON if it parses as JSON and a string otherwise. The baseline may be named twice:
    how far it is from itself is what any other difference has to exceed.
    """
    specs = [_parse_method(part) for part in _split(text, ",")]
    baselines = [place for place, spec in enumerate(specs) if spec.name == BASELINE]
    if len(baselines) == 2:
        specs[baselines[1]] = AGAIN
    labels = [spec.label for spec in specs]
    for label in labels:
        if labels.count(label) > 1:
            raise InputError(f"--methods names {label} twice")
    return specs


def _parse_method(text: str) -> MethodSpec:
    name, *pairs = _split(text, ":")
    if not _NAME.fullmatch(name):
        raise InputError(f"--methods: {text!r} does not start with the name of a method")
    options = dict(_parse_pair(pair, f"--methods: {name}") for pair in pairs)
    if name == BASELINE:
        if options:
            raise InputError(f"--methods: {BASELINE} takes no keys")
        return MethodSpec(text, name, None)
    if "method" in options:
        raise InputError(f"--methods: {name}: the key method is set by the method's name")
    config = {"method": name, **DEFAULT_OPTIONS.get(name, {}), **options}
    return MethodSpec(text, name, config)


def parse_engine_args(pairs: Iterable[str]) -> dict[str, Any]:
    """Parse the repeated `--engine-arg key=value` into arguments of `vllm.LLM`."""
    args = parse_pairs(pairs, "--engine-arg")
    for key in RESERVED_ENGINE_ARGS:
        if key in args:
            raise InputError(f"--engine-arg: {key} is set by the benchmark itself")
    return args


def parse_pairs(pairs: Iterable[str], option: str) -> dict[str, Any]:
    """Parse the `key=value` of a repeated option; a value is JSON if it parses as JSON."""
    return dict(_parse_pair(pair, option) for pair in pairs)


def parse_concurrencies(text: str) -> list[int]:
    """Parse the comma-separated numbers of requests in flight."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError as exc:
        raise InputError(
            f"--concurrency needs whole numbers separated by commas, not {text!r}"
        ) from exc
    if min(values) < 1:
        raise InputError("--concurrency needs numbers of at least 1")
    if len(set(values)) < len(values):
        raise InputError("--concurrency names a number twice")
    return values


def _parse_pair(text: str, context: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not _NAME.fullmatch(key) or not value:
        raise InputError(f"{context}: expected key=value, not {text!r}")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _split(text: str, separator: str) -> list[str]:
    """Split at the separators that are outside brackets and double quotes."""
    parts = [""]
    closing: list[str] = []
    quoted = False
    for char in text:
        if char == separator and not closing and not quoted:
            parts.append("")
            continue
        parts[-1] += char
        if char == '"':
            quoted = not quoted
        elif not quoted and char in _OPENING:
            closing.append(_OPENING[char])
        elif not quoted and closing and char == closing[-1]:
            closing.pop()
    return [part.strip() for part in parts]
