"""Preallocated room for packed tokens."""

from turboquant.quant.quantizer import PackedTensor


class TokenBuffer:
    """Preallocated room for packed tokens of one kind (keys or values)."""

    def __init__(self) -> None:
        self.storage = None
        self.length = 0

    @property
    def storage(self) -> PackedTensor | None:
        """The tokens and spare room behind them; None before the first."""
        return self._storage

    @storage.setter
    def storage(self, storage: PackedTensor | None) -> None:
        self._storage = storage
        self._view: PackedTensor | None = None  # a view would keep the storage before alive
        self._viewed = 0

    def append(self, new: PackedTensor) -> None:
        """Write tokens behind those held; where one side needs a wider float than the other, both take it."""
        if self.storage is not None:
            held = self.view()
            alike, new = held.alike(new)
            if alike is not held:
                room, self.storage = self.storage.tokens, alike
                self.reserve(room)
        new.copy_into(self.extend(new), 0)

    def extend(self, like: PackedTensor) -> PackedTensor:
        """Make room for as many tokens as `like` has, behind those held, and return it.

        Storage that is full grows by a sixteenth, in whole groups.
        """
        start, count = self.length, like.tokens
        end = start + count
        if self.storage is None:
            self.storage = like.empty(end)
        elif end > self.storage.tokens:
            group = like.token_group
            self.reserve(end + end // 16 // group * group)
        self.length = end
        return self.storage.narrow(start, count)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` tokens in all."""
        assert self.storage is not None
        if self.storage.tokens < tokens:
            larger = self.storage.empty(tokens)
            self.view().copy_into(larger, 0)
            self.storage = larger

    def shrink(self) -> None:
        """Give the spare room back."""
        if self.storage is not None and self.storage.tokens > self.length:
            held, self.storage = self.view(), self.storage.empty(self.length)
            held.copy_into(self.storage, 0)
            self._view = None

    def view(self) -> PackedTensor:
        """Return the tokens held, without the spare room: the same object until tokens come or go."""
        assert self.storage is not None
        if self._view is None or self._viewed != self.length:
            self._view, self._viewed = self.storage.narrow(0, self.length), self.length
        return self._view


def round_up(tokens: int, group: int) -> int:
    """Return the least multiple of `group` that is not below `tokens`."""
    return -(-tokens // group) * group
