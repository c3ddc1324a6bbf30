"""The catalogue of metrics: names, units, digits, definitions, which way is better; all of it stands nowhere else."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.models import tiny_loaded
from turboquant.experiments.base import cells_for, run_cells
from turboquant.experiments.registry import EXPERIMENTS
from turboquant.experiments.theory import TheorySettings, validate
from turboquant.methods import parse_method
from turboquant.records.environment import device_name
from turboquant.records.metrics import METRICS, MISSING, NONE, Metric, human_bytes, known, metric
from turboquant.records.pareto import front_of
from turboquant.report.summary import read_results
from turboquant.report.tables import COLUMNS

ROOT = Path(__file__).resolve().parents[3]
SHOWING = [
    path for place in ("turboquant/cli", "turboquant/report", "app", "pages") for path in (ROOT / place).rglob("*.py")
]
SMALL = {
    "attention": {"context": 400, "queries": 8},
    "generation": {"context": 80, "new_tokens": 4, "repeats": 1},
    "decode": {"prompt_tokens": 80, "new_tokens": 4, "repeats": 1, "device": device_name("cpu")},
    "kernel-attention": {"shape": "smollm2-135m", "context": 256, "repeats": 1},
    "kernel-scores": {"shape": "smollm2-135m", "context": 128, "repeats": 1},
    "kernel-encode": {"shape": "smollm2-135m", "tokens": 128, "repeats": 1},
    "longest-context": {"shape": "smollm2-135m", "weights": "bf16", "budget_gb": 4.0},
    "families": {},
    "metrics-speed": {"tokens": 64, "queries": 8, "repeats": 1},
    "model-speed": {"shape": "smollm2-135m", "weights": "bf16", "context": 512, "repeats": 4},
    "validate": {"dim": 64, "bits": 2, "vectors": 8, "seeds": 3},
    "needle": {"context": 400, "repetitions": 1, "max_new_tokens": 2},
    "perplexity": {"texts": ("persuasion",), "context": 96, "prefill": 48},
    "variance": {
        "texts": ("persuasion",),
        "context": 96,
        "prefill": 48,
        "prompts": 1,
        "prompt_tokens": 96,
        "new_tokens": 4,
    },
}


def distinct() -> list[Metric]:
    return list({id(one): one for one in METRICS.values()}.values())


def test_labels_are_told_apart_and_every_metric_is_defined_in_sentences() -> None:
    for texts in ([one.label for one in distinct()], [one.column for one in distinct()]):
        assert len(set(texts)) == len(texts)
    for one in distinct():
        assert one.definition.endswith("."), one.title
        assert not one.title.endswith(f" {one.unit}") or not one.unit


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_every_metric_that_an_experiment_yields_is_listed(name: str) -> None:
    if name in ("longest-context", "model-speed") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    cells = cells_for(
        EXPERIMENTS[name],
        "tiny",
        [parse_method("turboquant:bits=4,residual_length=8")],
        [EXPERIMENTS[name].settings(**SMALL[name])],
    )
    [record] = run_cells(cells, EXPERIMENTS, load=lambda model, weights: tiny_loaded())
    assert record.error is None
    assert record.metrics
    assert not [one for one in record.metrics if known(one) is None]


def test_every_recorded_metric_and_every_one_of_the_codes_is_listed() -> None:
    recorded = {name for record, _ in read_results([ROOT / "results"]).records for name in record.metrics}
    codes = validate(TheorySettings(dim=64, bits=2, vectors=8, seeds=3)).metrics()
    shown = {name for names in COLUMNS.values() for name in names}
    assert {"kl_mean", "speed_ratio", "mse"} <= recorded | set(codes)
    assert not [one for one in sorted(recorded | set(codes) | shown) if known(one) is None]


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every constant text of a module with its line, docstrings left out; of f-strings each constant part."""
    tree = ast.parse(path.read_text())
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


def test_no_page_command_or_report_holds_a_label_a_second_time() -> None:
    """Words that are labels too ("found", "speed") are words; a label of several words belongs to the catalogue."""
    assert len(SHOWING) > 100
    labels = {
        text.lower()
        for one in distinct()
        for text in (one.title, one.label, one.column, one.head, one.spelled, one.axis)
        if re.search(r"\W", text)
    }
    assert {"mean kl", "heads at risk", "kl, nats", "top-1 match, %"} <= labels
    copies = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in SHOWING
        for line, text in texts_of(path)
        if text.strip(" ,:;.").lower() in labels
    ]
    assert not copies


def test_no_page_command_or_report_holds_a_definition_a_second_time() -> None:
    sentences = {
        sentence.lower()
        for one in distinct()
        for sentence in re.split(r"(?<=[.;:]) ", one.definition)
        if len(sentence) > 25
    }
    copies = [
        f"{path.relative_to(ROOT)}:{line}: {sentence}"
        for path in SHOWING
        for line, text in texts_of(path)
        for sentence in sentences
        if sentence in text.lower()
    ]
    assert not copies


