"""Agreement of scores and of next-token distributions, against loops in float64 and values worked out by hand."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from turboquant.kernels.scoring import Scoring
from turboquant.run.metrics import Span, compare_layer, head_agreement, token_agreement

SCALING = 0.125
SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.integers(0, 2**31))


def cosine(one: list[float], two: list[float]) -> float:
    product = sum(a * b for a, b in zip(one, two, strict=True))
    return product / math.sqrt(sum(a * a for a in one) * sum(b * b for b in two))


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(score - max(scores)) for score in scores]
    return [power / sum(powers) for power in powers]


def place(scores: list[float], index: int) -> tuple[float, int]:
    """Sorts the highest score first, of equal ones the earlier."""
    return -scores[index], index


def expected_head(full: Tensor, compressed: Tensor, visible: Tensor) -> dict[str, Tensor]:
    """One head, query by query: the visible tokens sorted by score, of equal ones the earlier first."""
    rows: dict[str, list[float]] = {"cosine_scores": [], "cosine_weights": [], "top1": [], "top5": []}
    for query in range(full.shape[0]):
        pair = [[float(v) for v in side[query].double()[visible[query]]] for side in (full, compressed)]
        order = [sorted(range(len(side)), key=partial(place, side)) for side in pair]
        rows["cosine_scores"].append(cosine(*pair))
        rows["cosine_weights"].append(cosine(*(softmax([SCALING * v for v in side]) for side in pair)))
        rows["top1"].append(float(order[0][0] == order[1][0]))
        rows["top5"].append(float(order[0][0] in order[1][:5]))
    return {name: torch.tensor(values) for name, values in rows.items()}


def visibility(queries: int, tokens: int, generator: torch.Generator) -> Tensor:
    """A random mask in which every query sees at least one token."""
    visible = torch.rand(queries, tokens, generator=generator) < 0.6
    visible[torch.arange(queries), torch.randint(0, tokens, (queries,), generator=generator)] = True
    return visible


@given(shape=SHAPES)
def test_head_agreement_is_what_a_loop_gives(shape: tuple[int, int, int, int]) -> None:
    heads, queries, tokens, seed = shape
    generator = torch.Generator().manual_seed(seed)
    full = 6 * torch.randn(heads, queries, tokens, generator=generator)
    compressed = full + 3 * torch.randn(heads, queries, tokens, generator=generator)
    visible = visibility(queries, tokens, generator)
    actual = head_agreement(full, compressed, visible, SCALING)
    for head in range(heads):
        for name, values in expected_head(full[head], compressed[head], visible).items():
            assert torch.allclose(actual[name][head], values, atol=2e-5), name


@given(shape=SHAPES, levels=st.integers(1, 3))
def test_of_equal_scores_the_earlier_token_counts_as_higher(shape: tuple[int, int, int, int], levels: int) -> None:
    heads, queries, tokens, seed = shape
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randint(1, 1 + levels, (2, heads, queries, tokens), generator=generator).float()
    visible = visibility(queries, tokens, generator)
    actual = head_agreement(pair[0], pair[1], visible, SCALING)
    for head in range(heads):
        expected = expected_head(pair[0, head], pair[1, head], visible)
        for name in ("top1", "top5"):
            assert torch.equal(actual[name][head], expected[name]), name


@given(shape=SHAPES, tied=st.booleans())
def test_the_same_scores_agree_fully(shape: tuple[int, int, int, int], tied: bool) -> None:
    heads, queries, tokens, seed = shape
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(heads, queries, tokens, generator=generator)
    scores = scores.sign() if tied else scores
    result = head_agreement(scores, scores, visibility(queries, tokens, generator), SCALING)
    assert torch.allclose(result["cosine_scores"], torch.ones(heads, queries), atol=1e-5)
    assert torch.allclose(result["cosine_weights"], torch.ones(heads, queries), atol=1e-5)
    assert bool((result["top1"] == 1).all())
    assert bool((result["top5"] == 1).all())


def test_what_is_not_visible_counts_for_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    full, compressed = torch.randn(2, 1, 3, 10, generator=generator)
    visible = torch.arange(10) < 6
    expected = head_agreement(full, compressed, visible.expand(3, 10), SCALING)
    full[..., 6:], compressed[..., 6:] = 100.0, -100.0
    actual = head_agreement(full, compressed, visible.expand(3, 10), SCALING)
    alone = head_agreement(full[..., :6], compressed[..., :6], torch.ones(3, 6, dtype=torch.bool), SCALING)
    for name in expected:
        assert torch.equal(actual[name], expected[name])
        assert torch.allclose(actual[name], alone[name], atol=1e-6)


def test_fewer_than_five_tokens_are_all_of_the_top_five() -> None:
    full, compressed = torch.tensor([[[3.0, 2.0, 1.0, 0.5]]]), torch.tensor([[[-3.0, 2.0, 1.0, 0.5]]])
    result = head_agreement(full, compressed, torch.ones(1, 4, dtype=torch.bool), 1.0)
    assert result["top1"].item() == 0
    assert result["top5"].item() == 1


def test_one_visible_token_leaves_no_choice() -> None:
    result = head_agreement(
        torch.tensor([[[5.0, 9.0]]]), torch.tensor([[[4.0, -9.0]]]), torch.tensor([[1, 0]]) > 0, 1.0
    )
    assert {name: value.item() for name, value in result.items()} == {
        "cosine_scores": 1.0,
        "cosine_weights": 1.0,
        "top1": 1.0,
        "top5": 1.0,
    }


def test_sixth_place_is_not_among_the_top_five() -> None:
    full = torch.tensor([[[9.0, 1.0, 2.0, 3.0, 4.0, 5.0]]])
    compressed = torch.tensor([[[0.5, 1.0, 2.0, 3.0, 4.0, 5.0]]])
    visible = torch.ones(1, 6, dtype=torch.bool)
    assert head_agreement(full, compressed, visible, 1.0)["top5"].item() == 0
    compressed[..., 1] = 0.0
    assert head_agreement(full, compressed, visible, 1.0)["top5"].item() == 1


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
@pytest.mark.parametrize("places", [slice(None), slice(0, 5)])
def test_compressed_scores_that_are_no_numbers_never_agree(broken: float, places: slice) -> None:
    """A cache that gives NaN must not look like a perfect one, and must not be left out of a mean."""
    full = torch.randn(2, 3, 10, generator=torch.Generator().manual_seed(0)).sort(dim=-1).values
    compressed = full.clone()
    compressed[..., places] = broken
    for visible in (None, torch.ones(3, 10, dtype=torch.bool)):
        result = head_agreement(full, compressed, visible, SCALING)
        for name, values in result.items():
            if broken != broken or name.startswith("cosine"):
                assert torch.equal(values, torch.zeros(2, 3)), name


def test_an_output_that_is_no_number_has_no_small_error() -> None:
    query, keys, values = torch.randn(3, 1, 2, 4, 8, generator=torch.Generator().manual_seed(0))
    pair, span = (keys[0], values[0]), Span(0, 2)
    broken = (keys[0], values[0].clone().index_fill_(1, torch.tensor([0]), torch.nan))
    found = compare_layer(query[0], pair, broken, Scoring(SCALING), span, span)
    assert bool((found["served"]["output_error"] == torch.inf).all())


def test_the_scaling_acts_on_weights_and_on_nothing_else() -> None:
    generator = torch.Generator().manual_seed(2)
    full, compressed = 5 * torch.randn(2, 1, 1, 30, generator=generator)
    visible = torch.ones(1, 30, dtype=torch.bool)
    one, two = (head_agreement(full, compressed, visible, scaling) for scaling in (0.1, 1.0))
    assert (one["cosine_weights"] - two["cosine_weights"]).abs().max() > 0.01
    assert all(torch.equal(one[name], two[name]) for name in ("cosine_scores", "top1", "top5"))


@given(tokens=st.integers(1, 6), vocabulary=st.integers(1, 50), spread=st.floats(0.0, 30.0), seed=st.integers(0, 2**31))
def test_token_agreement_is_what_a_loop_gives(tokens: int, vocabulary: int, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    full = spread * torch.randn(tokens, vocabulary, generator=generator)
    compressed = full + torch.randn(tokens, vocabulary, generator=generator)
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    result = token_agreement(full, compressed, targets)
    for token in range(tokens):
        p, q = (softmax(side[token].double().tolist()) for side in (full, compressed))
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)
        assert result["kl"][token].item() == pytest.approx(kl, abs=1e-5, rel=1e-4)
        assert result["probability_full"][token].item() == pytest.approx(p[targets[token]], abs=1e-6)
        assert result["probability_compressed"][token].item() == pytest.approx(q[targets[token]], abs=1e-6)
        assert bool(result["same_top"][token]) == bool(full[token].argmax() == compressed[token].argmax())


def test_kl_is_that_of_torch() -> None:
    full, compressed = torch.randn(2, 20, 100, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.kl_div(
        compressed.log_softmax(-1), full.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    actual = token_agreement(full, compressed, torch.zeros(20, dtype=torch.long))["kl"]
    assert torch.allclose(actual, expected, atol=1e-6)
    assert actual.min() > 0.1


def test_tokens_that_are_ruled_out_add_nothing_to_kl() -> None:
    """Vocabularies are padded with logits of minus infinity; 0 x log 0 is 0 there, as in the limit."""
    logits = torch.randn(2, 6, 50, generator=torch.Generator().manual_seed(0))
    full, compressed = (torch.cat([side, torch.full((6, 14), -torch.inf)], dim=1) for side in logits)
    targets = torch.zeros(6, dtype=torch.long)
    padded, plain = token_agreement(full, compressed, targets), token_agreement(logits[0], logits[1], targets)
    assert torch.allclose(padded["kl"], plain["kl"])
    assert torch.equal(padded["same_top"], plain["same_top"])
    full[:, 3] = -torch.inf  # the full side alone rules it out: that costs what it takes from the others
    p = full.double().softmax(-1)
    expected = torch.special.xlogy(p, p / compressed.double().softmax(-1)).nan_to_num(0.0).sum(-1)
    assert torch.allclose(token_agreement(full, compressed, targets)["kl"].double(), expected, atol=1e-5)
    swapped = token_agreement(compressed, full, targets)["kl"]  # the other alone: a large number, but a number
    assert swapped.isfinite().all()
    assert (swapped > 10).all()


def test_kl_by_hand_and_its_direction() -> None:
    """KL((1/2, 1/2) || (1/4, 3/4)) = ln 2 / 2 + ln(2/3) / 2; the other way round it is another number."""
    half, quarter = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    target = torch.tensor([0])
    forth, back = token_agreement(half, quarter, target), token_agreement(quarter, half, target)
    assert forth["kl"].item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-6)
    assert back["kl"].item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-6)
    assert forth["probability_full"].item() == pytest.approx(0.5)
    assert forth["probability_compressed"].item() == pytest.approx(0.25)


@given(
    spread=st.sampled_from([0.0, 1e-3, 1.0, 100.0]), noise=st.sampled_from([0.0, 1e-6, 1e-3]), seed=st.integers(0, 99)
)
def test_kl_is_never_negative(spread: float, noise: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    full = spread * torch.randn(8, 500, generator=generator)
    compressed = full + noise * torch.randn(8, 500, generator=generator)
    assert token_agreement(full, compressed, torch.zeros(8, dtype=torch.long))["kl"].min() >= 0


def test_a_constant_added_to_logits_changes_nothing() -> None:
    full, compressed = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(1))
    targets = torch.arange(5)
    one, two = token_agreement(full, compressed, targets), token_agreement(full + 7, compressed - 11, targets)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


def test_the_same_logits_agree_fully() -> None:
    logits = torch.randn(9, 50, generator=torch.Generator().manual_seed(3))
    result = token_agreement(logits, logits.clone(), torch.arange(9))
    assert not result["kl"].any()
    assert bool(result["same_top"].all())
    assert torch.equal(result["probability_full"], result["probability_compressed"])


def test_the_top_token_is_that_of_the_logits_and_not_of_their_rounded_softmax() -> None:
    """Greedy decoding takes the highest logit; float32 log-probabilities of close logits can be equal."""
    full, compressed = torch.tensor([[1e-8, 3e-8]]), torch.tensor([[3e-8, 1e-8]])
    assert full.log_softmax(-1).unique().numel() == 1
    assert token_agreement(full, compressed, torch.tensor([0]))["same_top"].item() == 0
