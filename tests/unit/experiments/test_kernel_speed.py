"""The benchmarks of kernels and of model shapes: what is timed is said, bad sizes are refused, records read back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.support.system import at_terminal
from turboquant import cli
from turboquant.experiments.base import Experiment, Measurement, Watch
from turboquant.experiments.kernel_speed import KERNEL_ATTENTION, KERNEL_ENCODE, KERNEL_SCORES, copy_bandwidth
from turboquant.experiments.registry import EXPERIMENTS
from turboquant.methods import parse_method
from turboquant.models import inputs
from turboquant.records.files import parse_record, read_records
from turboquant.records.old import OLD
from turboquant.report.gpu import (
    attention_table,
    context_table,
    encode_table,
    model_table,
    prefill_table,
    scores_table,
)
from turboquant.report.summary import read_results

RESULTS = Path(__file__).parents[3] / "results"
SMALL = "smollm2-135m"


def measured(experiment: Experiment[Any], methods: list[Any], **settings: Any) -> list[Measurement]:
    asked = experiment.settings(shape=SMALL, repeats=2, **settings)
    return [found for _, found in experiment.run(None, methods, asked, Watch())]


def figures(found: Measurement) -> dict[str, Any]:
    return dict(found.metrics)


def test_attention_records_say_what_was_read() -> None:
    methods = [parse_method(f"turboquant:bits={bits}") for bits in (4, 2)]
    four, two = measured(KERNEL_ATTENTION, methods, context=512)
    own = figures(four)
    assert own["exact_tokens"] == 4 + 64 + 60  # whole groups of 64 are packed
    packed, width = 512 - own["exact_tokens"], 4 if four.detail["dtype"] == "float32" else 2
    codes = 2 * 3 * packed * 64 * 4 // 8
    exact = 2 * 3 * own["exact_tokens"] * 64 * 2
    assert codes + exact < own["cache_bytes"] < 1.2 * (codes + exact) + width
    assert figures(two)["cache_bytes"] < own["cache_bytes"] < own["full_cache_bytes"] == 2 * 2 * 3 * 512 * 64
    assert own["speed_ratio"] == pytest.approx(own["full_us"] / own["us"])
    assert own["p20_us"] <= own["us"] <= own["p80_us"]
    assert own["floor_us"] == pytest.approx(own["cache_bytes"] / own["copy_gb_per_second"] / 1e3)
    assert four.detail["full"] in four.detail["full_all_us"]


def test_encode_records_count_vectors_and_bytes() -> None:
    (found,) = measured(KERNEL_ENCODE, [parse_method("turboquant:bits=3")], tokens=100)
    own = figures(found)
    assert own["vectors"] == 2 * 3 * 128  # whole groups
    assert own["gb_per_second"] == pytest.approx(own["moved_bytes"] / own["us"] / 1e3)


def test_scores_records_hold_packed_keys_against_float32_ones() -> None:
    (found,) = measured(KERNEL_SCORES, [parse_method("turboquant:bits=4")], context=300)
    own = figures(found)
    assert own["compressed_tokens"] == 256  # whole groups
    assert own["full_cache_bytes"] == 4 * 3 * 300 * 64
    assert 3 * 256 * 32 < own["cache_bytes"] < 1.2 * 3 * 256 * 32
    assert own["speed_ratio"] == pytest.approx(own["full_us"] / own["us"])
    assert found.detail["full"] in found.detail["full_all_us"]


def test_a_chunk_of_queries_is_exact_in_the_cache() -> None:
    """As in a chunked prefill: its own tokens are not packed yet."""
    (found,) = measured(KERNEL_ATTENTION, [parse_method("turboquant:bits=4")], context=512, query_tokens=128)
    assert found.metrics["exact_tokens"] == 128 + 4 + 64 + (512 - 128 - 4 - 64) % 64


def test_timings_of_another_machine_cannot_be_asked_for() -> None:
    with pytest.raises(ValueError, match="are of cuda: NVIDIA H9, and this is"):
        measured(KERNEL_ATTENTION, [parse_method("turboquant:bits=4")], context=512, device="cuda: NVIDIA H9")


def test_a_copy_has_a_speed() -> None:
    assert 1e8 < copy_bandwidth(torch.device("cpu")) < 1e13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--shape", "gpt-9"], "--shape should be 'llama-3.1-8b', 'qwen2.5-3b'"),
        (["attention", "--shape", SMALL, "--context", "60"], "packs nothing of 59 tokens"),
        (["encode", "--shape", SMALL, "--tokens", "0"], "--tokens should be greater than or equal to 1, got '0'"),
        (["scores", "--shape", "gpt-9"], "got 'gpt-9'"),
        (["encode", "--shape", SMALL, "--method", "full"], "no packed tokens"),
        (["model", "--run", "static"], "the method full alone, got turboquant:bits=4"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], message: str, tmp_path: Path) -> None:
    output = tmp_path / "bench.jsonl"
    result = CliRunner().invoke(cli.app, ["bench", *arguments, "--output", str(output)])
    assert result.exit_code == 2
    assert message in result.stderr
    assert not output.exists() or not output.read_bytes()


def test_the_command_appends_records_that_reports_read(tmp_path: Path) -> None:
    output = tmp_path / "bench.jsonl"
    arguments = ["bench", "attention", "--shape", SMALL, "--context", "512", "--bits", "4", "--repeats", "2"]
    result = CliRunner().invoke(cli.app, [*arguments, "--output", str(output)])
    assert result.exit_code == 0
    (record,) = read_records(output)
    assert json.loads(result.stdout.splitlines()[-1])["results"] == [
        {"method": "turboquant:bits=4", "settings": record.cell.settings, "metrics": record.metrics}
    ]
    ((found, _),) = read_results([output]).records
    device, shape, *_ = attention_table([found]).rows[0]
    assert device in record.environment.device
    assert shape == SMALL


def test_a_bench_resumes_until_the_program_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "bench.jsonl"
    words = ["bench", "encode", "--shape", SMALL, "--tokens", "64", "--bits", "4", "--repeats", "1"]
    first = CliRunner().invoke(cli.app, [*words, "--output", str(output)])
    assert first.exit_code == 0
    second = CliRunner().invoke(cli.app, [*words, "--output", str(output)])
    assert "1 of 1 records are in" in second.stderr
    monkeypatch.setattr(inputs, "code", lambda: "another commit")
    third = CliRunner().invoke(cli.app, [*words, "--output", str(output)])
    assert "the program has changed since 1 record was made: it is measured again" in third.stderr
    assert len(read_records(output)) == 2


@pytest.mark.parametrize("command", ["attention", "scores", "encode"])
def test_at_a_terminal_there_is_a_table_and_no_json(command: str, tmp_path: Path) -> None:
    output = tmp_path / "bench.jsonl"
    size = "--tokens" if command == "encode" else "--context"
    words = ["bench", command, "--shape", SMALL, size, "256", "--bits", "2", "4", "--repeats", "1"]
    code, text = at_terminal([*words, "--output", str(output)])
    assert code == 0
    *table, note, end = text.splitlines()
    assert any("method" in line for line in table)
    assert [line.split("turboquant:")[1][:6] for line in table if "turboquant:" in line] == ["bits=2", "bits=4"]
    assert note.startswith("Measured on ")
    assert "None" not in note
    assert json.loads(end)["records"] == 2
    assert len(output.read_text().splitlines()) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
@pytest.mark.parametrize("command", ["model", "memory"])
def test_model_shapes_need_a_gpu(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["bench", command, "--output", str(tmp_path / "x.jsonl")])
    assert result.exit_code == 2
    assert "needs a CUDA device" in result.stderr


def test_recorded_benches_of_every_kind_are_read_as_experiments() -> None:
    """The lines in results/ are of the kinds that there were before; each is a cell of its experiment today."""
    found = [record for record, _ in read_results([RESULTS]).records if record.cell.experiment in {*map(_new, OLD)}]
    assert {record.cell.experiment for record in found} == {*map(_new, OLD)}
    for record in found:
        settings = EXPERIMENTS[record.cell.experiment].settings
        assert settings.model_validate(record.cell.settings).model_dump(mode="json") == record.cell.settings
        assert record.cell.settings["device"] == record.environment.device
        assert all(value is None or value > 0 or name == "full_all_us" for name, value in record.metrics.items())
    gpu = [record for record in found if record.cell.experiment not in ("decode", "metrics-speed")]
    assert all(record.environment.driver and record.environment.triton for record in gpu)
    for table in (attention_table, prefill_table, scores_table, encode_table, model_table, context_table):
        assert table(gpu).rows
        assert {row[0] for row in table(gpu).rows} <= {"H100", "H200"}
    graphs: dict[Any, Any] = {
        (record.environment.device, record.cell.method): record.metrics["cache_bytes"]
        for record in gpu
        if record.cell.experiment == "model-speed"
        and (record.cell.settings["run"], record.cell.settings["context"]) == ("graph", 32_768)
    }
    assert len(graphs) == 4
    for (device, method), held in graphs.items():
        assert method == "full" or held < 0.3 * graphs[device, "full"]


def _new(kind: str) -> str:
    return OLD[kind].experiment


def test_a_line_of_an_old_kind_keeps_every_figure() -> None:
    line = json.loads((RESULTS / "bench-attention.jsonl").read_text().splitlines()[0])
    found = parse_record(json.dumps(line).encode())
    assert found is not None
    assert found.metrics["speed_ratio"] == line["ratio"]
    assert [found.metrics[f"{part}us"] for part in ("", "p20_", "p80_")] == [
        line["us"][part] for part in ("median", "p20", "p80")
    ]
    assert found.metrics["full_p80_us"] == line["full_us"]["p80"]
    assert found.metrics["cache_bytes"] == line["bytes"]
    assert found.detail["full_all_us"] == line["full_all_us"]
    assert found.environment.model_dump(exclude_none=True) == {k: v for k, v in line["environment"].items() if v}
    assert parse_record(b'{"kind": "bench-soak", "runs": 3}') is None
