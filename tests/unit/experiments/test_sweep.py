"""Sweeps: the grid, workers that die, a parent that dies, Ctrl-C, and a Ray cluster that loses a node."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from typer.testing import CliRunner

from tests.support.models import save_tiny
from tests.support.sample_experiments import EXPERIMENTS, SIZE, SizeSettings
from turboquant import cli
from turboquant.experiments.base import Experiment, Watch, cells_for, groups
from turboquant.experiments.registry import EXPERIMENTS as TASKS
from turboquant.experiments.sweep import grid, with_rotation_seeds
from turboquant.experiments.workers import run_workers, visible_gpus
from turboquant.methods import parse_method
from turboquant.records.base import Record
from turboquant.records.experiment import Cell, ExperimentRecord
from turboquant.records.files import read_records

ROOT = Path(__file__).resolve().parents[3]
FULL, FOUR, TWO = "full", "turboquant:bits=4,residual_length=8", "turboquant:bits=2,residual_length=8"
METHODS = [parse_method(one) for one in (FULL, FOUR, TWO)]
RUNNER = CliRunner()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("model")))


def cells(model: str, *settings: SizeSettings, methods=METHODS) -> list[Cell]:
    return cells_for(SIZE, model, methods, settings)


def measure(wanted: list[Cell], workers: int = 2, progress=lambda fraction, text: None) -> list[ExperimentRecord]:
    return list(run_workers(wanted, EXPERIMENTS, Watch(progress), lambda: False, workers=workers))


def keys(records: list[ExperimentRecord]) -> list[str]:
    return sorted(record.cell.key for record in records)


# The grid


class OtherSettings(Record):
    tokens: int = 5


OTHER = Experiment("other", OtherSettings, lambda *_: iter(()))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_every_experiment_travels_to_other_processes(name: str) -> None:
    assert pickle.loads(pickle.dumps(TASKS[name])) == TASKS[name]


def test_the_grid_is_every_combination_once_and_shared_work_is_side_by_side() -> None:
    axes = {"context": [64, 96], "seed": [0, 1, 2]}
    found = grid([SIZE, OTHER], ["a", "b"], METHODS, axes=axes)
    assert len({cell.key for cell in found}) == len(found) == 2 * (2 * 3 + 2) * 3
    assert [len(group) for group in groups(found)] == [3] * 16
    models = [cell.model or "" for cell in found]
    assert models == sorted(models)
    assert {cell.settings["tokens"] for cell in found if cell.experiment == "other"} == {64, 96}


def test_an_empty_axis_leaves_the_default_and_doubles_are_one() -> None:
    assert [cell.settings["context"] for cell in grid([SIZE], ["a"], METHODS[:1], axes={"context": []})] == [96]
    assert len(grid([SIZE], ["a", "a"], METHODS, axes={"seed": [1, 1]})) == 3


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"depth": [1]}, "no experiment of size, other has a setting 'depth'"),
        ({"context": ["many"]}, "size: context should be a valid integer, got 'many'"),
    ],
)
def test_what_no_experiment_takes_is_refused(axes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grid([SIZE, OTHER], ["a"], METHODS, axes=axes)


def test_rotation_seeds_multiply_methods_that_have_one() -> None:
    found = with_rotation_seeds(METHODS[:2], [0, 1, 2])
    assert [str(one) for one in found] == [FULL, FOUR, f"{FOUR},seed=1", f"{FOUR},seed=2"]
    assert with_rotation_seeds(METHODS, []) == METHODS


# Local workers


def test_two_workers_measure_what_one_process_measures(tiny: str) -> None:
    wanted = cells(tiny, SizeSettings(seconds=0.3), SizeSettings(seed=1, seconds=0.3))
    told: list[float] = []
    records = measure(wanted, progress=lambda fraction, text: told.append(fraction))
    assert keys(records) == sorted(cell.key for cell in wanted)
    assert all(record.error is None for record in records)
    bits = {record.cell.method: record.metrics["bits_per_value"] or 0.0 for record in records}
    assert bits[FULL] > bits[FOUR] > bits[TWO]
    processes = {record.metrics["process"] for record in records}
    assert len(processes) == 2
    assert float(os.getpid()) not in processes
    assert {record.environment.cpu_threads for record in records} == {1}
    assert told[0] == 0
    assert told[-1] == 1
    assert told == sorted(told)


def test_a_worker_that_dies_costs_a_try_and_no_cell(tiny: str, tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    lives.write_bytes(b"x")
    wanted = cells(tiny, SizeSettings(dies_for=FOUR, lives=str(lives)))
    records = measure(wanted, workers=1)
    assert keys(records) == sorted(cell.key for cell in wanted)
    assert [record.error for record in records] == [None] * 3
    assert lives.read_bytes() == b""


def test_a_worker_killed_from_outside_costs_nothing(tiny: str) -> None:
    before = _workers()
    wanted = cells(tiny, SizeSettings(seconds=0.2))
    records: list[ExperimentRecord] = []
    for record in run_workers(wanted, EXPERIMENTS, Watch(), lambda: False, workers=1):
        records.append(record)
        if len(records) == 1:
            [worker] = _workers(before)
            worker.kill()
    assert keys(records) == sorted(cell.key for cell in wanted)
    assert [record.error for record in records] == [None] * 3


def test_a_cell_that_kills_every_worker_is_recorded_and_the_rest_goes_on(tiny: str) -> None:
    wanted = [*cells(tiny, SizeSettings(dies_for=FOUR)), *cells(tiny, SizeSettings(seed=1))]
    records = measure(wanted, workers=2)
    assert keys(records) == sorted(cell.key for cell in wanted)
    failed = [record for record in records if record.error]
    assert [record.cell.key for record in failed] == [wanted[1].key]
    assert failed[0].error == "the worker process died of SIGKILL, 2 times (too little memory, perhaps)"


def test_stopping_finishes_what_is_in_hand(tiny: str) -> None:
    before = _workers()
    wanted = cells(tiny, *(SizeSettings(seed=seed, seconds=0.3) for seed in range(4)))
    got: list[ExperimentRecord] = []
    for record in run_workers(wanted, EXPERIMENTS, Watch(), lambda: bool(got), workers=1):
        got.append(record)
    assert [record.cell for record in got] == wanted[:1]
    assert not _workers(before)


def test_leaving_early_ends_the_workers(tiny: str) -> None:
    before = _workers()
    running = run_workers(cells(tiny, SizeSettings(seconds=0.2)), EXPERIMENTS, Watch(), lambda: False, workers=1)
    next(running)
    assert _workers(before)
    running.close()
    assert not _workers(before)


def _workers(before: Collection[psutil.Process] = (), of: int | None = None) -> list[psutil.Process]:
    """Processes forked by the server that imports the libraries for workers; the server itself stays."""
    below = psutil.Process(of).children(recursive=True)
    return [one for one in below if one not in before and one.ppid() != (of or os.getpid())]


def test_nothing_to_do_starts_nothing_and_no_workers_is_an_error() -> None:
    assert measure([]) == []
    with pytest.raises(ValueError, match="workers must be 1 or more, got 0"):
        measure([], workers=0)


@pytest.mark.parametrize(
    ("count", "named", "found"),
    [(0, "", []), (2, None, ["0", "1"]), (2, "3,5", ["3", "5"]), (1, "GPU-1f,7", ["GPU-1f"])],
)
def test_gpus_are_those_this_process_may_use(monkeypatch: pytest.MonkeyPatch, count: int, named, found) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if named is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == found


def test_where_there_are_gpus_a_worker_sees_its_own(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "main.py").write_text("raise SystemExit('the caller runs again')")  # as a script without a guard
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(tmp_path / "main.py"), raising=False)
    monkeypatch.setattr("turboquant.experiments.workers.visible_gpus", lambda: ["5"])
    records = list(run_workers(cells(tiny, SizeSettings()), EXPERIMENTS, Watch(), lambda: False))
    assert [record.detail["gpus"] for record in records] == ["5"] * 3


# The command


@pytest.fixture
def experiments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turboquant.experiments.registry.EXPERIMENTS", EXPERIMENTS)


def arguments(tiny: str, output: Path, *more: str) -> list[str]:
    known = ["--model", tiny, "--experiment", "size", "--bits", "2", "4", "--seeds", "0", "1", "--output", str(output)]
    return ["sweep", *known, *more]


# The real command with the small experiment of the tests among its own.
PROGRAM = """
from turboquant.experiments import registry as tasks
from tests.support.sample_experiments import EXPERIMENTS
tasks.EXPERIMENTS.update(EXPERIMENTS)
if __name__ == "__main__":
    from turboquant.cli import main
    main()
