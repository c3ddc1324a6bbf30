"""`evaluate`: the flags of the methodology, its schema, what is measured once, what is refused, being stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from tests.support.models import save_tiny
from tests.support.system import interrupted
from turboquant import cli
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.files import read_records
from turboquant.report.methodology import EvaluationFileError, document, read_document

SCHEMA = ["seq_len", "compression_ratio", "cosine_similarity", "top1_match_pct", "top5_match_pct"]
FAST = ["--queries", "32", "--chunk-tokens", "512"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=8192))


def evaluate(*words: object) -> Result:
    return CliRunner().invoke(cli.app, ["evaluate", *map(str, words)])


def last_line(result: Result) -> dict:
    return json.loads(result.stdout.splitlines()[-1])


def sides(path: Path) -> list[tuple[str, list[str]]]:
    content = json.loads(path.read_text())
    return [(run["method"], list(run["by_context"])) for run in content.get("runs", [content])]


# -- the flags and the file --------------------------------------------------------------------------------------------


def test_the_methodologys_command_line_is_understood(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Only parsed: the model is not on this machine. What follows from it is measured with another one below."""
    monkeypatch.chdir(tmp_path)
    seen: list = []
    monkeypatch.setattr("turboquant.cli.heads._check_machine", lambda *given: seen.append(given))

    def stop(title, cells, experiments, output, overwrite, store):
        seen.append((cells, output))
        raise typer.Exit(0)

    monkeypatch.setattr("turboquant.cli.heads.run_recorded", stop)
    line = "--model Qwen/Qwen2.5-3B-Instruct --bits 3 --contexts 2048 4096 8192 --output qwen/results_3bit.json"
    result = evaluate(*line.split())
    assert result.exit_code == 0, result.output
    assert seen[0] == ("Qwen/Qwen2.5-3B-Instruct", "auto", 8192)
    cells, output = seen[1]
    assert output == Path("qwen/results_3bit.json")
    assert [(cell.model, cell.method, cell.settings["context"]) for cell in cells] == [
        ("Qwen/Qwen2.5-3B-Instruct", "turboquant:bits=3", context) for context in (2048, 4096, 8192)
    ]


def test_one_method_gives_the_methodologys_schema(tiny: str, tmp_path: Path) -> None:
    output, records = tmp_path / "new" / "results_3bit.json", tmp_path / "records.jsonl"
    result = evaluate(
        "--model", tiny, "--bits", 3, "--contexts", 700, 600, "--output", output, "--records", records, *FAST
    )
    assert result.exit_code == 0, result.output
    content = json.loads(output.read_text())
    assert list(content) == ["model", "bits", "method", "by_context"]
    assert (content["model"], content["bits"], content["method"]) == (tiny, 3, "turboquant:bits=3")
    assert list(content["by_context"]) == ["600", "700"]
    for context, entry in content["by_context"].items():
        assert list(entry)[:5] == SCHEMA
        assert entry["seq_len"] == int(context)
        record = ExperimentRecord.model_validate(entry["record"])
        assert record.metrics["cosine_similarity"] == entry["cosine_similarity"]
        assert record.cache is not None
        assert entry["compression_ratio"] == record.cache.full_precision_bytes / record.cache.bytes
        assert entry["payload_ratio"] == pytest.approx(16 / 3)
        assert record.environment.torch
        assert len(record.detail["served"]["per_head_top1"]) == 3
    assert [record.cell for record in read_records(records)] == [record.cell for record in read_document(output)]
    assert last_line(result) == {**last_line(result), "records": 2, "failed": 0, "output": str(output)}
    table = [line for line in result.stdout.splitlines() if line.startswith("turboquant:bits=3")]
    assert [line.split()[1] for line in table] == ["600", "700"]
    assert not [path for path in output.parent.iterdir() if path != output]


