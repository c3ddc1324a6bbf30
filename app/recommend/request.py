"""The search for a setting: what the widgets say as a checked request, and what it found as tables' rows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import ValidationError

from app.config import AppConfig
from app.engine.job import Job, Request, key_of
from app.methods.request import TEXT_NAMES, MethodsChoices, contexts
from app.tab.measure import check_each
from app.tab.requests import Choices, RequestError, check_loading
from turboquant.experiments.recommendation import Recommendation, RecommendSettings
from turboquant.records.base import first_error
from turboquant.records.experiment import ExperimentRecord

if TYPE_CHECKING:
    from app.tab.results import Results

LIMITS = ("0.001", "0.003", "0.01", "0.03", "0.1")
MOST_CELLS = 100
"""A search measures fewer methods than this, single layers included, with models of up to 60 layers."""


@dataclass(frozen=True)
class RecommendChoices:
    """What the section's widgets say, unchecked; `text` counts where `own` is set."""

    kl: str = "0.01"
    same: int = 90
    own: bool = False
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class RecommendRequest(Request):
    """A search for the smallest cache within limits; the result is a Recommendation.

    `text` is the visitor's own, in place of the settings' texts. `known` holds what was measured so far, so that a
    search goes on after it was stopped or has let others go first.
    """

    title: str = "Recommend"
    page: str = "methods"
    resumes: ClassVar[bool] = True
    settings: RecommendSettings
    text: str | None
    known: dict[str, ExperimentRecord]

    def key(self, item: int) -> str | None:
        """Everything the search depends on."""
        del item
        return key_of("recommend", self.model, self.weights, self.settings, self.text)

    def run(self, loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
        """Search, or go on; others may go first between two measurements, but not before one is made."""
        from turboquant.experiments.base import Watch
        from turboquant.experiments.recommend import recommend
        from turboquant.run.generate import CancelledError

        known, made = self.known, set[str]()
        watch = Watch(job.progress, cancelled, stopping=lambda: bool(made) and yielding())

        def keep(record: ExperimentRecord) -> None:
            known[record.cell.key] = record
            made.add(record.cell.key)

        try:
            job.add(0, recommend(loaded, self.settings, watch, text=self.text, known=known.values(), keep=keep))
        except CancelledError:
            return

    def keep(self, tab: "Results", job: Job, item: int) -> str | None:
        """The newest search alone."""
        tab.recommendations[:] = [(job.results[item], item in job.cached)]
        return None


def request(
    chosen: RecommendChoices,
    page: MethodsChoices,
    choices: Choices,
    config: AppConfig,
    known: dict[str, ExperimentRecord],
) -> RecommendRequest:
    """Check everything and make the request; texts and context are those of the page.

    Raises:
        RequestError: Something cannot be searched; the message says what.
    """
    model, weights = check_loading(choices, config)
    if config.max_cells < MOST_CELLS:
        raise RequestError(
            f"A search may take {MOST_CELLS} measurements, and this deployment allows {config.max_cells}."
        )
    own = _own(chosen.text, config) if chosen.own else None
    texts = check_each("Texts", page.texts if own is None else TEXT_NAMES[:1], TEXT_NAMES)  # not read beside one's own
    context = int(check_each("Context", [page.context], contexts(config))[0])
    limit = float(check_each("The limit of KL", [chosen.kl], LIMITS)[0])
    try:
        settings = RecommendSettings(texts=texts, context=context, max_kl=limit, min_same_top_pct=chosen.same)
    except ValidationError as error:
        raise RequestError(f"These limits cannot be used ({first_error(error)}).") from None
    return RecommendRequest(
        model=model,
        weights=weights,
        private=frozenset() if own is None else frozenset({0}),
        methods=(),
        settings=settings,
        text=own,
        known=known,
    )


def _own(text: str, config: AppConfig) -> str:
    if not text.strip():
        raise RequestError("Paste a text of yours, or switch the own text off.")
    if len(text) > config.max_prompt_chars:
        raise RequestError(f"The text has {len(text):,} characters; the limit here is {config.max_prompt_chars:,}.")
    return text


def describe(asked: RecommendRequest) -> str:
    """What a search reads and does, in one line."""
    what = "your text" if asked.text is not None else ", ".join(asked.settings.texts)
    return (
        f"Reads {what}, up to {asked.settings.context:,} tokens at once · measures about ten methods, then each layer; "
        "this takes minutes"
    )


def said(values: Mapping[str, object]) -> RecommendChoices:
    """The widgets' values from loose ones; what is missing or of the wrong type takes its default."""
    start = RecommendChoices()
    found: dict[str, Any] = {}
    for name, default in vars(start).items():
        value = values.get(f"recommend_{name}")
        found[name] = value if type(value) is type(default) else default
    return RecommendChoices(**found)


def source(found: Recommendation) -> str:
    """What was read, model, machine, date and commit, in one line."""
    from turboquant.report.summary import measured_on

    model = found.model
    read = f"Text: {', '.join(found.texts)}; {found.context:,} tokens at once, the first {found.prefill:,} in one call."
    return f"{read} {model.name} (weights {model.weights_said}, {model.dtype}). {measured_on([found.environment])}"
