"""From a query's products with keys to its weights: what a model does to them beside a softmax."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Scoring:
    """How scores become weights: `softmax([cap * tanh(scaling * <q, k> / cap), sinks])`, without the sinks' share.

    Attributes:
        scaling: Factor on the inner products.
        cap: Soft cap of the scores (Gemma 2, arXiv:2408.00118, section 2); None for none.
        sinks: (heads,) a learned score of each query head that takes part in the softmax and has no value (gpt-oss,
            arXiv:2508.10925, section 2.2); None for none.
    """

    scaling: float
    cap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None

    @property
    def plain(self) -> bool:
        """Whether it is a softmax and nothing else."""
        return self.cap is None and self.sinks is None

    def on(self, device: torch.device) -> "Scoring":
        """Return the same on another device."""
        return self if self.sinks is None else replace(self, sinks=self.sinks.to(device))

    def capped(self, products: Tensor) -> Tensor:
        """Return inner products as the cap leaves them, still to be multiplied by `scaling`."""
        if self.cap is None:
            return products
        limit = self.cap / self.scaling
        return limit * torch.tanh(products / limit)

    def row_sinks(self, kv_heads: int, queries: int) -> Float[Tensor, "1 kv_heads rows 1"] | None:
        """Return the sinks of the query rows of each KV head: its heads, and of each of them all queries."""
        if self.sinks is None:
            return None
        rows = self.sinks.detach() if not torch.is_grad_enabled() else self.sinks
        return rows.float().view(1, kv_heads, -1, 1).repeat_interleave(queries, dim=2)
