"""What a user may write in ``--speculative-config``; every mistake is caught here.

One model per method. Unknown keys are errors; values are not coerced. Nothing
here imports vLLM.
"""

from __future__ import annotations

import importlib.util
import json
import math
from abc import abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, model_validator

from vllm_specplus.capabilities import TEXT, Need
from vllm_specplus.control.settings import ControlConfig, GoodputControl
from vllm_specplus.drafting import eagle_checkpoint
from vllm_specplus.drafting import model as draft_model
from vllm_specplus.retrieval import datastore
from vllm_specplus.samplers import judge
from vllm_specplus.strict import StrictModel, sentence
from vllm_specplus.target import Target


class AcceptanceRule(StrictModel):
    """Which nodes become text."""

    compares: ClassVar[bool] = False
    """Does it go by the probabilities of target and draft (``samplers/relaxed_sampling.py``)?
    Other relaxed rules take deterministic nodes only (``samplers/relaxed.py``)."""
    needs_codebook: ClassVar[bool] = False
    """Is it for image models?"""
    needs_draws: ClassVar[bool] = False
    """Does it say nothing about nodes that were not drawn?"""


class ImageAcceptance(AcceptanceRule):
    """Of image codes: they are known to be interchangeable, so nobody has to allow the loss."""

    compares: ClassVar[bool] = True
    needs_codebook: ClassVar[bool] = True


class LosslessAcceptance(AcceptanceRule):
    """The output follows the target's distribution."""

    rule: Literal["lossless"] = "lossless"


class TypicalAcceptance(AcceptanceRule):
    """Also nodes that are probable enough, the less the more open the text is (Medusa)."""

    rule: Literal["typical"]
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.09
    """A probability that is always enough."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of exp(-entropy) that is enough."""


class TopKMarginAcceptance(AcceptanceRule):
    """Also nodes among the most probable tokens, and nearly as probable as the best."""

    rule: Literal["top_k_margin"]
    top_k: Annotated[int, Field(ge=2)] = 3
    margin: Annotated[float, Field(gt=0)] = 1.0
    """Nats below the most probable token."""


class JudgeAcceptance(AcceptanceRule):
    """Also nodes that a trained head calls valid (Judge Decoding)."""

    rule: Literal["judge"]
    head: str
    """File of the head, written by ``python -m vllm_specplus.training.judge``."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Score above which a node is accepted; 1 accepts none."""

    @model_validator(mode="after")
    def _head_opens(self):
        judge.head_size(self.head)
        return self


class LanternAcceptance(ImageAcceptance):
    """Image codes may borrow the probability of their neighbours (LANTERN)."""

    rule: Literal["lantern"]
    k: Annotated[int, Field(ge=0)] = 1000
    """Nearest codes that may lend."""
    delta: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Most that is lent, and so the most that a distribution moves by (total variation)."""
    residual: Literal["optimal", "llamagen", "lumina"] = "optimal"
    """What follows a rejection; the others are the reference codes', for parity."""


class LanternPlusAcceptance(ImageAcceptance):
    """The same, in proportion to the code's own probability (LANTERN++)."""

    rule: Literal["lantern++"]
    k: Annotated[int, Field(ge=0)] = 10
    lambda_: Annotated[float, Field(ge=1, alias="lambda")] = 5.0
    """Borrowed and own probability together, as a multiple of the own."""
    residual: Literal["optimal", "llamagen", "lumina"] = "optimal"


class GsdAcceptance(ImageAcceptance):
    """Image codes are judged as groups of neighbours in rank (Grouped Speculative Decoding)."""

    rule: Literal["gsd"]
    group: Annotated[int, Field(ge=1)] = 14
    """Codes of a group."""
    max_gap: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Members differ in probability by less than this."""
    max_distance: Annotated[float, Field(gt=0)] | None = None
    """And in their codebook vectors by less than this (squared L2), if set."""


class KlJudgeAcceptance(AcceptanceRule):
    """Drawn nodes where draft and target hardly differ and the target is not sure (JuDi)."""

    compares: ClassVar[bool] = True
    needs_draws: ClassVar[bool] = True

    rule: Literal["kl_judge"]
    threshold: Annotated[float, Field(gt=0)] = 0.5
    """Most KL(target || draft), nats."""
    sure: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Above this largest probability of the target verification is lossless."""


