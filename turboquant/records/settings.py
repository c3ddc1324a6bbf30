"""The settings of every experiment: a record each, whose fields are a cell's settings and a command's options.

The text below a field is its description everywhere: in help, in documentation, in error messages it is the field's
name. Nothing heavy is imported here, so that `turboquant --help` and a page know all settings at once.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from pydantic import ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from turboquant.records.base import Record
from turboquant.records.comparison import Settings

MOST_RUNS = 10_000
"""Timed rounds, rows, seeds and the like at most."""
MOST_TOKENS = 2**24
MOST_ANSWER = 2**16
"""Tokens that are generated at most."""
CHUNK = 64
"""Tokens of one forward call at most where all its logits are held at once."""
SENTENCES = "sentences"
"""The filler that RULER repeats (arXiv:2404.06654)."""
REPEATED = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
STARTS = REPEATED.count(".")
"""Sentences at which that filler can begin: so many different prompts has an own needle in it."""
MAX_NEEDLE, MAX_QUESTION, MAX_ANSWER = 400, 300, 100
"""Characters of an own needle's texts at most."""
Shape = Literal["llama-3.1-8b", "qwen2.5-3b", "phi-2", "smollm2-135m"]
"""Attention heads of a model, for kernels alone."""
ModelShape = Literal["mistral-7b", "smollm2-135m"]
"""A whole model, with random weights."""


