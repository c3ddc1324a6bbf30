"""A conversation held twice: each side keeps its own cache and its own history from turn to turn.

In a turn only what a side's cache does not hold yet is fed. The whole conversation is rendered anew by the chat
template, and its tokens are compared with those held: the common prefix stays. Where the template or the tokenizer
writes the past differently, the cache is cropped to that prefix if it lies within the exact window; packed tokens are
never cut into, so then (and for layers that cannot be cropped) the cache is built anew and fed in one call. `Context`
says which of these happened.

The two histories part when the answers do, unless `fork` makes one answer the context of both. Head and token figures
of a turn compare the caches on the original side's history, fed to a fresh compressed cache exactly as it grew here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from turboquant.cache.kinds import HybridLayer
from turboquant.cache.layer import QuantizedLayer
from turboquant.cache.roomy import RoomyLayer
from turboquant.methods import METHODS, Method
from turboquant.models.load import LoadedModel
from turboquant.records.base import Record
from turboquant.records.comparison import Comparison, Settings
from turboquant.run.compare import OnEvent, Question, answer_twice
from turboquant.run.feed import packing_runs
from turboquant.run.generate import SIDES, Generation, QueryRecorder, check_length, conversation_ids, new_cache

SideName = Literal["original", "compressed"]
DIFFERENT_HISTORIES = (
    "The two sides answered different conversations, so their texts are not compared token by token. Head and token "
    "figures are those of the original side's conversation."
)


class Context(Record):
    """What one side's answer follows: tokens the cache held already, tokens fed, tokens cropped away before that.

    `rebuilt` says that the cache was built anew, so that all `fed_tokens` went through it in one call.
    """

    reused_tokens: int
    fed_tokens: int
    cropped_tokens: int
    rebuilt: bool

    @property
    def tokens(self) -> int:
        """Tokens of the conversation up to this turn's answer."""
        return self.reused_tokens + self.fed_tokens


class Turn(Record):
    """One prompt of a conversation and both answers.

    `same_history` says whether both sides answered the same conversation; `comparison.divergence` means something
    only then. `kept` is False for a turn that was stopped before both sides had answered anything: it has been undone.
    """

    index: int
    comparison: Comparison
    original: Context
    compressed: Context
    same_history: bool
    kept: bool


@dataclass
class _Side:
    """One history and the cache that holds it, in the pieces that went through it."""

    method: Method
    cache: Cache
    messages: list[dict[str, str]] = field(default_factory=list)
    pieces: list[list[int]] = field(default_factory=list)

    @property
    def held(self) -> list[int]:
        return [token for piece in self.pieces for token in piece]


