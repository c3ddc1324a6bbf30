"""lm-evaluation-harness over compressed caches. `test_lm_eval.py` runs this where the harness is installed."""

import json
import logging
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from tests.support.models import HF_FP8, tiny_loaded
from turboquant.cache.build import NothingCompressedError
from turboquant.integrations.lm_eval import ModelArgumentError, TurboQuantLM

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "lm-eval.md").read_text()
COMMAND = [sys.executable, "-c", "from turboquant.integrations import lm_eval; lm_eval()"]
LIMIT = {"until": ["\n"], "max_gen_toks": 20}
drawn = random.Random(0)


def text(length: int) -> str:
    """Random characters, one token each for the tiny model."""
    return "".join(chr(drawn.randrange(33, 127)) for _ in range(length))


def requests(kind: str, arguments: list[tuple], task: str = "task") -> list[Instance]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=i, metadata=(task, i, 1))
        for i, one in enumerate(arguments)
    ]


CONTEXTS = [text(300), text(200)]
PAIRS = requests("loglikelihood", [(context, text(n)) for context in CONTEXTS for n in (1, 5, 40)] + [("", text(180))])
TEXTS = requests("loglikelihood_rolling", [(text(700),), (text(350),)])
PROMPTS = requests("generate_until", [(context, LIMIT) for context in CONTEXTS])


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded()


@pytest.fixture(scope="module")
def usual(loaded) -> HFLM:
    return HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, backend="causal")


@pytest.mark.parametrize("chunk_tokens", [7, 64, 4096])
def test_with_the_full_cache_all_is_as_the_harness_has_it(loaded, usual: HFLM, chunk_tokens: int) -> None:
    own = TurboQuantLM(loaded, method="full", chunk_tokens=chunk_tokens)
    for found, expected in zip(own.loglikelihood(PAIRS), usual.loglikelihood(PAIRS), strict=True):
        assert found == (pytest.approx(expected[0], abs=1e-3), expected[1])
    assert own.loglikelihood_rolling(TEXTS) == pytest.approx(usual.loglikelihood_rolling(TEXTS), abs=2e-3)
    assert own.generate_until(PROMPTS) == usual.generate_until(PROMPTS)
    assert own.cache_use["task"].packed_tokens == 0


@pytest.mark.parametrize("method", ["turboquant:bits=2", "turboquant-paper:bits=2", "kivi:bits=2", HF_FP8])
def test_a_compressed_cache_changes_every_kind_of_result(loaded, usual: HFLM, method: str) -> None:
    own = TurboQuantLM(loaded, method=method, chunk_tokens=64)
    differences = [a[0] - b[0] for a, b in zip(own.loglikelihood(PAIRS), usual.loglikelihood(PAIRS), strict=True)]
    assert all(difference != pytest.approx(0.0, abs=1e-3) for difference in differences[:6])
    use = own.cache_use["task"]
    assert use.requests == 7
    assert use.requests_on_packed == 7
    assert use.tokens_on_packed > 2 * 46
    assert 0 < use.packed_tokens <= use.cache_tokens == 339
    rolling = own.loglikelihood_rolling(TEXTS)
    assert rolling != pytest.approx(usual.loglikelihood_rolling(TEXTS), abs=1e-2)
    own.generate_until(PROMPTS)
    assert use.requests == 7 + 3 + 2  # the text of 700 tokens takes two windows of the model's 512
    assert json.loads(json.dumps(own.get_model_info()))["method"] == method


def test_coarse_codes_give_other_answers(loaded, usual: HFLM) -> None:
    own = TurboQuantLM(loaded, method="turboquant-paper:bits=1")
    assert own.generate_until(PROMPTS) != usual.generate_until(PROMPTS)


def test_a_context_that_is_too_long_keeps_its_end(loaded, usual: HFLM) -> None:
    pairs = requests("loglikelihood", [(text(600), text(9))])
    own = TurboQuantLM(loaded, method="full")
    assert own.loglikelihood(pairs)[0][0] == pytest.approx(usual.loglikelihood(pairs)[0][0], abs=1e-3)
    assert own.cache_use["task"].cache_tokens == 512


def test_tasks_keep_their_results_apart_and_their_order(loaded) -> None:
    other = requests("loglikelihood", [(CONTEXTS[1], text(3))], "other")
    mixed = [PAIRS[0], *other, PAIRS[1]]
    together = TurboQuantLM(loaded).loglikelihood(mixed)
    assert together == [TurboQuantLM(loaded).loglikelihood([one])[0] for one in mixed]


def test_what_packs_nothing_is_refused_before_it_is_computed(loaded, usual: HFLM, caplog) -> None:
    short = requests("loglikelihood", [(text(90), text(9))], "short")
    own = TurboQuantLM(loaded)
    with pytest.raises(NothingCompressedError, match="task short: turboquant:bits=4 packs none of the 97 tokens"):
        own.loglikelihood([*PAIRS, *short])
    assert not own.cache_use
    with pytest.raises(NothingCompressedError, match="packs none of the 108 tokens"):
        own.generate_until(requests("generate_until", [(text(90), LIMIT)]))
    with pytest.raises(NothingCompressedError, match="packs none of the 99 tokens"):
        own.loglikelihood_rolling(requests("loglikelihood_rolling", [(text(100),)]))
    warned = TurboQuantLM(loaded, allow_unpacked=True)
    with caplog.at_level(logging.WARNING):
        (found,) = warned.loglikelihood(short)
    assert found[0] == pytest.approx(usual.loglikelihood(short)[0][0], abs=1e-3)
    assert "packs none of the 97 tokens" in caplog.text
    with caplog.at_level(logging.WARNING):
        own.loglikelihood([*PAIRS, *requests("loglikelihood", [(text(90), text(9))])])
    assert "1 of 8 requests were too short" in caplog.text