def test_several_methods_give_a_list_of_runs(tiny: str, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    words = ["--model", tiny, "--contexts", 600, "--output", output, *FAST]
    result = evaluate(*words, "--method", "turboquant", "turboquant-paper", "full", "--bits", 2, 4)
    assert result.exit_code == 0, result.output
    content = json.loads(output.read_text())
    assert list(content) == ["model", "runs"]
    assert [(run["bits"], run["method"]) for run in content["runs"]] == [
        (2, "turboquant:bits=2"),
        (4, "turboquant:bits=4"),
        (2, "turboquant-paper:bits=2"),
        (4, "turboquant-paper:bits=4"),
        (None, "full"),
    ]
    assert all(list(run["by_context"]["600"])[:5] == SCHEMA for run in content["runs"])
    assert content["runs"][4]["by_context"]["600"]["top1_match_pct"] == 100


def test_what_is_there_is_not_measured_again(tiny: str, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    words = ["--model", tiny, "--output", output, *FAST]
    assert evaluate(*words, "--bits", 3, "--contexts", 600).exit_code == 0
    first = read_document(output)
    more = evaluate(*words, "--bits", 3, 2, "--contexts", 600, 650)
    assert more.exit_code == 0
    assert "1 of 4 records are in" in more.stderr
    assert sides(output) == [("turboquant:bits=3", ["600", "650"]), ("turboquant:bits=2", ["600", "650"])]
    assert read_document(output)[0] == first[0]
    again = evaluate(*words, "--bits", 3, "--contexts", 600)
    assert "1 of 1 records are in" in again.stderr
    assert len(read_document(output)) == 4  # what was not asked for again stays
    assert "Loading" not in again.stderr
    fresh = evaluate(*words, "--bits", 3, "--contexts", 600, "--overwrite")
    assert fresh.exit_code == 0
    assert sides(output) == [("turboquant:bits=3", ["600"])]


def test_a_method_that_fails_leaves_the_others_and_code_1(tiny: str, tmp_path: Path) -> None:
    output, records = tmp_path / "results.json", tmp_path / "records.jsonl"
    words = ["--method", "turboquant:bits=3", "turboquant:residual_length=5000", "--records", records]
    result = evaluate("--model", tiny, "--contexts", 600, "--output", output, *words, *FAST)
    assert result.exit_code == 1
    assert "packed none of the 568 tokens" in result.stderr
    assert sides(output) == [("turboquant:bits=3", ["600"])]
    assert [bool(record.error) for record in read_records(records)] == [False, True]
    assert last_line(result)["failed"] == 1


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_model(*given, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("turboquant.models.load.load_model", load_model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "9"], "bits must be a whole number from 1 to 8, got 9"),
        (["--method", "turbo"], "unknown method 'turbo'"),
        (["--method", "turboquant:speed=1"], "unknown option of turboquant 'speed'"),
        (["--method", "turboquant:bits=3", "--bits", "3"], "bits are given twice"),
        (["--contexts", "600", "9000"], "has a context of 8,192 tokens, got 9,000"),
        (["--contexts", "600", "many"], "--contexts should be a valid integer, got 'many'"),
        (["--depth", "1.5"], "--depth should be less than or equal to 1, got '1.5'"),
        (["--weights", "3bit"], "Unknown weights '3bit'"),
        (["--model", "no-such-model"], "Unknown model 'no-such-model'"),
    ],
)
def test_wrong_use_is_refused_before_the_model_loads(tiny: str, tmp_path: Path, no_loading, words, message) -> None:
    result = evaluate("--model", tiny, "--output", tmp_path / "results.json", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--contexts", "100"], "a prompt with a needle has at least"),
        (["--contexts", "600", "--queries", "600"], "queries must be fewer than the context's 600, got 600"),
        (["--contexts", "600", "--filler", "nowhere.txt"], "the text must be one of"),
    ],
)
def test_what_only_the_tokenizer_can_tell_is_code_2_too(tiny: str, tmp_path: Path, words, message: str) -> None:
    result = evaluate("--model", tiny, "--output", tmp_path / "results.json", *words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_filler_that_is_not_utf8_is_refused(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Gén\n".encode("latin-1"))
    words = ["--output", tmp_path / "results.json", "--contexts", 600]
    result = evaluate("--model", tiny, *words, "--filler", tmp_path / "latin.txt")
    assert result.exit_code == 2
    assert "latin.txt is not UTF-8" in result.stderr


def test_too_little_memory_says_how_many_tokens_fit(
    tiny: str, tmp_path: Path, no_loading, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turboquant.models.checks.free_bytes", lambda device: 2**28 + 2**24)
    result = evaluate("--model", tiny, "--output", tmp_path / "results.json", "--contexts", 600, 8000)
    assert result.exit_code == 2
    fit = int(result.stderr.split(" tokens fit")[0].split()[-1].replace(",", ""))
    assert "a context of 8,000 tokens needs" in result.stderr
    assert 600 < fit < 8000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON (Expecting property name enclosed in double quotes in line 1)"),
        ("[" * 100_000, "is not JSON that can be read (maximum recursion depth exceeded"),
        ('{"bits":' + "9" * 5000 + "}", "is not JSON that can be read (Exceeds the limit (4300 digits)"),
        ("[1, 2]", "is not an output of evaluate"),
        ('{"runs": [{"model": 1}]}', "is not an output of evaluate: it has no by_context"),
        ('{"model": "m", "bits": 3, "by_context": {"600": {"seq_len": 600}}}', "a context of it has no record"),
        ('{"by_context": {"600": {"record": {"cell": {"experiment": 3}}}}}', "holds a broken record (cell.experiment"),
        ("\udce9", "is not an output of evaluate: it is not text"),
    ],
)
def test_a_foreign_or_broken_file_is_kept(tiny: str, tmp_path: Path, no_loading, content: str, message: str) -> None:
    output = tmp_path / "results.json"
    output.write_bytes(content.encode("utf-8", "surrogateescape"))
    before = output.read_bytes()
    result = evaluate("--model", tiny, "--contexts", 600, "--output", output)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "--overwrite" in result.stderr
    assert output.read_bytes() == before


def test_results_of_other_settings_or_of_another_model_are_kept(tiny: str, tmp_path: Path, monkeypatch) -> None:
    output = tmp_path / "results.json"
    words = ["--contexts", 600, "--output", output, *FAST]
    assert evaluate("--model", tiny, *words).exit_code == 0
    before = output.read_bytes()
    other = str(save_tiny(tmp_path / "other", max_position_embeddings=8192))
    for changed, message in (
        (["--model", tiny, *words, "--depth", 0.25], "holds results of depth 0.5, not 0.25"),
        (["--model", tiny, *words, "--seed", 1], "holds results of seed 0, not 1"),
        (["--model", tiny, *words, "--weights", "bf16"], "holds results of weights auto, not bf16"),
        (["--model", other, *words], f"holds results of model {tiny}, not {other}"),
    ):
        result = evaluate(*changed)
        assert result.exit_code == 2
        assert message in result.stderr
        assert output.read_bytes() == before


def test_an_output_that_cannot_be_written_is_refused_first(tiny: str, tmp_path: Path, no_loading) -> None:
    (tmp_path / "file").write_text("")
    for output in (tmp_path, tmp_path / "file" / "results.json", Path("/proc/results.json")):
        result = evaluate("--model", tiny, "--contexts", 600, "--output", output)
        assert result.exit_code == 2
        assert "cannot be" in result.stderr


def test_records_go_into_no_file_of_something_else(tiny: str, tmp_path: Path, no_loading) -> None:
    notes = tmp_path / "notes.md"
    notes.write_text("# Notes\n")
    result = evaluate("--model", tiny, "--contexts", 600, "--output", tmp_path / "r.json", "--records", notes)
    assert result.exit_code == 2
    assert "line 1 of" in result.stderr
    assert notes.read_text() == "# Notes\n"


def test_reading_names_what_is_wrong(tmp_path: Path) -> None:
    assert read_document(tmp_path / "none.json") == []
    (tmp_path / "a.json").write_text("7")
    with pytest.raises(EvaluationFileError, match=r"a\.json is not an output of evaluate"):
        read_document(tmp_path / "a.json")


# -- real processes ----------------------------------------------------------------------------------------------------


def words(tiny: str, output: Path) -> list[str]:
    lengths = ["600", "700", "3000", "4000"]
    return ["--model", tiny, "--bits", "3", "2", "--contexts", *lengths, "--output", str(output), *FAST]


def start(tiny: str, output: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "turboquant", "evaluate", *words(tiny, output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for_records(process: subprocess.Popen, output: Path) -> None:
    deadline = time.monotonic() + 120
    while not output.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_run_goes_on_where_it_was(tiny: str, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    killed = start(tiny, output)
    wait_for_records(killed, output)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    before = read_document(output)
    assert 1 <= len(before) < 8
    resumed = evaluate(*words(tiny, output))
    assert resumed.exit_code == 0, resumed.output
    assert f"{len(before)} of 8 records are in" in resumed.stderr
    assert last_line(resumed)["records"] == 8
    after = read_document(output)
    assert all(record in after for record in before)
    assert document(after) == json.loads(output.read_text())
    assert sorted(dict(sides(output))["turboquant:bits=2"], key=int) == ["600", "700", "3000", "4000"]


def test_ctrl_c_finishes_the_record_in_hand_and_says_how_to_go_on(tiny: str, tmp_path: Path) -> None:
    output = tmp_path / "results.json"
    with interrupted(output, 0):
        stopped = evaluate(*words(tiny, output))
    held = read_document(output)
    assert stopped.exit_code == 1, stopped.output
    assert "the record in hand is finished first" in stopped.stderr
    assert f"stopped with {len(held)} of 8 records" in stopped.stderr
    assert "the same command goes on from there" in stopped.stderr
