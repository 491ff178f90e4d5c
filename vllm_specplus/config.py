"""What every method understands in ``--speculative-config``; every mistake is caught here.

The keys of a method's own are in its file, see ``proposers``. Unknown keys are errors; values
are not coerced. Nothing here imports vLLM.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from vllm_specplus import registry
from vllm_specplus.capabilities import TEXT, Need
from vllm_specplus.control.settings import ControlConfig, GoodputControl
from vllm_specplus.samplers import judge
from vllm_specplus.strict import StrictModel, quoted, sentences, told
from vllm_specplus.target import Target

#: Memory that a user grants, in MiB: up to 1 TiB.
Megabytes = Annotated[int, Field(ge=1, le=1 << 20)]


class MemoryBudget(StrictModel):
    """What drafting and verifying may take, see ``engine/memory_plan.py``."""

    budget_gb: Annotated[float, Field(gt=0, le=1 << 20)]
    """Gigabytes (1e9 bytes) for the rows of a step with their logits, and for what the method
    keeps; keys and values of the texts are vLLM's."""


class AcceptanceRule(StrictModel):
    """Which nodes become text."""

    compares: ClassVar[bool] = False
    """Does it go by the probabilities of target and draft (``samplers/relaxed_sampling.py``)?
    Other relaxed rules take deterministic nodes only (``samplers/relaxed.py``)."""
    needs_codebook: ClassVar[bool] = False
    """Is it for image models?"""
    needs_draws: ClassVar[bool] = False
    """Does it say nothing about nodes that were not drawn?"""

    @property
    def reads_before_norm(self) -> bool:
        """Does it go by what leaves the target's last layer, before the final norm?"""
        return False


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
    top_k: Annotated[int, Field(ge=2, le=1000)] = 3
    margin: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Nats below the most probable token."""


class JudgeAcceptance(AcceptanceRule):
    """Also nodes that a trained head calls valid (Judge Decoding)."""

    rule: Literal["judge"]
    head: str
    """File of the head, written by ``vllm-specplus train judge``."""
    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Score above which a node is accepted; 1 accepts none. None: what the head was calibrated to,
    or the paper's 0.5."""

    @model_validator(mode="after")
    def _head_opens(self):
        judge.read_head(self.head)
        return self

    @property
    def reads_before_norm(self) -> bool:
        return judge.read_head(self.head).before_norm


class NeighbourAcceptance(ImageAcceptance):
    """Image codes may borrow the probability of their neighbours."""

    residual: Literal["optimal", "llamagen", "lumina"] = "optimal"
    """What follows a rejection; the others are the reference codes', for parity."""
    greedy: bool = False
    """Greedy requests, too: a code is accepted that is the most probable with what it borrows."""


class LanternAcceptance(NeighbourAcceptance):
    """Image codes may borrow the probability of their neighbours (LANTERN)."""

    rule: Literal["lantern"]
    k: Annotated[int, Field(ge=0, le=1_000_000)] = 1000
    """Nearest codes that may lend."""
    delta: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Most that is lent, and so the most that a distribution moves by (total variation)."""


class LanternPlusAcceptance(NeighbourAcceptance):
    """The same, in proportion to the code's own probability (LANTERN++)."""

    rule: Literal["lantern++"]
    k: Annotated[int, Field(ge=0, le=1_000_000)] = 10
    lambda_: Annotated[float, Field(ge=1, le=1e6, alias="lambda")] = 5.0
    """Borrowed and own probability together, as a multiple of the own."""


class GsdAcceptance(ImageAcceptance):
    """Image codes are judged as groups of neighbours in rank (Grouped Speculative Decoding)."""

    rule: Literal["gsd"]
    group: Annotated[int, Field(ge=1, le=1_000_000)] = 14
    """Codes of a group."""
    max_gap: Annotated[float, Field(gt=0, le=1)] = 0.15
    """Members differ in probability by less than this."""
    max_distance: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """And in their vectors by less than this (squared L2), if set."""
    vectors: Literal["embeddings", "codebook"] = "embeddings"
    """Which ones: those that the model reads codes as, or those that pictures are decoded from."""
    residual: Literal["optimal", "published"] = "optimal"
    """What follows a rejection; the other is the reference code's, for parity."""

    @model_validator(mode="after")
    def _vectors_are_compared(self):
        if self.max_distance is None and "vectors" in self.model_fields_set:
            raise ValueError("'vectors' says what 'max_distance' is between: set that, too")
        return self


