"""`turboquant validate`: what it prints, records and refuses, how it is stopped and goes on."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.support.system import interrupted
from turboquant import cli
from turboquant.records.files import read_records

RUNNER = CliRunner()
SMALL = ["--dims", "64", "--seeds", "6", "--vectors", "64"]


def invoke(*arguments: str):
    return RUNNER.invoke(cli.app, ["validate", *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("validate") / "validate.jsonl"
    result = invoke(*SMALL, "--bits", "1", "3", "--output", str(output))
    return result, output


def test_a_line_a_cell_and_a_json_line_at_the_end(finished) -> None:
    result, output = finished
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["experiment"], last["records"], last["failed"], last["checks_failed"]) == ("validate", 2, 0, 0)
    records = read_records(output)
    assert [(r.cell.model, r.cell.settings["dim"], r.cell.settings["bits"]) for r in records] == [
        (None, 64, 1),
        (None, 64, 3),
    ]
    assert last["checks"] == sum(len(record.detail["checks"]) for record in records) == 24
    assert "pass  MSE, exact density" in result.stdout
    assert records[1].metrics["mse"] == pytest.approx(records[1].metrics["mse_theory"], rel=0.05)
    assert records[0].metrics["gain_mse"] == pytest.approx(0.64, abs=0.03)
    assert min(v for k, v in records[0].metrics.items() if k.endswith("_per_second") and v is not None) > 0


def test_what_is_recorded_is_not_measured_again(finished) -> None:
    _, output = finished
    before = output.read_bytes()
    result = invoke(*SMALL, "--bits", "1", "3", "--output", str(output))
    assert result.exit_code == 0
    assert "2 of 2 records are in" in result.stderr
    assert output.read_bytes() == before


def test_the_plot_is_a_page_of_its_own(finished, tmp_path: Path) -> None:
    plot = tmp_path / "plots" / "validate.html"
    result = invoke(*SMALL, "--bits", "1", "3", "--output", str(finished[1]), "--plot", str(plot))
    assert result.exit_code == 0, result.output
    page = plot.read_text(encoding="utf-8")
    assert page.count("dim 64, measured") == page.count("dim 64, expected") == 4
    assert "inner product error, prod orthogonal (lower is better)" in page
    assert "<script src=" not in page


def test_a_check_that_fails_is_named_and_fails_the_command(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("turboquant.experiments.theory.TOLERANCE", 0.0)  # nothing is that exact
    result = invoke(*SMALL, "--bits", "2", "--output", str(tmp_path / "v.jsonl"))
    assert result.exit_code == 1
    assert "FAIL  MSE, exact density" in result.stdout
    assert "12 of 12 checks failed" in result.stderr
    assert json.loads(result.stdout.splitlines()[-1])["checks_failed"] == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--bits", "9"], "--bits should be less than or equal to 8, got '9'"),
        (["--rotation", "givens"], "--rotation should be 'qr' or 'hadamard', got 'givens'"),
        (["--device", "abacus"], "--device should be 'cpu' or 'cuda', got 'abacus'"),
        (["--dims", "1"], "--dims should be greater than or equal to 2, got '1'"),
        (["--seeds", "2"], "--seeds should be greater than or equal to 3, got '2'"),
        (["--dims", "5000"], "--dims should be less than or equal to 4096, got '5000'"),
        (["--seed", str(2**31)], "--seed should be less than 2147483648, got 2147483648"),
        (["--seeds", str(10**9)], "--seeds should be less than or equal to 10000, got '1000000000'"),
        (["--vectors", "9" * 40], "--vectors should be less than or equal to 1000000, got '99"),
    ],
)
def test_wrong_use_is_refused_before_any_work(tmp_path: Path, arguments: list[str], message: str) -> None:
    output = tmp_path / "v.jsonl"
    result = invoke(*arguments, "--output", str(output))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not output.exists()


def test_another_experiments_output_is_refused(finished, tmp_path: Path) -> None:
    record = read_records(finished[1])[0]
    other = record.model_copy(update={"cell": record.cell.model_copy(update={"experiment": "needle"})})
    output = tmp_path / "needle.jsonl"
    output.write_text(other.model_dump_json() + "\n")
    assert invoke(*SMALL, "--bits", "1", "--output", str(output)).exit_code == 2
    assert read_records(output) == [other]


def test_ctrl_c_finishes_the_record_and_says_how_to_go_on(tmp_path: Path) -> None:
    output = tmp_path / "v.jsonl"
    words = ["validate", "--bits", *"12345678", "--dims", "64", "80", "--seeds", "16", "--output", str(output)]
    kept = b""
    for _ in range(2):
        with interrupted(output, kept.count(b"\n") + 1):
            result = RUNNER.invoke(cli.app, words)
        assert result.exit_code == 1, result.output
        assert "the same command goes on from there" in result.stderr
        assert output.read_bytes().startswith(kept)
        assert kept.count(b"\n") < len(read_records(output)) < 16
        kept = output.read_bytes()
    keys = [record.cell.key for record in read_records(output)]
    assert len(keys) == len(set(keys))
