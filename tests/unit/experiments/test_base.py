"""Cells: measured once, shared forward passes, failures kept apart, stopping and going on."""

import json
import math
import signal
from pathlib import Path

import pytest
import typer

from tests.support.models import AttentionCalls, tiny_loaded
from tests.support.sample_experiments import EXPERIMENTS, SIZE, SizeSettings
from turboquant.cli.app import finish, run_recorded
from turboquant.experiments.base import Experiment, Measurement, Watch, cells_for, run_cells
from turboquant.methods import parse_method
from turboquant.models.load import LoadedModel, ModelError
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.records.files import read_records
from turboquant.run.generate import CancelledError

FULL, FOUR, TWO = "full", "turboquant:bits=4,residual_length=8", "turboquant:bits=2,residual_length=8"


def cells(*settings: SizeSettings, methods: tuple[str, ...] = (FULL, FOUR, TWO), model: str = "tiny") -> list[Cell]:
    return cells_for(SIZE, model, [parse_method(one) for one in methods], settings or [SizeSettings()])


class Loader:
    """Loads tiny models and counts; the name "broken" is refused."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def __call__(self, name: str, weights: str) -> LoadedModel:
        self.names.append(name)
        if name == "broken":
            raise ModelError("the model is broken")
        return tiny_loaded()


def test_records_say_what_was_measured_where_and_for_how_long() -> None:
    records = list(run_cells(cells(), EXPERIMENTS, load=Loader()))
    assert [record.cell.method for record in records] == [FULL, FOUR, TWO]
    held = [record.metrics["bits_per_value"] or 0.0 for record in records]
    assert held[0] > held[1] > held[2] > 2
    for record in records:
        assert record.error is None
        assert record.cache.tokens == 96
        assert record.model.name == "tiny-llama"
        assert record.timing["elapsed"] > 0
        assert record.environment.device.startswith("cpu")


def test_a_model_is_loaded_once_for_neighbours_and_again_when_it_comes_back() -> None:
    loader = Loader()
    wanted = [cells(SizeSettings(seed=seed), methods=(TWO,), model=name)[0] for seed, name in enumerate("aab")]
    assert all(record.error is None for record in run_cells(wanted, EXPERIMENTS, load=loader))
    assert loader.names == ["a", "b"]


def test_a_failing_method_does_not_take_the_others_along() -> None:
    records = list(run_cells(cells(SizeSettings(fails_for=FOUR)), EXPERIMENTS, load=Loader()))
    assert {record.cell.method: record.error for record in records} == {
        FULL: None,
        FOUR: f"{FOUR} cannot be measured",
        TWO: None,
    }


def test_finished_methods_are_not_measured_again_when_a_later_one_fails() -> None:
    loaded = tiny_loaded()
    calls = AttentionCalls(loaded)
    list(run_cells(cells(SizeSettings(fails_for=FOUR)), EXPERIMENTS, load=lambda name, weights: loaded))
    assert len(calls.layers) == 2 * loaded.model.config.num_hidden_layers


def test_a_cell_without_a_result_is_a_failure() -> None:
    records = list(run_cells(cells(SizeSettings(forgets=TWO)), EXPERIMENTS, load=Loader()))
    assert [record.error for record in records] == [None, None, "the experiment size gave no result for it"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model": "broken"}, "the model is broken"),
        ({"settings": {"context": 9999}}, "has a context of 512 tokens"),
        ({"settings": {"context": "many"}}, "validation error"),
        ({"method": "no-such-method"}, "unknown method 'no-such-method'"),
    ],
)
def test_what_cannot_run_is_recorded_and_the_rest_goes_on(changed: dict, message: str) -> None:
    good, bad = cells(methods=(TWO,)), [cells(methods=(TWO,))[0].model_copy(update=changed)]
    records = list(run_cells([*bad, *good], EXPERIMENTS, load=Loader()))
    assert message in str(records[0].error)
    assert records[0].metrics == {}
    assert records[1].error is None


def test_progress_runs_from_nought_to_one_over_all_cells() -> None:
    seen: list[float] = []
    watch = Watch(progress=lambda fraction, text: seen.append(fraction))
    list(run_cells(cells(SizeSettings(), SizeSettings(seed=1)), EXPERIMENTS, load=Loader(), watch=watch))
    assert seen == pytest.approx([i / 6 for i in range(6)])


def test_stopping_finishes_the_group_in_hand_and_cancelling_does_not() -> None:
    two = cells(SizeSettings(), SizeSettings(seed=1))
    done: list[ExperimentRecord] = []
    for record in run_cells(two, EXPERIMENTS, load=Loader(), stopping=lambda: bool(done)):
        done.append(record)
    assert [record.cell for record in done] == two[:3]
    with pytest.raises(CancelledError):
        list(run_cells(two, EXPERIMENTS, load=Loader(), watch=Watch(cancelled=lambda: True)))


@pytest.fixture
def output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("turboquant.models.load.load_model", lambda name, weights, progress: tiny_loaded())
    return tmp_path / "out.jsonl"


def record(wanted: list[Cell], output: Path, **more) -> list[ExperimentRecord]:
    return run_recorded("test", wanted, EXPERIMENTS, output, **({"overwrite": False} | more))


def test_what_is_recorded_is_not_measured_again(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = record(cells(methods=(FULL, TWO)), output)
    assert read_records(output) == first
    shown: list[ExperimentRecord] = []
    second = record(cells(), output, show=shown.append)
    assert [one.cell.method for one in second] == [FULL, FOUR, TWO]
    assert [one.cell.method for one in shown] == [FOUR]
    assert "2 of 3 records are in" in capsys.readouterr().err
    assert record(cells(), output, overwrite=True) == read_records(output)


def test_what_failed_is_tried_again(output: Path) -> None:
    bad = cells(SizeSettings(fails_for=TWO), methods=(TWO,))
    assert record(bad, output)[0].error
    lines = output.read_text().splitlines()
    assert record(bad, output)[0].error
    assert len(output.read_text().splitlines()) == len(lines) + 1


def test_the_output_of_something_else_is_left_alone(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content, message in (
        ("to do: buy milk\n", "line 1 of"),
        (_foreign() + "\n", "holds records of needle"),
    ):
        output.write_text(content)
        with pytest.raises(typer.Exit) as left:
            record(cells(), output)
        assert left.value.exit_code == 2
        assert message in capsys.readouterr().err
        assert output.read_text() == content


def _foreign() -> str:
    from turboquant.records.environment import environment

    return ExperimentRecord(cell=Cell(experiment="needle"), environment=environment()).model_dump_json()


def test_an_output_that_cannot_be_written_is_refused_before_the_work(output: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "out.jsonl"):
        with pytest.raises(typer.Exit) as left:
            record(cells(), path)
        assert left.value.exit_code == 2


def test_ctrl_c_keeps_what_is_in_hand_and_the_same_call_goes_on(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = cells(SizeSettings(), SizeSettings(seed=1))
    with pytest.raises(typer.Exit) as left:
        record(wanted, output, show=lambda one: signal.raise_signal(signal.SIGINT) if one.cell.method == FULL else None)
    assert left.value.exit_code == 1
    assert [one.cell for one in read_records(output)] == wanted[:3]
    said = capsys.readouterr().err
    assert "the record in hand is finished first" in said
    assert f"stopped with 3 of 6 records in {output}; the same command goes on from there" in said
    assert [one.cell for one in record(wanted, output)] == wanted
    assert len(read_records(output)) == 6


def test_a_second_ctrl_c_leaves_at_once_and_loses_no_record(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def twice(one: ExperimentRecord) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    record(cells(), output)
    with pytest.raises(typer.Exit) as left:
        record(cells(), output, show=twice, overwrite=True)
    assert left.value.exit_code == 1
    assert len(read_records(output)) == 1  # what was overwritten is gone
    assert "; the same command without --overwrite goes on from there" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_the_last_line_counts_what_failed(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = record(cells(SizeSettings(fails_for=TWO)), output)
    with pytest.raises(typer.Exit) as left:
        finish(records, output, started=0.0, more="said")
    assert left.value.exit_code == 1
    summary = json.loads(capsys.readouterr().out)
    assert {"experiment": "size", "records": 3, "failed": 1, "output": str(output), "more": "said"}.items() <= (
        summary.items()
    )


def test_what_is_no_number_is_none_in_the_record() -> None:
    """As on disk, so that what compares or writes figures at once meets no NaN."""
    found = Measurement({"kl_mean": math.nan, "ppl": math.inf, "bits": 4.0})
    broken = Experiment("size", SizeSettings, lambda loaded, methods, settings, watch: iter([(methods[0], found)]))
    (one,) = run_cells(cells(SizeSettings(), methods=(FOUR,)), {"size": broken}, Loader())
    assert one.metrics == {"kl_mean": None, "ppl": None, "bits": 4.0}