AcceptanceConfig = (
    LosslessAcceptance
    | TypicalAcceptance
    | TopKMarginAcceptance
    | JudgeAcceptance
    | LanternAcceptance
    | LanternPlusAcceptance
    | GsdAcceptance
    | KlJudgeAcceptance
)


class MethodConfig(StrictModel):
    """Keys every method of ours understands."""

    supports: ClassVar[frozenset[Need]] = TEXT
    """What models and launches may need of the method, of :mod:`vllm_specplus.capabilities`."""
    retrieves: ClassVar[bool] = False
    """Does the method only look texts up, with no opinion on the next token of its own?"""
    fuses: ClassVar[bool] = True
    """May it be a source of rasd?"""
    own_size: ClassVar[bool] = False
    """Has it, as a source of rasd, a ``num_speculative_tokens`` of its own?"""
    drafts_latents: ClassVar[bool] = False

    method: str
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)]
    """Most nodes drafted per request and step."""
    control: Annotated[ControlConfig, Field(discriminator="policy")] = GoodputControl()
    """How much of that is used; see ``vllm_specplus/control``."""
    acceptance: Annotated[AcceptanceConfig, Field(discriminator="rule")] = LosslessAcceptance()
    """Which nodes become text; see ``vllm_specplus/samplers``."""
    allow_lossy: bool = False
    """Is it known that the acceptance rule changes what is answered?"""

    @model_validator(mode="after")
    def _fixed_says_how_many(self):
        if self.control.policy == "fixed" and "num_speculative_tokens" not in self.model_fields_set:
            raise ValueError(
                'control policy "fixed" always drafts num_speculative_tokens nodes: '
                "set num_speculative_tokens"
            )
        return self

    def serves(self) -> frozenset[Need]:
        """Return what it supports with these keys."""
        return self.supports

    @property
    def rule(self) -> str | None:
        """Verification rule of ``samplers/sampled.py``; None: nothing is drawn."""
        return None

    @property
    def accepts_by(self) -> str:
        """Name of the rule that accepts nodes."""
        return self.acceptance.rule

    @property
    def lossless(self) -> bool:
        return self.acceptance.rule == "lossless"

    @model_validator(mode="after")
    def _loss_is_wanted(self):
        if self.lossless:
            if self.allow_lossy:
                raise ValueError("'allow_lossy' is for an 'acceptance' rule that is: remove it")
        elif not self.allow_lossy and not self.acceptance.needs_codebook:
            raise ValueError(
                f"acceptance rule {self.acceptance.rule!r} changes what is answered: set "
                f"'allow_lossy' to true if that is wanted"
            )
        elif self.acceptance.needs_draws and self.rule is None:
            raise ValueError(
                f"acceptance rule {self.acceptance.rule!r} compares with what the nodes were drawn "
                f"from: use a method and 'shape' that draws"
            )
        elif self.rule is not None and not self.acceptance.compares:
            raise ValueError(
                f"acceptance rule {self.acceptance.rule!r} takes nodes that were not drawn: "
                + ("set 'shape' to 'topk'" if hasattr(self, "shape") else "use another method")
            )
        return self

    @classmethod
    def as_source(cls, keys: dict[str, Any]) -> dict[str, Any]:
        """``keys`` with the defaults that are others when it is a source of rasd."""
        return keys

    def check_source(self) -> None:
        """Raise ValueError if, with these keys, it cannot be a source of rasd."""

    def check_acceptance(self, target: Target) -> None:
        """Raise ValueError if the acceptance rule does not fit the target model."""
        if self.acceptance.needs_codebook and not target.has_codebook:
            raise ValueError(
                f"acceptance rule {self.acceptance.rule!r} goes by the codebook of an image model, "
                f"and the target is of type {target.family!r}"
            )
        if self.acceptance.rule == "judge":
            size = judge.head_size(self.acceptance.head)
            if size != target.hidden_size:
                raise ValueError(
                    f"'head' {self.acceptance.head!r} reads {size} hidden units, and the target "
                    f"has {target.hidden_size}: train it on this target"
                )

    def check_kind(self, target: Target) -> None:
        """Raise ValueError if what is drafted is not what the target model generates."""
        if self.drafts_latents and target.latents is None:
            raise ValueError(
                f"method {self.method!r} drafts latents, and the target, of type "
                f"{target.family!r}, generates tokens: use another method"
            )
        if target.latents is not None and not self.drafts_latents:
            latents = ", ".join(name for name, each in METHODS.items() if each.drafts_latents)
            raise ValueError(
                f"method {self.method!r} drafts tokens, and the target generates latents: use "
                f"{latents}"
            )

    def check_target(self, target: Target) -> None:
        """Raise ValueError if the method does not fit the target model."""


