from __future__ import annotations

import json

import pytest

from tests.engine import harness
from vllm_specplus.testing import models
from vllm_specplus.testing.models import VOCAB, build_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    return build_model(tmp_path_factory.mktemp("tiny"), VOCAB, 0.25)


@pytest.fixture(scope="session")
def tiny_engine(tiny_model) -> dict:
    """Engine arguments in which everything that complicates a batch happens: chunked
    prefill (64 tokens a step), prefix caching, and preemption (64 small pages)."""
    return models.engine_arguments(tiny_model)


@pytest.fixture(scope="session")
def mixed_requests() -> list:
    return models.mixed_requests()


@pytest.fixture(scope="session")
def plain(tmp_path_factory, tiny_engine, mixed_requests) -> dict:
    """The same requests without speculation, twice (the second time from the prefix cache)."""
    batches = [{"requests": mixed_requests}] * 2
    return harness.run(tmp_path_factory.mktemp("plain"), tiny_engine, batches)


@pytest.fixture(scope="session")
def reference_file(tmp_path_factory, plain) -> str:
    path = tmp_path_factory.mktemp("reference") / "reference.json"
    path.write_text(json.dumps([[r["prompt"], r["ids"][0]] for r in plain["batches"][0]]))
    return str(path)


@pytest.fixture(scope="session")
def near_model(tmp_path_factory, tiny_model) -> str:
    """A draft that is often right: the target with a little noise on its weights."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(11)
    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.02 * weight.std() * torch.randn_like(weight) if weight.ndim > 1 else 0
    path = tmp_path_factory.mktemp("near")
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def small_pair(tmp_path_factory) -> tuple[str, str]:
    """A target of 32 tokens and a draft that resembles it."""
    target = build_model(tmp_path_factory.mktemp("small"), 32, 0.12)
    return target, build_model(tmp_path_factory.mktemp("smaller"), 32, 0.09)
