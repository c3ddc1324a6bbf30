"""The search for a setting: what the widgets say as a checked request, and what it found as tables' rows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from pydantic import ValidationError

from app.config import AppConfig
from app.methods.request import TEXT_NAMES, MethodsChoices, contexts
from app.tab.measure import check_each
from app.tab.requests import Choices, RequestError, check_loading
from turboquant.experiments.recommendation import Recommendation, RecommendSettings
from turboquant.records.results import ExperimentRecord, first_error

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


@dataclass(frozen=True)
class RecommendRequest:
    """A search for the smallest cache within limits; the result is a Recommendation.

    `text` is the visitor's own, in place of the settings' texts. `known` holds what was measured so far, so that a
    search goes on after it was stopped or has let others go first.
    """

    model: str
    weights: str
    settings: RecommendSettings
    text: str | None
    known: dict[str, ExperimentRecord]
    title: ClassVar[str] = "Recommend"
    page: ClassVar[str] = "methods"
    short: ClassVar[bool] = False
    sides: ClassVar[int] = 0
    items: ClassVar[int] = 1

    def key(self, item: int) -> str | None:
        """Everything the search depends on."""
        del item
        return json.dumps(["recommend", self.model, self.weights, self.settings.model_dump(mode="json"), self.text])

    def public(self, item: int) -> bool:
        """Is the text a shipped one?"""
        del item
        return self.text is None


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
    return RecommendRequest(model, weights, settings, own, known)


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
    return f"{read} {model.name} (weights {model.weights}, {model.dtype}). {measured_on([found.environment])}"