def test_wrong_arguments_are_refused(loaded) -> None:
    for arguments, message in (
        ({"method": "turbo"}, "unknown method 'turbo'"),
        ({"chunk_tokens": 0}, "chunk_tokens must be a whole number, 1 or more, got 0"),
        ({"batch_size": 8}, "batch_size must be 1"),
        ({"residual_length": 64}, "no argument residual_length; options of a method belong into its string"),
    ):
        with pytest.raises(ModelArgumentError, match=message):
            TurboQuantLM(loaded, **arguments)
    with pytest.raises(ModelArgumentError, match="no beams"):
        TurboQuantLM(loaded).generate_until(requests("generate_until", [(CONTEXTS[0], {**LIMIT, "num_beams": 2})]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The task of the documentation, written out as it says; data sets are kept here and come from no network."""
    for name, value in (("HF_HOME", str(tmp_path / "hf")), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf" / "datasets")
    monkeypatch.chdir(tmp_path)
    (task,) = re.findall(r"```yaml\n(.*?)```", DOCS, flags=re.DOTALL)
    (tmp_path / "ships.yaml").write_text(task)
    return tmp_path


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", DOCS, flags=re.DOTALL)


def test_the_example_scores_from_packed_tokens(tmp_path: Path) -> None:
    script = Path(__file__).resolve().parents[2] / "examples" / "lm_evaluation.py"
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = re.findall(r"^(\S+): accuracy ([\d.]+), 6 of 6 requests read packed tokens$", done.stdout, flags=re.M)
    assert [(method, 0 <= float(accuracy) <= 1) for method, accuracy in lines] == [
        ("turboquant:bits=4", True),
        ("turboquant-paper:bits=2", True),
    ]


def test_the_documentation_runs_and_scores_as_the_harness_does(folder: Path, capsys) -> None:
    questions, evaluation = blocks("python")
    exec(compile(questions, "docs/lm-eval.md", "exec"), {})
    found: dict = {}
    exec(compile(evaluation, "docs/lm-eval.md", "exec"), found)
    assert "'requests_on_packed': 4" in capsys.readouterr().out
    compressed = likelihoods(found["results"])
    from turboquant import load_model

    model = load_model("smollm2-135m")
    usual = HFLM(pretrained=model.model, tokenizer=model.tokenizer, backend="causal")
    manager = TaskManager(include_path=".", include_defaults=False)
    expected = likelihoods(lm_eval.simple_evaluate(model=usual, tasks=["ships"], task_manager=manager))
    full = TurboQuantLM(model, method="full")
    assert likelihoods(lm_eval.simple_evaluate(model=full, tasks=["ships"], task_manager=manager)) == pytest.approx(
        expected, abs=1e-3
    )
    assert compressed != pytest.approx(expected, abs=0.1)


def likelihoods(results) -> list[float]:
    return [response[0] for sample in results["samples"]["ships"] for response in sample["filtered_resps"]]


def test_the_command_line_of_the_documentation(folder: Path) -> None:
    (folder / "make.py").write_text(blocks("python")[0])
    subprocess.run([sys.executable, "make.py"], check=True, cwd=folder)
    (commands,) = [block for block in blocks("sh") if "--include_path" in block]
    for line in commands.strip().splitlines():
        arguments = shlex.split(line)
        assert arguments.pop(0) == "turboquant-lm-eval"
        said = subprocess.run(
            [*COMMAND, *arguments, "--output_path", "out"], capture_output=True, text=True, timeout=300
        )
        assert said.returncode == 0, said.stderr
        assert "|ships" in said.stdout
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("out/**/*.json"))]
    methods = {record["config"]["method"] for record in records}
    assert methods == {"turboquant:bits=3", "turboquant:key_bits=4,value_bits=2"}
    assert all(record["config"]["cache_use"]["ships"]["requests_on_packed"] == 4 for record in records)


def test_the_command_line_says_what_is_wrong_in_a_sentence(folder: Path) -> None:
    (folder / "make.py").write_text(blocks("python")[0])
    subprocess.run([sys.executable, "make.py"], check=True, cwd=folder)
    for given, expected in (
        ("method=turbo", "turboquant-lm-eval: unknown method 'turbo'"),
        ("pretrained=smollm", "turboquant-lm-eval: Unknown model 'smollm'"),
        ("method=turboquant:residual_length=4096", "packs none of the"),
    ):
        arguments = ["run", "--model", "turboquant", "--include_path", ".", "--tasks", "ships", "--model_args", given]
        said = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300)
        assert said.returncode == 1
        assert expected in said.stderr.splitlines()[-1]
        assert "Traceback" not in said.stderr
