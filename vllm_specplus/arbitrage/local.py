"""Engines and routers in this process: vLLM's asynchronous engine, whose model runs in a process of
its own, and a classifier of transformers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_specplus.arbitrage.engines import EngineError, Refused, end_of
from vllm_specplus.arbitrage.steps import Written


class LocalEngine:
    """A model of a folder, or of the hub."""

    def __init__(self, model: str, separator: str, arguments: Mapping[str, Any]):
        """``arguments`` are vLLM's engine arguments; what vLLM says of them is raised as it is."""
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.name, self._separator = model, separator
        self._engine = AsyncLLM.from_engine_args(AsyncEngineArgs(model=model, **arguments))
        self._tokenizer = self._engine.get_tokenizer()
        self._context = self._engine.model_config.max_model_len

    async def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # of Jinja, of a template that raises, or without one
            raise Refused(f"{self.name} cannot read this conversation: {error}", 400) from None

    async def write(
        self, prompt: str, most: int | None, stop: Sequence[str], sampling: Mapping[str, Any],
        special_tokens: bool,
    ) -> Written:  # fmt: skip
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        tokens = self._tokenizer.encode(prompt, add_special_tokens=special_tokens)
        room = self._context - len(tokens)
        if room < 1:
            raise Refused(
                f"{self.name} reads {self._context} tokens, and the text has {len(tokens)}", 400
            )
        try:
            sampling = dict(sampling)
            salt = sampling.pop("cache_salt", None)
            params = SamplingParams(
                max_tokens=room if most is None else min(most, room),
                stop=[self._separator, *stop], include_stop_str_in_output=True,
                output_kind=RequestOutputKind.FINAL_ONLY, **sampling,
            )  # fmt: skip
        except ValueError as error:
            raise Refused(str(error), 400) from None
        last = None
        try:
            name = f"step-{uuid.uuid4().hex}"
            read = TokensPrompt(prompt_token_ids=tokens)
            if salt is not None:
                read["cache_salt"] = salt
            async for output in self._engine.generate(read, params, name):
                last = output
        except ValueError as error:
            raise Refused(str(error), 400) from None
        except Exception as error:  # an engine that has died
            raise EngineError(f"the engine of {self.name} has failed: {error}") from error
        if last is None:
            raise EngineError(f"the engine of {self.name} has written nothing")
        made = last.outputs[0]
        end = end_of(made.finish_reason, made.text, self._separator)
        return Written(made.text, len(made.token_ids), end, len(tokens))

    def close(self) -> None:
        """Ends its process."""
        self._engine.shutdown()


class LocalClassifier:
    """A sequence classifier of two labels, as ``vllm-specplus train router`` writes it.

    Reads the last token's state itself: transformers looks for the last token that is no padding,
    and a text may end with what a tokenizer pads with.
    """

    def __init__(self, folder: Path):
        """EngineError if the folder has no such model. Nothing in it is executed."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        local = {"local_files_only": True, "trust_remote_code": False}
        try:
            self._model = AutoModelForSequenceClassification.from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32, **local
            ).eval()
            self._tokenizer = AutoTokenizer.from_pretrained(folder, truncation_side="left", **local)
        except Exception as error:  # of transformers, safetensors or the file system
            reason = (str(error).splitlines() or [""])[0][:200]
            raise EngineError(f"the router {folder} cannot be loaded: {reason}") from None
        self._score: Any = getattr(self._model, "score", None)
        if self._score is None or self._model.config.num_labels != 2:
            raise EngineError(
                f"the router {folder} must be a decoder with a score of two labels: train one by "
                f"vllm-specplus train router"
            )
        self._context = self._model.config.max_position_embeddings
        # One forward pass takes all cores: others wait.
        self._free = asyncio.Lock()

    async def probability(self, text: str, cache_salt: str | None = None) -> float:
        # Nothing is cached here.
        async with self._free:
            return await asyncio.to_thread(self._probability, text)

    def _probability(self, text: str) -> float:
        import torch

        # As it was learnt, and as vLLM reads it by default.
        tokens = self._tokenizer(text, truncation=True, max_length=self._context)["input_ids"]
        with torch.inference_mode():
            states = self._model.base_model(torch.tensor([tokens]), use_cache=False)
            logits = self._score(states.last_hidden_state[0, -1]).float()
        return float(logits.softmax(-1)[1])
