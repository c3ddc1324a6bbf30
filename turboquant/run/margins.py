"""Why a head is at risk: its scores under full and compressed keys, kept while the heads of an answer are compared.

The top token of a head changes where compression moves two scores past each other. So what counts is the head's margin
(how far its best score stands above the second best) against the error of its scores; both are kept for every head,
and for the worst heads the scores themselves at a few query positions.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from turboquant.records.heads import AttentionDetail, HeadDetail, row

MAX_POSITIONS = 8
MAX_HEADS = 10
MAX_SCORES = 65_536
"""Scores of one side that a detail may hold: heads x positions x tokens."""
SIGNIFICANT_DIGITS = 4
_POWERS = torch.tensor([float(10**k) for k in range(23)], dtype=torch.float64, device="cpu")  # exact in float64


class AttentionCollector:
    """Takes the scores of one layer after the other as they are compared, and keeps what explains the worst heads.

    Args:
        prompt_tokens: Tokens that the first measured query sees.
        packed: How many tokens are packed at each measured step.
        sinks: Exact tokens before the packed ones.
    """

    def __init__(self, prompt_tokens: int, packed: Sequence[int], sinks: int) -> None:
        self.prompt_tokens, self.packed, self.sinks = prompt_tokens, list(packed), sinks
        last = prompt_tokens + len(self.packed) - 1
        self.max_heads = min(MAX_HEADS, MAX_SCORES // max(last, 1))
        count = min(MAX_POSITIONS, MAX_SCORES // max(self.max_heads * last, 1)) if self.max_heads else 0
        self.steps = chosen_steps(self.packed, count)
        self.scaling = 1.0
        self._kept: list[tuple[tuple[float, float], int, int, list[tuple[Tensor, Tensor]]]] = []
        self._margins: list[Tensor] = []
        self._errors: list[Tensor] = []
        self._begin_layer()

    def _begin_layer(self) -> None:
        self._layer_scores: list[tuple[Tensor, Tensor]] = []
        self._margin_sum: Tensor | float = 0.0
        self._square_sum: Tensor | float = 0.0
        self._margin_steps = self._error_steps = 0

    def take(
        self,
        start: int,
        full: Float[Tensor, "heads queries tokens"],
        compressed: Float[Tensor, "heads queries tokens"],
    ) -> None:
        """Take raw scores of all heads of a layer at the steps from `start` on; each sees the tokens up to its own."""
        for step in self.steps:
            if start <= step < start + full.shape[1]:
                seen = self.prompt_tokens + step
                self._layer_scores.append(
                    (full[:, step - start, :seen].clone(), compressed[:, step - start, :seen].clone())
                )
        count = self.packed[start]
        if not count:
            return
        part = slice(self.sinks, self.sinks + count)
        packed, changed = full[..., part], compressed[..., part]
        self._error_steps += full.shape[1]
        self._square_sum += (changed - packed).square().mean(dim=-1).sum(dim=-1)
        if count > 1:
            best = packed.topk(2, dim=-1).values
            self._margin_steps += full.shape[1]
            self._margin_sum += (best[..., 0] - best[..., 1]).sum(dim=-1)

    def end_layer(self, layer: int, scaling: float, agreement: dict[str, Tensor]) -> None:
        """Close a layer, given the `head_agreement` of its heads over packed positions, (heads, steps)."""
        self.scaling = scaling
        heads = agreement["top1"].shape[0]
        nothing = torch.full((heads,), torch.nan, dtype=torch.float32, device="cpu")
        margins = scaling * self._margin_sum / self._margin_steps if self._margin_steps else nothing
        errors = scaling * (self._square_sum / self._error_steps) ** 0.5 if self._error_steps else nothing
        self._margins.append(torch.as_tensor(margins))
        self._errors.append(torch.as_tensor(errors))
        top1, cosine = (agreement[name].nanmean(dim=1).tolist() for name in ("top1", "cosine_scores"))
        if self._layer_scores:
            found = [
                ((top1[head], cosine[head]), layer, head, [(f[head], c[head]) for f, c in self._layer_scores])
                for head in range(heads)
            ]
            self._kept = sorted([*self._kept, *found], key=lambda kept: kept[0])[: self.max_heads]
        self._begin_layer()

    def detail(self, tokens: list[str]) -> AttentionDetail:
        """Return what was collected; `tokens` are the texts of the context."""
        heads = [
            HeadDetail(
                layer=layer,
                head=head,
                full=[row(rounded(self.scaling * full)) for full, _ in scores],
                compressed=[row(rounded(self.scaling * compressed)) for _, compressed in scores],
            )
            for _, layer, head, scores in self._kept
        ]
        return AttentionDetail(
            tokens=tokens,
            positions=[self.prompt_tokens - 1 + step for step in self.steps],
            packed=[self.packed[step] for step in self.steps],
            sinks=self.sinks,
            scaling=self.scaling,
            heads=heads,
            margins=[rounded(one) for one in self._margins],
            errors=[rounded(one) for one in self._errors],
        )


def chosen_steps(packed: Sequence[int], count: int) -> list[int]:
    """Return at most `count` steps, evenly from the first with packed tokens to the last."""
    steps = [step for step, tokens in enumerate(packed) if tokens]
    if not steps or count < 1:
        return []
    last = len(steps) - 1
    if count == 1:
        return [steps[-1]]
    return [steps[i] for i in sorted({round(i * last / (count - 1)) for i in range(count)})]


def rounded(values: Tensor) -> list[float | None]:
    """Return numbers with four significant digits, as short in JSON as can be; None where there is no number."""
    exact = values.double()
    magnitude = torch.nan_to_num(exact.abs().clamp_min(1e-15).log10().floor(), nan=0.0, posinf=0.0).long()
    places = SIGNIFICANT_DIGITS - 1 - magnitude
    up, down = (_POWERS[side.clamp(0, len(_POWERS) - 1)] for side in (places, -places))
    numbers = ((exact * up / down).round() * down / up).tolist()
    return [value if abs(value) < torch.inf else None for value in numbers]
