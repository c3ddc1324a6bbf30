"""The command line: what newcomers type, what is wrong, what is recorded."""

import inspect
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support.system import at_terminal
from turboquant import __version__, cli
from turboquant.cache.build import NothingCompressedError
from turboquant.experiments.base import Watch
from turboquant.experiments.decode_speed import DECODE
from turboquant.methods import METHODS, parse_method
from turboquant.models.load import MODELS, LoadedModel, tiny_model
from turboquant.models.registry import ModelSpec
from turboquant.records.environment import environment
from turboquant.records.files import read_records
from turboquant.records.settings import DecodeSettings
from turboquant.report.summary import read_results
from turboquant.report.tables import busy_table, decode_table

RUNNER = CliRunner()


class CountingTokenizer:
    """Turns each character into a token; enough for a benchmark's prompt."""

    chat_template = None
    eos_token_id = 2

    def __call__(self, text, return_tensors):
        import torch

        class Encoded(dict):
            input_ids = torch.tensor([[3 + ord(c) % 250 for c in text]])

        return Encoded(input_ids=Encoded.input_ids)

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(97 + i % 26) for i in ids)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    spec = ModelSpec("tiny", "tiny", None, "random weights", 0.001)
    loaded = LoadedModel(tiny_model("llama"), CountingTokenizer(), spec, "fp32", "cpu")
    monkeypatch.setattr("turboquant.cli.compare.load", lambda name, weights: loaded)
    monkeypatch.setattr("turboquant.models.load.load_model", lambda name, **_: loaded)
    return loaded


def test_bare_command_and_every_command_explain_themselves() -> None:
    assert "Usage" in RUNNER.invoke(cli.app, []).output
    for command in (["compare"], ["bench"], ["bench", "decode"], ["report"], ["models"], ["methods"]):
        result = RUNNER.invoke(cli.app, [*command, "--help"])
        assert result.exit_code == 0
        assert "Usage" in result.output


