"""The benchmark of head metrics: both sides say the same, and the record says what was timed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from turboquant import cli
from turboquant.experiments.base import Watch
from turboquant.experiments.decode_speed import METRICS_SPEED, compare_head_by_head
from turboquant.kernels.scoring import Scoring
from turboquant.records.files import read_records
from turboquant.records.settings import MetricsSpeedSettings
from turboquant.run.metrics import Span, compare_layer


def test_the_loop_says_what_the_vectorised_metrics_say() -> None:
    generator = torch.Generator().manual_seed(1)
    query, keys, values, noise = (
        torch.randn(*shape, 32, generator=generator) for shape in ((6, 5), (2, 60), (2, 60), (2, 60))
    )
    sides = (keys, values), (keys + 0.5 * noise, values)
    fast = compare_layer(query, *sides, Scoring(0.2), Span(4, 50), Span(4, 8))
    slow = compare_head_by_head(query, *sides, 0.2, Span(4, 50))
    assert set(slow) == {*fast["served"], *(f"packed_{name}" for name in fast["packed"])}
    for name, value in slow.items():
        side = "packed" if name.startswith("packed_") else "served"
        torch.testing.assert_close(fast[side][name.removeprefix("packed_")], value, atol=1e-5, rtol=1e-4)
    assert 0 < float(slow["top1"].mean()) < 1


def test_all_heads_at_once_are_faster() -> None:
    ((method, found),) = METRICS_SPEED.run(None, [], MetricsSpeedSettings(tokens=200, queries=32, repeats=3), Watch())
    assert method is None
    figures: dict[str, Any] = found.metrics
    assert figures["speed_ratio"] == figures["loop_ms"] / figures["vectorised_ms"]
    assert figures["speed_ratio"] > 3  # about 20 on an idle core


def test_sizes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="got 64 queries, 70 tokens"):
        MetricsSpeedSettings(tokens=70)
    with pytest.raises(ValueError, match="9 heads on 2"):
        MetricsSpeedSettings(tokens=200, kv_heads=2)


def test_the_command_records_each_length(tmp_path: Path) -> None:
    output = tmp_path / "results" / "bench.jsonl"
    words = ["bench", "metrics", "--tokens", "100", "150", "--queries", "8", "--repeats", "1", "--output", str(output)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    records = read_records(output)
    assert [record.cell.settings["tokens"] for record in records] == [100, 150]
    assert all((record.cell.model, record.cell.method) == (None, None) for record in records)
    last = json.loads(result.stdout.splitlines()[-1])
    assert [one["metrics"] for one in last["results"]] == [record.metrics for record in records]
    assert CliRunner().invoke(cli.app, [*words, "--kv-heads", "2"]).exit_code == 2
