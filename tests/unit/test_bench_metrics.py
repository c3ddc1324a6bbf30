"""The benchmark of head metrics: both sides say the same, and the record says what was timed."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from turboquant import cli
from turboquant.experiments.decode_speed import MetricsBench, bench_metrics, compare_head_by_head
from turboquant.run.metrics import Span, compare_layer


def test_the_loop_says_what_the_vectorised_metrics_say() -> None:
    generator = torch.Generator().manual_seed(1)
    query, keys, values, noise = (
        torch.randn(*shape, 32, generator=generator) for shape in ((6, 5), (2, 60), (2, 60), (2, 60))
    )
    sides = (keys, values), (keys + 0.5 * noise, values)
    fast = compare_layer(query, *sides, 0.2, Span(4, 50), Span(4, 8))
    slow = compare_head_by_head(query, *sides, 0.2, Span(4, 50))
    assert set(slow) == {*fast["served"], *(f"packed_{name}" for name in fast["packed"])}
    for name, value in slow.items():
        side = "packed" if name.startswith("packed_") else "served"
        torch.testing.assert_close(fast[side][name.removeprefix("packed_")], value, atol=1e-5, rtol=1e-4)
    assert 0 < float(slow["top1"].mean()) < 1


def test_all_heads_at_once_are_faster() -> None:
    record = bench_metrics(200, queries=32, repeats=3)
    assert record.ratio == record.loop_ms.median / record.vectorised_ms.median
    assert record.ratio > 3  # about 20 on an idle core


def test_sizes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="got 64 queries, 70 tokens"):
        bench_metrics(70)
    with pytest.raises(ValueError, match="9 heads on 2"):
        bench_metrics(200, kv_heads=2)


def test_the_command_records_each_length(tmp_path: Path) -> None:
    output = tmp_path / "results" / "bench.jsonl"
    words = ["bench", "metrics", "--tokens", "100", "150", "--queries", "8", "--repeats", "1", "--output", str(output)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    records = [MetricsBench.model_validate_json(line) for line in output.read_text().splitlines()]
    assert [record.tokens for record in records] == [100, 150]
    assert json.loads(result.stdout.splitlines()[-1]) == json.loads(output.read_text().splitlines()[-1])
    assert CliRunner().invoke(cli.app, [*words, "--kv-heads", "2"]).exit_code == 2
