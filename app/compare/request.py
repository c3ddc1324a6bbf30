"""One prompt answered with the full cache and with one or two compressed ones, as the widgets ask for it."""

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from app.config import AppConfig
from app.engine.job import Job, Request, key_of
from app.tab.examples import own
from app.tab.requests import (
    Choices,
    RequestError,
    check_loading,
    check_prompt,
    method_texts,
    sampling_settings,
)
from app.tab.runs import Run
from turboquant.methods import parse_method
from turboquant.records.comparison import Comparison, Settings

if TYPE_CHECKING:
    from app.tab.results import Results


@dataclass(frozen=True, kw_only=True)
class CompareRequest(Request):
    """One prompt under one or two methods; the result is a tuple of Comparisons that share the original answer."""

    title: str = "Compare"
    page: str = "compare"
    short: ClassVar[bool] = True
    prompt: str
    settings: Settings
    chat: bool = True

    @property
    def sides(self) -> int:
        """The original and one for each method."""
        return 1 + len(self.methods)

    def key(self, item: int) -> str | None:
        """Everything the answers depend on."""
        del item
        return key_of("compare", self.model, self.weights, self.prompt, self.methods, self.settings, self.chat)

    def run(self, loaded: Any, job: Job, cancelled: Callable[[], bool], yielding: Callable[[], bool]) -> None:
        """Answer on all sides, token by token in turn."""
        from turboquant.run.compare import compare_methods

        del yielding
        methods = [parse_method(method) for method in self.methods]
        found = compare_methods(
            loaded,
            self.prompt,
            methods,
            self.settings,
            chat=self.chat,
            detail=True,
            on_event=job.publish,
            cancelled=cancelled,
        )
        job.add(0, tuple(found))

    def keep(self, tab: "Results", job: Job, item: int) -> str | None:
        """A run for each method, in one group; the first is shown."""
        result: tuple[Comparison, ...] = job.results[item]
        group = uuid.uuid4().hex[:8] if len(result) > 1 else None
        made = [tab.runs.add(Run(comparison=c, group=group, cached=item in job.cached)) for c in reversed(result)]
        return made[-1].id

    def prompt_tokens(self, result: Any) -> int:
        """Those of the one prompt."""
        return int(result[0].prompt_tokens)


def compare_request(choices: Choices, prompt: object, config: AppConfig) -> CompareRequest:
    """Check every choice and make the request that the engine runs.

    Raises:
        RequestError: One of them cannot be run.
    """
    model, weights = check_loading(choices, config)
    methods = method_texts(choices)
    if len(set(methods)) < len(methods):
        raise RequestError("Both compressed settings are the same; change one of them.")
    checked = check_prompt(prompt, config)
    return CompareRequest(
        model=model,
        weights=weights,
        private=own([checked]),
        prompt=checked,
        methods=tuple(methods),
        settings=sampling_settings(choices, config),
        chat=bool(choices.chat),
    )