def test_help_and_the_list_of_models_load_no_library() -> None:
    """The help of each command there is comes at once: in a new process, all of them, without what takes seconds."""
    code = """
        import json, sys, typer
        from turboquant.cli import app

        def walk(command, words):
            yield words
            for name, inner in getattr(command, "commands", {}).items():
                yield from walk(inner, [*words, name])

        top = typer.main.get_command(app)
        asked = [[*words, "--help"] for words in walk(top, [])] + [["models"]]
        for words in asked:
            assert not top.main(words, prog_name="turboquant", standalone_mode=False)
        heavy = ("torch", "transformers", "numpy", "scipy", "numba", "streamlit", "plotly")
        print(json.dumps([len(asked), [name for name in heavy if name in sys.modules]]))
    """
    done = subprocess.run([sys.executable, "-c", inspect.cleandoc(code)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    count, loaded = json.loads(done.stdout.splitlines()[-1])
    assert count > 15
    assert loaded == []


def test_help_takes_less_than_a_second() -> None:
    """Counted in seconds of the processor, so that it holds while other work shares the machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "turboquant", "--help"], capture_output=True, timeout=60, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


def test_lists_name_everything() -> None:
    methods, models = (RUNNER.invoke(cli.app, words).output for words in (["methods", "--list"], ["models"]))
    assert all(name in methods for name in METHODS)
    assert all(name in models for name in MODELS)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compare", "hello", "--method", "nope"], 2, "unknown method 'nope'"),
        (["compare", "  "], 2, "The prompt is empty"),
        (["compare", "x" * 600], 2, "has a context of 512 tokens"),
        (["bench", "decode", "--method", "turboquant:bits=99"], 2, "bits must be a whole number from 1 to 8, got 99"),
        (["bench", "decode", "--prompt-tokens", "600"], 2, "has a context of 512 tokens"),
        (["bench", "decode", "--output", "/proc/none/b.jsonl"], 2, "/proc/none/b.jsonl cannot be written"),
        (["bench", "decode", "--prompt-tokens", "9", "--new-tokens", "4", "--repeats", "1"], 2, "packs none of 12"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_a_code(tiny, tmp_path: Path, arguments, code: int, message: str) -> None:
    if arguments[0] == "bench" and "--output" not in arguments:
        arguments = [*arguments, "--output", str(tmp_path / "bench.jsonl")]
    result = RUNNER.invoke(cli.app, arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert not (tmp_path / "bench.jsonl").exists()


def test_version_says_what_a_report_of_a_fault_needs() -> None:
    result = RUNNER.invoke(cli.app, ["--version"])
    assert result.exit_code == 0
    here = environment()
    for part in (__version__, here.commit or "unknown", here.python, here.torch, here.transformers, here.device):
        assert part in result.stdout
    assert len(result.stdout.splitlines()) == 1


def test_unknown_model_fails_in_one_sentence() -> None:
    result = RUNNER.invoke(cli.app, ["compare", "hello", "--model", "no-such-model"])
    assert result.exit_code == 2
    assert "no-such-model" in result.stderr


def test_compare_ends_with_the_record(tiny) -> None:
    arguments = ["compare", "a" * 150, "--max-new-tokens", "5", "--method", "turboquant:bits=2"]
    result = RUNNER.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["compressed"]["method"] == "turboquant:bits=2"
    assert record["compressed"]["report"]["compressed_tokens"] > 0


def test_bench_records_and_the_readme_table_comes_from_them(tiny, tmp_path: Path) -> None:
    output = tmp_path / "results" / "bench.jsonl"
    sizes = ["--prompt-tokens", "150", "--new-tokens", "6", "--repeats", "2", "--output", str(output)]
    result = RUNNER.invoke(cli.app, ["bench", "decode", "--method", "turboquant:bits=3", *sizes])
    assert result.exit_code == 0, result.output
    (record,) = read_records(output)
    found: dict[str, Any] = record.metrics
    assert json.loads(result.stdout.splitlines()[-1])["results"][0]["metrics"] == found
    assert found["speed_ratio"] == pytest.approx(found["tokens_per_second"] / found["full_tokens_per_second"])
    assert record.cache is not None
    assert record.cache.compressed_tokens > 0
    again = RUNNER.invoke(cli.app, ["bench", "decode", "--method", "turboquant:bits=3", *sizes])
    assert "1 of 1 records are in" in again.stderr
    assert len(read_records(output)) == 1
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- results: decode -->\nstale\n<!-- end of results -->\nafter\n")
    paths = ["--readme", str(readme), "--results", str(output.parent)]
    assert RUNNER.invoke(cli.app, ["report", "--check", *paths]).exit_code == 1
    assert RUNNER.invoke(cli.app, ["report", *paths]).exit_code == 0
    assert "`turboquant:bits=3` | 150 + 6" in readme.read_text()
    assert "stale" not in readme.read_text()
    assert RUNNER.invoke(cli.app, ["report", "--check", *paths]).exit_code == 0


def test_decode_speed_beside_busy_processes(tiny, tmp_path: Path, monkeypatch) -> None:
    """How long threads spin is noted, and such records stand in a table of their own."""
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    output = tmp_path / "results" / "bench.jsonl"
    sizes = ["--prompt-tokens", "150", "--new-tokens", "4", "--repeats", "1", "--output", str(output)]
    for more in (["--busy", "1"], []):
        command = ["bench", "decode", "--method", "turboquant:bits=3", *sizes, *more]
        assert RUNNER.invoke(cli.app, command).exit_code == 0
    found = [record for record, _ in read_results([output]).records]
    for side in ("", "full_"):
        figures: dict[str, Any] = found[0].metrics
        assert figures[f"{side}worst_step_ms"] >= 1e3 / figures[f"{side}tokens_per_second"]
    assert [[one.cell.settings[name] for name in ("busy", "openmp_spins")] for one in found] == [[1, 77], [0, 77]]
    assert decode_table(found).rows == ()
    assert [row[3:5] for row in busy_table(found).rows] == [("0", "77"), ("1", "77")]
    cell = found[1].cell
    longer = cell.model_copy(update={"settings": {**cell.settings, "prompt_tokens": 151}})
    other = found[1].model_copy(update={"cell": longer})
    assert [len(table([*found, other]).rows) for table in (busy_table, decode_table)] == [2, 1]


def test_at_a_terminal_decode_speed_is_a_table(tiny, tmp_path: Path) -> None:
    sizes = ["--prompt-tokens", "150", "--new-tokens", "4", "--repeats", "1", "--output", str(tmp_path / "b.jsonl")]
    code, text = at_terminal(["bench", "decode", "--method", "turboquant:bits=3", *sizes])
    assert code == 0
    *table, end = text.splitlines()
    assert "turboquant:bits=3" in table[-1]
    assert "results" not in json.loads(end)


def test_a_bench_that_packs_nothing_has_no_figure(tiny) -> None:
    few = DecodeSettings(prompt_tokens=10, new_tokens=4, repeats=1)
    with pytest.raises(NothingCompressedError, match=r"packed none of 13 tokens"):
        list(DECODE.run(tiny, [parse_method("turboquant")], few, Watch()))
