"""Token-by-token generation, one side or two in turn; the command line and the app use the same loop.

The loop is our own so that two answers can advance token by token, be watched and be stopped; sampling uses the
library's logits processors, and each side draws from its own generator, seeded alike.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache

from turboquant.cache.build import build_cache, cache_bytes
from turboquant.cache.roomy import Replayable, RoomyCache, roomy
from turboquant.hf_attention import observe_queries
from turboquant.kernels.scoring import Scoring
from turboquant.methods import Method
from turboquant.models.load import LoadedModel
from turboquant.records.comparison import Settings
from turboquant.run.feed import step

SIDES: tuple[Literal["original"], Literal["compressed"]] = ("original", "compressed")


class PromptError(ValueError):
    """The prompt cannot be answered as given."""


class CancelledError(RuntimeError):
    """The caller asked to stop; raised between two layers of a forward call."""


def prompt_ids(loaded: LoadedModel, prompt: str, chat: bool = True) -> Int[Tensor, "1 tokens"]:
    """Return the prompt's token ids, (1, tokens), through the model's chat template where it has one.

    Raises:
        PromptError: If the prompt is empty or no text, or the chat template cannot be used.
    """
    return conversation_ids(loaded, [{"role": "user", "content": prompt}], chat)


def conversation_ids(
    loaded: LoadedModel, messages: Sequence[Mapping[str, str]], chat: bool = True
) -> Int[Tensor, "1 tokens"]:
    """Return the token ids of a conversation whose next turn is the model's, (1, tokens).

    Args:
        loaded: The model.
        messages: Each with `role` (user, assistant) and `content`; the last is the user's.
        chat: Go through the model's chat template, where it has one; otherwise the contents are lines of one text.

    Raises:
        PromptError: If the last message is empty or no text, or the chat template cannot be used.
    """
    check_prompt(messages[-1]["content"])
    tokenizer: Any = loaded.tokenizer
    if chat and tokenizer.chat_template:
        encoded = tokenizer(chat_text(tokenizer, messages), add_special_tokens=False, return_tensors="pt")
    else:
        encoded = tokenizer("\n".join(message["content"] for message in messages), return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    if not ids.shape[1]:
        raise PromptError("The prompt has no tokens: the model's tokenizer leaves nothing of it.")
    return ids.to(loaded.model.device)


def check_prompt(prompt: str) -> None:
    """Raise PromptError where a prompt is empty or no text, whatever the model."""
    if not prompt.strip():
        raise PromptError("The prompt is empty: type some text first.")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise PromptError("The prompt must be text: it has bytes that are not valid UTF-8.")
    if "\0" in prompt:
        raise PromptError("The prompt must be text: it has null characters.")


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]], **options: Any) -> str:
    """Return a conversation as the tokenizer's chat template writes it, up to where the model's turn begins.

    Args:
        tokenizer: One with a chat template.
        messages: As for `conversation_ids`.
        options: Variables of the template.

    Raises:
        PromptError: If there is no default template, it fails, or it leaves out what the last message says.
    """
    named = tokenizer.chat_template
    if isinstance(named, dict) and "default" not in named:
        raise template_error(f"none of {', '.join(sorted(named))} is called default")
    try:
        text = str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **options))
    except Exception as error:  # a template is a program that came with the model, and fails in its own ways
        reason = " ".join(str(error).split()).rstrip(".")
        raise template_error(reason[:200] or type(error).__name__) from error
    if "".join(messages[-1]["content"].split()) not in "".join(text.split()):
        raise template_error("what it writes does not hold the prompt")
    return text


def template_error(reason: str) -> PromptError:
    """Return the error of a chat template that cannot be used, with what can be done."""
    return PromptError(
        f"The model's chat template cannot be used ({reason}): leave it out with --no-chat-template, or in the app "
        "with the switch Chat template."
    )


def check_length(loaded: LoadedModel, prompt_tokens: int, max_new_tokens: int) -> None:
    """Raise PromptError where prompt and answer together exceed the model's context."""
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + max_new_tokens > limit:
        raise PromptError(
            f"The prompt has {prompt_tokens:,} tokens and up to {max_new_tokens:,} more were asked for, but "
            f"{loaded.spec.name} has a context of {limit:,} tokens: shorten the prompt or ask for fewer new tokens."
        )


@dataclass
class QueryRecorder:
    """Keeps the last queries of every forward call, by layer, and stops the call when the caller has cancelled.

    Attributes:
        cancelled: Asked in every layer; once true, CancelledError is raised.
        keep: Whether queries are kept at all.
        last: How many of a call's queries are kept, counted from its end.
        queries: (batch, heads, last, dim) by layer, one tensor a call.
        scoring: What the model makes of scores, by layer.
    """

    cancelled: Callable[[], bool] = lambda: False
    keep: bool = True
    last: int = 1
    queries: dict[int, list[Tensor]] = field(default_factory=dict)
    scoring: dict[int, Scoring] = field(default_factory=dict)

    def record(self, layer_idx: int, query: Tensor, scoring: Scoring) -> None:
        """Take one layer's queries (batch, heads, queries, dim)."""
        if self.cancelled():
            raise CancelledError
        if self.keep:
            # A copy of the last rows alone: a view would keep the whole prompt's queries. It stays on its device, since
            # a transfer here would wait for the GPU in every layer and slow the side that is recorded.
            last = query[:, :, -self.last :].detach().clone(memory_format=torch.contiguous_format)
            self.queries.setdefault(layer_idx, []).append(last)
            self.scoring[layer_idx] = scoring


