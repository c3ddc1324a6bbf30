"""What a model's cache keeps for every token, layer by layer."""

from typing import Literal

from turboquant.records.base import Record

Kept = Literal["all", "window", "none"]


class LayerShape(Record):
    """What one layer of a cache keeps of a row.

    Attributes:
        keeps: Keys and values of all tokens, of a window of them, or of none.
        window: Tokens that a layer with a window sees; 0 where there is none.
        kv_heads: Heads whose keys and values are kept; 1 for a joint latent.
        key_dim: Numbers in a key of one head; for a joint latent, in the latent.
        value_dim: Numbers in a value of one head; for a joint latent, in the rotary part beside it.
        beside: Numbers kept for a token beside its keys and values: an indexer's keys.
        state_values: Numbers of recurrent states in the model's own format; their size does not change.
        state_bytes: Bytes of recurrent states that are kept in float32 whatever the model's format.
        packed: Whether a compressed cache packs it.
    """

    keeps: Kept = "none"
    window: int = 0
    kv_heads: int = 0
    key_dim: int = 0
    value_dim: int = 0
    beside: int = 0
    state_values: int = 0
    state_bytes: int = 0
    packed: bool = False

    @property
    def token_values(self) -> int:
        """Numbers that one token adds."""
        return self.kv_heads * (self.key_dim + self.value_dim) + self.beside

    @property
    def recurrent(self) -> bool:
        """Does it keep a state of a fixed size?"""
        return bool(self.state_values or self.state_bytes)

    def tokens_kept(self, tokens: int) -> int:
        """Return how many of so many tokens it keeps: of a window one less than it sees."""
        return {"all": tokens, "window": min(tokens, max(self.window - 1, 0)), "none": 0}[self.keeps]


class KVShape(Record):
    """What decides the size of a model's KV cache.

    Attributes:
        model_type: As in config.json.
        layers: What every layer of its cache keeps.
        query_heads: Query heads; they take no room in a cache.
        parameters: Number of weights.
        latent: Multi-head latent attention (MLA): one latent a token in place of keys and values.
        max_positions: Positions the model has; None where the file does not say.
        notes: Sentences about what was counted and what was assumed.
    """

    model_type: str
    layers: tuple[LayerShape, ...]
    query_heads: int
    parameters: int
    latent: bool = False
    max_positions: int | None = None
    notes: tuple[str, ...] = ()

    def keeping(self, keeps: Kept) -> list[LayerShape]:
        """Return the layers that keep so much."""
        return [layer for layer in self.layers if layer.keeps == keeps]

    @property
    def packed_layers(self) -> tuple[int, ...]:
        """The layers that a compressed cache packs."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.packed)

    @property
    def first(self) -> LayerShape:
        """The first layer that a compressed cache packs, else the first that keeps keys and values."""
        attends = [layer for layer in self.layers if layer.keeps != "none"]
        return next((layer for layer in attends if layer.packed), attends[0])

    @property
    def token_values(self) -> int:
        """Numbers that one token adds to the layers that keep all tokens."""
        return sum(layer.token_values for layer in self.keeping("all"))
