"""One prompt, two caches: generate both answers in turn, then measure what changed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from turboquant.cache import build_cache, cache_report
from turboquant.generate import (
    SIDES,
    CancelledError,
    Generation,
    PromptError,
    QueryRecorder,
    check_length,
    generate_in_turn,
    prompt_ids,
)
from turboquant.methods import METHODS, Method
from turboquant.models import LoadedModel
from turboquant.probe import head_metrics, token_metrics
from turboquant.results import (
    Comparison,
    Divergence,
    HeadMetrics,
    ModelInfo,
    Settings,
    SideResult,
    TokenMetrics,
    environment,
)

__all__ = ["Event", "PromptError", "Question", "answer_twice", "compare", "prompt_ids"]


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
    """

    kind: Literal["prefill", "token", "done", "phase"]
    side: Literal["original", "compressed"] | None = None
    text: str = ""
    tokens: int = 0
    cache_bytes: int = 0
    fraction: float | None = None


OnEvent = Callable[[Event], None]


def model_info(loaded: LoadedModel) -> ModelInfo:
    """Describe a model as it was loaded."""
    config = loaded.model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return ModelInfo(
        name=loaded.spec.name,
        hub_id=loaded.spec.hub_id,
        revision=loaded.spec.revision,
        weights=loaded.weights,
        device=loaded.device,
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        layers=config.num_hidden_layers,
        query_heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def compare(
    loaded: LoadedModel,
    prompt: str,
    method: Method,
    settings: Settings,
    *,
    chat: bool = True,
    on_event: OnEvent | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Comparison:
    """Answer `prompt` twice with the same seed, with the full cache and with `method`, and measure the difference.

    The two sides advance token by token in turn. When `cancelled` turns true the texts so far are kept and what was
    not measured stays None. Where the compressed cache packed nothing, no quality figure is derived from it and
    `notes` says so.

    Raises:
        PromptError: If the prompt is empty or does not fit the model's context.
    """
    ids = prompt_ids(loaded, prompt, chat)
    check_length(loaded, ids.shape[1], settings.max_new_tokens)
    recorders = [QueryRecorder(cancelled), QueryRecorder(cancelled, keep=False)]
    original, compressed = (
        Generation(loaded, ids, build_cache(loaded.model.config, m), settings, recorder)
        for m, recorder in zip((METHODS["full"](), method), recorders, strict=True)
    )
    return answer_twice(Question(loaded, prompt, method, original, compressed, chat), on_event, cancelled)


@dataclass(frozen=True)
class Question:
    """A prompt about to be answered by both sides.

    Attributes:
        loaded: The model.
        prompt: What was typed.
        method: How the compressed side stores its cache.
        original: The full side's generation, nothing generated yet; its recorder keeps queries.
        compressed: The other side's.
        chat: Whether the prompt goes through a chat template.
        history: What the original's cache held before, in the pieces (1, tokens) that went through it.
    """

    loaded: LoadedModel
    prompt: str
    method: Method
    original: Generation
    compressed: Generation
    chat: bool = True
    history: tuple[Tensor, ...] = ()

    @property
    def context_tokens(self) -> int:
        """Tokens that the original answer follows."""
        return sum(piece.shape[1] for piece in self.history) + self.original.prompt.shape[1]


def answer_twice(
    question: Question, on_event: OnEvent | None = None, cancelled: Callable[[], bool] = lambda: False
) -> Comparison:
    """Generate both answers in turn and measure the difference on the original one; see `compare`."""
    emit = on_event or (lambda _: None)
    loaded, method = question.loaded, question.method
    generations = [question.original, question.compressed]
    generate_in_turn(generations, lambda i: _emit_step(emit, i, generations[i]))
    original, compressed = (_side(loaded, m, g) for m, g in zip((METHODS["full"](), method), generations, strict=True))
    notes = [note for note in (_unmeasured(original, compressed, method),) if note]
    heads, tokens = None, None
    if not (notes or cancelled()) and compressed.report.compressed_tokens:
        heads, tokens = _measure(question, emit, cancelled)
    return Comparison(
        environment=environment(loaded.model.device),
        model=model_info(loaded),
        prompt=question.prompt,
        chat=question.chat,
        prompt_tokens=question.context_tokens,
        settings=question.original.settings,
        original=original,
        compressed=compressed,
        divergence=first_divergence(original, compressed),
        heads=heads,
        tokens=tokens,
        notes=notes,
    )


def _emit_step(emit: OnEvent, index: int, generation: Generation) -> None:
    held = generation.cache_bytes[-1]
    if not generation.step_ms:
        emit(Event("prefill", SIDES[index], cache_bytes=held))
    count = len(generation.tokens)
    emit(Event("token", SIDES[index], generation.text, count, held))
    if generation.finish:
        emit(Event("done", SIDES[index], generation.text, count, held))


def _side(loaded: LoadedModel, method: Method, generation: Generation) -> SideResult:
    return SideResult(
        method=str(method),
        text=generation.text,
        token_ids=generation.tokens,
        token_texts=[str(loaded.tokenizer.decode([token])) for token in generation.tokens],
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
    if method.name == "full":
        return None
    if not report.compressed_layers:
        return f"{method.name} packed nothing: none of the model's {report.layers} layers has plain full attention."
    if report.compressed_tokens:
        if not (method.foreign or method.packed_length(original.report.tokens)):
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


def _measure(
    question: Question, emit: OnEvent, cancelled: Callable[[], bool]
) -> tuple[HeadMetrics | None, TokenMetrics | None]:
    """Measure heads, then tokens; a cancel leaves None for what was not finished.

    Heads are compared through a method's quantizers; layers of another library have none, and no head figures.
    """

    def progress(text: str, fraction: float) -> None:
        emit(Event("phase", text=text, fraction=fraction))

    method, original, history = question.method, question.original, question.history
    heads = None
    try:
        with torch.no_grad():
            if not method.foreign:
                report = partial(progress, "Comparing attention heads")
                lengths = tuple(accumulate(piece.shape[1] for piece in history))
                heads = head_metrics(
                    original.cache, original.recorder, method, question.context_tokens, report, lengths
                )
        report = partial(progress, "Reading the original answer through both caches")
        prompt, answer = original.prompt, original.tokens
        return heads, token_metrics(question.loaded, prompt, answer, method, report, cancelled, history)
    except CancelledError:
        return heads, None


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
