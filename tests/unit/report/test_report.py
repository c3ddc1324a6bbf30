"""Reports: what is read, what is averaged, what stands in tables, plots, pages and the README."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from typer.testing import CliRunner

from tests.support.models import tiny_loaded
from tests.support.sample_experiments import EXPERIMENTS, SIZE, SizeSettings
from tests.support.sample_records import METHOD_NAMES, grid, record, write
from turboquant import cli
from turboquant.experiments.base import cells_for, run_cells
from turboquant.experiments.decode_speed import DECODE
from turboquant.methods import METHODS, Method, parse_method
from turboquant.records.experiment import ExperimentRecord
from turboquant.records.metrics import metric
from turboquant.records.settings import DecodeSettings
from turboquant.report import README_TABLES, ReportError, build_report, fill_readme, read_results, to_html, to_markdown
from turboquant.report.plots import PLOTS, against_bits, legend, pareto, validate_figure
from turboquant.report.summary import Results, summarize
from turboquant.report.tables import Table, comparison_table, seeds_table

ROOT = Path(__file__).resolve().parents[3]
CHROMIUM = Path("/usr/bin/chromium")
RUNNER = CliRunner()
# Tables


def test_the_comparison_has_a_row_for_each_model_and_method() -> None:
    table = comparison_table(summarize([*grid(), *grid(model="other")]))
    assert len(table.rows) == 10
    assert table.columns[:4] == ("model", "method", "contexts", "times smaller")
    row = dict(zip(table.columns, table.rows[-1], strict=True))
    assert row["model"] == "tiny"
    assert row["contexts"] == "3, 512 to 2,048"
    assert row["bits a value held"] == "2.25"
    assert row["records"] == "3"
    assert "filler=sentences" in table.note
    assert "commit abc123" in table.note


def test_the_spread_over_seeds_keeps_greedy_and_sampled_answers_apart() -> None:
    def one(rotation: int, seed: int | None, **metrics: float) -> ExperimentRecord:
        method = f"turboquant:bits=4,seed={rotation}"
        found = record(method, experiment="variance", settings={"seed": seed})
        return found.model_copy(update={"metrics": metrics})

    greedy = [one(seed, None, kl_mean=seed + 1.0, agreed_tokens=10.0) for seed in range(3)]
    sampled = [one(seed, 7, agreed_tokens=2.0 + seed) for seed in range(3)]
    table = seeds_table([*greedy, *sampled])
    [row] = (dict(zip(table.columns, cells, strict=True)) for cells in table.rows)
    assert row["method"] == "`turboquant:bits=4`"
    assert row["KL, nats ± sd"] == "2.0000 ± 1.0000"
    assert row["first divergence, tokens ± sd"] == "10.0 ± 0.0"
    assert row["first divergence, sampled, tokens ± sd"] == "3.0 ± 1.0"
    assert row["greedy + sampled runs"] == "3 + 3"
    assert "commit abc123" in table.note
    [section] = build_report(_results([*greedy, *sampled]))
    assert section.tables == (table,)


def test_markdown_is_a_table_that_bars_cannot_break() -> None:
    text = Table("", ("a", "b"), (("x|y", "`1`"),), "Note.").markdown()
    assert text == "| a | b |\n|---|---|\n| x\\|y | `1` |\n\nNote."


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("kl_mean", 0.01234, "0.0123"),
        ("kl_mean", 0.00012, "1.2e-04"),
        ("kl_mean", 0.0, "0.0000"),
        ("top1_match_pct", 99.96, "100.0"),
        ("cache_bytes", 12345.0, "12.06 KiB"),
        ("cosine_similarity", 0.99876, "0.9988"),
        ("ppl", 12.3456, "12.35"),
        ("ppl", 12345.6, "12,346"),
        ("anything", None, "-"),
    ],
)
def test_numbers_have_the_digits_that_mean_something(name: str, value: float | None, shown: str) -> None:
    assert metric(name).text(value) == shown


# Plots


def test_every_method_has_a_colour_and_a_sign_of_its_own() -> None:
    own = [method for name, method in METHODS.items() if name != "lossless"]  # a test's own
    assert len({method.color for method in own}) == len({method.sign for method in own}) == len(own)
    assert not {method.color for method in own} & {Method.color}
    one, two = (
        legend(summarize(record(name) for name in names)) for names in (METHOD_NAMES, ("turboquant-paper:bits=4",))
    )
    assert {name: rest for name, *rest in one}["turboquant-paper"] == list(two[0][1:])
    variants = legend(summarize(map(record, ("turboquant:bits=4", "turboquant:bits=4,residual_length=8"))))
    assert variants[0][1] == variants[1][1]
    assert variants[0][2] != variants[1][2]


def test_plots_draw_what_their_tables_say() -> None:
    summaries = summarize(grid())
    plot = against_bits(summaries, "kl_mean", log=True)
    assert plot is not None
    assert plot.figure.layout.yaxis.title.text == "KL, nats (lower is better)"
    values = [float(row[2] or 0.0) for row in plot.rows]
    least, most = min(values), max(values)
    assert plot.alt.startswith(f"Best {metric('kl_mean').said(least)} (")
    assert f", worst {metric('kl_mean').said(most)} (" in plot.alt
    drawn = {(t.name, x, y) for t in plot.figure.data for x, y in zip(t.x, t.y, strict=True)}
    assert drawn == set(plot.rows)
    expected = {(one.family, one.bits, one.metrics["kl_mean"]) for one in summaries if one.method != "full"}
    assert drawn == expected
    front = pareto(summaries)
    assert front is not None
    assert {row[2] for row in front.rows} == set(METHOD_NAMES) - {"full"}
    assert front.alt.startswith("Of 4 methods 4 are on the front")


def test_every_plot_can_be_drawn_and_has_words_and_numbers() -> None:
    summaries = summarize(grid())
    plots = [plot for kind in PLOTS.values() for draw in kind if (plot := draw(summaries))]
    assert len(plots) == sum(map(len, PLOTS.values()))
    assert len({plot.title for plot in plots}) == len(plots)
    for plot in plots:
        assert plot.figure.data
        assert plot.rows
        assert all(len(row) == len(plot.columns) for row in plot.rows)
        assert plot.alt.endswith(".")


def test_nothing_to_draw_is_no_plot() -> None:
    summaries = summarize([record().model_copy(update={"metrics": {}, "cache": None})])
    assert not [draw for kind in PLOTS.values() for draw in kind if draw(summaries)]


def test_the_codes_on_random_vectors_have_a_figure() -> None:
    records = [
        record(None, experiment="validate", model=None, settings={"dim": dim, "bits": bits}).model_copy(
            update={"metrics": {"mse": 4.0**-bits, "mse_theory": 4.0**-bits}}
        )
        for dim in (64, 128)
        for bits in (1, 2, 3)
    ]
    figure = validate_figure(records)
    assert [trace.name for trace in figure.data][:2] == ["dim 64, measured", "dim 64, expected"]
    assert list(figure.data[0].y) == [0.25, 0.0625, 0.015625]
    assert "| 64 | 2 |" in to_markdown(build_report(_results(records)))


def _results(records: list[ExperimentRecord]) -> Results:
    return Results(tuple((one, Path("a.jsonl")) for one in records))


# Pages


@pytest.fixture
def page(tmp_path: Path) -> Path:
    records = write(
        tmp_path / "r.jsonl",
        *grid(),
        *grid(experiment="perplexity"),
        record("</script><script>alert(1)</script>", model="<b>bold</b>"),
    )
    out = tmp_path / "deep" / "page.html"
    result = RUNNER.invoke(cli.app, ["report", "--results", str(records), "--html", str(out)])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["plots"] > 10
    return out


def test_the_page_stands_alone_and_escapes_what_it_shows(page: Path) -> None:
    text = page.read_text()
    assert len(re.findall(r"plotly\.js v\d", text)) == 1
    own = re.sub(r"<script>.*?</script>", "", text, count=1, flags=re.DOTALL)
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", own)
    assert "alert(1)</script>" not in own
    assert "<b>bold" not in own
    assert own.count("<summary>The numbers</summary>") == own.count('class="plot"') > 10


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is not installed")
@pytest.mark.parametrize(("width", "scheme"), [(1400, "light"), (390, "dark")])
def test_the_page_works_offline_in_a_browser(page: Path, width: int, scheme) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        tab = context.new_page()
        problems: list[str] = []
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("console", lambda said: problems.append(said.text) if said.type == "error" else None)
        tab.goto(page.as_uri())
        places = tab.locator(".plot").count()
        tab.wait_for_function(f"document.querySelectorAll('.plot .main-svg .xtick').length > {places}")
        assert tab.locator(".plot .main-svg:first-child").count() == places
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        ink = tab.evaluate("getComputedStyle(document.querySelector('.plot .xtick text')).fill")
        assert ink == tab.evaluate("getComputedStyle(document.body).color")
        browser.close()
    assert not problems


def test_markdown_has_every_table(tmp_path: Path) -> None:
    records = write(tmp_path / "r.jsonl", *grid(), *grid(experiment="perplexity"))
    out = tmp_path / "r.md"
    result = RUNNER.invoke(cli.app, ["report", "--results", str(records), "--markdown", str(out)])
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout)
    assert (last["written"], last["tables"] > 0) == ([str(out)], True)
    text = out.read_text()
    assert "## Attention over long contexts" in text
    assert "on the front" in text
    assert text.count("| tiny |") == 5 + 5 + 4


def test_a_report_without_records_or_plotly_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = write(tmp_path / "r.jsonl", record())
    words = ["report", "--results", str(empty), "--html", str(tmp_path / "r.html")]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "turboquant.report.plots", None)
        result = RUNNER.invoke(cli.app, words)
    assert result.exit_code == 2
    assert "pip install 'turboquant-lab[plots]'" in result.stderr
    empty.write_text("")
    result = RUNNER.invoke(cli.app, words)
    assert result.exit_code == 1
    assert "there are no records to report on" in result.stderr
    for wrong in (["--markdown", "/proc/none/r.md"], ["--results", "/proc/none"]):
        assert RUNNER.invoke(cli.app, [*words[:3], *wrong]).exit_code == 2


def test_a_check_writes_nothing(tmp_path: Path) -> None:
    words = ["report", "--results", str(write(tmp_path / "r.jsonl", record())), "--check"]
    result = RUNNER.invoke(cli.app, [*words, "--markdown", str(tmp_path / "r.md")])
    assert result.exit_code == 2
    assert "--check changes nothing" in result.stderr
    assert not (tmp_path / "r.md").exists()


# The README


def marked(*names: str) -> str:
    return (
        "before\n" + "between\n".join(f"<!-- results: {n} -->\nold\n<!-- end of results -->\n" for n in names) + "after"
    )


def test_the_readme_is_filled_checked_and_filled_again(tmp_path: Path) -> None:
    results, readme = tmp_path / "results", tmp_path / "README.md"
    write(results / "methods.jsonl", *grid(experiment="perplexity"))
    write(results / "needle.jsonl", *grid(experiment="needle"))
    write(results / "evaluate.jsonl", *grid())
    readme.write_text(marked("methods", "needle", "evaluate"))
    command = [sys.executable, "-m", "turboquant", "report", "--results", str(results), "--readme", str(readme)]
    stale = subprocess.run([*command, "--check"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert stale.returncode == 1
    assert "the tables methods, needle, evaluate; run `turboquant report`" in stale.stderr
    assert readme.read_text() == marked("methods", "needle", "evaluate")
    words = command[3:]
    assert RUNNER.invoke(cli.app, words).exit_code == 0
    text = readme.read_text()
    assert "old" not in text
    assert text.startswith("before\n")
    assert text.endswith("after")
    assert "| on the front |" in text
    assert "| found at 512, % (full) |" in text
    assert "| 50 (100) |" in text
    assert RUNNER.invoke(cli.app, [*words, "--check"]).exit_code == 0
    write(results / "needle.jsonl", record("turboquant:bits=4", 512, experiment="needle", day=9, metrics={}))
    changed = RUNNER.invoke(cli.app, [*words, "--check"])
    assert changed.exit_code == 1
    assert "the tables needle;" in changed.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (marked("nope"), "asks for the table 'nope': choose from decode"),
        (marked("variance"), "asks for the table 'variance', and .* has no records for it"),
        ("<!-- results: evaluate -->\nno end", "table 'evaluate' has no end"),
        ("nothing here", "no place for results"),
    ],
)
def test_a_readme_that_cannot_be_filled_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "a.jsonl", *grid())
    with pytest.raises(ReportError, match=message):
        fill_readme(text, tmp_path)


RECORDED: dict[str, Callable[[ExperimentRecord], bool]] = {
    "gpu-attention": lambda r: bench(r, "kernel-attention") and r.cell.settings["query_tokens"] == 1,
    "gpu-speed": lambda r: (
        bench(r, "kernel-attention")
        and [r.cell.settings[name] for name in ("shape", "batch", "context", "query_tokens")]
        == ["llama-3.1-8b", 8, 32_768, 1]
    ),
    "gpu-prefill": lambda r: bench(r, "kernel-attention") and r.cell.settings["query_tokens"] > 1,
    "gpu-scores": lambda r: bench(r, "kernel-scores"),
    "gpu-encode": lambda r: bench(r, "kernel-encode"),
    "gpu-model": lambda r: bench(r, "model-speed"),
    "gpu-context": lambda r: bench(r, "longest-context"),
    "models": lambda r: bench(r, "families"),
}
"""Which records of this repository each shows."""


def bench(made: ExperimentRecord, name: str) -> bool:
    return made.cell.experiment == name


def on_a_gpu(made: ExperimentRecord) -> ExperimentRecord:
    environment = made.environment.model_copy(update={"device": "cuda: NVIDIA H100"})
    return made.model_copy(update={"environment": environment, "timing": {"elapsed": 1.0}})


def test_gpu_and_cpu_records_of_one_cell_are_both_kept_and_never_averaged(tmp_path: Path) -> None:
    cpu, gpu = (
        record("turboquant:bits=4", 512, experiment="perplexity", metrics={"kl_mean": kl}) for kl in (0.25, 0.75)
    )
    gpu = on_a_gpu(gpu)
    write(tmp_path / "gpu-perplexity.jsonl", cpu, gpu)
    found = summarize(read_results([tmp_path]).of("perplexity"))
    assert {one.model: one.metrics["kl_mean"] for one in found} == {"tiny": 0.25, "tiny on a GPU": 0.75}
    assert "on a GPU" in fill_readme(marked("gpu-quality"), tmp_path)[0]
    assert "on a GPU" not in fill_readme(marked("perplexity"), write(tmp_path / "perplexity.jsonl", cpu, gpu))[0]


@pytest.mark.parametrize("name", README_TABLES)
def test_every_readme_table_says_when_and_where(tmp_path: Path, name: str) -> None:
    kinds = {"evaluate": "attention", "gpu-long": "attention"}
    kinds |= dict.fromkeys(("methods", "sweep", "recipe", "gpu-quality"), "perplexity")
    if name in ("decode", "decode-busy"):
        sizes = {"prompt_tokens": 150, "new_tokens": 3, "repeats": 1, "busy": int(name == "decode-busy")}
        cells = cells_for(DECODE, "tiny", [parse_method("turboquant")], [DecodeSettings(**sizes)])
        (record_,) = run_cells(cells, {"decode": DECODE}, load=lambda name, weights: tiny_loaded())
        older = record_.environment.model_copy(update={"created": "2020-01-01"})
        write(tmp_path / "bench.jsonl", record_, record_.model_copy(update={"environment": older}))
        day, commit = record_.environment.created[:10], record_.environment.commit
    elif name in RECORDED:
        newest = next(r for r, _ in read_results([ROOT / "results"]).records if RECORDED[name](r))
        older = newest.environment.model_copy(update={"created": "2020-01-01"})
        write(tmp_path / "bench.jsonl", newest.model_copy(update={"environment": older}), newest)
        day, commit = newest.environment.created[:10], newest.environment.commit
    else:
        made = grid(experiment=kinds.get(name, name))
        if name.startswith("gpu-"):
            made = [on_a_gpu(record_) for record_ in made]
        write(tmp_path / f"{name}.jsonl", *made)
        day, commit = "2026-01-01", "abc123"
    text, stale = fill_readme(marked(name), tmp_path)
    assert stale == [name]
    assert day in text
    assert str(commit) in text
    assert "2020" not in text


def test_the_projects_own_tables_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = RUNNER.invoke(cli.app, ["report", "--check"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["readme"] == ["README.md", "docs/models.md", "docs/recipe.md", "docs/results.md"]


def test_several_files_are_filled_or_none(tmp_path: Path) -> None:
    records = write(tmp_path / "needle.jsonl", *grid(experiment="needle"))
    first, second = tmp_path / "a.md", tmp_path / "b.md"
    first.write_text(marked("needle"))
    second.write_text(marked("nope"))
    words = ["report", "--results", str(records), "--readme", str(first), str(second)]
    result = RUNNER.invoke(cli.app, words)
    assert result.exit_code == 1
    assert f"{second}: it asks for the table 'nope'" in result.stderr
    assert first.read_text() == marked("needle")
    second.write_text(marked("needle", "needle"))
    stale = RUNNER.invoke(cli.app, [*words, "--check"])
    assert f"stale in {first}: the tables needle; stale in {second}: the tables needle, needle;" in stale.stderr
    assert RUNNER.invoke(cli.app, words).exit_code == 0
    assert "| found at 512, % (full) |" in first.read_text()
    assert second.read_text().count("| found at 512, % (full) |") == 2


def test_records_of_a_real_run_make_a_report(tmp_path: Path) -> None:
    methods = [parse_method(one) for one in ("full", "turboquant:bits=4", "turboquant:bits=2")]
    settings = [SizeSettings(context=context) for context in (128, 256)]
    cells = cells_for(SIZE, "tiny", methods, settings)
    path = write(tmp_path / "a.jsonl", *run_cells(cells, EXPERIMENTS, load=lambda name, weights: tiny_loaded()))
    held = {one.method: one.metrics for one in summarize(record for record, _ in read_results([path]).records)}
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for method, metrics in held.items():
        own = [line["cache"]["bits_per_value"] for line in lines if line["cell"]["method"] == method]
        assert metrics["bits_per_value"] == pytest.approx(sum(own) / 2)
    assert "Memory by model" in to_html(build_report(read_results([path]), plots=True))