class TokenRecyclingConfig(MethodConfig):
    """``{"method": "token_recycling", ...}``; see ``proposers/token_recycling.py``."""

    method: Literal["token_recycling"] = "token_recycling"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 32
    tree: Literal["best_first", "2.2.2"] = "best_first"
    """Grown best first by acceptance probability, or the paper's static template."""
    top_k: Annotated[int, Field(ge=1, le=16)] = 8
    """Successors kept per token."""
    pair_keys: bool = True
    """Also keep successors keyed by the last two tokens."""
    match_context: bool = True
    """Merge the continuation of the longest match in the request's own text."""
    seed_from_prompt: bool = False
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


class JacobiConfig(MethodConfig):
    """``{"method": "jacobi", ...}``; see ``proposers/jacobi.py``."""

    fuses: ClassVar[bool] = False

    method: Literal["jacobi"] = "jacobi"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 15
    """The window less the token that is being read."""

    @property
    def rule(self) -> str | None:
        return "without_replacement"


class CspdConfig(MethodConfig):
    """``{"method": "cspd", "model": "...", ...}``; see ``proposers/cspd.py``."""

    fuses: ClassVar[bool] = False
    drafts_latents: ClassVar[bool] = True

    method: Literal["cspd"] = "cspd"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 4
    """Latents drafted per step, at most."""
    model: str
    """Folder of the draft, a smaller causal model of the same latents."""
    verification: Literal["exact", "paper", "reference"] = "exact"
    """How a drafted latent is judged; see ``image/continuous/acceptance.py``."""
    prefill: Annotated[int, Field(ge=0)] = 0
    """First latents of a picture that are not drafted."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Denoising steps of a drafted latent; by default the target's."""
    kv_memory_mb: Annotated[int, Field(ge=1)] = 512
    """The draft's own keys and values; requests beyond it go undrafted."""

    @property
    def accepts_by(self) -> str:
        return self.verification

    @property
    def lossless(self) -> bool:
        return self.verification == "exact"

    @model_validator(mode="after")
    def _loss_is_wanted(self):
        if self.acceptance.rule != "lossless":
            raise ValueError("'acceptance' is for tokens, and latents have 'verification': use it")
        if self.lossless and self.allow_lossy:
            raise ValueError("'allow_lossy' is for a 'verification' that is not exact: remove it")
        if not self.lossless and not self.allow_lossy:
            raise ValueError(
                f"verification {self.verification!r} changes what is made: set 'allow_lossy' to "
                f"true if that is wanted"
            )
        return self

    @model_validator(mode="after")
    def _model_is_there(self):
        self._draft()
        return self

    def _draft(self) -> dict[str, Any]:
        path = Path(self.model) / "config.json"
        if not path.is_file():
            raise ValueError(f"'model' {self.model!r} is not a folder with a config.json")
        return json.loads(path.read_text())

    def check_target(self, target: Target) -> None:
        draft = self._draft()
        if self.steps is not None and self.steps > target.latents["steps"]:
            raise ValueError(
                f"'steps' is {self.steps}, and the target takes {target.latents['steps']}: lower it"
            )
        for key in ("model_type", "num_classes", "grid_size", "size", "end", "prediction"):
            if draft.get(key) != target.latents.get(key):
                raise ValueError(
                    f"'model' {self.model!r} does not draft for this target: its {key!r} is "
                    f"{draft.get(key)!r}, and the target's is {target.latents.get(key)!r}"
                )


