"""One prompt, the full cache and others: generate all answers in turn, then measure what changed."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from turboquant.cache.build import cache_report, compressed_layers
from turboquant.cache.kinds import why_dense
from turboquant.methods import METHODS, Method
from turboquant.models.load import LoadedModel
from turboquant.models.sizes import layer_heads
from turboquant.records.comparison import (
    Comparison,
    Divergence,
    HeadMetrics,
    ModelInfo,
    Settings,
    SideResult,
    TokenMetrics,
)
from turboquant.records.environment import environment
from turboquant.records.faults import UNMEASURED, out_of_memory
from turboquant.records.heads import AttentionDetail
from turboquant.run.generate import (
    SIDES,
    CancelledError,
    Generation,
    PromptError,
    QueryRecorder,
    check_length,
    generate_in_turn,
    new_cache,
    prompt_ids,
)
from turboquant.run.heads import attention_collector, head_metrics, token_metrics

__all__ = ["Event", "PromptError", "Question", "answer_all", "answer_twice", "compare", "compare_methods", "prompt_ids"]

MAX_METHODS = 3


@dataclass(frozen=True)
class Event:
    """Something to show while a comparison runs.

    Attributes:
        kind: "prefill" (that side has read the prompt), "token", "done" (that side has ended) or "phase".
        side: Whose event it is; None for a phase.
        text: The whole text of the side so far, or what the phase does.
        tokens: Tokens generated so far on that side.
        cache_bytes: Bytes that side's cache holds.
        fraction: How much of a phase is done, 0 to 1.
        number: Which of the methods a "compressed" event or a phase belongs to, from 0.
    """

    kind: Literal["prefill", "token", "done", "phase"]
    side: Literal["original", "compressed"] | None = None
    text: str = ""
    tokens: int = 0
    cache_bytes: int = 0
    fraction: float | None = None
    number: int = 0


NO_HEADS = "There are no figures of attention heads: {}."
OnEvent = Callable[[Event], None]


def model_info(loaded: LoadedModel) -> ModelInfo:
    """Describe a model as it was loaded; of layers of several widths the first that a cache packs."""
    config = loaded.model.config
    heads = layer_heads(config)
    first = heads[next(iter(compressed_layers(config)), 0)]
    return ModelInfo(
        name=loaded.spec.name,
        hub_id=loaded.spec.hub_id,
        revision=loaded.spec.revision,
        weights=loaded.weights,
        stored=loaded.stored,
        device=loaded.placement or loaded.device,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        layers=len(heads),
        **asdict(first),
    )


def compare(  # noqa: PLR0913
    loaded: LoadedModel,
    prompt: str,
    method: Method,
    settings: Settings,
    *,
    chat: bool = True,
    detail: bool = False,
    on_event: OnEvent | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Comparison:
    """Answer `prompt` twice with the same seed, with the full cache and with `method`, and measure the difference.

    The two sides advance token by token in turn. When `cancelled` turns true the texts so far are kept and what was
    not measured stays None. Where the compressed cache packed nothing, no quality figure is derived from it and
    `notes` says so. With `detail`, the record also keeps what explains the heads at risk (`Comparison.attention`).

    Raises:
        PromptError: If the prompt is empty or does not fit the model's context.
    """
    options = {"chat": chat, "detail": detail, "on_event": on_event, "cancelled": cancelled}
    return compare_methods(loaded, prompt, (method,), settings, **options)[0]  # type: ignore[arg-type]


def compare_methods(  # noqa: PLR0913
    loaded: LoadedModel,
    prompt: str,
    methods: Sequence[Method],
    settings: Settings,
    *,
    chat: bool = True,
    detail: bool = False,
    on_event: OnEvent | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> list[Comparison]:
    """Answer `prompt` with the full cache and with each method, all in turn, and measure each against the full answer.

    The comparisons come in the order of the methods and share the original answer. Otherwise this is `compare`; all
    caches are held at once.

    Raises:
        PromptError: If the prompt is empty or does not fit the model's context.
        ValueError: If there are no methods or more than three.
    """
    if not 1 <= len(methods) <= MAX_METHODS:
        raise ValueError(f"the full cache is compared with 1 to {MAX_METHODS} methods at once, got {len(methods)}")
    ids = prompt_ids(loaded, prompt, chat)
    check_length(loaded, ids.shape[1], settings.max_new_tokens)
    original, *compressed = (
        Generation(
            loaded,
            ids,
            new_cache(loaded.model.config, loaded.model.device, method),
            settings,
            QueryRecorder(cancelled, keep=index == 0),
        )
        for index, method in enumerate((METHODS["full"](), *methods))
    )
    question = Question(loaded, prompt, tuple(methods), original, tuple(compressed), chat, detail=detail)
    return answer_all(question, on_event, cancelled)


@dataclass(frozen=True)
class Question:
    """A prompt about to be answered by the full cache and by others.

    Attributes:
        loaded: The model.
        prompt: What was typed.
        methods: How each of the compressed sides stores its cache.
        original: The full side's generation, nothing generated yet; its recorder keeps queries.
        compressed: The others', one a method.
        chat: Whether the prompt goes through a chat template.
        history: What the original's cache held before, in the pieces (1, tokens) that went through it.
        detail: Whether to keep what explains the heads at risk.
    """

    loaded: LoadedModel
    prompt: str
    methods: tuple[Method, ...]
    original: Generation
    compressed: tuple[Generation, ...]
    chat: bool = True
    history: tuple[Tensor, ...] = ()
    detail: bool = False

    @property
    def context(self) -> Tensor:
        """Tokens (1, tokens) that the original answer follows."""
        return torch.cat([*self.history, self.original.prompt], dim=1)


def answer_twice(
    question: Question, on_event: OnEvent | None = None, cancelled: Callable[[], bool] = lambda: False
) -> Comparison:
    """Answer a question of one method; see `compare`."""
    (comparison,) = answer_all(question, on_event, cancelled)
    return comparison


def answer_all(
    question: Question, on_event: OnEvent | None = None, cancelled: Callable[[], bool] = lambda: False
) -> list[Comparison]:
    """Generate all answers in turn and measure each method on the original one; see `compare_methods`."""
    emit = on_event or (lambda _: None)
    loaded = question.loaded
    generations = [question.original, *question.compressed]
    generate_in_turn(generations, lambda i: _emit_step(emit, i, generations[i]))
    original, *others = (
        _side(loaded, method, generation)
        for method, generation in zip((METHODS["full"](), *question.methods), generations, strict=True)
    )
    measured_on = environment(loaded.model.device)
    model = model_info(loaded)
    comparisons = []
    for number, (method, compressed) in enumerate(zip(question.methods, others, strict=True)):
        notes = [note for note in (_unmeasured(original, compressed, method),) if note]
        measured = Measured()
        if not (notes or cancelled()) and compressed.report.compressed_tokens:
            measured = _measure(question, number, emit, cancelled)
            notes += [*measured.notes, *_misread(compressed, method)]
        comparison = Comparison(
            environment=measured_on,
            model=model,
            prompt=question.prompt,
            chat=question.chat,
            prompt_tokens=question.context.shape[1],
            settings=question.original.settings,
            original=original,
            compressed=compressed,
            divergence=first_divergence(original, compressed),
            heads=measured.heads,
            tokens=measured.tokens,
            attention=measured.attention,
            notes=notes,
        )
        comparisons.append(comparison)
    return comparisons


def _emit_step(emit: OnEvent, index: int, generation: Generation) -> None:
    side, number = SIDES[min(index, 1)], max(index - 1, 0)
    held, count = generation.cache_bytes[-1], len(generation.tokens)
    if not generation.step_ms:
        emit(Event("prefill", side, cache_bytes=held, number=number))
    emit(Event("token", side, generation.text, count, held, number=number))
    if generation.finish:
        emit(Event("done", side, generation.text, count, held, number=number))


def _texts(loaded: LoadedModel, tokens: Sequence[int]) -> list[str]:
    """Return the text of each token by itself."""
    return [str(loaded.tokenizer.decode([token])) for token in tokens]


def _side(loaded: LoadedModel, method: Method, generation: Generation) -> SideResult:
    return SideResult(
        method=str(method),
        text=generation.text,
        token_ids=generation.tokens,
        token_texts=_texts(loaded, generation.tokens),
        finish=generation.finish or "cancelled",
        time_to_first_token_ms=generation.time_to_first_token_ms,
        tokens_per_second=generation.tokens_per_second,
        step_ms=generation.step_ms,
        cache_bytes=generation.cache_bytes,
        report=cache_report(generation.cache),
    )


def _unmeasured(original: SideResult, compressed: SideResult, method: Method) -> str | None:
    """Say why no quality figure can be given, where none can."""
    report = compressed.report
    if not method.compresses:
        return None
    if not report.compressed_layers:
        return f"{method.name} packed nothing: none of the model's {report.layers} layers has plain full attention."
    if report.compressed_tokens:
        if not method.packs(original.report.tokens):
            return "Only the compressed side's text is long enough to be packed, so there is nothing to measure."
        return None if original.token_ids else "The original answer is empty, so there is nothing to measure."
    needed = method.sink_length + method.residual_length + method.block_length
    if compressed.finish == "cancelled" and (not compressed.token_ids or report.tokens >= needed):
        return "No token was packed: the run was stopped before the compressed cache had anything to pack."
    return (
        f"No token was packed: the cache holds {report.tokens:,} tokens, and packing starts at {needed:,} "
        f"({method.sink_length} sinks, {method.residual_length} recent tokens and a block of {method.block_length}). "
        "Quality and memory figures would say nothing about compression, so none are given."
    )


def _misread(compressed: SideResult, method: Method) -> list[str]:
    """Say that vectors are not read back as what they were, where some are."""
    count = compressed.report.misread_vectors
    if not count:
        return []
    return [
        f"{count:,} keys and values (of one head and token each) are read back from {method.name} as something else: "
        "vectors of very different lengths share a range or a mean there."
    ]


@dataclass(frozen=True)
class Measured:
    """What is measured of one method; None where that was not finished or cannot be had."""

    heads: HeadMetrics | None = None
    tokens: TokenMetrics | None = None
    attention: AttentionDetail | None = None
    notes: tuple[str, ...] = ()


def _measure(question: Question, number: int, emit: OnEvent, cancelled: Callable[[], bool]) -> Measured:
    """Measure heads, then tokens; a cancel leaves None for what was not finished, and so does a lack of memory.

    Heads are compared through a method's quantizers; layers of another library have none, and no head figures.
    """
    method, original, history = question.methods[number], question.original, question.history
    which = f": {method}" if len(question.methods) > 1 else ""

    def progress(text: str, fraction: float) -> None:
        emit(Event("phase", text=text + which, fraction=fraction, number=number))

    heads, attention = None, None
    dense = why_dense(question.loaded.model.config)
    notes = () if dense is None else (NO_HEADS.format(dense),)
    try:
        if method.has_quantizers and dense is None:
            heads, attention = _measure_heads(question, method, partial(progress, "Comparing attention heads"))
        report = partial(progress, "Reading the original answer through both caches")
        prompt, answer = original.prompt, original.tokens
        tokens = token_metrics(question.loaded, prompt, answer, method, report, cancelled, history)
        return Measured(heads, tokens, attention, notes)
    except CancelledError:
        return Measured(heads, None, attention, notes)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return Measured(heads, None, attention, (*notes, UNMEASURED))


@torch.no_grad()
def _measure_heads(
    question: Question, method: Method, report: Callable[[float], None]
) -> tuple[HeadMetrics, AttentionDetail | None]:
    original, context = question.original, question.context
    length = context.shape[1]
    earlier = tuple(accumulate(piece.shape[1] for piece in question.history))
    collector = attention_collector(method, length, original.recorder) if question.detail else None
    heads = head_metrics(original.cache, original.recorder, method, length, report, earlier, collector)
    if collector is None:
        return heads, None
    return heads, collector.detail(_texts(question.loaded, [*context[0].tolist(), *original.tokens]))


def first_divergence(original: SideResult, compressed: SideResult) -> Divergence | None:
    """Return the first place where the answers differ, or None.

    An answer that was cut short (cancelled) is compared only as far as it goes.
    """
    sides = (original, compressed)
    for index in range(max(len(side.token_ids) for side in sides)):
        ids = [side.token_ids[index] if index < len(side.token_ids) else None for side in sides]
        if ids[0] == ids[1]:
            continue
        if any(i is None and side.finish == "cancelled" for i, side in zip(ids, sides, strict=True)):
            return None
        texts = [side.token_texts[index] if index < len(side.token_texts) else None for side in sides]
        return Divergence(index=index, original=texts[0], compressed=texts[1])
    return None