class CellSettings(Record):
    """Base of all: what an experiment is asked, apart from model and method.

    Fields in `added_later` are no part of a cell's settings while they have their default, so that records from before
    they were there are still those of the same cell.
    """

    model_config = ConfigDict(use_attribute_docstrings=True)
    added_later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_defaults_of_later_fields(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        settings: dict[str, Any] = handler(self)
        default = {name: type(self).model_fields[name].default for name in self.added_later}
        return {name: value for name, value in settings.items() if name not in default or value != default[name]}


def _check_prefill(prefill: int, context: int) -> None:
    if prefill >= context:
        raise ValueError(f"prefill must be shorter than the context of {context} tokens, got {prefill}")


class PerplexitySettings(CellSettings):
    """What is read. Unless `chunk_tokens` says otherwise, chunks give the same as feeding token by token."""

    texts: tuple[str, ...] = Field(("persuasion", "factbook", "sqlite"), min_length=1)
    """Shipped texts or paths of UTF-8 files."""
    context: int = Field(1024, ge=2)
    """Tokens of a window."""
    prefill: int = Field(512, ge=1)
    """The first of them, read in one call; not measured."""
    windows: int = Field(1, ge=1)
    """Windows of each text."""
    start: int = Field(0, ge=0)
    """Token of the text where the first window begins."""
    seed: int = Field(0, ge=0)
    """0: windows in a row; else their places are drawn."""
    chunk_tokens: int | None = Field(None, ge=1, le=CHUNK)
    """Tokens fed at once; faster and coarser. Default: exactly as decoding token by token."""

    @model_validator(mode="after")
    def _prefill_is_shorter(self) -> "PerplexitySettings":
        _check_prefill(self.prefill, self.context)
        return self


def contains(text: str, words: str) -> bool:
    """Return whether words stand in a text, whatever the case and the spaces between them."""
    return " ".join(words.casefold().split()) in " ".join(text.casefold().split())


@dataclass(frozen=True)
class OwnNeedle:
    """A needle that somebody wrote: it stands in the filler, the question at the end.

    Attributes:
        needle: The sentence that is hidden.
        question: What is asked about it.
        answer: Words of the needle that a right reply contains.
    """

    needle: str
    question: str
    answer: str

    def __post_init__(self) -> None:
        """Check that the answer can be found in the needle alone.

        Raises:
            ValueError: If a text is empty, the answer is not in the needle, or the question gives it away.
        """
        if not (self.needle.strip() and self.question.strip() and self.answer.strip()):
            raise ValueError("an own needle has a needle, a question and an answer, none of them empty")
        if not contains(self.needle, self.answer):
            raise ValueError(f"the answer must occur in the needle, got {self.answer!r}")
        if contains(self.question, self.answer):
            raise ValueError(f"the question must not contain the answer {self.answer!r}")


class NeedleSettings(CellSettings):
    """One length and depth, asked about `repetitions` times. `needle`, `question` and `answer` are given together."""

    added_later = frozenset({"needle", "question", "answer", "chat"})

    context: int = Field(1024, ge=2)
    """Tokens of a prompt, the question included."""
    depth: float = Field(0.5, ge=0.0, le=1.0)
    """Where the needle stands: 0 start, 1 end."""
    repetitions: int = Field(5, ge=1, le=MOST_RUNS)
    """Needles for each length and depth."""
    seed: int = Field(0, ge=0)
    """Chooses the needles; no two seeds share one."""
    filler: str = SENTENCES
    """Text around the needle: sentences (RULER's), a shipped text or a UTF-8 file."""
    max_new_tokens: int = Field(16, ge=1, le=MOST_ANSWER)
    """Tokens of an answer."""
    chunk_tokens: int = Field(512, ge=1)
    """Tokens read at once with the full cache; changes memory and speed, not what is measured."""
    chat: bool = True
    """Put the prompt through the model's chat template, where it has one."""
    needle: str | None = Field(None, max_length=MAX_NEEDLE)
    """An own sentence to hide."""
    question: str | None = Field(None, max_length=MAX_QUESTION)
    """What is asked about it."""
    answer: str | None = Field(None, max_length=MAX_ANSWER)
    """Words of the needle that a right reply contains."""

    @property
    def own(self) -> OwnNeedle | None:
        """The needle that was given, if one was."""
        if self.needle is None or self.question is None or self.answer is None:
            return None
        return OwnNeedle(self.needle, self.question, self.answer)

    @model_validator(mode="after")
    def _own_needle_is_whole(self) -> "NeedleSettings":
        given = [text is not None for text in (self.needle, self.question, self.answer)]
        if any(given) and not all(given):
            raise ValueError("needle, question and answer are given together or not at all")
        if self.own and self.filler == SENTENCES and self.repetitions > STARTS:
            raise ValueError(
                f"an own needle has {STARTS} different prompts in the filler {SENTENCES}, "
                f"got {self.repetitions} repetitions"
            )
        return self


class HeadsSettings(CellSettings):
    """What is read, and which tokens ask: the last `queries` are exact, all before them is what the cache holds."""

    added_later = frozenset({"chat"})

    context: int = Field(2048, ge=2)
    """Tokens of a context."""
    depth: float = Field(0.5, ge=0.0, le=1.0)
    """Where in the context the needle is hidden: 0 start, 1 end."""
    queries: int = Field(64, ge=1)
    """Last tokens of the context, whose attention is compared."""
    seed: int = Field(0, ge=0)
    """Chooses the needle."""
    filler: str = SENTENCES
    """Text around the needle: sentences, a shipped text or a UTF-8 file."""
    chunk_tokens: int = Field(512, ge=1)
    """Tokens read at once; memory against speed."""
    chat: bool = True
    """Put the prompt through the model's chat template, where it has one."""


class SeedsSettings(CellSettings):
    """What is read and answered; answers do not end before their length."""

    texts: tuple[str, ...] = Field(("persuasion", "factbook"), min_length=1)
    """Shipped texts or paths of UTF-8 files."""
    context: int = Field(512, ge=2)
    """Tokens whose perplexity is measured."""
    prefill: int = Field(256, ge=1)
    """The first of them, read in one call."""
    seed: int | None = Field(None, ge=0, lt=2**31)
    """Sampling seed; none for perplexity and greedy answers."""
    prompts: int = Field(2, ge=1)
    """Prompts from each text: stretches behind the window."""
    prompt_tokens: int = Field(160, ge=1)
    """Tokens of a prompt."""
    new_tokens: int = Field(48, ge=1)
    """Tokens of an answer."""
    temperature: float = Field(0.8, gt=0.0, le=5.0)
    """Of sampled answers."""

    @model_validator(mode="after")
    def _perplexity_agrees(self) -> "SeedsSettings":
        _check_prefill(self.prefill, self.context)
        return self

    @property
    def perplexity(self) -> PerplexitySettings:
        """The settings of the perplexity experiment."""
        return PerplexitySettings(texts=self.texts, context=self.context, prefill=self.prefill)

    @property
    def sampling(self) -> Settings:
        """How answers are chosen."""
        if self.seed is None:
            return Settings(max_new_tokens=self.new_tokens)
        return Settings(max_new_tokens=self.new_tokens, temperature=self.temperature, seed=self.seed)


class SpeedSettings(CellSettings):
    """What is generated: `context` tokens a row in the end, `new_tokens` of them by the model."""

    context: int = Field(640, ge=3)
    """Tokens of a row in the end: its prompt and the new ones."""
    new_tokens: int = Field(128, ge=2)
    """Tokens generated for each row."""
    batch: int = Field(1, ge=1, le=64)
    """Rows."""
    shortest: float = Field(1.0, gt=0.0, le=1.0)
    """Shortest prompt as a share of the longest; below 1 rows are left-padded."""
    repeats: int = Field(5, ge=1, le=MOST_RUNS)
    """Timed rounds; all sides in turn in each."""
    text: str = "persuasion"
    """Where prompts come from: a shipped text or a path."""

    @model_validator(mode="after")
    def _has_a_prompt(self) -> "SpeedSettings":
        if self.new_tokens >= self.context:
            raise ValueError(f"new_tokens must be fewer than the context's {self.context}, got {self.new_tokens}")
        return self


class TheorySettings(CellSettings):
    """Random unit vectors: `vectors` for each of `seeds` seeds, beginning with `seed`."""

    dim: int = Field(128, ge=2, le=4096)
    """Head dims."""
    bits: int = Field(4, ge=1, le=8)
    """Bits a coordinate."""
    vectors: int = Field(256, ge=2, le=1_000_000)
    """Vectors a seed."""
    seeds: int = Field(32, ge=3, le=MOST_RUNS)
    """Seeds. Fewer than 12 fail checks by chance."""
    seed: int = Field(0, ge=0, lt=2**31)
    """The first seed."""
    rotation: Literal["qr", "hadamard"] = "qr"
    """How vectors are rotated: qr or hadamard."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it runs: cpu or cuda."""


def _this_device() -> str:
    from turboquant.records.environment import device_name

    return device_name()


def _this_spinning() -> int | None:
    from turboquant.records.environment import openmp_spins

    return openmp_spins()


class TimedSettings(CellSettings):
    """Timings are of one device: a record from another machine is that of another cell."""

    device: str = Field(default_factory=_this_device)
    """The device's name, as records have it; no other can be asked for."""
    repeats: int = Field(20, ge=1, le=MOST_RUNS)
    """Timed rounds; sides take turns."""


class DecodeSettings(TimedSettings):
    """Greedy decoding of `new_tokens` behind `prompt_tokens`."""

    prompt_tokens: int = Field(512, ge=1, le=MOST_TOKENS)
    """Tokens of the prompt."""
    new_tokens: int = Field(128, ge=2, le=MOST_ANSWER)
    """Tokens generated in a run."""
    repeats: int = Field(5, ge=1, le=MOST_RUNS)
    """Runs of each cache."""
    busy: int = Field(0, ge=0, le=MOST_RUNS)
    """Other processes that compute meanwhile."""
    openmp_spins: int | None = Field(default_factory=_this_spinning)
    """Rounds that PyTorch's threads spin before they sleep, as this process has it; none where nobody set it."""


class KernelAttentionSettings(TimedSettings):
    """One layer's attention from the last `query_tokens` of `context` tokens."""

    shape: Shape = "llama-3.1-8b"
    """Heads of llama-3.1-8b, qwen2.5-3b, phi-2 or smollm2-135m."""
    batch: int = Field(1, ge=1, le=MOST_RUNS)
    """Rows."""
    context: int = Field(8192, ge=1, le=MOST_TOKENS)
    """Tokens a row."""
    query_tokens: int = Field(1, ge=1, le=MOST_TOKENS)
    """Query tokens a row."""


class KernelScoresSettings(TimedSettings):
    """The attention scores of one query token a row over `context` tokens."""

    shape: Shape = "llama-3.1-8b"
    """Heads of llama-3.1-8b, qwen2.5-3b, phi-2 or smollm2-135m."""
    batch: int = Field(1, ge=1, le=MOST_RUNS)
    """Rows."""
    context: int = Field(8192, ge=1, le=MOST_TOKENS)
    """Tokens a row; whole groups of them are packed."""


class KernelEncodeSettings(TimedSettings):
    """Quantizing the keys and values of `tokens` tokens a row, all heads of one layer."""

    shape: Shape = "llama-3.1-8b"
    """Heads of llama-3.1-8b, qwen2.5-3b, phi-2 or smollm2-135m."""
    batch: int = Field(1, ge=1, le=MOST_RUNS)
    """Rows."""
    tokens: int = Field(12_800, ge=1, le=MOST_TOKENS)
    """Tokens a row; whole groups of them are packed."""


class MetricsSpeedSettings(TimedSettings):
    """Comparing one layer's heads, all at once and in the obvious loop."""

    tokens: int = Field(2048, ge=1, le=MOST_TOKENS)
    """Tokens of a context."""
    queries: int = Field(64, ge=1, le=MOST_TOKENS)
    """Queries a head."""
    heads: int = Field(9, ge=1, le=MOST_RUNS)
    """Query heads."""
    kv_heads: int = Field(3, ge=1, le=MOST_RUNS)
    """KV heads."""
    head_dim: int = Field(64, ge=2, le=4096)
    """Values of a key."""
    repeats: int = Field(5, ge=1, le=MOST_RUNS)
    """Timed runs of each."""

    @model_validator(mode="after")
    def _sizes_go_together(self) -> "MetricsSpeedSettings":
        if self.tokens < self.queries + 16 or self.heads % self.kv_heads:
            raise ValueError(
                "metrics are timed with 16 tokens more than queries and whole groups of heads, "
                f"got {self.queries} queries, {self.tokens} tokens and {self.heads} heads on {self.kv_heads}"
            )
        return self


class ModelSpeedSettings(TimedSettings):
    """Decode steps of a whole model behind `context` tokens."""

    shape: ModelShape = "mistral-7b"
    """Shape of mistral-7b or smollm2-135m; weights are random."""
    weights: Literal["bf16", "4bit"] = "4bit"
    """bf16 or 4bit."""
    batch: int = Field(1, ge=1, le=MOST_RUNS)
    """Rows."""
    context: int = Field(32_768, ge=256, le=MOST_TOKENS)
    """Tokens a row."""
    repeats: int = Field(64, ge=1, le=MOST_RUNS)
    """Timed decode steps."""
    run: Literal["calls", "graph", "generate", "static"] = "calls"
    """generate: by `generate()`, as users call it; static: so too, with transformers' compiled StaticCache; graph: one
    step replayed; calls: one forward call after another."""


class LongestContextSettings(TimedSettings):
    """The longest context that fits a budget of GPU memory, the weights included."""

    shape: ModelShape = "mistral-7b"
    """Shape of mistral-7b or smollm2-135m; weights are random."""
    weights: Literal["bf16", "4bit"] = "4bit"
    """bf16 or 4bit."""
    budget_gb: float = Field(16.0, ge=1, le=10_000)
    """GPU memory to stay within, GB."""
    repeats: int = Field(4, ge=1, le=MOST_RUNS)
    """Timed decode steps."""


class FamilySettings(CellSettings):
    """One family of models, as a tiny one with random weights."""

    family: str = "llama-3"
    """Its name."""