def _stop_ids(loaded: LoadedModel) -> frozenset[int]:
    eos = loaded.model.generation_config.eos_token_id
    ids = eos if isinstance(eos, list) else [eos]
    return frozenset(i for i in (*ids, loaded.tokenizer.eos_token_id) if i is not None)


def logits_processors(settings: Settings) -> LogitsProcessorList:
    """Return temperature, top-k and top-p as the library applies them, in its order; empty for greedy."""
    processors = LogitsProcessorList()
    if settings.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(settings.temperature)))
        if settings.top_k:
            processors.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1:
            processors.append(TopPLogitsWarper(settings.top_p))
    return processors


def new_cache(config: PreTrainedConfig, device: torch.device, method: Method) -> Cache:
    """Return an empty cache for an answer.

    On a GPU an uncompressed one has room for tokens to come, so that its decode steps are captured as well.
    """
    cache = build_cache(config, method)
    return cache if method.compresses or device.type != "cuda" else roomy(cache, config)


class Generation:
    """One answer in progress: its cache, tokens, text and timing.

    Args:
        loaded: The model.
        ids: Prompt tokens (1, tokens), behind those that the cache holds already.
        cache: Usually empty; in the end it holds everything but the last sampled token.
        settings: Sampling settings.
        recorder: Sees the queries of this side's forward calls.
        ignore_eos: Go on past end-of-sequence tokens (benchmarks).
        measure_bytes: Measure the cache after every step.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        ids: Tensor,
        cache: Cache,
        settings: Settings,
        recorder: QueryRecorder,
        *,
        ignore_eos: bool = False,
        measure_bytes: bool = True,
    ) -> None:
        self.measure_bytes = measure_bytes
        self.loaded, self.cache, self.settings, self.recorder = loaded, cache, settings, recorder
        self.prompt = self.next_ids = ids
        self.tokens: list[int] = []
        self.text = ""
        self.finish: Literal["stop", "length", "cancelled"] | None = None
        self.time_to_first_token_ms: float | None = None
        self.step_ms: list[float] = []
        self.cache_bytes: list[int] = []
        self._stop_ids = frozenset() if ignore_eos else _stop_ids(loaded)
        self._processors = logits_processors(settings)
        self._generator = torch.Generator(device=loaded.model.device).manual_seed(settings.seed)

    @torch.no_grad()
    def step(self) -> None:
        """Run one forward call and take the next token; the first call reads the prompt.

        Raises:
            CancelledError: If the recorder's caller asked to stop; tokens so far are kept.
        """
        started = time.perf_counter()
        try:
            if getattr(self.cache, "replay", None) is not None and self.recorder.cancelled():  # its layers ask nobody
                raise CancelledError
            with observe_queries(self.recorder):
                logits = step(self.loaded.model, self.cache, self.next_ids)
            token = self._sample(logits.float())
        except CancelledError:
            self.finish = "cancelled"
            raise
        elapsed = (time.perf_counter() - started) * 1e3
        if self.time_to_first_token_ms is None:
            self.time_to_first_token_ms = elapsed
        else:
            self.step_ms.append(elapsed)
        if self.measure_bytes:
            self.cache_bytes.append(self._held_bytes())
        self._take(token)
        if self.finish is not None and isinstance(self.cache, Replayable):
            self.cache.shrink()

    def _held_bytes(self) -> int:
        """Bytes of the cache; the room of an uncompressed one is left out, since Hugging Face's own has none."""
        if isinstance(self.cache, RoomyCache):
            return self.cache.plain_bytes
        replay = getattr(self.cache, "replay", None)
        if replay is None:
            return cache_bytes(self.cache)
        if replay.held_bytes is None:  # it stays the same until something is packed
            replay.held_bytes = cache_bytes(self.cache)
        return int(replay.held_bytes)

    def run(self) -> None:
        """Go on to the end of the answer.

        Raises:
            CancelledError: As in `step`.
        """
        while self.finish is None:
            self.step()

    def _sample(self, logits: Float[Tensor, "1 vocabulary"]) -> int:
        if self.settings.temperature <= 0:
            return int(logits.argmax())
        scores: Tensor = self._processors(self.next_ids, logits)  # type: ignore[arg-type]
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._generator))

    def _take(self, token: int) -> None:
        if token in self._stop_ids:
            self.finish = "stop"
            return
        self.tokens.append(token)
        self.next_ids = torch.tensor([[token]], device=self.next_ids.device)
        self.text = str(self.loaded.tokenizer.decode(self.tokens, skip_special_tokens=True))
        cut = min((i for s in self.settings.stop if s and (i := self.text.find(s)) >= 0), default=-1)
        if cut >= 0:
            self.text, self.finish = self.text[:cut], "stop"
        elif len(self.tokens) >= self.settings.max_new_tokens:
            self.finish = "length"

    @property
    def tokens_per_second(self) -> float | None:
        """Decode speed, the first token left out; None before the second."""
        return 1e3 * len(self.step_ms) / sum(self.step_ms) if self.step_ms else None


def generate_in_turn(generations: list[Generation], on_step: Callable[[int], None]) -> None:
    """Advance all generations token by token in turn until each has finished; `on_step(i)` follows each step.

    A cancel ends all of them: what they have so far is kept and `finish` says so.
    """
    try:
        while pending := [i for i, generation in enumerate(generations) if generation.finish is None]:
            for i in pending:
                generations[i].step()
                on_step(i)
    except CancelledError:
        for generation in generations:
            generation.finish = generation.finish or "cancelled"
