"""What `recommend` is asked for and what it finds; the search is in `turboquant.experiments.recommend`."""

from typing import Literal

from pydantic import Field, field_validator

from turboquant.methods import BitsMethod, parse_method
from turboquant.methods.layer_bits import Bits
from turboquant.records.base import Record
from turboquant.records.comparison import ModelInfo
from turboquant.records.environment import Environment

RECIPES = ("turboquant", "kivi", "rtn:rotation=hadamard")
MOST_TOKENS = 32_768
"""Where sizes are compared unless asked otherwise: here, or at the model's longest context where that is shorter."""
Part = Literal["choose", "confirm"]


class RecommendSettings(Record):
    """What is asked for.

    Attributes:
        texts: Names of shipped texts or paths of UTF-8 files.
        max_kl: Greatest mean KL from the full cache, in nats a token.
        min_same_top_pct: Least share of positions with the same most likely token, in percent. At the default of 90 it
            decides where `max_kl` is loose: on the recorded texts, methods with a KL below 0.03 keep 91 % and more.
        recipes: Methods without bits.
        context: Tokens of a window, fewer where the text is short. The first half is read in one call, as a prompt is.
        windows: Windows of each text, on the first half to choose and as many on the second half to confirm.
        tokens: The context at which sizes are compared; None for the model's longest, at most `MOST_TOKENS`.
        layers: Whether single layers may be given fewer bits.
    """

    texts: tuple[str, ...] = Field(("persuasion",), min_length=1)
    max_kl: float = Field(0.01, gt=0, allow_inf_nan=False)
    min_same_top_pct: float = Field(90.0, ge=0, le=100)
    recipes: tuple[str, ...] = Field(RECIPES, min_length=1)
    context: int = Field(1024, ge=2)
    windows: int = Field(1, ge=1)
    tokens: int | None = Field(None, ge=1, le=2**24)
    layers: bool = True

    @field_validator("recipes")
    @classmethod
    def _bits_are_free(cls, recipes: tuple[str, ...]) -> tuple[str, ...]:
        for recipe in recipes:
            if not isinstance(parse_method(recipe), BitsMethod):
                raise ValueError(f"a recipe is a method with bits to choose, such as {', '.join(RECIPES)}")
            if "bits=" in recipe or "layers=" in recipe:
                raise ValueError("a recipe names no bits, since they are what is searched")
        return recipes

    def failure(self, kl: float | None, same_top_pct: float | None) -> str | None:
        """Say in which way figures are not within the limits; None where they are."""
        if kl is None or same_top_pct is None:
            return "it could not be measured"
        if kl > self.max_kl:
            return f"KL is {kl:.4g}, above {self.max_kl:g}"
        if same_top_pct < self.min_same_top_pct:
            return f"the top token is the same at {same_top_pct:.1f} %, below {self.min_same_top_pct:g} %"
        return None

    @property
    def limits(self) -> str:
        """The limits in words."""
        return f"KL at most {self.max_kl:g} nats, the same top token at {self.min_same_top_pct:g} % or more"


class Tried(Record):
    """A method that was measured on one part of the text; `failure` says why it is not within the limits, else None.

    Attributes:
        kl: Mean in nats; `kl_low` and `kl_high` are its 95 % bootstrap interval, None for a very short text.
        bytes: What the cache held at the end of a window (measured), `full_bytes` what a full one holds in 16 bits;
            `bits_per_value` is the former in bits by the cached values.
        packed_bits: Codes and scales of a packed value, in bits (measured).
        estimated_bytes: What it holds at the context where sizes are compared (estimated).
    """

    method: str
    part: Part
    kl: float | None = None
    kl_low: float | None = None
    kl_high: float | None = None
    same_top_pct: float | None = None
    measured_tokens: int = 0
    bytes: int | None = None
    full_bytes: int | None = None
    bits_per_value: float | None = None
    packed_bits: float | None = None
    estimated_bytes: int
    failure: str | None = None


class Memory(Record):
    """Bytes of the recommended cache and of a full one in 16 bits, at one context."""

    tokens: int
    bytes: int
    full_bytes: int
    measured: bool

    @property
    def times_smaller(self) -> float:
        """The full cache's bytes divided by the recommended one's."""
        return self.full_bytes / self.bytes


class Recommendation(Record):
    """What was found, with the evidence.

    Attributes:
        texts: What was read, by name.
        method: The recommended method; None where nothing passes.
        uniform: The smallest method with the same bits in all layers that passes.
        closest: Where nothing passes, the measured method with the smallest KL.
        context: Tokens of a window, the first `prefill` read in one call.
        tokens: The context at which sizes are compared.
        candidates: Methods with the same bits in all layers; `measured` of them were measured.
        tried: Every method that was measured on a whole part of the text, in order.
        layer_kl: KL with one layer alone at the lower bits `lower_bits`, by layer.
        memory: What it holds: measured, then estimated for longer contexts.
        reused: Measurements that were known from before; `environment` and `seconds` are those of the others.
        seconds: What the search took.
    """

    kind: Literal["recommendation"] = "recommendation"
    settings: RecommendSettings
    texts: tuple[str, ...]
    model: ModelInfo
    environment: Environment
    method: str | None
    uniform: str | None
    closest: str | None
    context: int
    prefill: int
    tokens: int
    candidates: int
    measured: int
    tried: tuple[Tried, ...]
    layer_kl: dict[int, float] = Field({})
    lower_bits: Bits | None = None
    memory: tuple[Memory, ...] = ()
    reused: int
    seconds: float

    def evidence(self, part: Part, method: str | None = None) -> Tried | None:
        """Return how a method, the recommended one unless another is named, did on one part."""
        wanted = method or self.method
        return next((one for one in self.tried if (one.method, one.part) == (wanted, part)), None)

    @property
    def limits(self) -> str:
        """The limits in words."""
        return (
            f"KL at most {self.settings.max_kl:g} nats and the same top token at {self.settings.min_same_top_pct:g} %"
        )

    @property
    def sentence(self) -> str:
        """The outcome in one sentence."""
        limits = f"the limits ({self.settings.limits})"
        if self.method is None:
            close = self.evidence("confirm", self.closest) or self.evidence("choose", self.closest)
            best = f"the closest is {close.method}, where {close.failure}" if close else "none could be measured"
            return f"None of {self.candidates} methods stays within {limits} on this text; {best}."
        found = self.evidence("confirm")
        assert found is not None
        interval = "" if found.kl_low is None else f" (95 % interval {found.kl_low:.3g} to {found.kl_high:.3g})"
        return (
            f"{self.method} stays within {limits}: on the held-out part of the text KL is {found.kl:.3g}{interval} "
            f"and the top token is the same at {found.same_top_pct:.1f} % of {found.measured_tokens:,} positions."
        )

    @property
    def caution(self) -> str | None:
        """What keeps the outcome from being certain, where that can be seen."""
        halves = (self.evidence("choose"), self.evidence("confirm")) if self.method else ()
        high = max((one.kl_high for one in halves if one and one.kl_high is not None), default=0.0)
        if high <= self.settings.max_kl:
            return None
        return f"On one half the interval reaches above the limit (to {high:.3g}): on more text KL may be above it."
