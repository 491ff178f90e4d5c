"""Verification of a step: from the target's logits to the tokens that become text.

A :class:`Verifier` is built once, at load, of parts that the method and its acceptance rule
choose: how a token is found at every row (:class:`TargetDraws`, :class:`JudgedDraws`), and
whether accepted nodes take the place of some (:class:`Substitution`). A step in which every
draw is the argmax skips the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler

from vllm_specplus.engine.row_penalties import Texts, TokenCounts
from vllm_specplus.engine.row_sampling import (
    RowSamples,
    RuleSampler,
    gather_logprobs,
    is_plain_greedy,
    sample_rows,
)
from vllm_specplus.engine.row_seeds import RowSampler
from vllm_specplus.kernels import native
from vllm_specplus.samplers import lossless
from vllm_specplus.samplers.registry import make_rule
from vllm_specplus.samplers.relaxed import (
    CandidateStatistics,
    SubstitutionRule,
    candidate_statistics,
    substitute,
)
from vllm_specplus.samplers.relaxed_sampling import Lantern, Relaxation, RelaxedSampling
from vllm_specplus.samplers.sampled import SampledRule
from vllm_specplus.samplers.synthetic import Synthetic
from vllm_specplus.step import Acceptance, DraftProbs, Rows

if TYPE_CHECKING:
    from vllm.distributed.parallel_state import GroupCoordinator

    from vllm_specplus.config import MethodConfig
    from vllm_specplus.metrics import Counters
    from vllm_specplus.proposer import Proposer

#: Stands at rows whose logits are no distribution: NaN or infinite.
BROKEN = -2

#: Finds what the children of each row were drawn from.
FindDraftProbs = Callable[[list[str], Rows], DraftProbs]


@dataclass(slots=True)
class VerifyBatch:
    """What a step of R requests and L rows is verified by."""

    request_ids: list[str]
    rows: Rows
    metadata: SamplingMetadata
    texts: Texts | None
    """None: nobody asks for a penalty."""
    temperature: np.ndarray
    """float32 [R]; 0 is greedy."""
    top_k: np.ndarray
    """int32 [R]; the vocabulary's size where nothing is cut."""
    top_p: np.ndarray
    """float32 [R]; 1 where nothing is cut."""
    discarded: np.ndarray
    """bool [R] requests that output nothing in this step: their prompt is not read to its
    end."""
    relaxed_stops: list[frozenset[int] | None]
    """[R] stop tokens of the requests that a lossy rule may serve; None: losslessly. Of a verifier
    that does not ``relax``, nothing."""
    outside_pictures: np.ndarray | None = None
    """bool [R] requests that are not in a picture, whose tokens are not compared by a codebook
    then; None: all may be."""
    hidden: torch.Tensor | None = None
    """[L, hidden] hidden states of the rows, if the verifier ``reads_hidden``; None: there are
    none, and nothing is accepted by them."""


@dataclass(slots=True)
class Verdict:
    """What a step came to."""

    acceptance: Acceptance
    top_ids: np.ndarray
    """int32 [L, k] the k most probable next tokens of each row, best first."""
    logprobs: LogprobsTensors | None
    """Of the accepted paths, [R * width] in the order of ``acceptance.output``."""
    target_probs: torch.Tensor | None
    """float32 [L, V] the target's distribution at each row, for a proposer that asks."""
    broken: np.ndarray
    """bool [R] requests whose last output, a 0, stands for none: there was no distribution."""