class KlJudgeAcceptance(AcceptanceRule):
    """Drawn nodes where draft and target hardly differ and the target is not sure (JuDi)."""

    compares: ClassVar[bool] = True
    needs_draws: ClassVar[bool] = True

    rule: Literal["kl_judge"]
    threshold: Annotated[float, Field(gt=0, le=100)] = 0.5
    """Most KL(target || draft), nats."""
    sure: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Above this largest probability of the target verification is lossless."""


class SyntheticAcceptance(AcceptanceRule):
    """Nodes at a given rate, whatever they hold: for planning, texts are nonsense."""

    rule: Literal["synthetic"]
    rate: Annotated[float, Field(ge=0, le=1)]
    """Probability that the first child of an accepted node is accepted."""


AcceptanceConfig = (
    LosslessAcceptance
    | TypicalAcceptance
    | TopKMarginAcceptance
    | JudgeAcceptance
    | LanternAcceptance
    | LanternPlusAcceptance
    | GsdAcceptance
    | KlJudgeAcceptance
    | SyntheticAcceptance
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
    knows_next: ClassVar[bool] = False
    """Has it a distribution of the next token, over the vocabulary?"""
    takes_speculators: ClassVar[bool] = False
    """Is its ``model`` a head, as folders of ``speculators`` hold one for a target they name?"""
    drafts_latents: ClassVar[bool] = False
    drafts_pictures: ClassVar[bool] = False
    """Is it for image models only?"""

    method: str
    num_speculative_tokens: Annotated[int, Field(ge=1, le=80)]
    """Most nodes drafted per request and step."""
    control: Annotated[ControlConfig, Field(discriminator="policy")] = GoodputControl()
    """How much of that is used; see ``vllm_specplus/control``."""
    acceptance: Annotated[AcceptanceConfig, Field(discriminator="rule")] = LosslessAcceptance()
    """Which nodes become text; see ``vllm_specplus/samplers``."""
    memory: MemoryBudget | None = None
    """None: a step's logits have 1 GiB, and methods their own limits."""
    allow_lossy: bool = False
    """Is it known that the acceptance rule changes what is answered?"""

    @field_validator("control", mode="before")
    @classmethod
    def _goodput_goes_without_saying(cls, control: Any) -> Any:
        if isinstance(control, dict) and "policy" not in control:
            return {"policy": GoodputControl().policy, **control}
        return control

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
    def reads_layers(self) -> bool:
        """Does it read hidden states that enter layers of the target?"""
        return False

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
                    f"'head' {quoted(self.acceptance.head)} reads {size} hidden units, and "
                    f"the target has {target.hidden_size}: train it on this target"
                )
            if self.acceptance.reads_before_norm and not target.gives_layers():
                raise ValueError(
                    f"'head' {quoted(self.acceptance.head)} reads states before the last norm, "
                    f"which vLLM does not hand out of a target of type {target.family!r}: train it "
                    f"with --set states=after_norm"
                )

    def check_kind(self, target: Target) -> None:
        """Raise ValueError if what is drafted is not what the target model generates."""
        if self.drafts_latents and target.latents is None:
            raise ValueError(
                f"method {self.method!r} drafts latents, and the target, of type "
                f"{target.family!r}, generates tokens: use another method"
            )
        if target.latents is not None and not self.drafts_latents:
            latents = ", ".join(registry.usable_methods(lambda config: config.drafts_latents))
            raise ValueError(
                f"method {self.method!r} drafts tokens, and the target generates latents: use "
                f"{latents}"
            )

        if self.drafts_pictures and not target.has_codebook:
            raise ValueError(
                f"method {self.method!r} drafts image codes, and the target, of type "
                f"{target.family!r}, writes text: use another method, such as 'token_recycling'"
            )

    def check_target(self, target: Target) -> None:
        """Raise ValueError if the method does not fit the target model."""


def parse(raw: dict[str, Any]) -> MethodConfig:
    """Validate a user's speculative config for a method of ours or of a package that adds one.

    Raises ValueError with one sentence per mistake: what is wrong, what is allowed.
    """
    method = raw.get("method")
    try:
        model = registry.config_class(method)
    except ValueError as error:
        raise ValueError(f"speculative_config: {error}") from error
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        mistakes = sentences(error, model)
        raise ValueError(told(f"speculative_config for {method!r}", mistakes)) from None
