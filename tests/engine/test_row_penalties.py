"""Penalties from kept counts, bit for bit against vLLM's own function on whole texts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.ops.penalties import apply_all_penalties

from tests.control.test_memory import peak_bytes
from tests.engine.test_row_sampling import asks_for_a_penalty, metadata_of, path_of
from tests.samplers.test_relaxed import VOCAB, random_rows
from vllm_specplus.engine import row_penalties
from vllm_specplus.engine.row_penalties import RowPenalties, Texts, TokenCounts
from vllm_specplus.engine.text_versions import TextVersions


class Served:
    """Requests of an engine: they come, sit out steps, are cut, go on as sessions and end."""

    LONGEST = 400

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.names: list[str] = []
        self.params: dict[str, SamplingParams] = {}
        self.prompts: dict[str, int] = {}
        self.texts: dict[str, list[int]] = {}
        self.versions = TextVersions()
        self._made = 0

    def tokens(self, most: int) -> list[int]:
        # Now and then another modality's placeholder.
        return self.rng.integers(0, VOCAB + 2, int(self.rng.integers(1, most))).tolist()

    def come(self) -> None:
        # A name may come again.
        name = f"r{self._made % 9}"
        self._made += 1
        if name in self.params:
            return
        penalised = self.rng.random() < 0.7
        self.params[name] = SamplingParams(
            presence_penalty=0.7 * penalised, frequency_penalty=-0.3 * penalised,
            repetition_penalty=1.3 if penalised else 1.0,
        )  # fmt: skip
        self.texts[name] = self.tokens(30)
        self.prompts[name] = len(self.texts[name])

    def change(self) -> None:
        for name in list(self.params):
            kind, text = self.rng.integers(12), self.texts[name]
            if kind == 0:
                for kept in (self.params, self.prompts, self.texts):
                    kept.pop(name)
                self.versions.forget(name)
            elif kind == 1 and len(text) > self.prompts[name]:  # a session's next turn
                self.texts[name] = text[:-1] + self.tokens(4)
                self.prompts[name] = len(self.texts[name])
            elif kind == 2 and len(text) > self.prompts[name]:  # output is computed anew
                self.texts[name] = text[: self.prompts[name]]

    def batch(self) -> Texts:
        """Of the requests that are in this step, in any order."""
        self.names = [name for name in self.params if self.rng.random() < 0.8]
        self.rng.shuffle(self.names)
        tokens = np.zeros((len(self.names), self.LONGEST), np.int32)
        for row, name in zip(tokens, self.names, strict=True):
            row[: len(self.texts[name])] = self.texts[name]
        lengths = np.array([len(self.texts[name]) for name in self.names], np.int32)
        prompts = np.array([self.prompts[name] for name in self.names], np.int32)
        return Texts(
            list(self.names), tokens, lengths, prompts,
            self.versions.look(self.names, lengths, prompts),
            np.array([asks_for_a_penalty(self.params[name]) for name in self.names], bool),
        )  # fmt: skip

    def grow(self) -> None:
        for name in self.names:
            self.texts[name] += self.tokens(5)


def theirs(served: Served, rows, logits: torch.Tensor) -> torch.Tensor:
    """vLLM's own penalties at every row, from whole texts; ids that it cannot count left out."""
    request = np.repeat(np.arange(len(served.names)), np.diff(rows.starts))
    prompts, outputs = [], []
    for row, r in enumerate(request):
        name = served.names[r]
        text, prompt = served.texts[name], served.prompts[name]
        prompts.append(text[:prompt])
        outputs.append(text[prompt:] + path_of(rows, row, int(rows.starts[r])))
    longest = max(map(len, prompts))
    padded = [[t for t in p if t < VOCAB] for p in prompts]
    padded = [p + [VOCAB] * (longest - len(p)) for p in padded]
    outputs = [[t for t in output if t < VOCAB] for output in outputs]
    per_row = [served.params[served.names[r]] for r in request]
    values = [
        torch.tensor([getattr(one, name) for one in per_row], dtype=torch.float32)
        for name in ("presence_penalty", "frequency_penalty", "repetition_penalty")
    ]
    return apply_all_penalties(logits, torch.tensor(padded), *values, outputs)


