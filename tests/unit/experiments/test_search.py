"""The search of `recommend` on made-up tables: it finds the smallest that passes, and never one that does not."""

from itertools import product

from hypothesis import given
from hypothesis import strategies as st

from turboquant.experiments.recommend import BITS, MOST_APART, Candidate, candidates, most, one_step_down, smallest

GRID = list(product(range(4), range(4)))


@st.composite
def tables(draw: st.DrawFn, monotone: bool) -> tuple[list[Candidate], dict[Candidate, bool], dict[Candidate, bool]]:
    """Candidates of up to three families with what they would say on both parts; more bits are larger."""
    everything: list[Candidate] = []
    parts: tuple[dict[Candidate, bool], dict[Candidate, bool]] = ({}, {})
    for family in draw(st.sets(st.sampled_from("abc"), min_size=1)):
        key_cost, value_cost, fixed = (draw(st.integers(1, 5)) for _ in range(3))
        own = [
            Candidate(f"{family}{bits}", family, bits, fixed + key_cost * bits[0] + value_cost * bits[1])
            for bits in GRID
        ]
        everything += own
        for part in parts:
            if monotone:
                needed = [draw(st.tuples(st.integers(0, 4), st.integers(0, 4))) for _ in range(2)]
                part |= {one: any(n[0] <= one.bits[0] and n[1] <= one.bits[1] for n in needed) for one in own}
            else:
                part |= {one: draw(st.booleans()) for one in own}
    return everything, *parts


@given(table=tables(monotone=True))
def test_where_more_bits_are_better_the_smallest_is_found(
    table: tuple[list[Candidate], dict[Candidate, bool], dict[Candidate, bool]],
) -> None:
    everything, choose, confirm = table
    found = smallest(everything, choose.__getitem__, confirm.__getitem__)
    allowed = [one for one in everything if choose[one] and confirm[one]]
    assert (found is None) == (not allowed)
    if found is not None:
        assert choose[found]
        assert confirm[found]
        assert found.size == min(one.size for one in allowed)


@given(table=tables(monotone=False))
def test_whatever_is_measured_the_choice_passes_and_no_smaller_one_was_seen_to(
    table: tuple[list[Candidate], dict[Candidate, bool], dict[Candidate, bool]],
) -> None:
    everything, choose, confirm = table
    seen: dict[Candidate, bool] = {}
    confirmed: dict[Candidate, bool] = {}
    found = smallest(
        everything,
        lambda one: seen.setdefault(one, choose[one]),
        lambda one: confirmed.setdefault(one, confirm[one]),
    )
    failed = [one for one, passes in [*seen.items(), *confirmed.items()] if not passes]
    if found is None:
        assert all(any(one.within(bad) for bad in failed) for one in everything)
        return
    assert choose[found]
    assert confirm[found]
    for one in seen:
        if one.size < found.size and seen[one]:
            assert any(one.within(bad) for bad in failed)


def test_most_need_not_be_measured() -> None:
    asked: list[Candidate] = []
    grid = [Candidate(f"{bits}", "a", bits, sum(bits)) for bits in product(range(10), range(10))]

    def choose(one: Candidate) -> bool:
        asked.append(one)
        return min(one.bits) >= 5

    found = smallest(grid, choose)
    assert found is not None
    assert found.bits == (5, 5)
    assert len(set(asked)) <= 15


@given(count=st.integers(0, 100), limit=st.integers(0, 100))
def test_most_finds_the_last_number_that_passes(count: int, limit: int) -> None:
    asked: list[int] = []

    def passes(number: int) -> bool:
        asked.append(number)
        return number <= limit

    assert most(count, passes) == min(count, limit)
    assert len(asked) <= 7
    assert all(1 <= number <= count for number in asked)


def test_candidates_are_pairs_of_bits_that_lie_near_each_other() -> None:
    found = candidates(["turboquant", "rtn:rotation=hadamard", "turboquant"], lambda method: 0)
    assert len({one.method for one in found}) == len(found) == 48
    assert {one.bits for one in found} == {
        (a, b) for a, b in product(BITS, BITS) if abs(BITS.index(a) - BITS.index(b)) <= MOST_APART
    }
    assert "rtn:bits=5,rotation=hadamard" in {one.method for one in found}


def test_one_step_down_ends_at_the_fewest_bits() -> None:
    assert one_step_down((4, 2)) == [(3, 2)]
    assert one_step_down((8, 3)) == [(6, 3), (8, 2)]
    assert one_step_down((2, 2)) == []