def most_probable(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the k most probable ids of every row of ``logits`` [L, V], best first, and its largest
    logit, NaN where it holds one: int32 [L, k] and float32 [L] on the device.

    Before sampling, which changes logits in place. Column 0 is the argmax with
    ties to the lower index, as in vLLM's greedy sampling.
    """
    if k and logits.device.type == "cpu":
        ids, values = native.top_k(logits, k)
        return ids, values[:, 0]
    largest = logits.amax(-1).float()
    if k == 0:
        return torch.empty((len(logits), 0), dtype=torch.int32, device=logits.device), largest
    if k == 1:
        return logits.argmax(dim=-1, keepdim=True).to(torch.int32), largest
    ids = logits.topk(k, dim=-1).indices.to(torch.int32)
    ids[:, 0] = logits.argmax(dim=-1)
    return ids, largest


def to_host(
    top: torch.Tensor, tokens: torch.Tensor, largest: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Copies ``top`` int32 [L, k], ``tokens`` int32 [L] and ``largest`` float32 [L] to the host, in
    one go: every copy waits for the device."""
    tokens = tokens.to(top.device)
    if top.device.type == "cpu":
        # Tokens may be a column of ``top``, and are not what the caller makes of them.
        return top.numpy(), tokens.numpy().copy(), largest.numpy()
    rows = torch.cat((top.T, tokens[None], largest.view(torch.int32)[None])).cpu().numpy()
    return np.ascontiguousarray(rows[:-2].T), rows[-2], rows[-1].view(np.float32)


class Draws(Protocol):
    """A way to find the token at every row that the walk down a tree follows."""

    relaxes: bool
    """May it take other tokens than the target's draws?"""

    def __call__(self, logits: torch.Tensor, batch: VerifyBatch) -> RowSamples:
        """Samples from ``logits`` [L, V], which it may change in place."""

    def warm_up(self, vocab_size: int) -> None:
        """Compiles what the first step should not wait for."""


class TargetDraws:
    """Draws from the target at every row: losslessly for any draft that is a function of the
    past."""

    relaxes = False

    def __init__(self, sampler: Sampler):
        self._sampler = RowSampler(sampler)
        self._counts = TokenCounts()

    def __call__(self, logits: torch.Tensor, batch: VerifyBatch) -> RowSamples:
        penalties = self._counts.of_rows(batch.texts, batch.rows, batch.metadata, logits)
        return sample_rows(self._sampler, logits, batch.metadata, batch.rows, penalties)

    def warm_up(self, vocab_size: int) -> None:
        """Has nothing to compile."""


class JudgedDraws:
    """Judges drafts by what they were drawn from: by a lossless rule, or a relaxed one for the
    requests that allow it.

    The draft's distributions are on rank 0, which judges for all ranks of ``group``.
    """

    def __init__(
        self, sampler: RuleSampler, rule: SampledRule, relaxed: RelaxedSampling | None,
        draft_probs: FindDraftProbs, counters: Counters, device: torch.device,
        group: GroupCoordinator | None,
    ):  # fmt: skip
        self._sampler, self._rule, self._relaxed = sampler, rule, relaxed
        self._draft_probs, self._counters = draft_probs, counters
        self._device = device
        self._counts = TokenCounts()
        self.relaxes = relaxed is not None
        self._group = group if group is not None and group.world_size > 1 else None

    def __call__(self, logits: torch.Tensor, batch: VerifyBatch) -> RowSamples:
        if self._group is None:
            return self._judge(logits, batch)
        samples = None
        if self._group.rank_in_group == 0:
            samples = self._judge(logits, batch)
        if samples is not None:
            samples.tokens = samples.tokens.cpu()
        tokens = self._group.broadcast_object(None if samples is None else samples.tokens, src=0)
        return RowSamples(tokens) if samples is None else samples

    def _judge(self, logits: torch.Tensor, batch: VerifyBatch) -> RowSamples:
        draft_probs = self._draft_probs(batch.request_ids, batch.rows)
        relaxation = None
        if self._relaxed is not None:
            relaxation = Relaxation(self._relaxed, self._stops(batch))
        penalties = self._counts.of_rows(batch.texts, batch.rows, batch.metadata, logits)
        samples = self._sampler.judge_rows(
            logits, batch.metadata, batch.rows, penalties, draft_probs, batch.discarded, relaxation
        )
        if relaxation is not None:
            self._counters.add("relaxed_tokens", int(relaxation.relaxed))
        return samples

    @staticmethod
    def _stops(batch: VerifyBatch) -> list[frozenset[int] | None]:
        """Lists what may be relaxed, as ``VerifyBatch.relaxed_stops``: nothing of greedy
        requests, and nothing outside pictures, where tokens are words."""
        strict = batch.temperature == 0
        if batch.outside_pictures is not None:
            strict = strict | batch.outside_pictures
        return [
            None if each else stops for each, stops in zip(strict, batch.relaxed_stops, strict=True)
        ]

    def warm_up(self, vocab_size: int) -> None:
        """Compiles the rule's kernels, on a GPU."""
        if self._device.type != "cpu":
            self._rule.warm_up(vocab_size, self._device)


class Substitution:
    """Puts nodes that a lossy rule accepts in the place of the target's draws."""

    def __init__(self, rule: SubstitutionRule, counters: Counters):
        self._rule, self._counters = rule, counters
        self.reads_hidden = rule.head is not None

    def statistics(self, logits: torch.Tensor, batch: VerifyBatch) -> CandidateStatistics | None:
        """Computes what the rule goes by, before sampling changes ``logits`` in place; None
        where there are no nodes."""
        head = self._rule.head
        if not (batch.rows.parents >= 0).any() or (head is not None and batch.hidden is None):
            return None
        scores = None if head is None else head.scores(batch.hidden)
        return candidate_statistics(logits, batch.rows, batch.temperature, scores)

    def __call__(
        self, sampled: np.ndarray, statistics: CandidateStatistics, batch: VerifyBatch
    ) -> np.ndarray:
        """Returns ``sampled`` int32 [L] with some nodes' tokens in it."""
        rows = batch.rows
        counts = np.diff(rows.starts)
        request = np.repeat(np.arange(len(counts)), counts)[statistics.rows]
        accepted = self._rule.accepts(statistics)
        accepted &= statistics.rank < batch.top_k[request]
        accepted &= statistics.mass_above < batch.top_p[request]
        sampled, count = substitute(rows, sampled, statistics, accepted, batch.relaxed_stops)
        self._counters.add("relaxed_tokens", count)
        return sampled


@dataclass(slots=True)
class GreedyNodes:
    """Nodes of greedy requests that may be relaxed; what ``relaxed.substitute`` reads of them."""

    rows: np.ndarray
    """int64 [N]"""
    probability: np.ndarray
    """float32 [N] p(x), at temperature 1."""
    accepted: np.ndarray
    """bool [N]"""
    best: np.ndarray
    """int64 [L] the most probable token of every row: what was drawn is not known off the paths
    that the lossless rule has walked."""


class GreedySubstitution:
    """Puts nodes that stand for the most probable token in its place, in greedy requests."""

    reads_hidden = False

    def __init__(self, rule: Lantern, counters: Counters):
        self._rule, self._counters = rule, counters

    def statistics(self, logits: torch.Tensor, batch: VerifyBatch) -> GreedyNodes | None:
        """Judges the nodes; None where there are none."""
        rows, counts = batch.rows, np.diff(batch.rows.starts)
        greedy = np.repeat(self._serves(batch), counts)
        nodes = np.flatnonzero((rows.parents >= 0) & (rows.tokens >= 0) & greedy)
        if not len(nodes):
            return None
        above = np.repeat(rows.starts[:-1], counts)[nodes] + rows.parents[nodes]
        parents, at = np.unique(above, return_inverse=True)
        host = torch.from_numpy(np.stack((at, rows.tokens[nodes])).astype(np.int64))
        row, token = host.to(logits.device)
        p = logits[torch.from_numpy(parents).to(logits.device)].float().softmax(-1)
        judged = torch.stack((p[row, token], self._rule.most_probable(p, row, token).float()))
        probability, accepted = judged.cpu().numpy()
        return GreedyNodes(nodes, probability, accepted > 0, logits.argmax(-1).cpu().numpy())

    def __call__(
        self, sampled: np.ndarray, statistics: GreedyNodes, batch: VerifyBatch
    ) -> np.ndarray:
        """Returns ``sampled`` int32 [L] with some nodes' tokens in it."""
        serves = self._serves(batch)
        stops = [
            stops if each else None for each, stops in zip(serves, batch.relaxed_stops, strict=True)
        ]
        own = np.repeat([each is not None for each in stops], np.diff(batch.rows.starts))
        own &= sampled != BROKEN
        sampled = np.where(own, statistics.best, sampled).astype(np.int32)
        sampled, count = substitute(batch.rows, sampled, statistics, statistics.accepted, stops)
        self._counters.add("relaxed_tokens", count)
        return sampled

    @staticmethod
    def _serves(batch: VerifyBatch) -> np.ndarray:
        """Which requests, bool [R]: greedy ones, in pictures."""
        serves = batch.temperature == 0
        if batch.outside_pictures is not None:
            serves = serves & ~batch.outside_pictures
        return serves


class SyntheticSubstitution:
    """Puts nodes in the place of draws by a given rate alone."""

    reads_hidden = False

    def __init__(self, rule: Synthetic, counters: Counters):
        self._rule, self._counters = rule, counters

    def statistics(self, logits: torch.Tensor, batch: VerifyBatch) -> bool | None:
        """Says whether there are nodes, by None if not."""
        return True if (batch.rows.parents >= 0).any() else None

    def __call__(self, sampled: np.ndarray, statistics: bool, batch: VerifyBatch) -> np.ndarray:
        """Returns ``sampled`` int32 [L] with some nodes' tokens in it."""
        sampled, count = self._rule.choose(batch.rows, sampled, batch.relaxed_stops)
        self._counters.add("relaxed_tokens", count)
        return sampled


AnySubstitution = Substitution | GreedySubstitution | SyntheticSubstitution


class Verifier:
    """Verifies steps: finds a token at every row, and follows them down the trees."""

    def __init__(
        self, draws: Draws, substitution: AnySubstitution | None, top_k: int,
        reads_target_probs: bool,
    ):  # fmt: skip
        self._draws, self._substitution = draws, substitution
        self._top_k, self._reads_target_probs = top_k, reads_target_probs
        self.reads_hidden = substitution is not None and substitution.reads_hidden
        """Must a batch bring hidden states?"""
        self.relaxes = substitution is not None or draws.relaxes
        """May its rule be lossy?"""

    def verify(self, logits: torch.Tensor, batch: VerifyBatch, watched: bool = True) -> Verdict:
        """Decides what becomes text by ``logits`` [L, V], which it may change in place. If nobody
        has ``watched``, the proposer is told nothing of it."""
        greedy = is_plain_greedy(batch.metadata)
        # Greedy steps need nothing else from the device. Others need what the proposer reads.
        best, largest = most_probable(logits, (watched and self._top_k) or int(greedy))
        statistics = None
        if self._substitution is not None:
            statistics = self._substitution.statistics(logits, batch)
        samples = RowSamples(best[:, 0]) if greedy else self._draws(logits, batch)
        top, sampled, largest = to_host(best, samples.tokens, largest)
        # Penalties may have made infinities of finite logits: what is drawn from those is no id.
        usable = (largest < np.inf) & (sampled < logits.shape[-1])
        sampled[~usable] = BROKEN
        if statistics is not None:
            sampled = self._substitution(sampled, statistics, batch)
        acceptance = lossless.accept(batch.rows, sampled)
        # A node without a distribution is not accepted: only a root can have none.
        nothing = sampled[batch.rows.starts[:-1]] == BROKEN
        acceptance.output[nothing, 0] = 0
        broken = nothing & ~batch.discarded
        if samples.seeded is not None:
            draws = acceptance.lengths
            if logits.device.type == "cpu":  # elsewhere vLLM takes discarded draws back
                draws = np.where(batch.discarded, 0, draws)
            samples.seeded.advance(draws)
        logprobs = samples.logprobs
        if logprobs is not None:
            logprobs = gather_logprobs(logprobs, batch.rows, acceptance)
        target_probs = samples.target_probs if self._reads_target_probs else None
        return Verdict(acceptance, top, logprobs, target_probs, broken)

    def warm_up(self, vocab_size: int) -> None:
        """Compiles what the first step should not wait for, for logits of ``vocab_size``."""
        self._draws.warm_up(vocab_size)


def make_verifier(
    config: MethodConfig, proposer: Proposer, sampler: Sampler, device: torch.device,
    codebook: torch.Tensor | None, counters: Counters, draft_probs: FindDraftProbs,
    group: GroupCoordinator | None = None,
    embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Verifier:  # fmt: skip
    """Builds the verifier of a method: its acceptance rule, and how its nodes are drawn, choose
    the parts.

    ``sampler`` is the runner's; ``codebook`` [V, d] an image model's; ``group`` the
    tensor-parallel ranks, None: one alone; ``embed`` reads ids int64 [n] as the target does.
    """

    @torch.inference_mode()
    def embeddings() -> torch.Tensor:
        return embed(torch.arange(len(codebook), device=device))

    keys = config.acceptance.model_dump(exclude={"rule"})
    given = {"codebook": codebook, "embeddings": embeddings, "device": device}
    acceptance = make_rule(config.acceptance.rule, keys, **given)
    relaxed = acceptance if isinstance(acceptance, RelaxedSampling) else None
    name = proposer.rule
    if name is None and relaxed is not None:
        name = "without_replacement"  # probabilities are compared, also of deterministic nodes
    if name is None:
        draws: Draws = TargetDraws(sampler)
    else:
        rule = make_rule(name, {})
        rule_sampler = RuleSampler(sampler.logprobs_mode, rule, device)
        draws = JudgedDraws(rule_sampler, rule, relaxed, draft_probs, counters, device, group)
    substitution: AnySubstitution | None = None
    if isinstance(acceptance, SubstitutionRule):
        substitution = Substitution(acceptance, counters)
    elif isinstance(acceptance, Lantern) and acceptance.greedy:
        substitution = GreedySubstitution(acceptance, counters)
    elif isinstance(acceptance, Synthetic):
        substitution = SyntheticSubstitution(acceptance, counters)
    return Verifier(draws, substitution, proposer.top_k, proposer.reads_target_probs)