class RestConfig(MethodConfig):
    """``{"method": "rest", ...}``; see ``proposers/rest.py``."""

    retrieves: ClassVar[bool] = True

    method: Literal["rest"] = "rest"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 32
    datastore: str
    """Folder written by ``vllm-specplus datastore build``."""

    @model_validator(mode="after")
    def _datastore_opens(self):
        datastore.Datastore.open(self.datastore)
        return self

    def check_target(self, target: Target) -> None:
        manifest = datastore.verify(self.datastore)
        datastore.check_target(manifest, self.datastore, target.load_tokenizer(), target.vocab_size)


class SuffixTreeConfig(MethodConfig):
    """``{"method": "suffix_tree", ...}``; see ``proposers/suffix_tree.py``."""

    retrieves: ClassVar[bool] = True

    method: Literal["suffix_tree"] = "suffix_tree"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 32
    max_depth: Annotated[int, Field(ge=2, le=256)] = 24
    """Longest match plus continuation the trees hold."""
    max_memory_mb: Annotated[int, Field(ge=1)] = 256
    """Finished responses are forgotten, oldest first, beyond this."""

    @model_validator(mode="after")
    def _library_is_there(self):
        if importlib.util.find_spec("arctic_inference") is None:
            raise ValueError(
                "method 'suffix_tree' needs arctic-inference: pip install 'vllm-specplus[suffix]'"
            )
        return self