class Session:
    """A conversation with both caches.

    Args:
        loaded: The model.
        method: How the compressed side stores its cache.
        chat: Use the model's chat template, where it has one; otherwise the turns are lines of one text.
    """

    def __init__(self, loaded: LoadedModel, method: Method, chat: bool = True) -> None:
        self.method, self.chat = method, chat
        self._name, self._fingerprint = _name(loaded), loaded.fingerprint
        self._config, self._device = loaded.model.config, loaded.model.device
        self._loaded: LoadedModel | None = loaded
        self.reset()

    @property
    def loaded(self) -> LoadedModel:
        """The model.

        Raises:
            ValueError: If it has been detached.
        """
        if self._loaded is None:
            raise ValueError(f"The conversation has no model: attach {self._name} to go on.")
        return self._loaded

    def detach(self) -> None:
        """Let go of the model, so that it can be freed; caches and histories stay."""
        self._loaded = None

    def attach(self, loaded: LoadedModel) -> None:
        """Take the model up again.

        Raises:
            ValueError: If it is another model, the same in other weights or on another device, or its files changed.
        """
        if (name := _name(loaded)) != self._name:
            raise ValueError(f"The conversation was held with {self._name}, and cannot go on with {name}.")
        if loaded.fingerprint != self._fingerprint:
            raise ValueError(f"The files of {self._name} have changed since the conversation began.")
        self._loaded = loaded

    def reset(self) -> None:
        """Begin anew with empty caches."""
        self.turns: list[Turn] = []
        self._sides = {name: self._empty(m) for name, m in zip(SIDES, (METHODS["full"](), self.method), strict=True)}

    def _empty(self, method: Method) -> _Side:
        return _Side(method, new_cache(self._config, self._device, method))

    def cache(self, side: SideName) -> Cache:
        """Return one side's cache, to be measured or looked at."""
        return self._sides[side].cache

    def messages(self, side: SideName) -> list[dict[str, str]]:
        """Return one side's conversation, oldest first."""
        return [dict(message) for message in self._sides[side].messages]

    def held_tokens(self, side: SideName) -> list[int]:
        """Return the tokens that one side's cache holds."""
        return self._sides[side].held

    def fork(self, side: SideName) -> None:
        """Make this side's conversation the context of both; the other cache follows at the next turn."""
        source = self._sides[side]
        for other in self._sides.values():
            other.messages = [dict(message) for message in source.messages]

    def ask(
        self,
        prompt: str,
        settings: Settings,
        *,
        on_event: OnEvent | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Turn:
        """Put a prompt to both sides and measure the turn; see `turboquant.compare` for events and cancelling.

        A cancel keeps what both sides have said so far. Where one of them had not begun, the turn is undone, and a
        cache that was stopped while it read the prompt is built anew at the next turn. So are both caches after any
        other error in the midst of a turn; the conversation stays as it was before.

        Raises:
            PromptError: If the prompt is empty or the conversation does not fit the model's context; nothing changes.
            ValueError: If the model has been detached.
        """
        wanted = {name: self._rendered(side, prompt, settings) for name, side in self._sides.items()}
        same = wanted["original"] == wanted["compressed"]
        contexts = {name: self._prepare(side, wanted[name]) for name, side in self._sides.items()}
        history = tuple(self._ids(piece) for piece in self._sides["original"].pieces)
        original, compressed = (
            Generation(
                self.loaded,
                self._ids(wanted[name][len(side.held) :]),
                side.cache,
                settings,
                QueryRecorder(cancelled, keep=name == "original"),
            )
            for name, side in self._sides.items()
        )
        question = Question(self.loaded, prompt, (self.method,), original, (compressed,), self.chat, history)
        try:
            comparison = answer_twice(question, on_event, cancelled)
        except BaseException:
            for side in self._sides.values():
                self._drop_cache(side)
            raise
        kept = all(generation.time_to_first_token_ms is not None for generation in (original, compressed))
        for side, generation in zip(self._sides.values(), (original, compressed), strict=True):
            self._settle(side, generation)
            if kept:
                side.messages += [
                    {"role": "user", "content": prompt},
                    {"role": "assistant", "content": generation.text},
                ]
        if not same:
            notes = [*comparison.notes, DIFFERENT_HISTORIES]
            comparison = comparison.model_copy(update={"divergence": None, "notes": notes})
        turn = Turn(
            index=len(self.turns),
            comparison=comparison,
            original=contexts["original"],
            compressed=contexts["compressed"],
            same_history=same,
            kept=kept,
        )
        if kept:
            self.turns.append(turn)
        return turn

    def _ids(self, tokens: list[int]) -> Int[Tensor, "1 tokens"]:
        return torch.tensor([tokens], dtype=torch.long, device=self.loaded.model.device)

    def _rendered(self, side: _Side, prompt: str, settings: Settings) -> list[int]:
        """The whole conversation with the new prompt, as tokens."""
        ids = conversation_ids(self.loaded, [*side.messages, {"role": "user", "content": prompt}], self.chat)
        check_length(self.loaded, ids.shape[1], settings.max_new_tokens)
        tokens: list[int] = ids[0].tolist()
        return tokens

    def _prepare(self, side: _Side, wanted: list[int]) -> Context:
        """Bring a side's cache to a prefix of what is wanted, at least one token short of it."""
        held = side.held
        pairs = zip(held, wanted[:-1], strict=False)
        common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        rebuilt = bool(side.messages) and not held
        if _shorten(side.cache, common):
            side.pieces = _first(side.pieces, common)
        else:
            self._drop_cache(side)
            rebuilt, common = True, 0
        return Context(
            reused_tokens=common, fed_tokens=len(wanted) - common, cropped_tokens=len(held) - common, rebuilt=rebuilt
        )

    def _drop_cache(self, side: _Side) -> None:
        side.cache, side.pieces = new_cache(self._config, self._device, side.method), []

    def _settle(self, side: _Side, generation: Generation) -> None:
        """Note what went through the cache; a call that was stopped half-way is taken out of the layers it reached."""
        length = len(side.held)
        reading = generation.time_to_first_token_ms is None
        if not reading:
            prompt: list[int] = generation.prompt[0].tolist()
            fed = generation.tokens[: len(generation.step_ms)]
            runs = packing_runs(self.method, length + len(prompt), len(fed))
            side.pieces += [prompt, *(fed[first:last] for first, last in runs)]
            length += len(prompt) + len(fed)
        # Layers without a length (linear attention) cannot tell whether a stopped call has reached them.
        unsure = generation.finish == "cancelled" and not all(hasattr(x, "get_seq_length") for x in side.cache.layers)
        if unsure or not _shorten(side.cache, length, interrupted_prompt=reading):
            self._drop_cache(side)


def _name(loaded: LoadedModel) -> str:
    """What must be the same for caches to stay usable, for people."""
    revision = f" at {loaded.spec.revision[:12]}" if loaded.spec.revision else ""
    return f"{loaded.spec.name}{revision} ({loaded.weights}, {loaded.device})"


def _first(pieces: list[list[int]], length: int) -> list[list[int]]:
    """Return the first `length` tokens of all pieces, in their pieces."""
    kept = []
    for piece in pieces:
        if length > 0:
            kept.append(piece[:length])
        length -= len(piece)
    return kept


def _shorten(cache: Cache, length: int, interrupted_prompt: bool = False) -> bool:
    """Crop every layer to `length` tokens where that leaves no trace; return False where the cache is of no more use.

    With `interrupted_prompt`, a layer that holds more has packed for a call that is to be forgotten.
    """
    longest = max(
        (int(layer.get_seq_length()) for layer in cache.layers if hasattr(layer, "get_seq_length")), default=0
    )
    if longest > length and not all(hasattr(layer, "get_seq_length") for layer in cache.layers):
        return False  # linear attention keeps no tokens that could be taken away
    for layer in cache.layers:
        held: Any = layer
        surplus = int(held.get_seq_length()) - length if hasattr(held, "get_seq_length") else 0
        if surplus < 0 or (surplus and not _can_crop(held, surplus, interrupted_prompt)):
            return False
        if surplus:
            held.crop(-surplus)
    return True


def _can_crop(layer: Any, surplus: int, interrupted_prompt: bool) -> bool:
    """Return whether a layer can forget its last tokens without a trace.

    Plain layers always can; packed ones within their exact window, or where codes stand alone and a cache of the new
    length would have packed as much.
    """
    if not isinstance(layer, QuantizedLayer) or isinstance(layer, HybridLayer):  # recurrent states cannot go back
        return type(layer) in (DynamicLayer, RoomyLayer)
    if not layer.packed_length:
        return True
    if interrupted_prompt:
        return False
    from_packed = surplus - (layer.exact_length - layer.sink_length)
    alone = layer.key_quantizer.token_group == layer.value_quantizer.token_group == 1
    due = layer.method.packed_length(int(layer.get_seq_length()) - surplus)
    return from_packed <= 0 or (alone and layer.packed_length - from_packed <= due)
