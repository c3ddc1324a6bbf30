"""Runs: round trips, exports, and files that are no runs."""

import csv
import io
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.tab.runs import MAX_IMPORT_BYTES, Run, RunError, RunStore, import_run, recorded_runs
from app.tab.verdict import human_bytes, verdict
from tests.support.factory import comparison


def test_a_run_travels_as_json() -> None:
    run = Run(comparison=comparison())
    back = import_run(run.to_json())
    assert back.comparison == run.comparison
    assert back.id == run.id
    assert back.origin == "imported"


def test_a_bare_comparison_is_read_too() -> None:
    c = comparison()
    assert import_run(c.model_dump_json().encode()).comparison == c


def test_a_file_cannot_claim_to_be_measured_here() -> None:
    assert import_run(Run(origin="recorded", comparison=comparison()).to_json()).origin == "imported"


def changed(path: str, value: Any) -> str:
    data = json.loads(Run(comparison=comparison()).to_json())
    *parents, last = path.split("/")
    place = data
    for key in parents:
        place = place[key]
    place[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "must be an object"),
        ("{}", "environment: Field required"),
        ('{"comparison": 3}', "comparison"),
        (changed("comparison/surprise", 1), "Extra inputs"),
        (changed("comparison/schema_version", 9), "schema_version"),
        (changed("id", "../../x"), "id:"),
        (changed("comparison/original/token_texts", ["a"]), "differ in length"),
        (changed("comparison/tokens/kl", [0.1]), "do not fit"),
        (changed("comparison/heads/layer_indices", [0]), "layer_indices"),
        (changed("comparison/heads/positions", [0]), "positions"),
        (changed("comparison/heads/served/per_head_top1", [[0.5], [0.5], [0.5]]), "number of heads"),
        (" " * (MAX_IMPORT_BYTES + 1), "too large"),
    ],
)
def test_a_bad_file_gives_one_sentence(text: str | bytes, words: str) -> None:
    with pytest.raises(RunError, match=words) as caught:
        import_run(text)
    assert "\n" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=12), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(json_values | st.text(max_size=40) | st.binary(max_size=40))
def test_any_other_json_is_refused_cleanly(value: Any) -> None:
    with pytest.raises(RunError):
        import_run(value if isinstance(value, str | bytes) else json.dumps(value))


PATHS = ["comparison/heads", "comparison/tokens", "comparison/original", "comparison/notes", "comparison/divergence"]
PATHS += ["comparison/compressed/report", "comparison/heads/packed", "comparison/tokens/kl", "comparison/prompt", "id"]


@settings(max_examples=80, deadline=None)
@given(st.sampled_from(PATHS), json_values)
def test_a_damaged_run_is_refused_or_can_be_shown(path: str, value: Any) -> None:
    try:
        run = import_run(changed(path, value))
    except RunError:
        return
    assert run.to_markdown()
    assert run.to_csv()
    assert run.heads_csv()


def test_csv_holds_every_token_and_no_formula() -> None:
    run = Run(comparison=comparison(("=1+1", " b"), ("=1+1", " b", " c")))
    rows = list(csv.DictReader(io.StringIO(run.to_csv())))
    assert len(rows) == 3
    assert rows[0]["original"] == "'=1+1"
    assert rows[2]["original"] == ""
    assert float(rows[1]["kl_nats"]) == 0.02
    heads = list(csv.DictReader(io.StringIO(run.heads_csv())))
    assert len(heads) == 12
    assert float(heads[1]["top1_packed"]) == 0.95


def test_markdown_holds_the_verdict_and_cannot_be_broken_out_of() -> None:
    run = Run(comparison=comparison(("```\n# injected", " b"), ("x",)))
    report = run.to_markdown()
    assert "````text\n```\n# injected" in report
    assert "Mean KL" in report
    assert "commit abc1234" in report


def test_nothing_packed_shows_no_quality_and_no_memory_figure() -> None:
    report = Run(comparison=comparison(packed=0)).to_markdown()
    assert "Nothing was packed" in report
    for word in ("ratio", "Bits per value", "Cosine", "KL(", "at risk"):
        assert word not in report


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ((" a", " b"), (" a", " b"), "Identical for all 2 tokens."),
        ((" a", " b"), (" a", " c"), "Identical for 1 token, then 'b' → 'c'."),
        ((" a",), (" b",), "Different from the first token: 'a' → 'b'."),
        ((" a",), (" a", " c"), "the original answer ends and the compressed one goes on with 'c'"),
        ((" a", "\n"), (" a",), "the compressed answer ends and the original one goes on with '↵'"),
        ((" a",), ("a",), "'␣a' → 'a'"),
    ],
)
def test_verdicts(first: tuple[str, ...], second: tuple[str, ...], words: str) -> None:
    assert words in verdict(comparison(first, second))


def test_verdict_of_a_stopped_run() -> None:
    assert (
        verdict(comparison((" a",), (" a",), finish="cancelled"))
        == "Stopped after 1 token; identical so far, for 1 token."
    )
    early = comparison((" a",), (" a",), finish="cancelled", packed=0)
    assert verdict(early) == "Stopped after 1 token; nothing was packed until then."
    assert "Stopped before" in verdict(comparison((), (), finish="cancelled"))


def test_sizes_have_units() -> None:
    assert [human_bytes(n) for n in (0, 1536, 5 * 2**20, 2**50)] == ["0 B", "1.50 KiB", "5.00 MiB", "1024.00 TiB"]


def test_a_store_is_bounded_and_keeps_the_newest() -> None:
    store = RunStore(2)
    runs = [store.add(Run(comparison=comparison())) for _ in range(3)]
    assert [run.id for run in store.all()] == [runs[2].id, runs[1].id]
    assert store.get(runs[0].id) is None
    same_id = store.add(Run(id=runs[2].id, comparison=comparison((" z",), (" y",))))
    assert same_id.id != runs[2].id


def test_recorded_runs_are_readable_and_say_where_they_come_from() -> None:
    runs = recorded_runs()
    for run in runs:
        assert run.origin == "recorded"
        assert run.packed
        assert run.complete
        assert run.comparison.environment.created
        assert run.comparison.environment.commit
        assert run.comparison.heads
        assert run.comparison.tokens