@pytest.mark.parametrize("name", sorted({name for names in COLUMNS.values() for name in names}))
def test_figures_of_tables_are_written_with_their_digits(name: str) -> None:
    assert metric(name).text(None) == NONE
    assert metric(name).said(None) == MISSING
    assert float(metric(name).text(0.0)) == 0
    assert float(metric(name).text(12.0)) == 12


@pytest.mark.parametrize(
    ("name", "value", "text", "said", "difference"),
    [
        ("kl_mean", 0.01234, "0.0123", "0.0123 nats", "+0.0123 nats"),
        ("kl_mean", -0.00012, "-1.2e-04", "-1.2e-04 nats", "-1.2e-04 nats"),
        ("same_top_pct", 97.5, "97.5", "97.5 %", "+97.5 points"),
        ("delta_ppl_pct", 0.25, "+0.25", "+0.25 %", "+0.25 points"),
        ("ppl", 12345.6, "12,346", "12,346", "+12,346"),
        ("tokens_per_second", 0.41, "0.41", "0.41 tokens/s", "+0.41 tokens/s"),
        ("tokens_per_second", 1234.56, "1,234.6", "1,234.6 tokens/s", "+1,234.6 tokens/s"),
        ("cache_bytes", 1536.0, "1.50 KiB", "1.50 KiB", "+1.50 KiB"),
        ("cache_bytes", -1536.0, "-1.50 KiB", "-1.50 KiB", "-1.50 KiB"),
        ("bits_per_value", 0.0, "0.00", "0.00", "0.00"),
    ],
)
def test_a_figure_is_written_in_one_way(name: str, value: float, text: str, said: str, difference: str) -> None:
    shown = metric(name)
    assert (shown.text(value), shown.said(value), shown.said(value, sign=True)) == (text, said, difference)


def test_sizes_are_written_with_the_unit_that_fits() -> None:
    assert [human_bytes(n) for n in (0, 1536, -5 * 2**20, 2**50)] == ["0 B", "1.50 KiB", "-5.00 MiB", "1024.00 TiB"]


def test_a_variant_is_its_metric_with_another_title() -> None:
    full = metric("full_p20_tokens_per_second")
    assert full.label == "speed, 20 %, full, tokens/s"
    assert (full.unit, full.digits, full.better) == ("tokens/s", metric("tokens_per_second").digits, "higher")
    assert metric("kl_low").label == "KL, from, nats"
    assert metric("packed_bits_per_value").label == "bits a packed value"  # listed itself
    assert metric("sampled_agreed_tokens_by_rotation").title == "first divergence, by rotation seed, sampled"


@pytest.mark.parametrize(
    ("name", "label", "value", "shown"),
    [
        ("warmup_ms", "warmup, ms", 1.234, "1.23"),
        ("swap_bytes", "swap", 1234567.0, "1.18 MiB"),
        ("agreed_pct", "agreed, %", 12.34, "12.3"),
        ("seconds", "seconds", 12345.0, "12,345"),
    ],
)
def test_what_is_not_listed_is_named_and_written_by_its_ending(name: str, label: str, value: float, shown: str) -> None:
    assert known(name) is None
    assert metric(name).label == label
    assert metric(name).text(value) == shown


def test_the_catalogue_says_which_of_two_values_is_the_better_one() -> None:
    assert metric("kl_mean").best((0.2, 0.1)) == 1
    assert metric("same_top_pct").best((97.0, 95.0)) == 0
    assert metric("same_top_pct").best((97.0, 97.0)) is None
    assert metric("same_top_pct").best((97.0, None)) is None
    assert metric("prompt_tokens").best((1.0, 2.0)) is None
    assert metric("kl_mean").axis == "KL, nats (lower is better)"
    assert metric("same_top_pct").help.endswith("Higher is better.")
    assert metric("gain").axis == "gain"
    assert metric("same_top_pct").hover() == "%{y:.1f} %"
    with pytest.raises(ValueError, match="gain has no better direction"):
        metric("gain").loss(1.0)


def test_the_front_is_of_better_values_whichever_way_that_is() -> None:
    rows = [
        {"bits_per_value": 2.0, "kl_mean": 0.2, "same_top_pct": 80.0},
        {"bits_per_value": 4.0, "kl_mean": 0.1, "same_top_pct": 90.0},
        {"bits_per_value": 5.0, "kl_mean": 0.3, "same_top_pct": 70.0},
    ]
    assert front_of(rows) == front_of(rows, loss="same_top_pct") == [True, True, False]
