"""Records are used again only where what their names stand for is the same: old records, new ones, and any change."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from tests.support import sample_records
from tests.support.models import save_tiny, tiny_loaded
from tests.support.sample_experiments import SizeSettings
from turboquant.cli.app import run_recorded
from turboquant.experiments.base import Experiment, Measurement, Models, Watch, cells_for, run_cells
from turboquant.methods import Method, parse_method
from turboquant.models import hub
from turboquant.models.inputs import as_here, disagreement, reusable
from turboquant.models.load import MODELS, LoadedModel, load_model
from turboquant.records.base import Record
from turboquant.records.comparison import ModelInfo
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.records.files import append_record, read_records
from turboquant.report.methodology import read_document
from turboquant.texts import read_text

RESULTS = Path(__file__).resolve().parents[3] / "results"
RECORDED = ("evaluate.json", "generation", "gpu-perplexity", "methods", "needle", "recipe", "recommend", "variance")
METHODS = [parse_method("full"), parse_method("turboquant:bits=4,residual_length=8")]
COMMIT, OTHER = "1" * 40, "2" * 40


def lines(records: Sequence[ExperimentRecord]) -> list[str]:
    return reusable(records, [record.cell for record in records]).lines()


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_results_are_still_found(name: str) -> None:
    path = RESULTS / name
    records = read_document(path) if path.suffix else read_records(path.with_suffix(".jsonl"))
    wanted = {record.cell.key for record in records if record.error is None}
    assert wanted
    found = reusable(records, [record.cell for record in records])
    assert set(found.records) == wanted
    assert not found.changes


# Records from before there were inputs


def info(hub_id: str, revision: str | None = None) -> ModelInfo:
    sizes = dict.fromkeys(("layers", "query_heads", "kv_heads", "head_dim"), 1)
    return ModelInfo(
        name="any", hub_id=hub_id, revision=revision, weights="fp32", device="cpu", dtype="float32", **sizes
    )


def old(tmp_path: Path, experiment: str = "perplexity", model: str = "smollm2-135m", **settings) -> ExperimentRecord:
    """A record of one of the texts in the settings, of which it has no sum."""
    cell = Cell(experiment=experiment, model=model, method="full", settings=settings)
    return ExperimentRecord(cell=cell, environment=sample_records.where())


@pytest.mark.parametrize("settings", [{"texts": ["NAME"]}, {"text": "NAME"}, {"filler": "NAME"}], ids=str)
def test_an_old_record_that_did_not_note_what_a_file_held_is_measured_again(tmp_path: Path, settings: dict) -> None:
    path = tmp_path / "my.txt"
    path.write_text("mine")
    named = json.loads(json.dumps(settings).replace("NAME", str(path)))
    said = f"2 records were made before it was noted what {path} held: they are measured again"
    assert lines([old(tmp_path, **named, seed=seed) for seed in (0, 1)]) == [said]
    for shipped in ("sentences", "sqlite"):
        assert not lines([old(tmp_path, **json.loads(json.dumps(settings).replace("NAME", shipped)))])


def test_an_old_record_with_the_sum_of_its_text_is_compared(tmp_path: Path) -> None:
    path = tmp_path / "my.txt"
    path.write_bytes(b"\xef\xbb\xbfmine\r\n")
    sums = {str(path): "0" * 64}
    record = old(tmp_path, texts=[str(path), "sqlite"])
    assert lines([record.model_copy(update={"detail": {"sha256": sums}})]) == [
        f"{path} has changed since 1 record was made: it is measured again"
    ]
    sums[str(path)] = hashlib.sha256(b"mine\n").hexdigest()
    assert not lines([record.model_copy(update={"detail": {"sha256": sums}})])
    path.unlink()
    assert lines([record.model_copy(update={"detail": {"sha256": sums}})]) == [
        f"{path} could be read when 1 record was made, and cannot now: it is measured again"
    ]


def test_an_old_record_says_of_its_model_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tmp_path / "tiny")
    here: dict[str, Path] = {}
    monkeypatch.setattr(hub, "cached_folder", lambda spec: here.get(spec.name))

    def said(model: str, known: ModelInfo) -> list[str]:
        return lines([old(tmp_path, model=model).model_copy(update={"model": known})])

    assert said(str(folder), info(str(folder))) == [
        f"1 record was made before it was noted what {folder} held: it is measured again"
    ]
    assert not said("smollm2-135m", info(MODELS["smollm2-135m"].hub_id))
    pinned = MODELS["qwen3-0.6b"]
    assert not said("qwen3-0.6b", info(pinned.hub_id, pinned.revision))
    assert said("qwen3-0.6b", info(pinned.hub_id, OTHER)) == [
        "qwen3-0.6b has changed since 1 record was made: it is measured again"
    ]
    assert not said("org/name", info("org/name", COMMIT))  # no copy here says otherwise
    here["org/name"] = tmp_path / OTHER
    assert said("org/name", info("org/name", COMMIT))
    here["org/name"] = tmp_path / COMMIT
    assert not said("org/name", info("org/name", COMMIT))


@pytest.mark.parametrize("settings", [{"texts": [["a"], 3, None]}, {"text": {"a": 1}}, {"filler": 7}], ids=str)
def test_a_record_of_another_shape_is_no_error(tmp_path: Path, settings: dict) -> None:
    record = old(tmp_path, **settings)
    assert not lines([record])
    assert not lines([record.model_copy(update={"detail": {"sha256": "none"}})])


def test_a_model_that_was_loaded_by_other_means_is_not_known(tmp_path: Path) -> None:
    record = old(tmp_path, model=str(tmp_path)).model_copy(update={"model": info(str(tmp_path))})
    assert lines([record.model_copy(update={"inputs": {"text sqlite": "1"}})]) != []
    shipped = hashlib.sha256(read_text("sqlite").encode()).hexdigest()
    assert lines([record.model_copy(update={"inputs": {"text sqlite": shipped}})]) == [
        f"1 record was made before it was noted what {tmp_path} held: it is measured again"
    ]


# New records


class ReadingSettings(Record):
    """A text that is read twice; `seed` makes other cells of it."""

    source: str
    seed: int = 0


def _read(
    loaded: LoadedModel, methods: Sequence[Method], settings: ReadingSettings, watch: Watch
) -> Iterator[tuple[Method, Measurement]]:
    first = read_text(settings.source)
    for method in methods:
        watch.progress(0.5, str(method))  # tests change the file here
        assert read_text(settings.source) == first
        yield method, Measurement({"length": float(len(first))}, detail={"text": first})


READING = Experiment("reading", ReadingSettings, _read)
"""An experiment that names its text as no other does: nothing was done for it to be noted."""
EXPERIMENTS = {"reading": READING}


def measure(
    source: Path | str, output: Path, seeds: Sequence[int] = (0,), model: str = "tiny", **more
) -> list[ExperimentRecord]:
    settings = [ReadingSettings(source=str(source), seed=seed) for seed in seeds]
    return run_recorded("test", cells_for(READING, model, METHODS, settings), EXPERIMENTS, output, False, **more)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    real = load_model
    loaded = tiny_loaded()

    def load(name: str, **more) -> LoadedModel:
        return loaded if name == "tiny" else real(name, **more)

    monkeypatch.setattr("turboquant.models.load.load_model", load)


@given(
    content=st.text("ab\n é", min_size=1, max_size=30).filter(str.strip).map(str.encode),
    other=st.text("ab\r\n é", min_size=1, max_size=30).filter(str.strip).map(str.encode),
)
def test_any_change_of_a_byte_is_measured_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, other: bytes
) -> None:
    folder = tmp_path_factory.mktemp("any")
    source, output = folder / "my.txt", folder / "out.jsonl"
    for held, so_far in ((content, {content}), (other, {content, other}), (content, {content, other})):
        source.write_bytes(held)
        for _ in range(2):
            records = measure(source, output)
            assert records[0].detail["text"] == held.decode().replace("\r\n", "\n").replace("\r", "\n")
            assert len(read_records(output)) == len(METHODS) * len(so_far)


def test_what_has_changed_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tmp_path / "my.txt", tmp_path / "out.jsonl"
    source.write_text("first")
    measure(source, output, seeds=(0, 1))
    source.write_text("second")
    capsys.readouterr()
    measure(source, output)
    assert capsys.readouterr().err.splitlines()[0] == (
        f"{source} has changed since 2 records were made: they are measured again"
    )
    source.write_text("first")
    measure(source, output)
    assert "has changed" not in capsys.readouterr().err
    assert len(read_records(output)) == 6


def test_the_same_words_in_another_folder_are_another_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.jsonl"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "my.txt").write_text(f"in {name}")
        monkeypatch.chdir(tmp_path / name)
        assert measure("my.txt", output)[0].detail["text"] == f"in {name}"
    monkeypatch.chdir(tmp_path / "one")
    assert measure("my.txt", output)[0].detail["text"] == "in one"
    assert len(read_records(output)) == 4


def test_a_link_that_leads_elsewhere_is_another_file(tmp_path: Path) -> None:
    link, output = tmp_path / "link.txt", tmp_path / "out.jsonl"
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        assert measure(link, output)[0].detail["text"] == name


def test_a_text_that_is_edited_meanwhile_is_what_was_read_at_first(tmp_path: Path) -> None:
    source, output = tmp_path / "my.txt", tmp_path / "out.jsonl"
    source.write_text("first")
    records = measure(source, output, seeds=(0, 1), show=lambda record: source.write_text("second") and None)
    assert [record.detail["text"] for record in records] == ["first"] * 4
    assert disagreement(records) is None
    assert [record.detail["text"] for record in measure(source, output, seeds=(0, 1))] == ["second"] * 4


def test_outside_of_a_command_each_group_reads_for_itself_and_says_what(tmp_path: Path) -> None:
    source = tmp_path / "my.txt"
    source.write_text("first")
    settings = [ReadingSettings(source=str(source), seed=seed) for seed in (0, 1)]
    cells = cells_for(READING, "tiny", METHODS, settings)
    found = []
    for record in run_cells(cells, EXPERIMENTS, load=lambda name, weights: tiny_loaded()):
        found.append(record)
        source.write_text("second")
    assert [record.detail["text"] for record in found] == ["first"] * 2 + ["second"] * 2
    assert len({record.inputs[f"text {source}"] for record in found}) == 2
    assert disagreement(found) == str(source)
    assert disagreement(found[:2]) is None
    assert set(reusable(found, cells).records) == {cell.key for cell in cells[2:]}


def test_a_text_that_changes_while_other_processes_read_it_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = tmp_path / "my.txt", tmp_path / "out.jsonl"
    source.write_text("first")
    one, two = (
        list(run_cells(cells_for(READING, "tiny", METHODS, [s]), EXPERIMENTS, load=lambda name, weights: tiny_loaded()))
        for s in _settings_while_it_changes(source)
    )
    with pytest.raises(typer.Exit) as left:
        measure(source, output, seeds=(0, 1), engine=lambda *given: iter([*one, *two]))
    assert left.value.exit_code == 1
    assert f"turboquant: {source} was not the same for all 4 records" in capsys.readouterr().err
    assert len(read_records(output)) == 4
    assert [record.detail["text"] for record in measure(source, output, seeds=(0, 1))] == ["second"] * 4
    assert len(read_records(output)) == 6


def _settings_while_it_changes(source: Path) -> Iterator[ReadingSettings]:
    yield ReadingSettings(source=str(source))
    source.write_text("second")
    yield ReadingSettings(source=str(source), seed=1)


def test_a_model_in_memory_is_loaded_again_once_its_folder_has_changed(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", num_hidden_layers=2)
    names: list[str] = []

    def load(name: str, weights: str) -> LoadedModel:
        names.append(name)
        return load_model(name, weights=weights)

    models = Models(load)
    first = models.get(str(folder), "fp32")
    assert models.get(str(folder), "fp32") is first
    save_tiny(folder, num_hidden_layers=2, seed=5)
    second = models.get(str(folder), "fp32")
    assert second.fingerprint != first.fingerprint
    assert len(names) == 2


def test_records_with_and_without_inputs_are_read(tmp_path: Path) -> None:
    record = sample_records.record()
    line = json.loads(record.model_dump_json())
    del line["inputs"]
    (tmp_path / "old.jsonl").write_text(json.dumps(line) + "\n")
    assert read_records(tmp_path / "old.jsonl") == [record]
    new = record.model_copy(update={"inputs": {"model": f"commit {COMMIT}"}})
    append_record(new, tmp_path / "new.jsonl")
    assert read_records(tmp_path / "new.jsonl") == [new]
    assert new.cell.key == record.cell.key


def test_a_copy_on_another_machine_is_the_same_model_whatever_its_dates() -> None:
    here, there = "folder a dates 1", "folder a dates 2"
    record = sample_records.record(model="tiny").model_copy(update={"inputs": {"model": there, "text sqlite": "1"}})
    assert reusable([record], [record.cell], lambda name: here).lines() == [
        "the weights in tiny have new dates since 1 record was made: it is measured again"
    ]
    asked = as_here(record, lambda name: here)
    assert asked.inputs == {"model": here, "text sqlite": "1"}
    assert reusable([asked], [asked.cell], lambda name: here).lines() == [
        "sqlite has changed since 1 record was made: it is measured again"
    ]
    others: dict[str, str | None] = {"b": "folder b dates 1", "c": f"commit {COMMIT}", "d": None}
    for name in others:
        elsewhere = record.model_copy(update={"cell": record.cell.model_copy(update={"model": name})})
        assert as_here(elsewhere, others.get) == elsewhere


def test_a_synthetic_cell_needs_no_inputs() -> None:
    cell = Cell(experiment="size", settings=SizeSettings().model_dump(mode="json"))
    record = ExperimentRecord(cell=cell, environment=sample_records.where())
    assert reusable([record], [cell]).records == {cell.key: record}
