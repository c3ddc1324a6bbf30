"""What reports read, which records count, and what is averaged."""

import os
from pathlib import Path

import pytest

from tests.support.sample_records import record, where, write
from turboquant.report import ReportError, build_report, read_results
from turboquant.report.methodology import read_document, write_document
from turboquant.report.summary import measured_on, summarize


def test_the_newest_record_of_a_cell_wins_wherever_it_stands(tmp_path: Path) -> None:
    new, old = record(day=9), record(day=2)
    write(tmp_path / "a.jsonl", new)
    write(tmp_path / "b" / "b.jsonl", old, record(context=512))
    assert [one for one, _ in read_results([tmp_path]).records] == [new, record(context=512)]


def test_a_failure_counts_only_where_nothing_succeeded(tmp_path: Path) -> None:
    good, bad = record(day=1), record(day=9, error="too big", metrics={}, cache=None)
    other = record(context=99, error="too big", metrics={})
    path = write(tmp_path / "a.jsonl", good, bad, other)
    assert [one for one, _ in read_results([path]).records] == [good, other]
    sections = build_report(read_results([path]))
    assert sections[-1].title == "Failures"
    assert sections[-1].tables[0].rows == ((str(other.cell), "too big", "2026-01-01"),)


def test_outputs_of_evaluate_are_read(tmp_path: Path) -> None:
    one, several = tmp_path / "one.json", tmp_path / "several.json"
    records = [record("turboquant:bits=4", 512), record("turboquant:bits=4", 1024)]
    write_document(records, one)
    write_document([*records, record("turboquant:bits=2", 512)], several)
    assert [found for found, _ in read_results([one]).records] == records
    one.write_bytes(b"\xef\xbb\xbf" + one.read_bytes())  # as some editors save it
    assert [found for found, _ in read_results([one]).records] == records
    assert read_document(one) == records
    assert len(read_results([several]).records) == 3
    assert len(read_results([tmp_path]).records) == 3


def test_half_a_line_is_passed_over_and_other_benchmarks_too(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", record())
    with path.open("a") as file:
        file.write('{"kind":"bench-soak","runs":20}\n{"kind":"experi')
    assert len(read_results([path]).records) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "hello\n", "line 1 of .*a.jsonl is not JSON"),
        ("a.jsonl", '{"kind":"experiment"}\n', r"line 1 of .*is not an experiment record \(cell"),
        ("a.jsonl", '{"kind":"bench-decode"}\n', "line 1 of .*is not an experiment record"),
        ("a.jsonl", '{"kind":[]}\n', "line 1 of .*is not an experiment record"),
        ("a.jsonl", '{"kind":' + "[" * 100_000 + "\n", "line 1 of .*a.jsonl is not JSON"),
        ("a.jsonl", '{"kind":' + "9" * 5000 + "}\n", "line 1 of .*a.jsonl is not JSON"),
        ("a.json", '{"by_context": ', "a.json is broken"),
        ("a.json", "[" * 100_000, "a.json is broken"),
        ("a.json", '{"record": {"kind": "experiment"}}', "a.json is broken"),
    ],
)
def test_what_is_no_record_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ReportError, match=message):
        read_results([tmp_path])
    with pytest.raises(ReportError, match="does not exist"):
        read_results([tmp_path / "none"])


def test_a_pipe_is_no_place_for_results(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ReportError, match="pipe must be a file or a folder, and this is a pipe or a device"):
        read_results([tmp_path / "pipe"])