"""


def start(tmp_path: Path, words: list[str]) -> "subprocess.Popen[str]":
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    out = subprocess.PIPE
    command = [sys.executable, str(program), *words]
    return subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=out, stderr=out, text=True)


def wait_for_records(path: Path, count: int, process: "subprocess.Popen[str]") -> list[ExperimentRecord]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        records = read_records(path)
        if len(records) >= count:
            return records
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    raise AssertionError(f"{len(records)} of {count} records after a minute")


def test_dry_run_lists_the_cells_and_which_are_done(experiments, tiny: str, tmp_path: Path) -> None:
    output = tmp_path / "new" / "sweep.jsonl"
    result = RUNNER.invoke(cli.app, arguments(tiny, output, "--dry-run"))
    assert result.exit_code == 0, result.output
    assert not output.parent.exists()
    *lines, last = result.stdout.splitlines()
    assert json.loads(last) == {"cells": 4, "done": 0, "to_do": 4, "output": str(output)}
    assert all(line.startswith("to do") and "turboquant:bits=" in line for line in lines)


def test_a_sweep_records_resumes_and_reports_failures(experiments, tiny: str, tmp_path: Path) -> None:
    output = tmp_path / "sweep.jsonl"
    bad = ["--set", "fails_for=turboquant:bits=4", "--workers", "1"]
    result = RUNNER.invoke(cli.app, arguments(tiny, output, *bad))
    assert result.exit_code == 1, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["experiment"], last["records"], last["failed"]) == ("sweep", 4, 2)
    assert "turboquant:bits=4 cannot be measured" in result.stderr
    listed = RUNNER.invoke(cli.app, arguments(tiny, output, *bad, "--dry-run")).stdout
    assert [line.split()[0] for line in listed.splitlines()[:-1]] == ["done", "failed"] * 2
    again = RUNNER.invoke(cli.app, arguments(tiny, output, *bad))
    assert again.exit_code == 1
    assert "2 of 4 records are in" in again.stderr
    assert len(read_records(output)) == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "no-such-model"], "no-such-model"),
        (["--experiment", "smell"], "unknown experiment 'smell': choose from other, size"),
        (["--method", "nope"], "unknown method 'nope'"),
        (["--set", "depth=1"], "no experiment of size has a setting 'depth'"),
        (["--set", "context=1"], "--contexts and --seeds have options of their own"),
        (["--set", "seconds=long"], "size: seconds should be a valid number, got 'long'"),
        (["--weights", "7bit"], "weights must be one of"),
        (["--address", "auto"], "--address goes with --engine ray"),
        (["--engine", "ray", "--workers", "2"], "--workers goes with --engine local"),
        (["--engine", "ray", "--num-cpus", "0"], "above 0"),
        (["--output", "/proc/none/sweep.jsonl"], "cannot be written: No such file"),
        (["--workers", "0"], "--workers"),
    ],
)
def test_wrong_use_is_refused_before_any_work(experiments, tmp_path: Path, words: list[str], message: str) -> None:
    output = tmp_path / "sweep.jsonl"
    known = ["sweep", "--experiment", "size", "--output", str(output)]
    result = RUNNER.invoke(cli.app, [*known, *words])
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not output.exists()


def test_without_ray_the_ray_engine_says_what_to_install(experiments, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = RUNNER.invoke(cli.app, ["sweep", "--experiment", "size", "--engine", "ray"])
    assert result.exit_code == 2
    assert "pip install 'turboquant-lab[ray]'" in result.stderr


@pytest.mark.nightly
def test_a_sweep_killed_then_interrupted_goes_on_where_it_stopped(experiments, tiny: str, tmp_path: Path) -> None:
    output = tmp_path / "sweep.jsonl"
    words = arguments(tiny, output, "--workers", "1", "--set", "seconds=0.4")
    process = start(tmp_path, words)
    wait_for_records(output, 1, process)
    workers = _workers(of=process.pid)
    process.kill()
    process.communicate()
    assert workers
    assert not psutil.wait_procs(workers, timeout=10)[1]
    first = read_records(output)
    assert 1 <= len(first) < 4

    process = start(tmp_path, words)
    wait_for_records(output, len(first) + 1, process)
    for one in (*psutil.Process(process.pid).children(recursive=True), process):  # as a terminal does: all hear it
        one.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    second = read_records(output)
    assert f"{len(first)} of 4 records are in" in err
    if process.returncode:  # the last record may have been in hand
        assert "stopping: the record in hand is finished first" in err
        assert f"stopped with {len(second)} of 4 records" in err
        assert "the same command goes on from there" in err

    result = RUNNER.invoke(cli.app, words)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["records"] == 4
    third = read_records(output)
    assert third[: len(first)] == first
    assert third[: len(second)] == second
    assert len(set(keys(third))) == len(third) == 4


# Ray


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """A head without room for tasks and two nodes with room for one each; tasks can import the tests' experiment."""
    pytest.importorskip("ray", reason="ray is not installed")
    for name, value in {
        "PYTHONPATH": str(ROOT),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_failure_threshold": "4",
        "RAY_enable_metrics_collection": "0",
    }.items():
        monkeypatch.setenv(name, value)
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **small})
    try:
        yield cluster, [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
    finally:
        ray.shutdown()
        cluster.shutdown()


@pytest.mark.nightly
@pytest.mark.timeout(180)
def test_a_ray_cluster_that_loses_a_node_loses_no_cell(cluster, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from turboquant.experiments.cluster import run_ray

    cluster, nodes = cluster
    wanted = cells(tiny, *(SizeSettings(seed=seed, seconds=0.3) for seed in range(4)))
    wanted += cells(tiny, SizeSettings(fails_for=FOUR))
    records: list[ExperimentRecord] = []
    engine = partial(run_ray, address=cluster.address)
    for record in engine(wanted, EXPERIMENTS, Watch(), lambda: False):
        records.append(record)
        if len(records) == 2:
            cluster.remove_node(nodes[0], allow_graceful=False)
    assert keys(records) == sorted(cell.key for cell in wanted)
    assert [record.error for record in records if record.error] == [f"{FOUR} cannot be measured"]
    assert float(os.getpid()) not in {record.metrics.get("process") for record in records}


def test_a_cluster_that_is_not_there_is_one_sentence(experiments, tiny: str, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    words = arguments(tiny, tmp_path / "a.jsonl", "--engine", "ray", "--address", "127.0.0.1:1")
    result = RUNNER.invoke(cli.app, words)
    assert result.exit_code == 2, result.output
    assert "no Ray cluster at 127.0.0.1:1" in result.stderr
