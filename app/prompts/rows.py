"""The results of a set of prompts as rows: one a prompt, the most damaged first, and those without a figure last."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from app.engine.job import Job
from app.prompts.request import PromptsRequest
from app.tab.runs import Run, csv_text, fenced
from app.tab.verdict import cache_size, columns, verdict
from turboquant.records.comparison import Comparison
from turboquant.records.metrics import metric

START = 60
FIGURES, SIZES = ("same_top_pct", "heads_at_risk_pct"), ("bytes", "compression_ratio")
"""What a row says of answers and of memory, where tokens were packed."""
_SHOWN = {metric(name).column: metric(name) for name in ("mean_kl", *FIGURES, *SIZES)}


@dataclass(frozen=True)
class PromptRow:
    """One prompt of a set: what came of it, or in `reason` why it has no figures (yet)."""

    number: int
    prompt: str
    run: Run | None
    reason: str = ""

    @property
    def comparison(self) -> Comparison | None:
        """What was measured."""
        return self.run.comparison if self.run else None

    @property
    def mean_kl(self) -> float | None:
        """The damage by which rows are sorted, in nats."""
        c = self.comparison
        return c.tokens.mean_kl if c and c.tokens else None

    @property
    def start(self) -> str:
        """The prompt's first words, on one line."""
        text = " ".join(self.prompt.split())
        return text if len(text) <= START else text[: START - 1] + "…"

    @property
    def identical(self) -> bool | None:
        """Are both answers the same? None where nothing can be said."""
        c = self.comparison
        return None if c is None or self.run is None or not self.run.packed else c.divergence is None


def rows(job: Job, runs: Sequence[Run]) -> list[PromptRow]:
    """One row a prompt of the job, sorted by damage; `runs` are those kept of this set."""
    assert isinstance(job.request, PromptsRequest)
    left = list(runs)
    found = []
    for item, prompt in enumerate(job.request.prompts):
        run = next((run for run in left if run.comparison.prompt == prompt), None)
        if run is not None:
            left.remove(run)
        found.append(PromptRow(item + 1, prompt, run, _reason(job, item, run)))
    damage = metric("mean_kl").loss
    return sorted(
        found, key=lambda row: (row.mean_kl is None, -damage(row.mean_kl or 0.0), row.run is None, row.number)
    )


def _reason(job: Job, item: int, run: Run | None) -> str:
    if run is not None:
        if not run.packed:
            return "nothing packed" if run.complete else "stopped"
        return "" if run.comparison.tokens else ("stopped" if not run.complete else "not measured")
    if item in job.results:
        return "deleted"
    if job.live:
        return "at work" if item == next(iter(job.pending), None) and job.view.state == "running" else "waiting"
    return {"failed": "failed" if item == next(iter(job.pending), None) else "not run"}.get(job.view.state, "stopped")


def table(found: Sequence[PromptRow]) -> pd.DataFrame:
    """The rows as a table; figures that need packed tokens are missing where nothing was packed."""
    return pd.DataFrame([_line(row) for row in found])


def _line(row: PromptRow) -> dict[str, object]:
    c = row.comparison
    packed = c if c and row.run and row.run.packed else None
    return {
        "nr": row.number,
        "prompt": row.start,
        "note": row.reason or ("cached" if row.run and row.run.cached else ""),
        **columns(c, ("mean_kl",)),
        "same answer": {True: "identical", False: "differs", None: ""}[row.identical],
        "first difference": packed.divergence.index if packed and packed.divergence else None,
        **columns(packed, (*FIGURES, *SIZES)),
        **columns(c, ("prompt_tokens",)),
        metric("answer_tokens").column: len(c.original.token_ids) if c else None,
    }


def _said(column: str, value: object) -> object:
    return _SHOWN[column].said(value) if column in _SHOWN and isinstance(value, (int, float)) else value


def to_csv(found: Sequence[PromptRow]) -> str:
    """The table with whole prompts."""
    lines = [{**_line(row), "prompt": row.prompt} for row in found]
    return csv_text(list(lines[0]), [list(line.values()) for line in lines]) if lines else ""


def to_json(found: Sequence[PromptRow]) -> str:
    """All runs of the set, the most damaged first; each element can be imported as a run."""
    return json.dumps([row.run.model_dump(mode="json") for row in found if row.run], indent=1, ensure_ascii=False)


def to_markdown(found: Sequence[PromptRow]) -> str:
    """A report: the settings, then one block a prompt."""
    first = next((row.comparison for row in found if row.comparison), None)
    if first is None:
        return "# A set of prompts\n\nNothing was measured.\n"
    env, model = first.environment, first.model
    parts = [
        "# A set of prompts",
        f"Model {model.name} ({model.hub_id}, weights {model.weights_said} on {model.device}), "
        f"method {first.compressed.method}, up to {first.settings.max_new_tokens} new tokens. "
        f"{env.created[:10]} · {env.device} · commit {env.commit or 'unknown'}. One prompt after the other, each "
        "through both caches; the most damaged first.",
    ]
    for row in found:
        line = {name: value for name, value in list(_line(row).items())[2:] if value not in (None, "")}
        if line.pop(metric("compression_ratio").column, None) is not None and row.comparison:
            line["the cache is"] = cache_size(row.comparison.compressed.report)
        figures = [f"{name}: {_said(name, value)}" for name, value in line.items()]
        said = fenced(verdict(row.comparison)) if row.comparison else ""
        parts += [f"## Prompt {row.number}", fenced(row.prompt), said, "; ".join(figures)]
    return "\n\n".join(part for part in parts if part) + "\n"