def test_nulls_that_a_crash_left_are_no_record(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", record())
    path.write_bytes(b"\0" * 9 + path.read_bytes() + b"\0" * 4096)
    assert len(read_results([path]).records) == 1


@pytest.mark.parametrize("context", [[1024], "many", None, 1e308])
def test_a_context_that_is_no_number_is_taken_for_none(tmp_path: Path, context: object) -> None:
    assert [one.contexts for one in summarize([record(settings={"context": context})])] == [(0,)]


def test_figures_are_means_across_contexts_whatever_the_number_of_seeds() -> None:
    records = [record("turboquant:bits=4", 512, settings={"seed": seed}) for seed in range(3)]
    records.append(record("turboquant:bits=4,seed=7", 1024))
    [summary] = summarize(records)
    assert summary.method == "turboquant:bits=4"
    assert summary.contexts == (512, 1024)
    assert summary.records == 4
    expected = [record("turboquant:bits=4", context).metrics["kl_mean"] or 0.0 for context in (512, 1024)]
    assert summary.metrics["kl_mean"] == pytest.approx(sum(expected) / 2)
    assert summary.metrics["bits_per_value"] == pytest.approx(4.25)
    assert summary.by_context[512]["kl_mean"] == pytest.approx(expected[0])


def test_ends_of_intervals_are_not_averaged() -> None:
    figures = {"kl_mean": 0.2, "kl_low": 0.1, "success_high_pct": 90.0}
    (one,) = summarize([record(context=512, metrics=figures)])
    assert one.metrics["kl_low"] == 0.1
    (both,) = summarize([record(context=c, metrics=figures) for c in (512, 1024)])
    assert "kl_mean" in both.metrics
    assert not {"kl_low", "success_high_pct"} & both.metrics.keys()


def test_other_settings_weights_models_and_experiments_stay_apart() -> None:
    base = record("turboquant:bits=4")
    others = [
        record("turboquant:bits=4", settings={"filler": "persuasion"}),
        record("turboquant:bits=4", model="other"),
        record("turboquant:bits=4", experiment="perplexity"),
        base.model_copy(update={"cell": base.cell.model_copy(update={"weights": "4bit"})}),
        record("turboquant:bits=3"),
    ]
    assert len(summarize([base, *others])) == 6


def test_bits_and_family_come_from_the_method() -> None:
    named = ("turboquant:bits=3,residual_length=16", "turboquant:key_bits=4,value_bits=2", "full", "gone:bits=3")
    found = {one.method: (one.family, one.bits) for one in summarize([record(name) for name in named])}
    assert found == {
        named[0]: ("turboquant:residual_length=16", 3),
        named[1]: ("turboquant:keys and values apart", 3),
        named[2]: ("full", None),
        named[3]: ("gone", None),
    }


def test_a_figure_that_some_records_lack_is_the_mean_of_the_others() -> None:
    with_none = record(context=512).model_copy(update={"metrics": {"needle_rank": None, "kl_mean": 1.0}})
    with_both = record(context=1024).model_copy(update={"metrics": {"needle_rank": 3.0, "kl_mean": 2.0}})
    [summary] = summarize([with_none, with_both])
    assert summary.metrics["needle_rank"] == 3.0
    assert summary.metrics["kl_mean"] == 1.5


def test_the_place_of_a_measurement_is_said() -> None:
    assert measured_on([where()]) == "Measured 2026-01-01 on cpu: Some Processor, 2 threads, commit abc123."
    several = measured_on([where(3, None), where(1)])
    assert several == "Measured 2026-01-01 to 2026-01-03 on cpu: Some Processor, 2 threads, commit abc123, no commit."


def test_other_contents_under_the_same_name_stand_apart() -> None:
    def one(seed: int, text: str, folder: str):
        inputs = {"model": f"folder {folder * 64} dates {seed}", "text my.txt": text * 64, "text sqlite": str(seed)}
        return record(settings={"seed": seed, "texts": ["my.txt", "sqlite"]}, model="/m").model_copy(
            update={"inputs": inputs}
        )

    first, second = summarize([one(0, "a", "f"), one(1, "a", "f"), one(2, "b", "f"), one(3, "b", "f")])
    assert (first.records, second.records) == (2, 2)
    assert first.settings == "filler=sentences, texts=my.txt sqlite, SHA-256 of my.txt=aaaaaaaa"
    assert second.settings.endswith("SHA-256 of my.txt=bbbbbbbb")
    assert [one.model for one in summarize([one(0, "a", "f"), one(1, "a", "e")])] == ["/m, eeeeeeee", "/m, ffffffff"]