def run(seed: int, steps: int = 40) -> int:
    """Serves random requests; returns in how many steps a bit was wrong."""
    rng = np.random.default_rng(seed)
    served, counts, wrong = Served(rng), TokenCounts(), 0
    for _ in range(steps):
        served.come()
        texts = served.batch()
        if not texts.request_ids:
            continue
        rows = random_rows(rng, len(texts.request_ids))
        params = [served.params[name] for name in served.names]
        metadata = metadata_of(params, [[] for _ in params], [0] * len(params), None)
        logits = torch.from_numpy(rng.normal(0, 3, (len(rows.tokens), VOCAB))).float()
        logits[rng.random(logits.shape) < 0.05] = -torch.inf
        penalties = counts.of_rows(texts, rows, metadata, logits)
        if penalties is None:
            assert not texts.penalised.any()
        else:
            want = theirs(served, rows, logits.clone())
            wrong += not torch.equal(penalties.apply(logits.clone()), want)
        served.grow()
        served.change()
    return wrong


def test_every_bit_is_vllms():
    assert sum(run(seed) for seed in range(25)) == 0


def test_every_bit_is_vllms_some_rows_at_a_time(monkeypatch):
    monkeypatch.setattr(row_penalties, "CHUNK_BYTES", 3 * row_penalties.ENTRY_BYTES * VOCAB)
    assert sum(run(seed) for seed in range(10)) == 0


@pytest.mark.parametrize("rows", [20, 200])
def test_penalties_take_a_bounded_memory(rows, monkeypatch):
    vocab, budget = 5000, 2**21
    monkeypatch.setattr(row_penalties, "CHUNK_BYTES", budget)
    nothing = torch.zeros(0, dtype=torch.int64)
    value = torch.full((rows,), 1.1)
    penalties = RowPenalties(
        torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, dtype=torch.int64),
        nothing, nothing, np.zeros(rows + 1, np.int64), torch.zeros(1, vocab, dtype=torch.bool),
        torch.ones(1, vocab, dtype=torch.int32), value, value, value,
    )  # fmt: skip
    logits = torch.zeros(rows, vocab)
    assert peak_bytes(lambda: penalties.apply(logits)) <= budget


def test_the_comparison_would_notice_a_cut_text(monkeypatch):
    """The negative control: versions by name alone."""
    monkeypatch.setattr(
        TextVersions, "look", lambda self, names, *_: np.array([int(n[1:]) for n in names])
    )
    assert sum(run(seed) for seed in range(5)) > 0


def test_only_new_tokens_are_sent(monkeypatch):
    """Counted in bytes: the third step sends as much at 100 tokens as at 10,000."""
    sent = []
    stock = row_penalties.upload

    def counted(arrays, device):
        sent.append(sum(each.nbytes for each in arrays.values()))
        return stock(arrays, device)

    monkeypatch.setattr(row_penalties, "upload", counted)
    params = [SamplingParams(presence_penalty=1.0)]
    sizes = {}
    for length in (100, 10_000):
        counts = TokenCounts()
        tokens = np.random.default_rng(0).integers(0, VOCAB, (1, length + 50)).astype(np.int32)
        for step in range(3):
            rows = random_rows(np.random.default_rng(1), 1)
            known = np.array([length + 3 * step], np.int32)
            texts = Texts(
                ["a"], tokens, known, np.array([50], np.int32), np.zeros(1, int), known > 0
            )
            metadata = metadata_of(params, [[]], [0], None)
            counts.of_rows(texts, rows, metadata, torch.empty(len(rows.tokens), VOCAB))
            sizes.setdefault(length, []).append(sent.pop())
            assert not sent, "one transfer"
    assert sizes[100][1:] == sizes[10_000][1:]
    assert sizes[10_000][0] > 8 * 10_000
