"""The benchmarks of kernels and of model shapes: what is timed is said, bad sizes are refused, records read back."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests.helpers import at_terminal
from turboquant import cli
from turboquant.experiments.kernel_speed import bench_attention, bench_encode, bench_scores, copy_bandwidth
from turboquant.methods import parse_method
from turboquant.records.bench import GPU_BENCHES, AttentionBench, ModelBench
from turboquant.report.gpu import (
    attention_table,
    context_table,
    encode_table,
    model_table,
    prefill_table,
    scores_table,
)
from turboquant.report.summary import read_results

RESULTS = Path(__file__).parents[2] / "results"
SMALL = "smollm2-135m"


def test_attention_records_say_what_was_read() -> None:
    methods = [parse_method(f"turboquant:bits={bits}") for bits in (4, 2)]
    four, two = bench_attention(SMALL, methods, context=512, repeats=2)
    assert (four.method, two.method) == ("turboquant:bits=4", "turboquant:bits=2")
    assert four.exact_tokens == 4 + 64 + 60  # whole groups of 64 are packed
    packed, width = 512 - four.exact_tokens, 4 if four.dtype == "float32" else 2
    codes = 2 * 3 * packed * 64 * 4 // 8
    exact = 2 * 3 * four.exact_tokens * 64 * 2
    assert codes + exact < four.bytes < 1.2 * (codes + exact) + width
    assert two.bytes < four.bytes < four.full_bytes == 2 * 2 * 3 * 512 * 64
    assert four.ratio == pytest.approx(four.full_us.median / four.us.median)
    assert four.floor_us == pytest.approx(four.bytes / four.copy_gb_per_second / 1e3)
    assert four.full in four.full_all_us


def test_encode_records_count_vectors_and_bytes() -> None:
    (record,) = bench_encode(SMALL, [parse_method("turboquant:bits=3")], tokens=100, repeats=2)
    assert record.tokens == 128  # whole groups
    assert record.vectors == 2 * 3 * 128
    assert record.gb_per_second == pytest.approx(record.bytes / record.us.median / 1e3)


def test_scores_records_hold_packed_keys_against_float32_ones() -> None:
    (record,) = bench_scores(SMALL, [parse_method("turboquant:bits=4")], context=300, repeats=2)
    assert record.context == 256  # whole groups
    assert record.full_bytes == 4 * 3 * 300 * 64
    assert 3 * 256 * 32 < record.bytes < 1.2 * 3 * 256 * 32
    assert record.ratio == pytest.approx(record.full_us.median / record.us.median)
    assert record.full in record.full_all_us


def test_a_chunk_of_queries_is_exact_in_the_cache() -> None:
    """As in a chunked prefill: its own tokens are not packed yet."""
    (record,) = bench_attention(SMALL, [parse_method("turboquant:bits=4")], context=512, query_tokens=128, repeats=2)
    assert record.exact_tokens == 128 + 4 + 64 + (512 - 128 - 4 - 64) % 64


def test_a_copy_has_a_speed() -> None:
    assert 1e8 < copy_bandwidth(torch.device("cpu")) < 1e13


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["attention", "--shape", "gpt-9"], "shape must be one of llama-3.1-8b"),
        (["attention", "--shape", SMALL, "--context", "60"], "packs nothing of 59 tokens"),
        (["encode", "--shape", SMALL, "--tokens", "0"], "--tokens should be greater than or equal to 1, got '0'"),
        (["scores", "--shape", "gpt-9"], "shape must be one of llama-3.1-8b"),
        (["encode", "--shape", SMALL, "--method", "full"], "no packed tokens"),
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
    (line,) = output.read_text().splitlines()
    assert json.loads(line) == json.loads(result.stdout)
    (record,) = read_results([output]).gpu
    assert isinstance(record, AttentionBench)
    assert attention_table([record]).rows[0][:2] == (record.environment.device, SMALL)


@pytest.mark.parametrize("command", ["attention", "scores", "encode"])
def test_at_a_terminal_there_is_a_table_and_no_json(command: str, tmp_path: Path) -> None:
    output = tmp_path / "bench.jsonl"
    size = "--tokens" if command == "encode" else "--context"
    words = ["bench", command, "--shape", SMALL, size, "256", "--bits", "2", "4", "--repeats", "1"]
    code, text = at_terminal([*words, "--output", str(output)])
    assert code == 0
    assert "{" not in text
    header, *rows, note = text.splitlines()
    assert "heads of" in header
    assert [row.split("turboquant:")[1][:6] for row in rows] == ["bits=2", "bits=4"]
    assert note.startswith("Measured on ")
    assert "None" not in note
    assert len(output.read_text().splitlines()) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
@pytest.mark.parametrize("command", ["model", "memory"])
def test_model_shapes_need_a_gpu(command: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["bench", command, "--output", str(tmp_path / "x.jsonl")])
    assert result.exit_code == 1
    assert "needs a CUDA device" in result.stderr


def test_recorded_gpu_results_are_whole() -> None:
    gpu = read_results([RESULTS]).gpu
    assert {record.kind for record in gpu} >= {"bench-attention", "bench-model", "bench-memory"}
    assert all(type(record) is GPU_BENCHES[record.kind] for record in gpu)
    assert all(record.environment.driver and record.environment.triton for record in gpu)
    for table in (attention_table, prefill_table, scores_table, encode_table, model_table, context_table):
        assert table(gpu).rows
        assert {row[0] for row in table(gpu).rows} <= {"H100", "H200"}
    graphs = {
        (record.environment.device, record.method): record.cache_bytes
        for record in gpu
        if isinstance(record, ModelBench) and (record.run, record.context) == ("graph", 32_768)
    }
    assert len(graphs) == 4
    for (device, method), held in graphs.items():
        assert method == "full" or held < 0.3 * graphs[device, "full"]