class ShapedDraftConfig(MethodConfig):
    """Keys of the methods that draft level by level, each level a forward pass."""

    own_size: ClassVar[bool] = True

    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 12
    """Nodes of the whole tree: width times depth, or given by ``branching``."""
    shape: Literal["chain", "topk", "rsd_c", "rsd_s", "spectr"] = "topk"
    width: Annotated[int, Field(ge=1, le=16)] = 3
    """Nodes per level of topk, rsd_s and spectr."""
    branching: list[Annotated[int, Field(ge=1, le=16)]] = Field(default=[3, 1, 1, 1], min_length=1)
    """Children of every node, level by level, of rsd_c."""
    verification: Literal["recursive", "block", "traversal", "k_seq"] | None = None
    """How sampled nodes are accepted; by default the best rule for the shape."""

    @model_validator(mode="after")
    def _shape_fits(self):
        for key, shapes in _SHAPE_KEYS.items():
            if key in self.model_fields_set and self.shape not in shapes:
                raise ValueError(f"shape {self.shape!r} has no {key!r}: remove it")
        nodes = sum(self.levels())
        if self.shape == "rsd_c" and self.num_speculative_tokens != nodes:
            raise ValueError(
                f"'branching' {self.branching} makes {nodes} nodes (at most 80): set "
                f"num_speculative_tokens to the number of nodes"
            )
        if self.num_speculative_tokens != nodes:
            raise ValueError(
                f"num_speculative_tokens ({self.num_speculative_tokens}) must be a multiple of "
                f"'width' ({self.width}), the nodes of a level"
            )
        return self

    @model_validator(mode="after")
    def _rule_fits(self):
        allowed = list(_RULES[self.shape])
        if self.verification is not None and self.verification not in allowed:
            raise ValueError(
                f"shape {self.shape!r} cannot be verified by {self.verification!r} "
                f"(allowed: {', '.join(allowed) or 'leave verification out'})"
            )
        return self

    def shape_arguments(self, depth: int) -> tuple:
        """What the shape takes for a tree of ``depth`` levels."""
        if self.shape == "rsd_c":
            return (tuple(self.branching[:depth]),)
        return (1 if self.shape == "chain" else self.width, depth)

    def levels(self) -> tuple[int, ...]:
        """Nodes of each level of the largest tree."""
        if self.shape == "rsd_c":
            return tuple(math.prod(self.branching[: d + 1]) for d in range(len(self.branching)))
        width, _ = self.shape_arguments(0)
        return (width,) * (self.num_speculative_tokens // width)

    @property
    def rule(self) -> str | None:
        rules = _RULES[self.shape]
        return rules[self.verification or next(iter(rules))] if rules else None

    @classmethod
    def as_source(cls, keys: dict[str, Any]) -> dict[str, Any]:
        keys = {"shape": "topk"} | keys
        if keys["shape"] in _FUSED_SHAPES:
            keys = {"verification": "recursive"} | keys
        return keys

    def check_source(self) -> None:
        # Other rules have no place for siblings that no draft distribution proposed.
        if self.rule not in (None, "without_replacement"):
            raise ValueError(
                f"'sources': {self.method!r} with shape {self.shape!r} is verified by a rule that "
                f"knows no nodes of other sources: set 'shape' to {', '.join(_FUSED_SHAPES)} or "
                f"topk, and leave 'verification' out"
            )


class DraftTreeConfig(ShapedDraftConfig):
    """``{"method": "draft_tree", "model": "...", ...}``; see ``proposers/draft_tree.py``."""

    method: Literal["draft_tree"] = "draft_tree"
    model: str
    """Hugging Face folder of the draft, with the target's tokenizer."""
    shape: Literal["chain", "topk", "rsd_c", "rsd_s", "spectr"] = "rsd_s"
    head_tokens: Annotated[int, Field(ge=2)] | None = None
    """Draft the first so many token ids only: the ids of byte-pair tokenizers are in order
    of frequency, and the output layer is most of a small draft (arXiv 2502.14856)."""
    kv_memory_mb: Annotated[int, Field(ge=1)] = 512
    """The draft's own keys and values; requests beyond it go undrafted."""

    @model_validator(mode="after")
    def _model_runs(self):
        draft_model.read_config(self.model)
        return self

    def check_target(self, target: Target) -> None:
        draft_model.check_target(self.model, target.load_tokenizer(), target.vocab_size)


class EasySpecConfig(DraftTreeConfig):
    """``{"method": "easyspec", "model": "...", ...}``; see ``proposers/easyspec.py``."""

    method: Literal["easyspec"] = "easyspec"
    group_size: Annotated[int, Field(ge=1, le=16)] = 4
    """Consecutive layers of the draft whose attentions read the same input."""
    shards: Annotated[int, Field(ge=1, le=16)] = 1
    """Processes that share the attentions, this one included; the others are placed by Ray."""
    ray_address: str | None = None
    """Cluster for the other shards; by default the one vLLM runs on, or a local one."""
    share_target: bool = False
    """Do the other shards run on the devices of the target's other ranks, which idle while rank 0
    drafts, instead of devices of their own?"""

    @model_validator(mode="after")
    def _shards_have_work(self):
        if self.shards > self.group_size:
            raise ValueError(
                f"'shards' ({self.shards}) is more than 'group_size' ({self.group_size}), the "
                f"layers that run at the same time: lower it"
            )
        if self.shards > 1 and importlib.util.find_spec("ray") is None:
            raise ValueError("more than one shard needs Ray: pip install 'vllm-specplus[ray]'")
        if self.shards == 1 and self.ray_address is not None:
            raise ValueError("'ray_address' is for 'shards' > 1: set it or remove the address")
        if self.shards == 1 and self.share_target:
            raise ValueError("'share_target' is for 'shards' > 1: set it or remove the key")
        return self

    def check_target(self, target: Target) -> None:
        super().check_target(target)
        if self.share_target and self.shards > target.tensor_parallel_size:
            raise ValueError(
                f"'share_target' puts every shard on the device of a rank of the target: 'shards' "
                f"({self.shards}) is more than tensor_parallel_size ({target.tensor_parallel_size})"
            )


class EagleTreeConfig(ShapedDraftConfig):
    """``{"method": "eagle_tree", "model": "...", ...}``; see ``proposers/eagle_tree.py``."""

    supports: ClassVar[frozenset[Need]] = TEXT - {Need.MROPE}
    fuses: ClassVar[bool] = False

    method: Literal["eagle_tree"] = "eagle_tree"
    model: str
    """Folder of an EAGLE or EAGLE-3 head that was trained for the target."""

    @model_validator(mode="after")
    def _head_runs(self):
        eagle_checkpoint.read_config(self.model)
        return self

    def check_target(self, target: Target) -> None:
        head = eagle_checkpoint.read_config(self.model)
        eagle_checkpoint.check_target(head, self.model, target)


class SelfSpeculationConfig(ShapedDraftConfig):
    """Keys of the methods that draft with the target's own layers."""

    supports: ClassVar[frozenset[Need]] = TEXT - {Need.MROPE}
    kv_memory_mb: Annotated[int, Field(ge=1)] = 512
    """The draft's own keys and values; requests beyond it go undrafted."""

    def check_target(self, target: Target) -> None:
        if target.family not in draft_model.FAMILIES:
            raise ValueError(
                f"method {self.method!r} knows the layers of {', '.join(draft_model.FAMILIES)}, "
                f"and the target is of type {target.family!r}"
            )
        if target.tensor_parallel_size > 1:
            raise ValueError(
                f"method {self.method!r} drafts with the target's layers on one rank: set "
                f"tensor_parallel_size to 1"
            )
        for key, layers in self.named_layers().items():
            if layers and not 0 <= min(layers) <= max(layers) < target.num_layers:
                raise ValueError(
                    f"{key!r} is {layers}, and the target's layers are 0 to {target.num_layers - 1}"
                )

    @abstractmethod
    def named_layers(self) -> dict[str, list[int] | None]:
        """Keys that name layers of the target."""


class LayerSkipConfig(SelfSpeculationConfig):
    """``{"method": "layer_skip", ...}``; see ``proposers/layer_skip.py``."""

    method: Literal["layer_skip"] = "layer_skip"
    skip_share: Annotated[float, Field(gt=0, lt=1)] = 0.45
    """Share of the attention and MLP blocks that drafting leaves out, first and last layer
    aside; which ones is found while serving."""
    skip_attention: list[Annotated[int, Field(ge=0)]] | None = None
    """Layers whose attention is left out, instead of a search."""
    skip_mlp: list[Annotated[int, Field(ge=0)]] | None = None
    """Layers whose MLP is left out, instead of a search."""

    @model_validator(mode="after")
    def _searched_or_given(self):
        given = [key for key, layers in self.named_layers().items() if layers is not None]
        if given and "skip_share" in self.model_fields_set:
            raise ValueError(
                f"'skip_share' is for the search, and {given[0]!r} says what to leave out: remove "
                f"one of them"
            )
        return self

    def check_target(self, target: Target) -> None:
        super().check_target(target)
        if target.num_layers < 3:
            raise ValueError(
                f"method 'layer_skip' keeps the first and the last layer, and the target has "
                f"{target.num_layers}"
            )

    def named_layers(self) -> dict[str, list[int] | None]:
        return {"skip_attention": self.skip_attention, "skip_mlp": self.skip_mlp}


class EarlyExitConfig(SelfSpeculationConfig):
    """``{"method": "early_exit", ...}``; see ``proposers/early_exit.py``."""

    method: Literal["early_exit"] = "early_exit"
    exit_layers: list[Annotated[int, Field(ge=1)]] | None = Field(default=None, min_length=1)
    """How many layers may run, in ascending order: the best is found while serving. By default
    a quarter, a half and three quarters of them."""

    @model_validator(mode="after")
    def _exits_ascend(self):
        if self.exit_layers and self.exit_layers != sorted(set(self.exit_layers)):
            raise ValueError(f"'exit_layers' is {self.exit_layers}: name each once, ascending")
        return self

    def named_layers(self) -> dict[str, list[int] | None]:
        return {"exit_layers": self.exit_layers}


_SHAPE_KEYS = {"width": ("topk", "rsd_s", "spectr"), "branching": ("rsd_c",)}
#: shape -> what a user may call its verification -> the rule; the first is the default.
_RULES: dict[str, dict[str, str]] = {
    "chain": {"block": "block", "recursive": "without_replacement"},
    "topk": {},
    "rsd_c": {"traversal": "traversal", "recursive": "without_replacement"},
    "rsd_s": {"traversal": "traversal", "recursive": "without_replacement"},
    "spectr": {"k_seq": "k_seq", "recursive": "with_replacement"},
}
#: Shapes that draw by a rule which also takes nodes that nothing drew.
_FUSED_SHAPES = tuple(
    shape for shape, rules in _RULES.items() if rules.get("recursive") == "without_replacement"
)


class RasdConfig(MethodConfig):
    """``{"method": "rasd", "sources": [...]}``; see ``proposers/rasd.py``."""

    fuses: ClassVar[bool] = False

    method: Literal["rasd"] = "rasd"
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)] = 32
    sources: list[str | dict[str, Any]] = Field(
        default=["token_recycling", "suffix_tree"], min_length=1
    )
    """Methods to fuse: names, or objects with the method's own keys."""
    prune: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Retrieved branches go if the drafting sources give their first token less."""

    @model_validator(mode="after")
    def _sources_fit(self):
        members = self.members()
        names = [member.method for member in members]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"'sources' names {name!r} twice: name every method once")
        drawing = [member.method for member in members if member.rule is not None]
        if len(drawing) > 1:
            raise ValueError(
                f"'sources': {' and '.join(drawing)} both draw their nodes: give all but one of "
                f"them the shape 'topk'"
            )
        if drawing and self.prune:
            raise ValueError(
                f"'prune' goes by what a draft thinks, and {drawing[0]!r} draws its nodes: give "
                f"it the shape 'topk' or remove 'prune'"
            )
        if self.prune and all(member.retrieves for member in members):
            raise ValueError(
                "'prune' needs a source that drafts, such as token_recycling: "
                "add one or remove 'prune'"
            )
        return self

    def serves(self) -> frozenset[Need]:
        return self.supports.intersection(*(member.serves() for member in self.members()))

    @property
    def rule(self) -> str | None:
        return next((member.rule for member in self.members() if member.rule), None)

    def members(self) -> list[MethodConfig]:
        """The sources' own configs; all but draft models get ``num_speculative_tokens``."""
        members = []
        sources = [{"method": s} if isinstance(s, str) else dict(s) for s in self.sources]
        names = [keys.get("method") for keys in sources]
        for source, keys, name in zip(self.sources, sources, names, strict=True):
            if name not in METHODS or not METHODS[name].fuses:
                allowed = ", ".join(sorted(n for n, m in METHODS.items() if m.fuses))
                raise ValueError(f"'sources' holds {source!r} (allowed: {allowed})")
            common = {"num_speculative_tokens": self.num_speculative_tokens}
            if METHODS[name].own_size:
                common = {}
            for key in (*common, "control", "acceptance", "allow_lossy"):
                if key in keys:
                    raise ValueError(
                        f"'sources': {name!r} has a {key!r} of its own: "
                        f"set it once, for {self.method!r}"
                    )
            keys = METHODS[name].as_source(keys) | common
            if name == "token_recycling" and "suffix_tree" in names:
                keys.setdefault("match_context", False)  # the suffix tree does that, and better
            members.append(parse(keys))
            members[-1].check_source()
        return members

    def check_target(self, target: Target) -> None:
        for member in self.members():
            member.check_target(target)


#: method name -> its model.
METHODS: dict[str, type[MethodConfig]] = {
    "cspd": CspdConfig,
    "draft_tree": DraftTreeConfig,
    "eagle_tree": EagleTreeConfig,
    "early_exit": EarlyExitConfig,
    "easyspec": EasySpecConfig,
    "jacobi": JacobiConfig,
    "layer_skip": LayerSkipConfig,
    "rasd": RasdConfig,
    "rest": RestConfig,
    "suffix_tree": SuffixTreeConfig,
    "token_recycling": TokenRecyclingConfig,
}


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
        problems = [sentence(e, model) for e in error.errors()]
        raise ValueError(f"speculative_config for {method!r}: {'; '.join(problems)}") from None
